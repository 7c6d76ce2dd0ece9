"""results.json: what a command measured, with what decides whether two results compare."""

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Optional

from rae_suite.files import locks_are_missing, writing


def git_revision() -> Optional[str]:
    """Commit of this checkout, or None."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def save_results(path: Path, results: dict) -> None:
    """Write results.json through evaluate.save, with what decides whether two results compare: versions and commit.
    Raises WriteError."""
    import evaluate  # seconds: only now

    packages = ("torch", "transformers", "diffusers", "accelerate", "clean-fid", "torchmetrics", "lpips", "pillow")
    results = {**results, "versions": {name: version(name) for name in packages}, "git_revision": git_revision()}
    if shutil.which("git") is None:  # evaluate.save asks it for the working directory's commit
        with writing(path):
            path.write_text(json.dumps(results))
        return
    with writing(path), open(os.devnull, "w") as null:  # git says on stderr that the working directory is no checkout
        stderr = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            evaluate.save(path, **results)
        except (OSError, NotImplementedError) as error:
            if not locks_are_missing(error):  # which evaluate.save takes
                raise
            path.write_text(json.dumps(results))
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
