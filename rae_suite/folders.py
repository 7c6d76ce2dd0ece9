"""Folders of image files: which files are images, which are left out, and the lists of large folders that are kept.

A folder's path is a text here, not a pathlib.Path, and paths below a folder begin with that text as the user gave it:
names of images and messages show it (pathlib would make x of ./x). os.scandir saves a call for each file.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

import numpy as np
from huggingface_hub.constants import HF_HOME

from rae_suite.errors import DataError, is_first_of_machine
from rae_suite.files import NPZ_ERRORS
from rae_suite.images import IMAGE_EXTENSIONS
from rae_suite.sources import join_paths

logger = logging.getLogger(__name__)

INDEX_CACHE = Path(HF_HOME) / "rae_indexes"  # lists of the files in large folders
INDEXED_FROM = 10_000  # files: to list fewer takes no time that counts
INDEX_FORMAT = 2  # to be raised when other files are listed, or in another way
# seconds without a change after which a folder's times tell of changes: two changes in one clock tick leave one time
SETTLED = 2.0
# files and folders that systems, network drives and archivers leave among images, some with thumbnails in them; names
# that begin with . are left out too
SYSTEM_NAMES = frozenset((
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler", "__macosx",
    "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
))  # fmt: skip
SHARD_ENDINGS = (".parquet", ".tar", ".tar.gz", ".tgz")  # of files with many images, see shards.py
# endings of texts that usually lie beside images: they are not reported as left out
SIDECARS = (
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".log", ".cls", ".caption",
)  # fmt: skip


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden or a system's own, so that it is no part of a data set."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def class_folders(path: str) -> list[str]:
    """Sorted names of the folders in `path` that hold images, or [] if images also lie in `path` itself."""
    files, folders, _ = list_folder(path)
    return [] if files else [name for name in folders if has_images(os.path.join(path, name))]


def list_images(path: str, classes: Sequence[str]) -> list:
    """[paths, ends, counts]: all images below `path` as `join_paths` gives them, and the number in each class folder.
    Warns of other files, with their numbers.

    The list of a large folder is kept in INDEX_CACHE, because to list 1.3 million files on a network drive takes
    minutes. A kept list is used until a folder's times of change differ from the kept ones: to add, remove or rename a
    file or folder changes the times of the folder around it. A list is written beside its place and renamed, because
    several processes may write it at once.
    """
    place = os.path.abspath(path)
    key = json.dumps([INDEX_FORMAT, IMAGE_EXTENSIONS, place, *classes])
    cache = INDEX_CACHE / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.npz"
    listing = _read_listing(cache, key, path)
    if listing is None:
        started = time.time_ns()
        stamps, *listing = _walk_classes(path, classes)
        settled = all(stamp is not None and stamp[2] < started - SETTLED * 1e9 for stamp in stamps.values())
        if len(listing[1]) >= INDEXED_FROM and settled:
            _write_listing(cache, key, stamps, listing)
    *listing, left_out = listing
    if left_out and is_first_of_machine():
        logger.warning("%s: %s", path, left_out_in_words(left_out))
    return listing


def left_out_in_words(counts: dict[str, int]) -> str:
    """The warning about files that are no images, {extension: number of them}."""
    kinds = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in kinds)
    return f"{sum(counts.values())} files left out: {words}"


def _walk_classes(path: str, classes: Sequence[str]) -> tuple:
    """(stamps of all folders below `path`, paths, ends, counts as list_images gives them, {extension: number of files}
    of the files that are left out). Text beside the images, SIDECARS, is not counted."""
    stamps, others, files, counts = {}, Counter(), [], []
    for name in classes or [""]:
        files += _walk(os.path.join(path, name), f"{name}/" if name else "", stamps, others)
        counts.append(len(files) - sum(counts))
    if classes:  # then no file beside the class folders is an image
        stamps[""] = _stamp(path)
        _, folders, beside = list_folder(path)
        others.update(map(_extension, beside))
        for name in set(folders) - set(classes):
            list(_walk(os.path.join(path, name), f"{name}/", stamps, others))  # to count files that are left out
    left_out = {kind: count for kind, count in others.items() if kind not in SIDECARS}
    return stamps, *join_paths(files), np.array(counts), left_out


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _stamp(folder: str) -> Optional[tuple[int, int, int]]:
    """Inode, modification time and status change time (ns) of a folder, or None where there is no folder. A change of
    its list of files shows in the times: a program can set the modification time back, but not the other one."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _read_listing(cache: Path, key: str, path: str) -> Optional[tuple]:
    """The listing that `_write_listing` wrote to `cache`; None without one, or where a folder has changed since."""
    if not os.path.exists(cache):  # Path.exists raises an error in a folder that may not be entered
        return None
    try:
        with np.load(cache) as arrays:
            stamps = json.loads(str(arrays["stamps"]))
            if str(arrays["key"]) != key or any(
                _stamp(os.path.join(path, folder)) != tuple(stamp) for folder, stamp in stamps.items()
            ):
                return None
            left_out = json.loads(str(arrays["left_out"]))
            return arrays["paths"].tobytes(), arrays["ends"], arrays["counts"], left_out
    except NPZ_ERRORS as error:
        logger.warning("%s is damaged (%s), %s is listed again", cache, error, path)
        return None


def _write_listing(cache: Path, key: str, stamps: dict, listing: Sequence) -> None:
    """Keep a listing, (paths, ends, counts, {extension: number of files left out}), for the next start. A failure is a
    warning."""
    paths, ends, counts, left_out = listing
    names = {"key": key, "stamps": json.dumps(stamps), "left_out": json.dumps(left_out)}
    try:
        INDEX_CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=INDEX_CACHE, ignore_cleanup_errors=True) as folder:
            beside = Path(folder, "index.npz")
            paths = np.frombuffer(paths, np.uint8)
            np.savez(beside, **names, paths=paths, ends=ends, counts=counts)
            beside.replace(cache)
    except OSError as error:
        logger.warning("the list of files is not kept for the next start: %s", error)


def _entries(path: str) -> Iterator[tuple[os.DirEntry, bool]]:
    """(entry, whether it is a folder) of everything in `path` but hidden and system files, without a stat per file."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not is_system_name(entry.name):
                    yield entry, entry.is_dir()
    except OSError as error:
        raise DataError(f"data.path: {path} cannot be listed: {error.strerror}") from error


def list_folder(path: str) -> tuple[list[str], list[str], list[str]]:
    """(names of image files, names of folders, names of other files), each sorted. Raises DataError."""
    files, folders, others = [], [], []
    for entry, is_folder in _entries(path):
        if is_folder:
            if not _is_loop(entry, path):
                folders.append(entry.name)
        else:
            (files if entry.name.lower().endswith(IMAGE_EXTENSIONS) else others).append(entry.name)
    return sorted(files), sorted(folders), sorted(others)


def _is_loop(entry: os.DirEntry, path: str) -> bool:
    """Whether `entry` of the folder `path` is a link to that folder or one around it, so that a walk would not end."""
    if not entry.is_symlink():
        return False
    target, here = os.path.realpath(entry.path), os.path.realpath(path)
    return os.path.commonpath([target, here]) == target


def _walk(path: str, prefix: str, stamps: dict, others: Counter) -> Iterator[str]:
    """Paths of all images below `path`, each with `prefix` before it: a folder's files before its folders, each sorted.

    `stamps` gets {prefix of the folder: its stamp} of all folders, `others`, a Counter, the extensions of other files.
    """
    stamps[prefix] = _stamp(path)  # before the folder is listed, so that the next start sees a change made meanwhile
    files, folders, rest = list_folder(path)
    others.update(map(_extension, rest))
    for name in files:
        yield prefix + name
    for name in folders:
        yield from _walk(os.path.join(path, name), f"{prefix}{name}/", stamps, others)


def has_images(path: str) -> bool:
    """Whether there is an image anywhere below `path`. Stops at the first: a large folder is not to be listed twice."""
    folders = []
    for entry, is_folder in _entries(path):
        if is_folder and not _is_loop(entry, path):
            folders.append(entry.path)
        elif not is_folder and entry.name.lower().endswith(IMAGE_EXTENSIONS):
            return True
    return any(has_images(folder) for folder in folders)
