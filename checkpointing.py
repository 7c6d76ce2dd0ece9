"""The run folder: config, metrics, checkpoints, exported models, and the signals that end a run early.

    <output_dir>/config.yaml       the resolved config, itself a valid --config
    <output_dir>/metrics.jsonl     one JSON object a line
    <output_dir>/checkpoints/      step-*: complete state, the newest `keep_last`
    <output_dir>/best, final       from_pretrained folders with the averaged weights

Whatever is a folder is written beside its place and renamed: a half-written one is never taken for a whole one.
"""

import fcntl
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, TextIO

import psutil
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from runtime import ConfigError

# what becomes of reading a damaged file
DAMAGED = (SafetensorError, zipfile.BadZipFile, struct.error, RuntimeError, ValueError, EOFError, LookupError)


def read_saved(path: Path, setting: str) -> Any:
    """What a .safetensors file, or a file of torch.save, holds. In the latter nothing but tensors, numbers, text and
    containers is accepted: no code in it runs.

    Raises OSError when there is no such file and ValueError when it holds something else; the message names `setting`.
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"{setting}: file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # mapped where the format allows it: of a large checkpoint only the tensors that are used are read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}, which was not run" if found else "it is no file of torch.save"
    except DAMAGED as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
    raise ValueError(f"{setting}: {path} is no file of tensors ({reason})")


def read_tensors(path: Path, setting: str) -> dict:
    """The tensors of a .safetensors file, or of a file of torch.save, in which nothing but tensors is accepted.

    Raises OSError when there is no such file and ValueError when it holds something else; the message names `setting`.
    """
    tensors = read_saved(path, setting)
    if not isinstance(tensors, dict):
        raise ValueError(f"{setting}: {path} holds a {type(tensors).__name__}, expected a dictionary of tensors")
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{setting}: '{name}' in {path} is a {type(value).__name__}, expected a tensor")
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise ValueError(
                f"{setting}: '{name}' in {path} is sparse, nested or without values, expected a plain tensor"
            )
    return tensors


def read_latent_stats(path: Path, rae_config: Any, setting: str) -> dict:
    """`mean` and `var` of a statistics file, (C, h, w) each as `rae_config` has them. Raises as `read_tensors`, and
    ValueError when they are missing, have other shapes, or are no mean and variance."""
    stats = read_tensors(path, setting)
    expected = (rae_config.latent_channels, rae_config.latent_size, rae_config.latent_size)
    for name in ("mean", "var"):
        if name not in stats:
            raise ValueError(f"{setting}: {path} holds {sorted(stats)}, expected 'mean' and 'var'")
        if stats[name].shape != expected:
            found = tuple(stats[name].shape)
            raise ValueError(f"{setting}: '{name}' in {path} has shape {found}, the latents {expected}")
        if not stats[name].is_floating_point():
            raise ValueError(f"{setting}: '{name}' in {path} is {stats[name].dtype}, expected floating-point numbers")
        if not stats[name].double().isfinite().all():
            raise ValueError(f"{setting}: '{name}' in {path} has values that are not finite")
    least = stats["var"].double().min()
    if least < 0:
        raise ValueError(f"{setting}: 'var' in {path} goes down to {least:.3g}, expected at least 0")
    return {"mean": stats["mean"], "var": stats["var"]}


def write_folder(target: Path, write: Callable[[Path], None], main_process: bool, wait: Callable[[], None]) -> None:
    """Let `write` fill a folder beside `target` and put it in target's place. Every process calls this."""
    beside = target.with_name(f".{target.name}.partial")
    if main_process:
        shutil.rmtree(beside, ignore_errors=True)
        beside.parent.mkdir(parents=True, exist_ok=True)
    wait()
    try:
        write(beside)
    except BaseException:
        if main_process:
            shutil.rmtree(beside, ignore_errors=True)
        raise
    wait()
    if main_process:
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)  # a folder cannot be renamed onto a filled one
        beside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    wait()


def restore_folders(run_dir: Path) -> None:
    """Clean up after a crash in `write_folder`: put a folder back that was caught between the two renames, drop what
    was half written."""
    for old in run_dir.glob(".*.old"):
        target = run_dir / old.name.removeprefix(".").removesuffix(".old")
        if not target.exists():
            old.rename(target)
    for folder in (run_dir, run_dir / "checkpoints"):
        for partial in folder.glob(".*.partial"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def lock_run_folder(run_dir: Path) -> TextIO:
    """Hold the run folder until the returned file is closed or the process ends. Raises BlockingIOError when another
    process holds it."""
    file = (run_dir / ".lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def checkpoints(run_dir: Path) -> list:
    """The run's checkpoints, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def save_checkpoint(accelerator: Accelerator, run_dir: Path, step: int, keep_last: int) -> Path:
    """Save the complete state of everything that `accelerator` prepared or registered; drop old checkpoints."""
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    write_folder(
        path,
        lambda folder: accelerator.save_state(str(folder)),
        accelerator.is_main_process,
        accelerator.wait_for_everyone,
    )
    if accelerator.is_main_process:
        for old in checkpoints(run_dir)[:-keep_last]:
            shutil.rmtree(old)
    return path


class MetricsFile:
    """`metrics.jsonl`, written by the main process only."""

    def __init__(self, path: Path, enabled: bool):
        self.path, self.enabled = path, enabled

    def forget_after(self, step: int) -> None:
        """Drop lines of steps after `step`: the run goes on from there and writes them again."""
        if self.enabled and self.path.exists():
            kept = [line for line in self.read() if line["step"] <= step]
            beside = self.path.with_suffix(".partial")
            beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            beside.replace(self.path)

    def read(self) -> list:
        """All whole lines; a last line cut off by a crash is left out. Raises ConfigError, which says where, for a line
        that `append` has not written."""
        lines = []
        for number, text in enumerate(self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else [], 1):
            try:
                line = json.loads(text)
                known = isinstance(line["step"], int) and isinstance(line["kind"], str)
            except (ValueError, TypeError, LookupError, RecursionError):
                known = False
            if not known:
                raise ConfigError(
                    f"{self.path} is damaged: line {number} is no JSON object with `kind` and `step`; without that "
                    "line the run goes on"
                )
            lines.append(line)
        return lines

    def append(self, line: dict) -> None:
        """Write one line; numbers that JSON does not know (inf, nan) become null."""
        if self.enabled:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(clean) + "\n")


def _launcher() -> Optional[int]:
    """Process id of the accelerate launch or torchrun that started this process, or None."""
    try:
        parent = psutil.Process().parent()
        words = " ".join(parent.cmdline()) if parent is not None else ""
    except psutil.Error:  # not ours to look at
        return None
    return parent.pid if any(name in words for name in ("accelerate", "torchrun", "torch.distributed")) else None


class StopSignal:
    """Whether the run was asked to stop, by SIGTERM or SIGUSR1 (a scheduler's warning), or by the end of the launcher:
    accelerate launch dies of a signal without passing it on. The loop then saves and ends cleanly."""

    def __init__(self):
        self.signal: Optional[str] = None
        self.launcher = _launcher()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.signal = signal.Signals(number).name

    @property
    def received(self) -> Optional[str]:
        """What asked for the stop, or None."""
        if self.signal is None and self.launcher is not None and os.getppid() != self.launcher:
            return "the end of its launcher"
        return self.signal
