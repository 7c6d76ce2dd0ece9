"""Shards: parquet files and WebDataset tars, local, over http or on the Hub: how they are named and found.

A shard is a text, a path or URL as fsspec takes it.
"""

import glob
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Optional

import aiohttp
import fsspec
from fsspec.implementations.local import LocalFileSystem

from rae_suite.errors import SECRET, URL_USER, DataError, one_line
from rae_suite.files import locks_are_missing
from rae_suite.folders import SHARD_ENDINGS, is_system_name
from rae_suite.settings import DataConfig
from rae_suite.splits import SAVED_DATASET_FILES

SERVER_TIMEOUT = 60  # seconds in which a web server must give something
MAX_SHARDS = 10**6  # shards that one path, range or glob may name
SERVER_ERRORS = (OSError, aiohttp.ClientError)


def is_parquet(shard: str) -> bool:
    return shard_name(shard).endswith(".parquet")


def is_shard(path: str) -> bool:
    return shard_name(path).endswith(SHARD_ENDINGS)


def is_saved(path: str) -> bool:
    """Whether `path` is a folder that `datasets` saved."""
    return any(os.path.isfile(os.path.join(path, name)) for name in SAVED_DATASET_FILES)


def shard_name(shard: str) -> str:
    """The shard's path or URL without user, password and query, which may be a signature."""
    return URL_USER.sub("", shard).split("?")[0] if "://" in shard else shard


def check_address(path: str, setting: str) -> None:
    """Raise DataError for an address that the suite wrote down without its credentials, and for credentials with
    characters that would keep `scrub` from finding them in an error's text."""
    if SECRET in path:
        raise DataError(
            f"{setting}: {path} is without its user, password or query, which are never written down; expected the "
            "whole address again, on the command line or in a settings file"
        )
    address, _, query = path.partition("?")
    user = address.partition("://")[2].split("/")[0].rpartition("@")[0]
    if "://" in path and re.search(r"[\s'\"]", user + query):
        raise DataError(
            f"{setting}: an address has a space or a quotation mark in its user, password or query; expected %20, %22 "
            "or %27"
        )


def protocol(path: str) -> str:
    """The protocol of an address: https for http too, file for a local path. Of a chain, such as
    simplecache::https://host/x, the protocol of the last part."""
    found = re.match(r"([\w+.-]+)://", path.split("::")[-1])
    kind = found[1].lower() if found else "file"
    return {"http": "https", "local": "file"}.get(kind, kind)


def check_listed(path: str, lists: tuple, setting: str) -> None:
    """Raise DataError when the last of `lists`, which names `path`, is on a server and `path` has another protocol:
    whoever can write to that server must not choose local files, or files of other services, that are read here."""
    if not lists or protocol(lists[-1]) == "file":
        return
    kind = protocol(lists[-1])
    if "::" in path or protocol(path) != kind:
        raise DataError(
            f"{setting}: list {shard_name(lists[-1])} names {shard_name(path)}; expected addresses that begin with "
            f"{'https:// or http://' if kind == 'https' else f'{kind}://'}: a list from a server names no others"
        )


def expand_braces(pattern: str) -> Iterator[str]:
    """All texts that `{000..127}` and `{a,b}` in the pattern stand for, in their order, one after the other."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        width = len(numbers[1])
        words = (f"{number:0{width}}" for number in range(int(numbers[1]), int(numbers[2]) + 1))
    else:
        words = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    for word in words:
        yield from expand_braces(before + word + after)


def names_shards(path: str) -> bool:
    """Whether `path` names shards, by a URL, glob, range or list, and so has no splits. A folder and a Hub id don't."""
    return "://" in path or is_shard(path) or is_list(path) or any(c in path for c in "*{")


def is_list(path: str) -> bool:
    return shard_name(path).endswith(".txt")


def list_shards(path: str, setting: str, within: tuple = ()) -> list[str]:
    """The shards that a path, URL, glob, range or .txt list of such texts names. `within`: the lists that led to
    `path`, outermost first. Raises DataError."""
    check_address(path, setting)
    check_listed(path, within, setting)
    shards = []
    check_one_source(path, setting)
    if is_list(path):
        if path in within:
            raise DataError(f"{setting}: list {path} names itself")
        try:
            with open_file(path) as file:
                lines = [line.strip() for line in file.read().decode().splitlines()]
        except (*SERVER_ERRORS, ValueError, ImportError) as error:
            raise DataError(f"{setting}: list {path} cannot be read: {one_line(error)}") from error
        for line in filter(None, lines):
            shards += list_shards(os.path.expanduser(line), setting, (*within, path))
    else:
        for text in expand_braces(path):
            check_listed(text, within, setting)
            shards += _glob(text, setting) if "*" in text else [text]
            if len(shards) > MAX_SHARDS:
                raise DataError(f"{setting}: {path} names more than {MAX_SHARDS} shards")
    if not shards:
        raise DataError(f"{setting}: {path} names no shards")
    for shard in shards:
        if not is_shard(shard):
            raise DataError(f"{setting}: {shard} is no shard that can be streamed; expected .parquet, .tar or .tar.gz")
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise DataError(f"{setting}: {path} names {twice} twice")
    return shards


def check_one_source(path: str, setting: str) -> None:
    """Raise DataError for sources that are joined with `::`, as open_clip takes them: fsspec would read only the first.
    A chain of fsspec, such as simplecache::https://host/a.tar or tar://a.parquet::b.tar, is allowed: no part before its
    last is a shard by name, unless that part begins with an archive's protocol."""
    for part in path.split("::")[:-1]:
        if (is_shard(part) or part.endswith(".txt")) and not part.startswith(("tar://", "zip://", "libarchive://")):
            raise DataError(
                f"{setting}: {path} joins several sources with '::'; expected a .txt file that lists them, one a line, "
                "or data.mixture with a weight for each"
            )


def _glob(pattern: str, setting: str) -> list[str]:
    """Existing shards that match, sorted. Other files that match (an index, a licence, a system's files) are left
    out."""

    def is_meant(path: str) -> bool:
        return is_shard(path) and not any(map(is_system_name, set(path.split("/")) - set(pattern.split("/"))))

    if "://" not in pattern:
        return list(filter(is_meant, sorted(glob.glob(pattern, recursive=True))))
    try:
        system, path = fsspec.url_to_fs(pattern, **file_options(pattern))
        return [system.unstrip_protocol(name) for name in sorted(system.glob(path)) if is_meant(name)]
    except (*SERVER_ERRORS, ValueError, ImportError) as error:
        raise DataError(f"{setting}: {pattern} cannot be listed: {one_line(error)}") from error


def list_splits(path: str, config_name: Optional[str], setting: str) -> dict[str, list]:
    """{split: shards} of a folder or a Hub data set, found as `datasets` finds them. Raises DataError."""
    import datasets
    from datasets.exceptions import DatasetsError

    if is_saved(path):
        raise DataError(
            f"{setting}: {path} is a saved data set, which is mapped from disk; data.streaming is not for it"
        )
    try:
        # a cache of its own, which only ever holds a lock: the usual cache may be on a file system without locks
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            builder = datasets.load_dataset_builder(path, name=config_name, cache_dir=cache)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if locks_are_missing(error):
            raise DataError(
                f"{setting}: `datasets`, which finds the splits of {path}, needs a temporary folder with file locks "
                f"({one_line(error)}); expected a glob of shards, or TMPDIR on a local disk"
            ) from error
        raise DataError(
            f"{setting}: {path} is no folder, glob or URL of parquet or tar shards, nor a Hub data set that can be "
            f"reached: {one_line(error)}"
        ) from error
    splits = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    if os.path.isdir(path):
        check_all_in_splits(path, splits, setting)
    for shard in itertools.chain(*splits.values()):
        if not is_shard(shard):
            raise DataError(
                f"{setting}: {path} is made of files like {os.path.basename(shard)}; expected .parquet or tar shards "
                "(the Hub keeps data sets as parquet too: hf://datasets/<id>@refs%2Fconvert%2Fparquet/<config>/<split>/*)"
            )
    return splits


def check_all_in_splits(folder: str, splits: dict[str, list], setting: str) -> None:
    """Raise DataError where `datasets` has left out shards of a folder: as soon as some file names have the name of a
    split in them, `datasets` ignores all other files. Shards may be left out where the folder's README.md has
    `configs`."""
    from huggingface_hub import DatasetCard

    readme = Path(folder, "README.md")
    if readme.is_file() and DatasetCard.load(readme, ignore_metadata_errors=True).data.get("configs"):
        return
    taken = {os.path.realpath(file) for files in splits.values() for file in files}
    left_out = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_system_name(name) and not name.startswith("__")]
        paths = (os.path.join(parent, name) for name in files if is_shard(name) and not is_system_name(name))
        left_out += [os.path.relpath(path, folder) for path in paths if os.path.realpath(path) not in taken]
    if left_out:
        names = ", ".join(sorted(left_out)[:3]) + (", ..." if len(left_out) > 3 else "")
        pattern = os.path.join(folder, f"*{os.path.splitext(left_out[0])[1]}")
        raise DataError(
            f"{setting}: {len(left_out)} of {len(left_out) + len(taken)} shards in {folder} are of no split, as their "
            f"names say none while others say {', '.join(sorted(splits))}: {names}; expected a split's name in all of "
            f"them, or a glob of those to read, such as {pattern}"
        )


def find_shards(path: str, split: str, cfg: DataConfig, setting: str) -> list[str]:
    """The shards of one split of `path`, a folder or Hub id, or all shards that `path` names. Raises DataError."""
    if names_shards(path):
        if cfg.config_name is not None:
            raise DataError(f"data.config_name: '{cfg.config_name}' is for Hub data sets, but {setting} is {path}")
        return list_shards(path, setting)
    splits = list_splits(path, cfg.config_name, setting)
    if split not in splits:
        raise DataError(
            f"{setting}: there is no split '{split}' in {path}, it has {', '.join(sorted(splits))}; expected another "
            "data.train_split or data.eval_split, or evaluation images elsewhere (data.eval_path)"
        )
    return splits[split]


def file_options(path: str) -> dict:
    """fsspec's options for a path: a timeout for http, because fsspec would wait five minutes for a silent server."""
    if not path.startswith(("http://", "https://")):
        return {}
    silence = aiohttp.ClientTimeout(total=None, sock_connect=SERVER_TIMEOUT, sock_read=SERVER_TIMEOUT)
    return {"client_kwargs": {"timeout": silence}}


def open_file(path: str) -> BinaryIO:
    """A file for reading bytes, by any protocol that fsspec knows (local paths, http, hf, s3, ...)."""
    system, path = fsspec.url_to_fs(path, **file_options(path))
    if isinstance(system, LocalFileSystem) and os.path.exists(path) and not os.path.isfile(path):
        raise OSError("no regular file")  # to read a pipe would wait for its first byte
    try:
        return system.open(path, "rb")
    except FileNotFoundError as error:  # fsspec's for all failures of a web server, which are its cause
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise
        raise cause from None
