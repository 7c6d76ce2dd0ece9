"""Training images streamed from shards (parquet files, WebDataset tars; local, http or on the Hub), larger than a disk.

Nothing here needs launching. A run uses it like this:

    stream = open_stream(cfg, global_batch_size=512, seed=0, accelerator=accelerator)      # cfg: the `data` group
    loader = StreamLoader(stream, cfg, image_size=256, rank=0, world_size=8, micro_batches=1)
    for batch in loader:
        batch["pixels"]                                                # uint8 (B, 3, 256, 256), without end
        loader.states                                                  # where it stands: another loader goes on there

The stream is split into lanes, each of which gives the same share of every global batch and shuffles its images in a
buffer of its own. What a lane gives is a function of (seed, lane) and of the data. Processes and workers only share out
the lanes, so the images of a step don't depend on them, nor on a stop in between.
"""

import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Optional

import aiohttp
import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate.utils import broadcast_object_list
from fsspec.implementations.local import LocalFileSystem

from rae_suite.data import (
    IMAGE_EXTENSIONS,
    SAVED_DATASET_FILES,
    DataError,
    HeldSource,
    UnreadableImage,
    UnreadableLog,
    WorkerLoader,
    find_image_column,
    load_eval_images,
    one_line,
    random_crop,
    start_worker,
    too_many_in_a_row,
    training_resize_size,
)

# Second words of seeds, beside those of data.py: they keep the random streams apart.
SHARD_STREAM, PASS_STREAM, WINDOW_STREAM, MIXTURE_STREAM, LANE_CROP_STREAM = 3, 4, 5, 6, 7
MAX_WAIT = 60  # seconds between two attempts at a shard
READ_AHEAD = 2**20  # bytes of a parquet column that are read at a time
ROWS = 16  # of a parquet file that are unpacked at a time
FOOTER_THREADS = 16
SERVER_TIMEOUT = 60  # seconds in which a web server must give something
MAX_SHARDS = 10**6  # that one path, range or glob may name
SERVER_ERRORS = (OSError, aiohttp.ClientError)


class UnreadableShard(Exception):
    """A shard that still fails after all attempts; `row` is the first image that was not read."""

    def __init__(self, row, error):
        self.row, self.reason = row, one_line(f"{type(error).__name__}: {error}")
        super().__init__(self.reason)


# ----------------------------------------------------------------------------------------------------------------------
# Which shards there are


def is_parquet(shard):
    return shard_name(shard).endswith(".parquet")


def is_shard(path):
    return shard_name(path).endswith((".parquet", ".tar", ".tar.gz", ".tgz"))


def is_saved(path):
    """Whether `path` is a folder that `datasets` saved."""
    return any(os.path.isfile(os.path.join(path, name)) for name in SAVED_DATASET_FILES)


def shard_name(shard):
    """The shard's path or URL without a query, which may hold a signature."""
    return shard.split("?")[0] if "://" in shard else shard


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
    return "://" in path or is_shard(path) or path.endswith(".txt") or any(c in path for c in "*{")


def list_shards(path, setting, within=()):
    """The shards that a path, URL, glob, range or .txt list of such ones, itself `within` other lists, stands for.
    Raises DataError."""
    shards = []
    if path.endswith(".txt"):
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


def _glob(pattern, setting):
    """Existing files, sorted; what is no shard beside them (an index, a licence) is left out."""
    if "://" not in pattern:
        return [path for path in sorted(glob.glob(pattern, recursive=True)) if is_shard(path)]
    try:
        system, path = fsspec.url_to_fs(pattern, **file_options(pattern))
        return [system.unstrip_protocol(name) for name in sorted(system.glob(path)) if is_shard(name)]
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
        builder = datasets.load_dataset_builder(path, name=config_name)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{setting}: {path} is no folder, glob or URL of parquet or tar shards, nor a Hub data set that can be "
            f"reached: {one_line(error)}"
        ) from error
    splits = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    for shard in itertools.chain(*splits.values()):
        if not is_shard(shard):
            raise DataError(
                f"{setting}: {path} is made of files like {os.path.basename(shard)}; expected .parquet or tar shards "
                "(the Hub keeps data sets as parquet too: hf://datasets/<id>@refs%2Fconvert%2Fparquet/<config>/<split>/*)"
            )
    return splits


def find_shards(path, split, cfg, setting="data.path"):
    """The shards of one split of `path`, or all of them where it names shards itself. Raises DataError."""
    path = os.path.expanduser(path)
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


# ----------------------------------------------------------------------------------------------------------------------
# Reading one shard


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


def read_parquet(shard, column, start):
    """(row, name, undecoded image) of the rows from `start` on. Row groups before that are not read."""
    with open_file(shard) as file:
        table = pq.ParquetFile(file, buffer_size=READ_AHEAD)  # of a large row group only this much is in memory
        row = 0
        for group in range(table.num_row_groups):
            end = row + table.metadata.row_group(group).num_rows
            if end <= start:
                row = end
                continue
            for batch in table.iter_batches(ROWS, [group], [column], use_threads=False):
                values = batch.column(column)
                for i in range(max(0, start - row), len(values)):
                    yield row + i, f"{shard_name(shard)}[{row + i}]", values[i].as_py()
                row += len(values)


def read_tar(shard, column, start):
    """(row, name, bytes) of the images from number `start` on. `column` is the extension after the sample's name that
    images have, or None for any of IMAGE_EXTENSIONS. Raises DataError for samples with several images."""
    with open_file(shard) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as archive:
        row, before = 0, None
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep them all
            folder, _, base = member.name.rpartition("/")
            sample, _, extension = base.partition(".")
            extension = extension.lower()
            wanted = extension == column if column else f".{extension.rpartition('.')[2]}" in IMAGE_EXTENSIONS
            if not (member.isfile() and sample and wanted):
                continue
            if before == (folder, sample):
                raise DataError(
                    f"data.image_column: sample {sample} of {shard_name(shard)} has several images, one of them "
                    f"'{extension}'; name the extension to use"
                )
            before = (folder, sample)
            if row >= start:
                yield row, f"{shard_name(shard)}:{member.name}", archive.extractfile(member).read()
            row += 1


def read_shard(shard, column, start, stop, step, retries):
    """(row, (name, undecoded image)) of the rows start, start + step, ... below `stop` (None: to the end).

    After an error it goes on at the row where it broke, `retries` times in a row, with growing pauses. Raises
    UnreadableShard then; at once for a file that isn't there, and where read_tar raises DataError.
    """
    failures = 0
    while True:
        try:
            read = read_parquet if is_parquet(shard) else read_tar
            for row, name, value in read(shard, column, start):
                if row == start:
                    start, failures = row + step, 0
                    yield row, (name, value)
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


# ----------------------------------------------------------------------------------------------------------------------
# Sources and the stream


@dataclass
class Source:
    """Shards of one origin. `lengths`: rows of each, or None where that is not known beforehand. `column`: see
    read_parquet and read_tar. `weight`: share of the drawn images, in (0, 1]. `unreadable`: what is wrong with shards
    whose length could not be read; they count as empty."""

    shards: list
    lengths: Optional[list]
    column: Optional[str]
    weight: float
    unreadable: list = field(default_factory=list)


def shard_log(cfg):
    return UnreadableLog(cfg.max_unreadable_shards, "shard", "data.max_unreadable_shards")


def in_their_places(shards, began):
    """The shards that a run began with, in their order, where `shards` says that they are now. Those that are gone stay
    in their places, to be skipped. Where there are others beside them, and where names say too little, `shards`."""
    for name in (shard_name, lambda shard: os.path.basename(shard_name(shard))):  # all may have moved
        now, then = {name(shard): shard for shard in shards}, [name(shard) for shard in began]
        if len(now) == len(shards) and len(set(then)) == len(then) and now.keys() <= set(then):
            return [now.get(key, shard) for key, shard in zip(then, began, strict=True)]
    return shards


def open_source(shards, cfg, setting, weight=1.0, began=None):
    """The Source of these shards. Reads the footers of parquet files; of tars, one image. Raises DataError where
    nothing can be read or too many shards cannot.

    `began`: what Stream.record gave of it when the run began. A shard that is gone or cannot be read now keeps its
    length, and is skipped where it is read; one that could not be read then stays out.
    """
    lengths_then = [None] * len(shards)
    if began is not None:
        shards = in_their_places(shards, began["shards"])
        if len(shards) == len(began["shards"]):
            lengths_then = began["lengths"] or [None] * len(shards)
    if not all(map(is_parquet, shards)):
        if any(map(is_parquet, shards)):
            raise DataError(f"{setting}: expected either parquet files or tar shards, found both")
        column = cfg.image_column and cfg.image_column.lower()
        unreadable = []
        for shard in shards[: cfg.max_unreadable_shards + 1]:
            try:
                # two: a sample with several images is noticed at the second
                if list(itertools.islice(read_shard(shard, column, 0, None, 1, cfg.shard_retries), 2)):
                    return Source(shards, None, column, weight)
                unreadable.append(f"{shard_name(shard)}: no images in it")
            except UnreadableShard as error:
                if isinstance(error.__cause__, DataError):
                    raise error.__cause__ from None
                unreadable.append(f"{shard_name(shard)}: {error.reason}")
        raise DataError(f"{setting}: none of the first {len(unreadable)} shards gives an image; {unreadable[-1]}")

    def footer(shard):
        try:
            return *read_footer(shard, cfg.shard_retries), None
        except UnreadableShard as error:
            return 0, None, f"{shard_name(shard)}: {error.reason}"

    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        lengths, schemas, reasons = map(list, zip(*threads.map(footer, shards), strict=True))
    schemas = [schema for schema in schemas if schema is not None]
    if not schemas or sum(lengths) == 0:
        problems = [f"; {reason}" for reason in reasons if reason]
        raise DataError(f"{setting}: {len(shards)} shards with no rows{''.join(problems[-1:])}")
    for i, then in enumerate(lengths_then):
        if then and reasons[i]:
            lengths[i], reasons[i] = then, None
        elif then == 0 and lengths[i]:
            lengths[i], reasons[i] = 0, f"{shard_name(shards[i])}: could not be read when the run began"
    unreadable = [reason for reason in reasons if reason]
    shard_log(cfg).add(unreadable)
    import datasets

    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schemas[0]))
    column = find_image_column(info, cfg.train_split, cfg.image_column)
    return Source(shards, lengths, column, weight, unreadable)


@dataclass
class Stream:
    """Everything about a run's stream that does not change while it goes on.

    `lanes`: their number; `steps_per_epoch`: as given, or what the number of images makes it. `by_epoch`: whether the
    images are dealt to the lanes anew each epoch; each lane else has shards, or rows of shards, that are its own.
    """

    sources: list
    lanes: int
    global_batch_size: int
    steps_per_epoch: int
    by_epoch: bool
    seed: int

    @property
    def num_images(self):
        """Of all sources, or None where that is not known."""
        if any(source.lengths is None for source in self.sources):
            return None
        return sum(sum(source.lengths) for source in self.sources)

    @property
    def lane_batch(self):
        """Images that each lane gives to a global batch."""
        return self.global_batch_size // self.lanes

    def fingerprint(self):
        """Changes when shards are added, removed, renamed, reordered or made longer; not when all of them move."""
        parts = [[[os.path.basename(shard_name(s)) for s in source.shards], source.lengths] for source in self.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def record(self):
        """What `open_stream` needs to find the same shards again when some of them are gone. Plain values."""
        return [{"shards": list(map(shard_name, source.shards)), "lengths": source.lengths} for source in self.sources]

    def share(self, source, lane, number):
        """The part of pass `number` through a source that is this lane's: a list of (shard, start, stop, step), rows
        `start`, `start + step`, ... below `stop` (None: all).

        The parts of all lanes are disjoint and together the whole source. Known lengths: the rows of all shards in
        random order of shards, cut into equal ranges. Else each lane gets equally many shards, and those that are left
        over are shared, every k-th row each.
        """
        origin, lanes = self.sources[source], self.lanes
        dealt = number if self.by_epoch else 0
        order = np.random.default_rng((self.seed, SHARD_STREAM, source, dealt)).permutation(len(origin.shards))
        if origin.lengths is None:
            whole = len(order) - len(order) % lanes
            part = [(int(shard), 0, None, 1) for shard in order[:whole][lane::lanes]]
            rest = order[whole:]
            if len(rest):
                which = lane % len(rest)
                part.append((int(rest[which]), lane // len(rest), None, len(range(which, lanes, len(rest)))))
        else:
            total = sum(origin.lengths)
            first, last = lane * total // lanes, (lane + 1) * total // lanes
            ends = np.cumsum([origin.lengths[shard] for shard in order])
            part = []
            for shard, end in zip(order.tolist(), ends.tolist(), strict=True):
                begin = end - origin.lengths[shard]
                if max(first, begin) < min(last, end):
                    part.append((shard, max(first, begin) - begin, min(last, end) - begin, 1))
        if self.by_epoch:
            return part
        order = np.random.default_rng((self.seed, PASS_STREAM, source, lane, number)).permutation(len(part))
        return [part[i] for i in order]


def open_stream(cfg, global_batch_size, seed, accelerator, began=None):
    """The stream that the `data` group of the configuration asks for, found by the main process for all of them.
    `began`: of a run that continues, the Stream.record of its beginning.

    Raises DataError for anything missing or contradictory, on all processes.
    """
    check_lanes(cfg, global_batch_size, accelerator.num_processes)
    outcome = [None]
    if accelerator.is_main_process:
        try:
            outcome = [_open_stream(cfg, global_batch_size, seed, began)]
        except DataError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], DataError):
        raise outcome[0]
    return outcome[0]


def _open_stream(cfg, global_batch_size, seed, began):
    if cfg.holdout_fraction > 0:
        raise DataError(f"data.holdout_fraction: {cfg.holdout_fraction}, but a stream holds no images out; expected 0")
    weights = cfg.mixture or {cfg.path: 1.0}
    setting = "data.mixture" if cfg.mixture else "data.path"
    sources = []
    for (path, weight), then in zip(weights.items(), began or [None] * len(weights), strict=True):
        shards = find_shards(path, cfg.train_split, cfg, setting)
        sources.append(open_source(shards, cfg, setting, weight / sum(weights.values()), then))
    steps = cfg.steps_per_epoch
    stream = Stream(sources, cfg.stream_lanes, global_batch_size, steps, steps is None, seed)
    if steps is None:
        if stream.num_images is None:
            raise DataError(f"data.steps_per_epoch: needed, because the number of images in {cfg.path} is not known")
        if stream.num_images < global_batch_size:
            raise DataError(
                f"data.path: {stream.num_images} training images are fewer than one global batch of {global_batch_size}"
            )
        stream.steps_per_epoch = stream.num_images // global_batch_size
    return stream


def check_lanes(cfg, global_batch_size, world_size):
    """Raise DataError unless lanes divide the global batch, and processes and their workers the lanes."""
    lanes, workers = cfg.stream_lanes, cfg.num_workers
    if global_batch_size % lanes:
        raise DataError(
            f"data.stream_lanes: {lanes} (none: processes x workers) is no divisor of the global batch of "
            f"{global_batch_size}"
        )
    if lanes % world_size:
        raise DataError(f"data.stream_lanes: {lanes} is not a multiple of {world_size} processes")
    if workers and lanes // world_size % workers:
        raise DataError(
            f"data.num_workers: {workers} workers do not share {lanes // world_size} lanes of a process evenly "
            f"(data.stream_lanes {lanes} / {world_size} processes)"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Lanes


class LaneSource:
    """A lane's endless way through one source: pass after pass over its share, shuffled.

    Images are read into windows of `size`, clipped at the end of a pass, and each window is given out in a random
    order. While one is given out the next is read: both hold `size` undecoded images together. So the place is known
    from few numbers: where the window starts, and how many of it were given. `state()` has them, and the shards that
    were found unreadable, with the row from which on they are skipped.
    """

    def __init__(self, stream, source, lane, size, retries, state=None):
        self.stream, self.source, self.lane, self.size, self.retries = stream, source, lane, size, retries
        fresh = {"position": [0, 0, 0, None], "window": 0, "given": 0, "skipped": {}}
        state = fresh if state is None else state
        self.position = state["position"]  # of the window's start: pass, shift, place in its share, row (None: first)
        self.window, self.given = state["window"], state["given"]
        self.skipped = {int(shard): value for shard, value in state["skipped"].items()}  # {shard: [row, reason]}
        self.reader = self._read(*self.position)
        self.opened = False  # whether `left` is what remains of the window that position, window and given describe
        self.left, self.next, self.closed = [], [], False

    def state(self):
        skipped = {str(shard): value for shard, value in self.skipped.items()}
        return {"position": self.position, "window": self.window, "given": self.given, "skipped": skipped}

    def draw(self):
        """The next image, undecoded: (name, value)."""
        self._fill()
        while not self.left:
            self._open_window()
            self._fill()
        self.given += 1
        return self.left.pop()

    def restart(self, number):
        """Go to the start of pass `number`, and leave what remains of the one before for another time."""
        if not (self.next and self.position[0] < number == self.next[0][0][0]):  # else it is read ahead already
            self.reader = self._read(number, 0, 0, None)
            self.next, self.closed = [], False
        self.left, self.opened = [], True

    def _fill(self):
        while not self.closed and len(self.left) + len(self.next) < self.size:
            item = next(self.reader)
            if item is not None:
                self.next.append(item)
            elif self.next:
                self.closed = True

    def _open_window(self):
        if self.opened:
            self.window, self.given = self.window + 1, 0
        self.opened = True
        self.position = self.next[0][0]
        seed = (self.stream.seed, WINDOW_STREAM, self.source, self.lane, self.window)
        order = np.random.default_rng(seed).permutation(len(self.next))
        self.left = [self.next[i][1] for i in order]
        del self.left[len(self.left) - self.given :]  # given before the stop
        self.next, self.closed = [], False

    def _read(self, number, shift, place, row):
        """(position, image) from a position on, without end; None at the end of each pass.

        A pass that gives nothing is followed by that of the next lane's share: a lane must not stand still as long as
        there are images, though they come twice then. Raises DataError when there are none at all.
        """
        while True:
            found = place > 0 or row is not None
            share = self.stream.share(self.source, (self.lane + shift) % self.stream.lanes, number)
            for i in range(place, len(share)):
                for read, image in self._read_part(*share[i], row):
                    found = True
                    yield [number, shift, i, read], image
                row = None
            yield None
            number, shift, place = (number + 1, 0, 0) if found else (number, shift + 1, 0)
            if shift == self.stream.lanes:
                shards = self.stream.sources[self.source].shards
                reasons = [f"; {reason}" for _, reason in self.skipped.values()]
                raise DataError(
                    f"data.path: none of {len(shards)} shards gives an image, the first is {shard_name(shards[0])}"
                    + "".join(reasons[-1:])
                )

    def _read_part(self, shard, start, stop, step, row):
        """(row, image) of one part of a share, from `row` on if it isn't None."""
        if shard in self.skipped:
            broken = self.skipped[shard][0]
            stop = broken if stop is None else min(stop, broken)
        origin = self.stream.sources[self.source]
        start = start if row is None else row
        if stop is not None and start >= stop:
            return
        try:
            yield from read_shard(origin.shards[shard], origin.column, start, stop, step, self.retries)
        except UnreadableShard as error:
            self.skipped[shard] = [error.row, f"{shard_name(origin.shards[shard])}: {error.reason}"]


class Lane:
    """One lane: chunks of cropped training images from all sources, without end.

    The source of each image is drawn by weight. Which images, and their crops, are a function of (seed, lane, how many
    were given): `state()` is all that another Lane needs to go on. An unreadable image is replaced by the next one of
    its source; max_unreadable + 1 in a row raise DataError.
    """

    def __init__(self, stream, lane, cfg, image_size, state=None):
        self.stream, self.lane = stream, lane
        self.image_size = image_size
        self.resize_size = training_resize_size(image_size, cfg.resize_size)
        self.max_unreadable = cfg.max_unreadable
        self.count = 0 if state is None else state["count"]
        self.weights = [source.weight for source in stream.sources]
        states = [None] * len(stream.sources) if state is None else state["sources"]
        self.sources = [
            LaneSource(stream, i, lane, max(1, round(cfg.shuffle_buffer * weight)), cfg.shard_retries, states[i])
            for i, weight in enumerate(self.weights)
        ]

    def state(self):
        """Plain numbers, text and lists."""
        return {"count": self.count, "sources": [source.state() for source in self.sources]}

    def chunk(self):
        """pixels uint8 (lane_batch, 3, S, S), names of unreadable images met on the way, lane, and the state after."""
        unreadable = []
        pixels = torch.stack([self._draw(unreadable) for _ in range(self.stream.lane_batch)])
        return {"pixels": pixels, "unreadable": unreadable, "lane": self.lane, "state": self.state()}

    def _draw(self, unreadable):
        epoch, place = divmod(self.count, self.stream.steps_per_epoch * self.stream.lane_batch)
        if self.stream.by_epoch and epoch and place == 0:
            self.sources[0].restart(epoch)
        which = 0
        if len(self.sources) > 1:
            generator = np.random.default_rng((self.stream.seed, MIXTURE_STREAM, self.lane, self.count))
            which = generator.choice(len(self.sources), p=self.weights)
        failed = []
        while len(failed) <= self.max_unreadable:
            try:
                image = HeldSource([self.sources[which].draw()]).load(0)
            except UnreadableImage as error:
                failed.append(str(error))
                continue
            unreadable += failed
            seed = (self.stream.seed, LANE_CROP_STREAM, self.lane, self.count)
            self.count += 1
            return random_crop(image, self.image_size, self.resize_size, seed)
        raise too_many_in_a_row(failed, self.max_unreadable)


# ----------------------------------------------------------------------------------------------------------------------
# The loader


class LaneChunks(torch.utils.data.IterableDataset):
    """Chunks of the given lanes in turn, without end; the workers share out the lanes so that a DataLoader, which asks
    one worker after the other, gives them in the same order as without workers."""

    def __init__(self, stream, lanes, cfg, image_size, states):
        self.stream, self.lanes, self.cfg, self.image_size, self.states = stream, lanes, cfg, image_size, states

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        mine = self.lanes if worker is None else self.lanes[worker.id :: worker.num_workers]
        lanes = [Lane(self.stream, lane, self.cfg, self.image_size, self.states.get(lane)) for lane in mine]
        while True:
            for lane in lanes:
                yield lane.chunk()


class StreamLoader:
    """This process's micro-batches, without end: dicts of pixels uint8 (B, 3, S, S) and unreadable, names of images.

    The lanes of rank r are the contiguous piece r of all. `micro_batches`: those of one step. `states` in the
    constructor: of all lanes, none at the start; the attribute: {lane: state} of this rank's lanes after the last step
    that was given out.
    Raises DataError when more than cfg.max_unreadable_shards shards cannot be read.
    """

    def __init__(self, stream, cfg, image_size, rank, world_size, micro_batches, states=None):
        self.per_process = stream.lanes // world_size
        self.micro_batches = micro_batches
        lanes = range(rank * self.per_process, (rank + 1) * self.per_process)
        self.states = {lane: state for lane, state in enumerate(states or []) if lane in lanes}
        self.unreadable = shard_log(cfg)
        self.unreadable.names.update(*(source.unreadable for source in stream.sources))  # open_source has said so
        self.skipped = set()  # (source, shard) that the log has
        self.loader = WorkerLoader(
            LaneChunks(stream, lanes, cfg, image_size, dict(self.states)),
            batch_size=None,
            num_workers=cfg.num_workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # the loader draws a seed from it, and would else move the global generator
        )

    def __iter__(self):
        chunks = iter(self.loader)
        while True:
            step = list(itertools.islice(chunks, self.per_process))
            for chunk in step:
                self.states[chunk["lane"]] = chunk["state"]
                self._log(chunk["state"])
            pixels = torch.cat([chunk["pixels"] for chunk in step])
            pixels = pixels.pin_memory() if torch.cuda.is_available() else pixels
            names = [name for chunk in step for name in chunk["unreadable"]]
            for micro_batch in pixels.chunk(self.micro_batches):
                yield {"pixels": micro_batch, "unreadable": names}
                names = []

    def _log(self, state):
        for i, source in enumerate(state["sources"]):
            for shard, (row, reason) in source["skipped"].items():
                if (i, shard) not in self.skipped:  # several lanes may read a shard
                    self.skipped.add((i, shard))
                    self.unreadable.add([f"{reason}; skipped from image {row} on"])


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation images


def load_stream_eval_images(cfg, num_samples):
    """The evaluation images of a streaming run: those of data.eval_path, or of split data.eval_split of data.path.

    A folder of images or a saved data set is read as without streaming. Of shards, the first `num_samples` images, from
    all of them in equal parts, are held in memory undecoded, on each process. Raises DataError, also where a shard
    cannot be read: evaluations must not differ.
    """
    path, setting = cfg.path, "data.eval_split"
    if cfg.eval_path is not None:
        path, setting = cfg.eval_path, "data.eval_path"
        cfg = replace(cfg, config_name=None)  # that is of the training images
    path = os.path.expanduser(path)
    saved = is_saved(path)
    if cfg.eval_path is not None and os.path.isdir(path) and (saved or not _has_shards(path)):
        column = cfg.image_column if saved else None  # image files have none
        try:
            return load_eval_images(replace(cfg, path=path, image_column=column), seed=0)
        except DataError as error:
            raise DataError(str(error).replace("data.path", "data.eval_path")) from error
    if cfg.eval_path is None and names_shards(path) and cfg.eval_split != cfg.train_split:
        raise DataError(
            f"data.eval_path: needed, because {path} has no split level (data.eval_split with data.train_split's name "
            "evaluates on training images)"
        )
    if num_samples is None:
        raise DataError(f"eval.num_samples: needed, because evaluation images of {path} are held in memory")
    shards = find_shards(path, cfg.eval_split, cfg, setting)
    column = open_source(shards, cfg, setting).column
    images = []
    for i, shard in enumerate(shards):
        wanted = -(-(num_samples - len(images)) // (len(shards) - i))  # of the shards to come, in equal parts
        try:
            rows = read_shard(shard, column, 0, None, 1, cfg.shard_retries)
            images += [image for _, image in itertools.islice(rows, wanted)]
        except UnreadableShard as error:
            raise DataError(f"{setting}: {shard_name(shard)} cannot be read: {error.reason}") from error
    return HeldSource(images)


def _has_shards(folder):
    return any(is_shard(name) for _, _, names in os.walk(folder) for name in names)
