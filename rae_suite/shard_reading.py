"""Reading one shard, a parquet file or a WebDataset tar: its images and labels, row by row, with repetitions."""

import itertools
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Optional

import pyarrow as pa
import pyarrow.parquet as pq

from rae_suite.errors import DataError, one_line
from rae_suite.folders import is_system_name
from rae_suite.images import IMAGE_EXTENSIONS, check_codecs
from rae_suite.shards import is_parquet, open_file, shard_name
from rae_suite.sources import HeldImage, Undecoded

MAX_WAIT = 60  # seconds between two attempts at a shard
READ_AHEAD = 2**20  # bytes of a parquet column that are read at a time
ROWS = 16  # rows of a parquet file that are unpacked at a time
FIELD_NAMES = 256  # files of a tar whose names show its fields: for all names it would be read to its end


class UnreadableShard(Exception):
    """A shard that still fails after all attempts; `row` is the first image that was not read."""

    def __init__(self, row: int, error: Exception):
        self.row, self.reason = row, one_line(f"{type(error).__name__}: {error}")
        super().__init__(self.reason)


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive; here it is an error."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except (tarfile.EmptyHeaderError, tarfile.EOFHeaderError):
            raise  # the end, which tarfile expects
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


def read_parquet(
    shard: str, column: str, label_column: Optional[str], start: int
) -> Iterator[tuple[int, str, Undecoded, Optional[int]]]:
    """(row, name, undecoded image, label) of the rows from `start` on. Row groups before that are not read."""
    with open_file(shard) as file:
        table = pq.ParquetFile(file, buffer_size=READ_AHEAD)  # holds only so many bytes of a large row group in memory
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


def read_tar(
    shard: str, column: Optional[str], label_column: Optional[str], fields: list, start: int
) -> Iterator[tuple[int, str, bytes, Optional[int]]]:
    """(row, name, bytes, label) of the images from number `start` on. A sample consists of neighbouring files with the
    same sample name, see split_member. Hidden and system files are left out.

    Args:
        column: the extension of a sample's image; None: any of IMAGE_EXTENSIONS.
        label_column: the extension of the file that holds its label as a number; None: cls.
        fields: as read_fields returns them.

    Raises DataError for samples with several images, and for a label that is no number where the column was asked for.
    """
    with open_file(shard) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as archive:
        row, sample, image, label = -1, None, None, None  # `image`: name and bytes of the image of `sample`
        for member, problem in members(archive):
            name, extension = (None, "") if member is None else split_member(member.name, fields)
            if name != sample:
                if image is not None and row >= start:
                    yield row, *image, label
                sample, image, label = name, None, None
            if problem is not None:
                raise problem  # only now: the image before the damage was given out
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


def split_member(path: str, fields: list) -> tuple[tuple[str, str], str]:
    """((folder, sample), extension) of a file in a tar. The extension begins after the last dot. Where the part between
    the first and the last dot is one of the `fields`, as in 0001.mask.png, the extension begins after the first dot."""
    folder, _, base = path.rpartition("/")
    name, _, extension = base.rpartition(".")
    stem, dot, middle = name.partition(".")
    if dot and middle.lower() in fields:
        name, extension = stem, f"{middle}.{extension}"
    return (folder, name or extension), extension.lower() if name else ""


def find_fields(paths: Iterable[str], columns: Iterable[Optional[str]]) -> list[str]:
    """The fields in the names of a tar's files, such as `mask` in 0001.mask.png.

    WebDataset ends a sample's name at its first dot, so files with other dots in their names (photo 0.1.png, photo
    0.2.png) would become one sample. Here the part between the first and the last dot is a field if it begins with a
    letter and either several samples have it, or a sample has it beside a file without such a part (0001.png). The part
    before the last dot of each of `columns`, the extensions that were asked for, is a field too; but if it begins with
    a digit, only where several samples have it."""
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


def read_fields(shard: str, columns: Iterable[Optional[str]], retries: int) -> list[str]:
    """The fields, see find_fields, of the first FIELD_NAMES files of a tar. Raises UnreadableShard."""
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


def is_content(member: tarfile.TarInfo) -> bool:
    """Whether a tar's member is a file of its data set: no folder, link or pipe, and no hidden or system file."""
    parts = member.name.split("/")
    return member.isfile() and not any(is_system_name(part) for part in parts if part not in ("", ".", ".."))


def members(archive: tarfile.TarFile) -> Iterator[tuple[Optional[tarfile.TarInfo], Optional[Exception]]]:
    """(member, None) for each file of a tar's data set, then (None, error) where the tar is damaged, else (None,
    None)."""
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


def read_label(content: bytes, name: str, asked: Optional[str]) -> Optional[int]:
    """The number in a label's file `name`; None where it holds none, but DataError if that column was `asked` for."""
    try:
        return int(content)
    except ValueError:
        if asked is None:
            return None
        raise DataError(f"data.label_column: {name} holds {content[:20]!r}, expected a number") from None


def read_shard(
    shard: str, columns: tuple, start: int, stop: Optional[int], step: int, retries: int
) -> Iterator[tuple[int, HeldImage]]:
    """(row, (name, undecoded image, label)) of the rows start, start + step, ... below `stop` (None: to the end).
    `columns`: the arguments of read_parquet or read_tar between shard and start.

    After an error, reading goes on at the row where it failed, at most `retries` times in a row, with growing pauses.
    Then UnreadableShard is raised; at once for a file that isn't there, and for a DataError of read_tar.
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


def _wait_or_give_up(failures: int, retries: int, row: int, error: Exception) -> None:
    """Pause after an `error`, longer after each of the `failures` before it. Raises UnreadableShard after `retries` of
    them, and at once where another attempt cannot help."""
    if failures >= retries or isinstance(error, (FileNotFoundError, DataError)):
        raise UnreadableShard(row, error) from error
    time.sleep(min(4**failures, MAX_WAIT))


def read_footer(shard: str, retries: int) -> tuple[int, pa.Schema]:
    """(number of rows, arrow schema) of a parquet file. Raises UnreadableShard."""
    for failures in itertools.count():
        try:
            with open_file(shard) as file:
                table = pq.ParquetFile(file)
                return table.metadata.num_rows, table.schema_arrow
        except Exception as error:  # as in read_shard
            _wait_or_give_up(failures, retries, 0, error)
