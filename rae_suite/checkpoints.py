"""Checkpoints: the named parts of a run in a folder checkpoints/step-*, listed with their SHA-256 in manifest.json, so
that a damaged file is known. They hold whole tensors, however the processes of a run share them: it continues on any
number of processes, with or without FSDP."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from rae_suite.files import clear, list_steps, read_saved, remove, sha256, write_folder, writing
from rae_suite.sharding import gather_to_cpu


def checkpoints(run_dir: Path) -> list:
    """The run's checkpoints, oldest first."""
    return list_steps(run_dir / "checkpoints")


def last_checkpoint(run_dir: Path) -> str:
    """Which checkpoint a run that ends with an error goes on from."""
    saved = checkpoints(run_dir)
    return f"the last good checkpoint is {saved[-1] if saved else 'none'}"


def save_checkpoint(accelerator: Accelerator, run_dir: Path, step: int, states: dict, keep_last: int) -> Path:
    """Write a checkpoint and drop old ones. Every process calls this.

    Args:
        states: by the part's name. A dictionary of tensors becomes NAME.safetensors, plain values NAME.json, anything
            else (an optimizer's state) NAME.pt.
    """

    def write(folder: Path) -> None:
        main = accelerator.is_main_process
        if main:
            folder.mkdir()
        for name, state in states.items():
            state = gather_to_cpu(state, main)
            if main:
                _write_state(folder, name, state)
        if main:
            files = {file.name: [file.stat().st_size, sha256(file)] for file in sorted(folder.iterdir())}
            (folder / "manifest.json").write_text(json.dumps({"files": files}, indent=1))

    path = run_dir / "checkpoints" / f"step-{step:08d}"
    write_folder(path, write, accelerator.is_main_process, accelerator.wait_for_everyone)
    if accelerator.is_main_process:
        for old in checkpoints(run_dir)[:-keep_last]:  # also those that could not be removed the time before
            remove(old)
    return path


def _write_state(folder: Path, name: str, state: Any) -> None:
    if isinstance(state, dict) and state and all(isinstance(value, torch.Tensor) for value in state.values()):
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
    elif isinstance(state, dict) and "param_groups" in state:
        with (folder / f"{name}.pt").open("wb") as file:  # given a path, torch does not say what went wrong
            torch.save(state, file)
    else:
        (folder / f"{name}.json").write_text(json.dumps(state))


def read_checkpoint(path: Path, pattern: str = "*") -> dict:
    """The states that save_checkpoint was given, of the files whose names match `pattern`. Raises OSError or ValueError
    for files that cannot be read."""
    states = {}
    for file in sorted(path.glob(pattern)):
        if file.suffix == ".json" and file.stem != "manifest":
            states[file.stem] = json.loads(file.read_text())
        elif file.suffix in (".pt", ".safetensors"):
            states[file.stem] = read_saved(file, str(path))
        if not isinstance(states.get(file.stem, {}), dict):
            raise ValueError(f"{file.name} holds a {type(states[file.stem]).__name__}, expected a dictionary")
    return states


def find_damage(path: Path, parts: Iterable) -> Optional[str]:
    """What is wrong with the files of a checkpoint that should hold `parts`, or None."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        missing = set(parts) - {Path(name).stem for name in files.keys()}  # a list has none: AttributeError
        if missing:
            return f"manifest.json does not list {min(missing)}"
        for name, (size, digest) in files.items():
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
            if sha256(path / name) != digest:
                return f"{name} holds something else than was written"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return "manifest.json is not readable"
    return None


def newest_checkpoint(run_dir: Path, parts: Iterable, warn: Callable[[str], None]) -> Optional[Path]:
    """The newest undamaged checkpoint with these parts, or None when there are none. Newer ones that are damaged are
    set aside as damaged-step-*, and `warn` is told. Raises ValueError when all are damaged. One process calls this."""
    damaged = {}
    for path in reversed(checkpoints(run_dir)):
        reason = find_damage(path, parts)
        if reason is None:
            for broken, why in damaged.items():
                aside = broken.with_name(f"damaged-{broken.name}")
                with writing(aside):
                    clear(aside)
                    broken.rename(aside)
                warn(f"checkpoint {broken} is damaged ({why}), now {aside.name}; the one before is used")
            return path
        damaged[path] = reason
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise ValueError(f"{path} is damaged ({reason}), and there is no older checkpoint that is whole")
    return None
