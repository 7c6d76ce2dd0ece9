"""What a run folder offers as a model, also while the run goes on: its final/, or the weights in a checkpoint."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate.utils import broadcast_object_list

from rae_suite.checkpoints import checkpoints
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.files import read_tensors

WORDS = {"ema": "averaged", "raw": "raw"}  # what results call a checkpoint's weights


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a run's checkpoint, or was one: a run deletes its older ones."""
    named_so = path.parent.name == "checkpoints" and re.fullmatch(r"step-\d{8,}", path.name) is not None
    return named_so or os.path.isfile(path / "state.json")  # no error for a path that no system takes


def is_run_folder(path: Path) -> bool:
    """Whether a path is a run's folder: the config.yaml of a model's folder is somebody else's."""
    is_model = any(os.path.isfile(path / name) for name in ("config.json", "model_index.json"))
    return os.path.isfile(path / "config.yaml") and not is_model


def name_of_run(source: str) -> tuple:
    """What tells the models of several runs apart: the last two parts of a path or Hub id, as <run> and <folder>."""
    return tuple(part for part in Path(source).absolute().parts[-3:] if part != "checkpoints")[-2:]


def model_of_run(run_dir: Path, key: str, weights: str, is_whole: Callable[[Path], bool]) -> Path:
    """What a run folder offers, the same on all processes: final/, where it `is_whole` and averaged `weights` ("ema")
    are asked for, else the newest checkpoint. Raises ConfigError, about the setting `key`, where there is neither."""

    def choose() -> Optional[Path]:
        if weights == "ema" and is_whole(run_dir / "final"):
            return run_dir / "final"
        return next(reversed(checkpoints(run_dir)), None)

    chosen = _agreed(choose)
    if chosen is None:
        raise ConfigError(f"{key}: {run_dir} is a run folder without final/ and without checkpoints")
    return chosen


def _agreed(choose: Callable[[], Any]) -> Any:
    """What `choose` gives on the main process: between two looks a run may have written another checkpoint."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return choose()
    [chosen] = broadcast_object_list([choose() if torch.distributed.get_rank() == 0 else None])
    return chosen


@contextmanager
def reading_checkpoint(checkpoint: Path, key: str, files: tuple) -> Iterator[None]:
    """Name the setting `key` in errors of reading `files` of a checkpoint, and say so where the run has deleted it."""
    try:
        with error_names_setting(key, str(checkpoint)):
            yield
    except ConfigError as error:
        lost = [name for name in files if not (checkpoint / name).is_file()]
        if not lost:
            raise
        saved = checkpoints(checkpoint.parent.parent)
        newest = f"the newest one is {saved[-1]}" if saved else "it has no other"
        raise ConfigError(
            f"{key}: {checkpoint} has no {lost[0]}, or no longer: a run deletes all but its newest train.keep_last "
            f"checkpoints; {newest}"
        ) from error


def read_weights(checkpoint: Path, part: str, key: str) -> dict:
    """The tensors of a checkpoint's part. Raises ConfigError, about the setting `key`, where they cannot be had."""
    file = f"{part}.safetensors"
    with reading_checkpoint(checkpoint, key, (file,)):
        return read_tensors(checkpoint / file, key)
