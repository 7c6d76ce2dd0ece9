"""Training images streamed from shards (parquet files, WebDataset tars; local, http or on the Hub), larger than a disk.

Nothing here needs launching. A run uses it like this (StreamLoader is in lanes.py):

    stream = open_stream(cfg, global_batch_size=512, seed=0, accelerator=accelerator)      # cfg: the `data` group
    loader = StreamLoader(stream, cfg, image_size=256, rank=0, world_size=8, micro_batches=1)
    for batch in loader:
        batch["pixels"]                                                # uint8 (B, 3, 256, 256), without end
        loader.states                                          # of its lanes: a loader that gets them goes on there

The stream is split into lanes, each of which gives the same share of every global batch and shuffles its images in a
buffer of its own. The images of a lane are a function of (seed, lane) and of the data. Processes and workers only share
out the lanes, so the images of a step depend neither on the number of processes and workers nor on a stop in between.
"""

import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Optional

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rae_suite.errors import DataError
from rae_suite.loaders import UnreadableLog
from rae_suite.randomness import PASS_STREAM, SHARD_STREAM
from rae_suite.settings import DataConfig
from rae_suite.shard_reading import UnreadableShard, read_fields, read_footer, read_shard
from rae_suite.shards import find_shards, is_parquet, is_saved, is_shard, names_shards, shard_name
from rae_suite.sources import HeldSource, ImageSource, find_image_column, find_label_column
from rae_suite.splits import WHOLE, find_splits, load_eval_images

if TYPE_CHECKING:  # slow to import
    import datasets

FOOTER_THREADS = 16


# ----------------------------------------------------------------------------------------------------------------------
# Sources and the stream


@dataclass
class Source:
    """Shards of one origin.

    `lengths`: rows of each shard, or None where they are not known beforehand. `columns`: the columns of image and
    label, and of tars the fields, see read_parquet and read_tar. `weight`: share of the drawn images, in (0, 1].
    `unreadable`: the problems of shards whose length could not be read; such shards count as empty. `class_names`:
    names of the labels, None where labels have no names.
    """

    shards: list[str]
    lengths: Optional[list[int]]
    columns: tuple
    weight: float
    unreadable: list = field(default_factory=list)
    class_names: Optional[list] = None
    has_labels: bool = False


def shard_log(cfg: DataConfig) -> UnreadableLog:
    return UnreadableLog(cfg.max_unreadable_shards, "shard", "data.max_unreadable_shards")


def in_recorded_order(shards: list[str], recorded: list[str]) -> list[str]:
    """The shards that a run began with, `recorded`, in their order, with the paths that they have now in `shards`. A
    shard that is gone stays in its place, to be skipped. Returns `shards` where there are others among them than
    recorded ones, and where two have the same name."""
    for name in (shard_name, lambda shard: os.path.basename(shard_name(shard))):  # all may have moved
        now, then = {name(shard): shard for shard in shards}, [name(shard) for shard in recorded]
        if len(now) == len(shards) and len(set(then)) == len(then) and now.keys() <= set(then):
            return [now.get(key, shard) for key, shard in zip(then, recorded, strict=True)]
    return shards


def open_source(
    shards: list[str], cfg: DataConfig, setting: str, weight: float = 1.0, record: Optional[dict] = None
) -> Source:
    """The Source of these shards. Reads the footers of parquet files; of tars, one image. Raises DataError where
    nothing can be read or too many shards cannot.

    `record`: this source in the Stream.record of the run's beginning. A shard that is gone or cannot be read now keeps
    the recorded length, and is skipped where it is read. A shard that could not be read then stays out. Fields of tars
    stay as recorded.
    """
    lengths = None
    if record is not None:
        shards = in_recorded_order(shards, record["shards"])
        if len(shards) == len(record["shards"]):
            lengths = record["lengths"]
    if all(map(is_parquet, shards)):
        return open_parquet_files(shards, cfg, setting, weight, lengths or [None] * len(shards))
    if any(map(is_parquet, shards)):
        raise DataError(f"{setting}: expected either parquet files or tar shards, found both")
    return open_tars(shards, cfg, setting, weight, (record or {}).get("fields"))


def open_tars(shards: list[str], cfg: DataConfig, setting: str, weight: float, fields: Optional[list]) -> Source:
    """See open_source. `fields`: as recorded; None: they are read from the first shard that can be read."""
    asked = cfg.image_column and cfg.image_column.lower(), cfg.label_column
    unreadable = []
    for shard in shards[: cfg.max_unreadable_shards + 1]:
        try:
            columns = *asked, read_fields(shard, asked, cfg.shard_retries) if fields is None else fields
            # two images, because a sample with several images is noticed at the second
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


def open_parquet_files(
    shards: list[str], cfg: DataConfig, setting: str, weight: float, recorded_lengths: list[Optional[int]]
) -> Source:
    """See open_source. `recorded_lengths`: of each shard, 0 where it could not be read then, None where none is
    recorded."""

    def footer(shard: str) -> tuple:
        """(rows, schema, None), or (0, None, why they cannot be read)."""
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
    for i, recorded in enumerate(recorded_lengths):
        if recorded and reasons[i]:
            lengths[i], reasons[i] = recorded, None
        elif recorded == 0 and lengths[i]:
            lengths[i], reasons[i] = 0, f"{shard_name(shards[i])}: could not be read when the run began"
    unreadable = [reason for reason in reasons if reason]
    shard_log(cfg).add(unreadable)
    import datasets

    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schemas[0]))
    column = find_image_column(info, cfg.train_split, cfg.image_column)
    label_column, class_names = find_labels(info, cfg)
    columns, has_labels = (column, label_column), label_column is not None
    return Source(shards, lengths, columns, weight, unreadable, class_names, has_labels)


def find_labels(info: "datasets.DatasetInfo", cfg: DataConfig) -> tuple[Optional[str], Optional[list]]:
    """(column of the labels, names of the labels), either or both None. A column of text is no label column here,
    because all of it would have to be read to number the texts. Raises DataError for a column that was asked for and
    cannot be used."""
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
    """Everything about a run's stream that does not change during the run.

    `lanes`: number of lanes. `steps_per_epoch`: as given, or computed from the number of images. `by_epoch`: whether
    images are dealt to the lanes anew each epoch; if not, each lane keeps its shards, or its rows of shards.
    """

    sources: list[Source]
    lanes: int
    global_batch_size: int
    steps_per_epoch: int
    by_epoch: bool
    seed: int

    @property
    def num_images(self) -> Optional[int]:
        """Number of images of all sources, or None where it is not known."""
        if any(source.lengths is None for source in self.sources):
            return None
        return sum(sum(source.lengths) for source in self.sources)

    @property
    def class_names(self) -> Optional[list]:
        """Names of the classes; None where a source has no names or sources have different names."""
        names = [source.class_names for source in self.sources]
        return names[0] if all(other == names[0] for other in names) else None

    @property
    def has_labels(self) -> bool:
        """Whether all sources have labels, as far as their columns or first images tell."""
        return all(source.has_labels for source in self.sources)

    def check_labels(self) -> None:
        """Raise DataError for a mixture whose sources number their classes in different ways."""
        names = [source.class_names for source in self.sources]
        if self.has_labels and any(other != names[0] for other in names):
            raise DataError(
                "data.mixture: its sources have different classes, and labels of one mean others of another"
            )

    @property
    def lane_batch(self) -> int:
        """Images that each lane gives to a global batch."""
        return self.global_batch_size // self.lanes

    def fingerprint(self) -> str:
        """A digest that changes when shards are added, removed, renamed, reordered or made longer, but not when all of
        them move to another folder."""
        parts = [[[os.path.basename(shard_name(s)) for s in source.shards], source.lengths] for source in self.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def record(self) -> list[dict]:
        """Names, lengths and fields of each source's shards, as plain values. With them `open_stream` finds the same
        shards again when some are gone."""
        return [
            {
                "shards": list(map(shard_name, source.shards)),
                "lengths": source.lengths,
                **({"fields": source.columns[2]} if source.lengths is None else {}),
            }
            for source in self.sources
        ]

    def share(self, source: int, lane: int, pass_number: int) -> list[tuple[int, int, Optional[int], int]]:
        """The lane's share of a pass through a source: parts (shard, start, stop, step), each of which is the rows
        `start`, `start + step`, ... below `stop` (None: to the end) of a shard.

        The shares of all lanes are disjoint and together the source. Of known lengths, the rows of all shards, in a
        random order of shards, are cut into equal ranges. Of unknown lengths, each lane gets equally many shards. A
        shard that is left over is shared by k lanes, and each of them gets every k-th row.
        """
        origin, lanes = self.sources[source], self.lanes
        deal = pass_number if self.by_epoch else 0
        order = np.random.default_rng((self.seed, SHARD_STREAM, source, deal)).permutation(len(origin.shards))
        if origin.lengths is None:
            even = len(order) - len(order) % lanes
            parts = [(int(shard), 0, None, 1) for shard in order[:even][lane::lanes]]
            left_over = order[even:]
            if len(left_over):
                place = lane % len(left_over)
                sharers = len(range(place, lanes, len(left_over)))
                parts.append((int(left_over[place]), lane // len(left_over), None, sharers))
        else:
            total = sum(origin.lengths)
            first, last = lane * total // lanes, (lane + 1) * total // lanes
            ends = np.cumsum([origin.lengths[shard] for shard in order])
            parts = []
            for shard, end in zip(order.tolist(), ends.tolist(), strict=True):
                begin = end - origin.lengths[shard]
                if max(first, begin) < min(last, end):
                    parts.append((shard, max(first, begin) - begin, min(last, end) - begin, 1))
        if self.by_epoch:
            return parts
        order = np.random.default_rng((self.seed, PASS_STREAM, source, lane, pass_number)).permutation(len(parts))
        return [parts[i] for i in order]


def open_stream(
    cfg: DataConfig, global_batch_size: int, seed: int, accelerator: Accelerator, record: Optional[list] = None
) -> Stream:
    """The stream that the `data` group of the configuration asks for. The main process finds it for all processes.
    `record`: of a run that continues, the Stream.record of its beginning.

    Raises DataError for anything missing or contradictory, on all processes.
    """
    check_lanes(cfg, global_batch_size, accelerator.num_processes)
    outcome = [None]
    if accelerator.is_main_process:
        try:
            outcome = [_build_stream(cfg, global_batch_size, seed, record)]
        except DataError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], DataError):
        raise outcome[0]
    return outcome[0]


def _build_stream(cfg: DataConfig, global_batch_size: int, seed: int, record: Optional[list]) -> Stream:
    if cfg.holdout_fraction > 0:
        raise DataError(f"data.holdout_fraction: {cfg.holdout_fraction}, but a stream holds no images out; expected 0")
    weights = cfg.mixture or {cfg.path: 1.0}
    setting = "data.mixture" if cfg.mixture else "data.path"
    sources = []
    for (path, weight), recorded in zip(weights.items(), record or [None] * len(weights), strict=True):
        shards = find_shards(path, cfg.train_split, cfg, setting)
        sources.append(open_source(shards, cfg, setting, weight / sum(weights.values()), recorded))
    steps = cfg.steps_per_epoch
    stream = Stream(sources, cfg.stream_lanes, global_batch_size, steps, steps is None, seed)
    if steps is None:
        if stream.num_images is None:
            raise DataError(f"data.steps_per_epoch: needed, because the number of images in {cfg.path} is not known")
        if stream.num_images < global_batch_size:
            raise DataError(
                f"train.global_batch_size: {global_batch_size}, but there are {stream.num_images} training images in "
                f"data.path; expected at most {stream.num_images}"
            )
        stream.steps_per_epoch = stream.num_images // global_batch_size
    return stream


def check_lanes(cfg: DataConfig, global_batch_size: int, world_size: int) -> None:
    """Raise DataError unless the lanes divide the global batch, the processes the lanes, and the workers the lanes of a
    process."""
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
# Evaluation images


def load_stream_eval_images(cfg: DataConfig, num_samples: Optional[int]) -> ImageSource:
    """The evaluation images of a streaming run: those of data.eval_path, or of split data.eval_split of data.path.

    A folder of images or a saved data set is read as without streaming. Of shards, `num_samples` images are held in
    memory undecoded, on each process: from the beginning of each shard, equally many of all shards. Raises DataError,
    also where a shard cannot be read, because evaluations without its images would not be comparable.
    """
    path, setting = cfg.path, "data.eval_split"
    if cfg.eval_path is not None:
        path, setting = cfg.eval_path, "data.eval_path"
        cfg = replace(cfg, config_name=None)  # the setting is meant for the training images
    saved = is_saved(path)
    if cfg.eval_path is not None and os.path.isdir(path) and (saved or not _has_shards(path)):
        column = cfg.image_column if saved else None  # image files have none
        cfg = replace(cfg, path=path, image_column=column)
        try:
            if WHOLE in find_splits(cfg):  # then all images are meant, also where a preset names a split
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
        wanted = -(-(num_samples - len(images)) // (len(shards) - i))  # an equal part of what is missing
        try:
            rows = read_shard(shard, source.columns, 0, None, 1, cfg.shard_retries)
            images += [image for _, image in itertools.islice(rows, wanted)]
        except UnreadableShard as error:
            raise DataError(f"{setting}: {shard_name(shard)} cannot be read: {error.reason}") from error
    return HeldSource(images, source.class_names, cfg.max_megapixels)


def _has_shards(folder: str) -> bool:
    return any(is_shard(name) for _, _, names in os.walk(folder) for name in names)
