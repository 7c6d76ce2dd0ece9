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

import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Optional

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from rae_suite.errors import DataError
from rae_suite.lanes import Lane
from rae_suite.loaders import UnreadableLog, WorkerLoader, cores, start_worker
from rae_suite.randomness import PASS_STREAM, SHARD_STREAM
from rae_suite.settings import DataConfig
from rae_suite.shards import (
    UnreadableShard,
    find_shards,
    is_parquet,
    is_saved,
    is_shard,
    names_shards,
    read_fields,
    read_footer,
    read_shard,
    shard_name,
)
from rae_suite.sources import HeldSource, find_image_column, find_label_column
from rae_suite.splits import WHOLE, find_splits, load_eval_images

FOOTER_THREADS = 16


# ----------------------------------------------------------------------------------------------------------------------
# Sources and the stream


@dataclass
class Source:
    """Shards of one origin. `lengths`: rows of each, or None where that is not known beforehand. `columns`: of image
    and label, and of tars the fields, see read_parquet and read_tar. `weight`: share of the drawn images, in (0, 1].
    `unreadable`: what is wrong with shards whose length could not be read; they count as empty. `class_names`: of the
    labels, where they have names."""

    shards: list
    lengths: Optional[list]
    columns: tuple
    weight: float
    unreadable: list = field(default_factory=list)
    class_names: Optional[list] = None
    has_labels: bool = False


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
    length, and is skipped where it is read; one that could not be read then stays out. Fields of tars stay the same.
    """
    lengths_then = [None] * len(shards)
    if began is not None:
        shards = in_their_places(shards, began["shards"])
        if len(shards) == len(began["shards"]):
            lengths_then = began["lengths"] or [None] * len(shards)
    if not all(map(is_parquet, shards)):
        if any(map(is_parquet, shards)):
            raise DataError(f"{setting}: expected either parquet files or tar shards, found both")
        asked = cfg.image_column and cfg.image_column.lower(), cfg.label_column
        fields, unreadable = (began or {}).get("fields"), []
        for shard in shards[: cfg.max_unreadable_shards + 1]:
            try:
                columns = *asked, read_fields(shard, asked, cfg.shard_retries) if fields is None else fields
                # two: a sample with several images is noticed at the second
                first = list(itertools.islice(read_shard(shard, columns, 0, None, 1, cfg.shard_retries), 2))
                if first:
                    has_labels = all(label is not None for _, (_, _, label) in first)
                    return Source(shards, None, columns, weight, has_labels=has_labels)
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
    label_column, class_names = find_labels(info, cfg)
    columns, has_labels = (column, label_column), label_column is not None
    return Source(shards, lengths, columns, weight, unreadable, class_names, has_labels)


def find_labels(info, cfg):
    """(column of the labels, their names), either or both None. Text is no label here: to number it, all of it would
    have to be read. Raises DataError for a column that was asked for and cannot be used."""
    try:
        column = find_label_column(info, cfg.train_split, cfg.label_column)
    except DataError:
        if cfg.label_column is not None:
            raise
        return None, None
    if column is None or info.features[column].dtype.endswith("string"):
        return None, None
    return column, getattr(info.features[column], "names", None)


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
    def class_names(self):
        """Names of the classes, None where sources have none, or not the same ones."""
        names = [source.class_names for source in self.sources]
        return names[0] if all(other == names[0] for other in names) else None

    @property
    def has_labels(self):
        """Whether all sources have labels, as far as it is known before all images are read."""
        return all(source.has_labels for source in self.sources)

    def check_labels(self):
        """Raise DataError for a mixture whose sources number their classes in different ways."""
        names = [source.class_names for source in self.sources]
        if self.has_labels and any(other != names[0] for other in names):
            raise DataError(
                "data.mixture: its sources have different classes, and labels of one mean others of another"
            )

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
        return [
            {
                "shards": list(map(shard_name, source.shards)),
                "lengths": source.lengths,
                **({"fields": source.columns[2]} if source.lengths is None else {}),
            }
            for source in self.sources
        ]

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
    """This process's micro-batches, without end: dicts of pixels uint8 (B, 3, S, S), label int64 (B,), -1 where there
    is none, and unreadable, names of images.

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
            # a divisor, so that each has equally many lanes: else they would come in another order
            num_workers=max(n for n in range(cfg.num_workers + 1) if n <= cores() and cfg.num_workers % max(n, 1) == 0),
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
            pixels, labels = (torch.cat([chunk[name] for chunk in step]) for name in ("pixels", "label"))
            pixels = pixels.pin_memory() if torch.cuda.is_available() else pixels
            names = [name for chunk in step for name in chunk["unreadable"]]
            for micro_batch, label in zip(*(t.chunk(self.micro_batches) for t in (pixels, labels)), strict=True):
                yield {"pixels": micro_batch, "label": label, "unreadable": names}
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
    saved = is_saved(path)
    if cfg.eval_path is not None and os.path.isdir(path) and (saved or not _has_shards(path)):
        column = cfg.image_column if saved else None  # image files have none
        cfg = replace(cfg, path=path, image_column=column)
        try:
            if WHOLE in find_splits(cfg):  # then they are meant as a whole, also where a preset names a split
                cfg = replace(cfg, eval_split=DataConfig.eval_split)
            return load_eval_images(cfg, seed=0)
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
    source = open_source(shards, cfg, setting)
    images = []
    for i, shard in enumerate(shards):
        wanted = -(-(num_samples - len(images)) // (len(shards) - i))  # of the shards to come, in equal parts
        try:
            rows = read_shard(shard, source.columns, 0, None, 1, cfg.shard_retries)
            images += [image for _, image in itertools.islice(rows, wanted)]
        except UnreadableShard as error:
            raise DataError(f"{setting}: {shard_name(shard)} cannot be read: {error.reason}") from error
    return HeldSource(images, source.class_names, cfg.max_megapixels)


def _has_shards(folder):
    return any(is_shard(name) for _, _, names in os.walk(folder) for name in names)
