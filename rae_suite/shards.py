"""Shards: parquet files and WebDataset tars, local, over http or on the Hub. Which there are, and reading one."""

import glob
import itertools
import os
import re
import tarfile
import tempfile
import time
from collections import defaultdict

import aiohttp
import fsspec
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from rae_suite.errors import SECRET, URL_USER, DataError, one_line
from rae_suite.files import locks_are_missing
from rae_suite.folders import SHARD_ENDINGS, is_system_name
from rae_suite.images import IMAGE_EXTENSIONS, check_codecs
from rae_suite.splits import SAVED_DATASET_FILES

MAX_WAIT = 60  # seconds between two attempts at a shard
READ_AHEAD = 2**20  # bytes of a parquet column that are read at a time
ROWS = 16  # of a parquet file that are unpacked at a time
SERVER_TIMEOUT = 60  # seconds in which a web server must give something
MAX_SHARDS = 10**6  # that one path, range or glob may name
FIELD_NAMES = 256  # of a tar, from which its fields are known: to see all of them it would be read to its end
SERVER_ERRORS = (OSError, aiohttp.ClientError)


class UnreadableShard(Exception):
    """A shard that still fails after all attempts; `row` is the first image that was not read."""

    def __init__(self, row, error):
        self.row, self.reason = row, one_line(f"{type(error).__name__}: {error}")
        super().__init__(self.reason)


def is_parquet(shard):
    return shard_name(shard).endswith(".parquet")


def is_shard(path):
    return shard_name(path).endswith(SHARD_ENDINGS)


def is_saved(path):
    """Whether `path` is a folder that `datasets` saved."""
    return any(os.path.isfile(os.path.join(path, name)) for name in SAVED_DATASET_FILES)


def shard_name(shard):
    """The shard's path or URL without user, password and query, which may be a signature."""
    return URL_USER.sub("", shard).split("?")[0] if "://" in shard else shard


def check_address(path, setting):
    """Raise DataError for an address whose credentials were left out where it was written down, and for credentials
    that could not be found again in an error's text."""
    if SECRET in path:
        raise DataError(
            f"{setting}: {path} is without its user, password or query, which are never written down; expected the "
            "whole address again, on the command line or in a settings file"
        )
    place, _, query = path.partition("?")
    user = place.partition("://")[2].split("/")[0].rpartition("@")[0]
    if "://" in path and re.search(r"[\s'\"]", user + query):
        raise DataError(
            f"{setting}: an address has a space or a quotation mark in its user, password or query; expected %20, %22 "
            "or %27"
        )


def protocol(path):
    """The kind of address: https for http too, file for a local path; of a chain, as simplecache::https://host/x, its
    last part's."""
    found = re.match(r"([\w+.-]+)://", path.split("::")[-1])
    kind = found[1].lower() if found else "file"
    return {"http": "https", "local": "file"}.get(kind, kind)


def check_listed(path, lists, setting):
    """Raise DataError where the innermost of `lists` is from a server and names something else than its own kind of
    address: whoever can write there must not choose what is read here."""
    if not lists or protocol(lists[-1]) == "file":
        return
    kind = protocol(lists[-1])
    if "::" in path or protocol(path) != kind:
        raise DataError(
            f"{setting}: list {shard_name(lists[-1])} names {shard_name(path)}; expected addresses that begin with "
            f"{'https:// or http://' if kind == 'https' else f'{kind}://'}: a list from a server names no others"
        )


def expand_braces(pattern):
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


def names_shards(path):
    """Whether `path` says itself which shards it means, so that it has no splits: not a folder and not a Hub id."""
    return "://" in path or is_shard(path) or is_list(path) or any(c in path for c in "*{")


def is_list(path):
    return shard_name(path).endswith(".txt")


def list_shards(path, setting, within=()):
    """The shards that a path, URL, glob, range or .txt list of such ones, itself `within` other lists, stands for.
    Raises DataError."""
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


def check_one_source(path, setting):
    """Raise DataError for sources that are joined with `::`, as open_clip takes them: fsspec would read the first one
    alone. (Its own chains, such as simplecache::https://host/a.tar or tar://a.parquet::b.tar, begin otherwise.)"""
    for part in path.split("::")[:-1]:
        if (is_shard(part) or part.endswith(".txt")) and not part.startswith(("tar://", "zip://", "libarchive://")):
            raise DataError(
                f"{setting}: {path} joins several sources with '::'; expected a .txt file that lists them, one a line, "
                "or data.mixture with a weight for each"
            )


def _glob(pattern, setting):
    """Existing files, sorted; what is no shard beside them (an index, a licence, a system's files) is left out."""

    def is_meant(path):
        return is_shard(path) and not any(map(is_system_name, set(path.split("/")) - set(pattern.split("/"))))

    if "://" not in pattern:
        return list(filter(is_meant, sorted(glob.glob(pattern, recursive=True))))
    try:
        system, path = fsspec.url_to_fs(pattern, **file_options(pattern))
        return [system.unstrip_protocol(name) for name in sorted(system.glob(path)) if is_meant(name)]
    except (*SERVER_ERRORS, ValueError, ImportError) as error:
        raise DataError(f"{setting}: {pattern} cannot be listed: {one_line(error)}") from error


def list_splits(path, config_name, setting):
    """{split: shards} of a folder or a Hub data set, found as `datasets` finds them. Raises DataError."""
    import datasets
    from datasets.exceptions import DatasetsError

    if is_saved(path):
        raise DataError(
            f"{setting}: {path} is a saved data set, which is mapped from disk; data.streaming is not for it"
        )
    try:
        # nothing is kept in this cache but a lock, for which the usual one's file system may have no support
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


def check_all_in_splits(folder, splits, setting):
    """Raise DataError where `datasets` has left out shards of a folder: once it finds the name of a split in a file's
    name, it takes those files alone. The folder's README.md may say that this is meant."""
    from huggingface_hub import DatasetCard

    readme = os.path.join(folder, "README.md")
    if os.path.isfile(readme) and DatasetCard.load(readme, ignore_metadata_errors=True).data.get("configs"):
        return
    taken = {os.path.realpath(file) for files in splits.values() for file in files}
    left_out = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_system_name(name) and not name.startswith("__")]
        paths = (os.path.join(place, name) for name in files if is_shard(name) and not is_system_name(name))
        left_out += [os.path.relpath(path, folder) for path in paths if os.path.realpath(path) not in taken]
    if left_out:
        names = ", ".join(sorted(left_out)[:3]) + (", ..." if len(left_out) > 3 else "")
        pattern = os.path.join(folder, f"*{os.path.splitext(left_out[0])[1]}")
        raise DataError(
            f"{setting}: {len(left_out)} of {len(left_out) + len(taken)} shards in {folder} are of no split, as their "
            f"names say none while others say {', '.join(sorted(splits))}: {names}; expected a split's name in all of "
            f"them, or a glob of those to read, such as {pattern}"
        )


def find_shards(path, split, cfg, setting="data.path"):
    """The shards of one split of `path`, or all of them where it names shards itself. Raises DataError."""
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


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive; here it is an error."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except (tarfile.EmptyHeaderError, tarfile.EOFHeaderError):
            raise  # the end, which tarfile expects
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


def file_options(path):
    """What fsspec needs beside the path: over http it would wait five minutes for a server that says nothing."""
    if not path.startswith(("http://", "https://")):
        return {}
    silence = aiohttp.ClientTimeout(total=None, sock_connect=SERVER_TIMEOUT, sock_read=SERVER_TIMEOUT)
    return {"client_kwargs": {"timeout": silence}}


def open_file(path):
    """A file for reading bytes, over whatever fsspec knows (local paths, http, hf, s3, ...)."""
    system, path = fsspec.url_to_fs(path, **file_options(path))
    if isinstance(system, LocalFileSystem) and os.path.exists(path) and not os.path.isfile(path):
        raise OSError("no regular file")  # of a pipe, the first byte would be waited for
    try:
        return system.open(path, "rb")
    except FileNotFoundError as error:  # fsspec says so of all that a web server answers, or fails to
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise
        raise cause from None


def read_parquet(shard, column, label_column, start):
    """(row, name, undecoded image, label) of the rows from `start` on. Row groups before that are not read."""
    with open_file(shard) as file:
        table = pq.ParquetFile(file, buffer_size=READ_AHEAD)  # of a large row group only this much is in memory
        row = 0
        for group in range(table.num_row_groups):
            end = row + table.metadata.row_group(group).num_rows
            if end <= start:
                row = end
                continue
            columns = [column] if label_column is None else [column, label_column]
            for batch in table.iter_batches(ROWS, [group], columns, use_threads=False):
                values, labels = batch.column(column), [None] * len(batch)
                if label_column is not None:
                    labels = [
                        None if label is None or label < 0 else label for label in batch[label_column].to_pylist()
                    ]
                for i in range(max(0, start - row), len(values)):
                    yield row + i, f"{shard_name(shard)}[{row + i}]", values[i].as_py(), labels[i]
                row += len(values)


def read_tar(shard, column, label_column, fields, start):
    """(row, name, bytes, label) of the images from number `start` on. A sample is the files in a row with one name, see
    split_member; hidden and system files are left out.

    Args:
        column: the extension of a sample's image; None: any of IMAGE_EXTENSIONS.
        label_column: the extension of the file that holds its label as a number; None: cls.
        fields: what read_fields gives.

    Raises DataError for samples with several images, and for a label that is no number where the column was asked for.
    """
    with open_file(shard) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as archive:
        row, sample, image, label = -1, None, None, None  # `image`: name and bytes, of the sample that is being read
        for member, problem in members(archive):
            name, extension = (None, "") if member is None else split_member(member.name, fields)
            if name != sample:
                if image is not None and row >= start:
                    yield row, *image, label
                sample, image, label = name, None, None
            if problem is not None:
                raise problem  # after what came before the damage
            if extension == (label_column or "cls"):
                label = read_label(
                    archive.extractfile(member).read(), f"{shard_name(shard)}:{member.name}", label_column
                )
            elif extension == column if column else f".{extension.rpartition('.')[2]}" in IMAGE_EXTENSIONS:
                if image is not None:
                    raise DataError(
                        f"data.image_column: sample {name[1]} of {shard_name(shard)} has several images, one of them "
                        f"'{extension}'; expected one, or here the extension of those to train on, which leaves out "
                        "the others"
                    )
                check_codecs([member.name])
                row += 1
                content = archive.extractfile(member).read() if row >= start else b""
                image = f"{shard_name(shard)}:{member.name}", content


def split_member(path, fields):
    """((folder, sample), extension) of a file in a tar. The sample is named by all before the last dot; where the part
    between the first and the last dot is one of the `fields`, as in 0001.mask.png, that belongs to the extension."""
    folder, _, base = path.rpartition("/")
    name, _, extension = base.rpartition(".")
    stem, dot, middle = name.partition(".")
    if dot and middle.lower() in fields:
        name, extension = stem, f"{middle}.{extension}"
    return (folder, name or extension), extension.lower() if name else ""


def find_fields(paths, columns):
    """What in the names of a tar's files is a field, such as `mask` in 0001.mask.png: a list of texts.

    WebDataset ends a sample's name at its first dot, so files with other dots in their names (photo 0.1.png, photo
    0.2.png) would fall together into one sample. Here, what stands between the first and the last dot is a field if it
    begins with a letter, and several samples have it or one has it beside a file without such a part (0001.png). What
    `columns`, the extensions that were asked for, name is a field too; if it begins with a digit, of several samples
    only."""
    samples, plain = defaultdict(set), set()
    for path in paths:
        folder, _, base = path.rpartition("/")
        stem, _, extension = base.partition(".")
        middle, dot, _ = extension.rpartition(".")
        if dot:
            samples[middle.lower()].add((folder, stem))
        else:
            plain.add((folder, stem))
    asked = {column.rpartition(".")[0] for column in columns if column and "." in column}
    fields = {middle for middle in asked if middle[:1].isalpha() or len(samples[middle]) > 1}
    for middle, names in samples.items():
        if middle[:1].isalpha() and (len(names) > 1 or names & plain):
            fields.add(middle)
    return sorted(fields)


def read_fields(shard, columns, retries):
    """What `find_fields` gives for the first FIELD_NAMES files of a tar. Raises UnreadableShard."""
    for failures in itertools.count():
        paths = []
        try:
            with open_file(shard) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as archive:
                for member, problem in itertools.islice(members(archive), FIELD_NAMES):
                    if problem is not None and not paths:
                        raise problem
                    paths += [] if member is None else [member.name]
            return find_fields(paths, columns)
        except Exception as error:  # as in read_shard
            _wait_or_give_up(failures, retries, 0, error)


def is_content(member):
    """Whether a tar's member is a file of its data set: no folder, link or pipe, and not a system's own."""
    parts = member.name.split("/")
    return member.isfile() and not any(is_system_name(part) for part in parts if part not in ("", ".", ".."))


def members(archive):
    """(member, None) for all files of a tar's data set, then (None, what is wrong with it or None)."""
    while True:
        try:
            member = archive.next()
        except Exception as error:  # as in read_shard
            yield None, error
            return
        archive.members.clear()  # tarfile would keep them all
        if member is None or is_content(member):
            yield member, None
        if member is None:
            return


def read_label(content, name, asked):
    """A label's number, None for another content unless that column was asked for: then DataError."""
    try:
        return int(content)
    except ValueError:
        if asked is None:
            return None
        raise DataError(f"data.label_column: {name} holds {content[:20]!r}, expected a number") from None


def read_shard(shard, columns, start, stop, step, retries):
    """(row, (name, undecoded image, label)) of the rows start, start + step, ... below `stop` (None: to the end).
    `columns`: the arguments of read_parquet or read_tar between shard and start.

    After an error it goes on at the row where it broke, `retries` times in a row, with growing pauses. Raises
    UnreadableShard then; at once for a file that isn't there, and where read_tar raises DataError.
    """
    failures = 0
    while True:
        try:
            read = read_parquet if is_parquet(shard) else read_tar
            for row, *image in read(shard, *columns, start):
                if row == start:
                    start, failures = row + step, 0
                    yield row, tuple(image)
                    if stop is not None and start >= stop:
                        return
            return
        except Exception as error:  # file systems and formats raise almost anything; see data.max_unreadable_shards
            _wait_or_give_up(failures, retries, start, error)
            failures += 1


def _wait_or_give_up(failures, retries, row, error):
    if failures >= retries or isinstance(error, (FileNotFoundError, DataError)):
        raise UnreadableShard(row, error) from error
    time.sleep(min(4**failures, MAX_WAIT))


def read_footer(shard, retries):
    """(number of rows, arrow schema) of a parquet file. Raises UnreadableShard."""
    for failures in itertools.count():
        try:
            with open_file(shard) as file:
                table = pq.ParquetFile(file)
                return table.metadata.num_rows, table.schema_arrow
        except Exception as error:  # as in read_shard
            _wait_or_give_up(failures, retries, 0, error)
