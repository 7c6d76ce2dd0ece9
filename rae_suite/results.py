"""results.json: what a command measured, with what decides whether two results compare."""

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Optional

from rae_suite.files import check_folder, has_locks, writing


def git_revision() -> Optional[str]:
    """Commit of this checkout, or None."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def results_folder(asked: Optional[str], default: str, key: str) -> Path:
    """The folder of a command's results, which is not made yet: the one that was `asked` for, else `default`, or
    default-2, default-3 and so on, where earlier results are in the way. Raises ConfigError, about the setting `key`,
    where nothing can be written."""
    folder, number = Path(asked or default), 1
    while asked is None and (folder / "results.json").exists():
        number += 1
        folder = Path(f"{default}-{number}")
    check_folder(str(folder), key)
    return folder


def save_results(path: Path, results: dict) -> None:
    """Write results.json through evaluate.save, with what decides whether two results compare: versions and commit.
    Raises WriteError."""
    import evaluate  # seconds: only now

    packages = ("torch", "transformers", "diffusers", "accelerate", "clean-fid", "torchmetrics", "lpips", "pillow")
    results = {**results, "versions": {name: version(name) for name in packages}, "git_revision": git_revision()}
    with writing(path):
        # evaluate.save asks git for the working directory's commit, and locks the file
        if shutil.which("git") is None or not has_locks(path.parent):
            path.write_text(json.dumps(results))
            return
    with writing(path), open(os.devnull, "w") as null:  # git says on stderr that the working directory is no checkout
        stderr = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            evaluate.save(path, **results)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
