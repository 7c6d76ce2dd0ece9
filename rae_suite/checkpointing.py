"""The run folder: config, metrics, checkpoints, exported models, and the signals that end a run early.

    <output_dir>/config.yaml       the resolved config, itself a valid --config
    <output_dir>/metrics.jsonl     one JSON object a line
    <output_dir>/checkpoints/      step-*: complete state, the newest `keep_last`
    <output_dir>/best, final       from_pretrained folders with the averaged weights

Whatever is a folder is written beside its place and renamed: a half-written one is never taken for a whole one. It is
on the disk before what it replaces goes.
A checkpoint holds whole tensors, however a run's processes share them: it continues on any number of processes, with
or without FSDP. Its files are listed with their SHA-256 in manifest.json, so a damaged one is known.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, TextIO

import psutil
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from rae_suite.errors import ConfigError
from rae_suite.runtime import writing

PARTS = {"state.json", "decoder.safetensors", "ema.safetensors", "optimizer.pt"}  # files of every run's checkpoints
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
    """Let `write` fill a folder beside `target` and put it in target's place. Every process calls this.

    Raises WriteError, on the main process, when it cannot be written; what was in target's place is still there.
    """
    beside = target.with_name(f".{target.name}.partial")
    with writing(target):
        if main_process:
            shutil.rmtree(beside, ignore_errors=True)
            beside.parent.mkdir(parents=True, exist_ok=True)
        wait()
        try:
            write(beside)
            if main_process:
                for path in (*beside.rglob("*"), beside):
                    _sync(path)
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
            _sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        wait()


def write_text(path: Path, text: str) -> None:
    """Put a text file in its place, whole: a crash leaves the one before. Raises WriteError."""
    beside = path.with_name(f".{path.name}.partial")
    with writing(path):
        beside.write_text(text)
        _sync(beside)
        beside.replace(path)


def _sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk: some file systems only then say that they are full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a network's may not know this
            raise
    finally:
        os.close(descriptor)


def restore_folders(run_dir: Path) -> None:
    """Clean up after a crash in `write_folder`: put a folder back that was caught between the two renames, drop what
    was half written."""
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "hub"):
        for old in folder.glob(".*.old"):
            target = folder / old.name.removeprefix(".").removesuffix(".old")
            shutil.rmtree(old) if target.exists() else old.rename(target)
        for partial in folder.glob(".*.partial"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def lock_run_folder(run_dir: Path) -> TextIO:
    """Hold the run folder until the returned file is closed or the process ends. Raises BlockingIOError when another
    process holds it."""
    file = (run_dir / ".lock").open("a")  # what the process that holds it wrote stays
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    held = weakref.ref(file)

    def let_go() -> None:
        if held() is not None:
            held().close()

    os.register_at_fork(after_in_child=let_go)  # or data loading processes would hold it on after a SIGKILL
    return file


def by_step(folder: Path, ending: str = "") -> list:
    """What a run wrote into a folder as step-00000012, oldest first; names end in the regular expression `ending`.
    Other names are somebody else's."""
    written = [path for path in folder.glob("step-*") if re.fullmatch(rf"step-\d{{8,}}{ending}", path.name)]
    return sorted(written, key=checkpoint_step)


def checkpoints(run_dir: Path) -> list:
    """The run's checkpoints, oldest first."""
    return by_step(run_dir / "checkpoints")


def checkpoint_step(path: Path) -> int:
    """The step in a name step-00000012, of a checkpoint or a picture, with or without something after it."""
    return int(path.stem.split("-")[1])


def last_checkpoint(run_dir: Path) -> str:
    """Which checkpoint a run that ends with an error goes on from."""
    saved = checkpoints(run_dir)
    return f"the last good checkpoint is {saved[-1] if saved else 'none'}"


def whole(state: Any, keep: bool) -> Any:
    """A nested state with its tensors on the CPU, sharded ones gathered: every process must call this, and only those
    that `keep` the result have it."""
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(state, torch.Tensor):
        return state.cpu() if keep else None
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [whole(value, keep) for value in state]
    return state


def sharded_as(target: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `target` is shared out among processes."""
    if not isinstance(target, DTensor):
        return tensor
    tensor = tensor.to(target.device)
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)  # all have it whole


def fill(own: dict, saved: dict, name: str) -> None:
    """Copy saved tensors into those of a state dict, in place. Raises ValueError, about `name`, on other keys or
    shapes."""
    own_shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    if own_shapes != shapes:
        key = next(k for k in sorted(own_shapes | shapes) if own_shapes.get(k) != shapes.get(k))
        raise ValueError(f"{name}: {key} has shape {shapes.get(key)}, the model's is {own_shapes.get(key)}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(sharded_as(tensor, saved[key]))


def fill_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load an AdamW's state of whole tensors. Raises ValueError when it is of other parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, entries in saved["state"].items():
        shape = tuple(parameters[i].shape)
        expected = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
        found = {key: tuple(value.shape) for key, value in entries.items()}
        if found != expected:
            raise ValueError(f"optimizer: the state of parameter {i} has shapes {found}, expected {expected}")
        moments = {key: sharded_as(parameters[i], entries[key]) for key in ("exp_avg", "exp_avg_sq")}
        state[i] = {"step": entries["step"], **moments}
    optimizer.load_state_dict({**saved, "state": state})


def save_checkpoint(accelerator: Accelerator, run_dir: Path, step: int, parts: dict, keep_last: int) -> Path:
    """Write a checkpoint and drop old ones. Every process calls this.

    Args:
        parts: states by name. A dictionary of tensors becomes NAME.safetensors, plain values NAME.json, anything else
            (an optimizer's state) NAME.pt.
    """

    def write(folder: Path) -> None:
        main = accelerator.is_main_process
        if main:
            folder.mkdir()
        for name, state in parts.items():
            state = whole(state, main)
            if main:
                _write_part(folder, name, state)
        if main:
            files = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(folder.iterdir())}
            (folder / "manifest.json").write_text(json.dumps({"files": files}, indent=1))

    path = run_dir / "checkpoints" / f"step-{step:08d}"
    write_folder(path, write, accelerator.is_main_process, accelerator.wait_for_everyone)
    if accelerator.is_main_process:
        for old in checkpoints(run_dir)[:-keep_last]:
            shutil.rmtree(old)
    return path


def _write_part(folder: Path, name: str, state: Any) -> None:
    if isinstance(state, dict) and state and all(isinstance(value, torch.Tensor) for value in state.values()):
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
    elif isinstance(state, dict) and "param_groups" in state:
        with (folder / f"{name}.pt").open("wb") as file:  # given a path, torch does not say what went wrong
            torch.save(state, file)
    else:
        (folder / f"{name}.json").write_text(json.dumps(state))


def read_checkpoint(path: Path) -> dict:
    """The parts that save_checkpoint was given. Raises OSError or ValueError for files that cannot be read."""
    parts = {}
    for file in sorted(path.iterdir()):
        if file.suffix == ".json" and file.stem != "manifest":
            parts[file.stem] = json.loads(file.read_text())
        elif file.suffix in (".pt", ".safetensors"):
            parts[file.stem] = read_saved(file, str(path))
        if not isinstance(parts.get(file.stem, {}), dict):
            raise ValueError(f"{file.name} holds a {type(parts[file.stem]).__name__}, expected a dictionary")
    return parts


def damage(path: Path) -> Optional[str]:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        if not files.keys() >= PARTS:
            return f"manifest.json does not list {min(PARTS - files.keys())}"
        for name, (size, digest) in files.items():
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
            if _sha256(path / name) != digest:
                return f"{name} holds something else than was written"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return "manifest.json is not readable"
    return None


def newest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Optional[Path]:
    """The newest undamaged checkpoint, or None when there are none. Newer ones that are damaged are set aside as
    damaged-step-*, and `warn` is told. Raises ValueError when all are damaged. One process calls this."""
    damaged = {}
    for path in reversed(checkpoints(run_dir)):
        reason = damage(path)
        if reason is None:
            for broken, why in damaged.items():
                aside = broken.with_name(f"damaged-{broken.name}")
                with writing(aside):
                    shutil.rmtree(aside, ignore_errors=True)
                    broken.rename(aside)
                warn(f"checkpoint {broken} is damaged ({why}), now {aside.name}; the one before is used")
            return path
        damaged[path] = reason
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise ValueError(f"{path} is damaged ({reason}), and there is no older checkpoint that is whole")
    return None


def is_whole_model(folder: Path) -> bool:
    """Whether a from_pretrained folder has its config, its code, and weights of the length that their headers say."""
    try:
        json.loads((folder / "config.json").read_text())
        index = folder / "model.safetensors.index.json"
        weights = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        for name in weights:
            with safe_open(folder / name, "pt"):
                pass
    except (OSError, ValueError, LookupError, SafetensorError):
        return False
    return (folder / "modeling_rae.py").exists()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def is_metrics_line(line: Any) -> bool:
    """Whether a JSON value has what those who read metrics.jsonl rely on: texts, numbers, and in the right places."""
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str) or not isinstance(line.get("step"), int):
        return False
    if line["kind"] == "eval" and not (isinstance(line.get("model"), str) and isinstance(line.get("num_samples"), int)):
        return False
    return all(
        isinstance(value, (int, float, type(None))) for key, value in line.items() if key not in ("kind", "model")
    )


class MetricsFile:
    """`metrics.jsonl`, written by the main process only."""

    def __init__(self, path: Path, enabled: bool):
        self.path, self.enabled = path, enabled

    def forget_after(self, step: int) -> None:
        """Drop lines of steps after `step`: the run goes on from there and writes them again."""
        if self.enabled and self.path.exists():
            kept = [line for line in self.read() if line["step"] <= step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def read(self) -> list:
        """All whole lines; a last line cut off by a crash is left out. Raises ConfigError, which says where, for a line
        that `append` has not written."""
        lines = []
        for number, text in enumerate(self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else [], 1):
            try:
                line = json.loads(text)
                known = is_metrics_line(line)
            except (ValueError, RecursionError):
                known = False
            if not known:
                raise ConfigError(
                    f"{self.path} is damaged: line {number} is no JSON object with `kind`, `step` and numbers, and "
                    "of an evaluation `model` and `num_samples`; without that line the run goes on"
                )
            lines.append(line)
        return lines

    def append(self, line: dict) -> None:
        """Write one line; numbers that JSON does not know (inf, nan) become null."""
        if self.enabled:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            with writing(self.path), self.path.open("a") as file:
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
