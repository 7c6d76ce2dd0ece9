"""Files and folders: read without trusting them, written whole or not at all."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import struct
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from rae_suite.errors import ConfigError, WriteError, error_names_setting

logger = logging.getLogger(__name__)

# what reading a damaged file of tensors raises, and what a damaged .npz file
TENSOR_FILE_ERRORS = (
    SafetensorError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
)
_MASK = os.umask(0)
os.umask(_MASK)
NPZ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)


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
    except TENSOR_FILE_ERRORS as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
    raise ValueError(f"{setting}: {path} is no file of tensors ({reason})")


def read_tensors(path: Path, setting: str, may_be_none: tuple = ()) -> dict:
    """The tensors of a .safetensors file, or of a file of torch.save, in which nothing but tensors is accepted. There,
    names in `may_be_none` may hold None, and are then left out.

    Raises OSError when there is no such file and ValueError when it holds something else; the message names `setting`.
    """
    tensors = read_saved(path, setting)
    if not isinstance(tensors, dict):
        raise ValueError(f"{setting}: {path} holds a {type(tensors).__name__}, expected a dictionary of tensors")
    tensors = {name: value for name, value in tensors.items() if value is not None or name not in may_be_none}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{setting}: '{name}' in {path} is a {type(value).__name__}, expected a tensor")
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise ValueError(
                f"{setting}: '{name}' in {path} is sparse, nested or without values, expected a plain tensor"
            )
    return tensors


def read_npz(path: Path, setting: str, wanted: tuple, expected: str) -> tuple:
    """(names of all arrays in an .npz file, {name: array} of those that are `wanted` and there). No other is read.

    Raises ConfigError, which names `setting` and says what was `expected`, for a file of another kind.
    """
    try:
        with np.load(path) as arrays:
            return set(arrays.files), {name: arrays[name] for name in wanted if name in arrays.files}
    except NPZ_ERRORS as error:
        # numpy's words on files of other kinds are advice to unpickle them
        reason = f" ({error})" if zipfile.is_zipfile(path) else ""
        raise ConfigError(f"{setting}: {path} cannot be read as .npz{reason}, {expected}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of writing `path`, a file or folder, into WriteError, which says how much space there is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        place = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(place).free / 2**20
        reason = getattr(error, "strerror", None) or error
        message = f"{path} cannot be written ({reason}); {free:.1f} MiB are free in {place}"
        raise WriteError(message, everywhere=True) from error  # the process that writes may be any


def make_folder(path: str, key: str) -> Path:
    """Create a folder. Raises ConfigError, about the setting `key`, when that cannot be done."""
    with error_names_setting(key):
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_folder(path: str, key: str) -> None:
    """Raise ConfigError, about the setting `key`, unless files can be written to a folder, which need not be there
    yet."""
    folder = Path(path)
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"{key}: {folder} cannot be made, {place} is no folder that can be written to")


def check_output_file(path: Optional[str], key: str) -> None:
    """Raise ConfigError, about the setting `key`, unless a file can be written to `path`; none is nothing to write."""
    if path is not None and Path(path).is_dir():
        raise ConfigError(f"{key}: {path} is a folder, expected a file")
    if path is not None:
        make_folder(str(Path(path).absolute().parent), key)


def check_links(folder: Path, paths: Iterable[Path], key: str) -> None:
    """Raise ConfigError, about the setting `key`, for a link among the `paths` in a model folder that leads to no file
    of the model: who made the folder must not choose what is copied or published. The Hub's cache is made of links,
    from snapshots/<commit>/ into blobs/."""
    home = folder.resolve()
    places = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in paths:
        target = path.resolve()
        inside = target.is_file() and any(target.is_relative_to(place) for place in places)
        if path.is_symlink() and not inside:
            raise ConfigError(f"{key}: {path} is a link to {target}, expected files of the model's folder itself")


def locks_are_missing(error: Exception) -> bool:
    """Whether a lock cannot be had because the file system has none: NFS and Lustre can be mounted so. 524 is what
    autofs says."""
    return getattr(error, "errno", None) in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524)


def has_locks(folder: Path) -> bool:
    """Whether files in a folder can be locked. Raises OSError where none can be made in it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return not locks_are_missing(error)
    return True


def remove(path: Path) -> None:
    """Delete a file or folder, where there is one. A network drive may keep a folder for as long as some process has a
    file in it open: that is a warning, because what is left stands in nobody's way and goes another time."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        if path.exists():
            logger.warning("%s cannot be removed now (%s), this is tried again later", path, error.strerror or error)


def clear(path: Path) -> None:
    """Have nothing at `path`: what cannot be deleted is renamed to .NAME.*.removed, which the next start of the run
    deletes. Raises OSError."""
    remove(path)
    if path.exists():
        path.rename(path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.removed"))


def write_folder(target: Path, write: Callable[[Path], None], main_process: bool, wait: Callable[[], None]) -> None:
    """Let `write` fill a folder beside `target` and put it in target's place. Every process calls this.

    Raises WriteError, on the main process, when it cannot be written; what was in target's place is still there.
    """
    beside = target.with_name(f".{target.name}.partial")
    with writing(target):
        if main_process:
            clear(beside)
            beside.parent.mkdir(parents=True, exist_ok=True)
        wait()
        try:
            write(beside)
            if main_process:
                for path in (*beside.rglob("*"), beside):
                    give_default_permissions(path)
                    sync(path)
        except BaseException:
            if main_process:
                remove(beside)
            raise
        wait()
        if main_process:
            old = target.with_name(f".{target.name}.old")
            clear(old)
            if target.exists():
                target.rename(old)  # a folder cannot be renamed onto a filled one
            beside.rename(target)
            sync(target.parent)
            remove(old)
        wait()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a file to write beside `path`, with its ending; when the block ends without an error that file takes
    path's place, whole: a crash leaves the one before. Raises WriteError."""
    beside = path.with_name(f".{path.stem}.partial{path.suffix}")
    with writing(path):
        yield beside
        give_default_permissions(beside)
        sync(beside)
        beside.replace(path)


def give_default_permissions(path: Path) -> None:
    """Give a file the permissions that a new one gets: safetensors and temporary files are their owner's alone."""
    if path.is_file() and not path.is_symlink():
        path.chmod(0o666 & ~_MASK)


def write_text(path: Path, text: str) -> None:
    """Put a text file in its place. Raises WriteError."""
    with replacing(path) as beside:
        beside.write_text(text)


def write_image_npz(path: Path, images: Iterable, count: int, size: int, others: Optional[dict] = None) -> None:
    """Put an .npz of `count` images, uint8 (size, size, 3) each, in its place as arr_0, with `others`, arrays by name.
    One image is in memory at a time; a crash leaves the file before. Raises WriteError."""
    with replacing(path) as beside:
        np.savez(beside, **(others or {}))
        with zipfile.ZipFile(beside, "a") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for image in images:
                file.write(image.tobytes())


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk: some file systems only then say that they are full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a network's may not know this
            raise
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def list_steps(folder: Path, ending: str = "") -> list:
    """What a run wrote into a folder as step-00000012, oldest first; names end in the regular expression `ending`.
    Other names are somebody else's."""
    written = [path for path in folder.glob("step-*") if re.fullmatch(rf"step-\d{{8,}}{ending}", path.name)]
    return sorted(written, key=step_of)


def step_of(path: Path) -> int:
    """The step in a name step-00000012, of a checkpoint or a picture, with or without something after it."""
    return int(path.stem.split("-")[1])


def is_whole_model(folder: Path, code: str, weights_name: str = "model.safetensors") -> bool:
    """Whether a from_pretrained folder has its config, the file `code`, and weights of the length that their headers
    say. `weights_name`: that of a single file of weights."""
    try:
        json.loads((folder / "config.json").read_text())
        index = folder / f"{weights_name}.index.json"
        weights = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {weights_name}
        for name in weights:
            with safe_open(folder / name, "pt"):
                pass
    except (OSError, ValueError, LookupError, SafetensorError):
        return False
    return (folder / code).exists()
