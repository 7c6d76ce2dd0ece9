"""Batches of images: in which order they are drawn, and the processes that load them. Nothing here needs launching:

    train, evaluation = load_splits(cfg, seed=0)                      # cfg: the `data` group of the configuration
    batches = TrainBatches(len(train), global_batch_size=512, micro_batch_size=64, rank=0, world_size=8, seed=0,
                           start_step=0, total_steps=40_000)
    for batch in train_loader(train, batches, TrainingView(size=256), num_workers=cfg.num_workers):
        batch["pixels"]                                               # uint8 (B, 3, 256, 256)

All randomness is a function of (seed, epoch, index): neither the number of workers or ranks nor a resume changes it.
"""

import contextlib
import errno
import functools
import logging
import multiprocessing
import multiprocessing.queues
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np
import torch

from rae_suite.errors import DataError, RunError, UnreadableImage
from rae_suite.images import TrainingView, center_crop, to_tensor
from rae_suite.randomness import CROP_STREAM, ORDER_STREAM
from rae_suite.signals import StoppedWaiting, waiting_for_images
from rae_suite.sources import ImageSource, evenly_spread

logger = logging.getLogger(__name__)

SHARED_MEMORY_FULL = errno.ENOSPC  # exit code of a data loading process that finds no shared memory for its images


class TrainImages(torch.utils.data.Dataset):
    """Training images as the run sees them, indexed by (epoch, index).

    Item: pixels uint8 (3, size, size), index, label (-1: none), and the names of images found unreadable on the way.
    The part of an image that its `view` shows depends on (seed, epoch, index) alone. An unreadable image is replaced by
    the next readable one (the last is followed by the first), and the item has that one's index. Raises DataError when
    max_unreadable + 1 images in a row fail.
    """

    def __init__(self, source: ImageSource, view: TrainingView, seed: int = 0, max_unreadable: int = 10):
        self.source = source
        self.view = view
        self.seed = seed
        self.max_unreadable = max_unreadable
        label_of(source, 0)  # reads the whole column of labels: once, before workers are forked

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict:
        epoch, index = epoch_and_index
        unreadable = []
        for offset in range(min(self.max_unreadable + 1, len(self.source))):
            shown = (index + offset) % len(self.source)
            try:
                image = self.source.load(shown)
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            pixels = self.view(image, (self.seed, CROP_STREAM, epoch, index))
            return {"pixels": pixels, "index": shown, "label": label_of(self.source, shown), "unreadable": unreadable}
        raise too_many_in_a_row(unreadable, self.max_unreadable)


def too_many_in_a_row(unreadable: list, max_unreadable: int) -> DataError:
    """The DataError for max_unreadable + 1 unreadable images in a row, or for all images if there are fewer.
    `unreadable`: their names."""
    if len(unreadable) <= max_unreadable:
        return DataError(
            f"data.path: none of {len(unreadable)} training images can be read; the last is {unreadable[-1]}"
        )
    return DataError(
        f"data.max_unreadable: {len(unreadable)} images in a row cannot be read, expected at most {max_unreadable}; "
        f"the last is {unreadable[-1]}"
    )


class EvalImages(torch.utils.data.Dataset):
    """Centre-cropped evaluation images, indexed by int.

    Item: pixels uint8 (3, image_size, image_size), index, label (-1: none), unreadable names. An unreadable image has
    pixels None and is dropped by `collate`: in its place another image would count twice.
    """

    def __init__(self, source: ImageSource, image_size: int):
        self.source = source
        self.image_size = image_size
        label_of(source, 0)  # as in TrainImages

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        try:
            image = self.source.load(index)
        except UnreadableImage as error:
            return {"pixels": None, "index": index, "label": -1, "unreadable": [str(error)]}
        pixels = to_tensor(center_crop(image, self.image_size))
        return {"pixels": pixels, "index": index, "label": label_of(self.source, index), "unreadable": []}


def label_of(source: ImageSource, index: int) -> int:
    """The class of an image as a number, -1 where it has none."""
    label = source.label(index) if len(source) else None
    return -1 if label is None else label


def collate(samples: list[dict], image_size: int = 0) -> dict:
    """Batch of samples: pixels uint8 (B, 3, S, S), index and label int64 (B,), unreadable list[str].

    Samples without pixels are left out; B may be 0, and then S is image_size.
    """
    readable = [sample for sample in samples if sample["pixels"] is not None]
    empty = torch.empty((0, 3, image_size, image_size), dtype=torch.uint8)
    return {
        "pixels": torch.stack([sample["pixels"] for sample in readable]) if readable else empty,
        "index": torch.tensor([sample["index"] for sample in readable], dtype=torch.int64),
        "label": torch.tensor([sample["label"] for sample in readable], dtype=torch.int64),
        "unreadable": [name for sample in samples for name in sample["unreadable"]],
    }


class UnreadableLog:
    """Counts distinct unreadable images, warns once for each, and stops when they are too many.

    `add` raises DataError when more than max_unreadable distinct names were added. Each process counts the images that
    it reads itself. `what`: the kind of thing that has the names; `setting`: the setting that gave max_unreadable.
    """

    def __init__(self, max_unreadable: int, what: str = "image", setting: str = "data.max_unreadable"):
        self.max_unreadable = max_unreadable
        self.what = what
        self.setting = setting
        self.names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.names:
                continue
            self.names.add(name)
            if len(self.names) > self.max_unreadable:
                raise DataError(
                    f"{self.setting}: {len(self.names)} {self.what}s cannot be read, expected at most "
                    f"{self.max_unreadable}; the last is {name}"
                )
            logger.warning("unreadable %s %d (at most %d): %s", self.what, len(self.names), self.max_unreadable, name)


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one rank, from start_step to total_steps: lists of (epoch, index) for TrainImages.

    The global batch of step s is slice s % steps_per_epoch of the epoch's permutation, a function of (seed, epoch).
    Images after the last full global batch are left out of that epoch. Micro-batch m of rank r is the contiguous piece
    m*world_size + r of the global batch, so the images of a step do not depend on the number of processes. All
    micro-batches of a step are given, then those of the next step. Raises DataError for fewer images than one global
    batch, or sizes that do not divide.
    """

    num_images: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    seed: int
    start_step: int
    total_steps: int

    def __post_init__(self) -> None:
        together = self.micro_batch_size * self.world_size
        if self.global_batch_size < 1 or self.micro_batch_size < 1 or self.global_batch_size % together:
            raise DataError(
                f"global batch size {self.global_batch_size} is not a multiple of micro-batch size "
                f"{self.micro_batch_size} times {self.world_size} processes = {together}"
            )
        if self.num_images < self.global_batch_size:
            raise DataError(
                f"train.global_batch_size: {self.global_batch_size}, but there are {self.num_images} training images "
                f"in data.path; expected at most {self.num_images}"
            )
        if not 0 <= self.rank < self.world_size:
            raise DataError(f"rank {self.rank} is outside of 0..{self.world_size - 1}")

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch_size

    @property
    def micro_batches_per_step(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.micro_batches_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_epoch, order = None, None
        for step in range(self.start_step, self.total_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng((self.seed, ORDER_STREAM, epoch)).permutation(self.num_images)
                order_epoch = epoch
            for micro_batch in range(self.micro_batches_per_step):
                piece = micro_batch * self.world_size + self.rank
                start = step_in_epoch * self.global_batch_size + piece * self.micro_batch_size
                yield [(epoch, int(index)) for index in order[start : start + self.micro_batch_size]]


def train_loader(
    source: ImageSource, batches: TrainBatches, view: TrainingView, max_unreadable: int = 10, num_workers: int = 0
) -> "WorkerLoader":
    """DataLoader over the micro-batches of a TrainBatches, each a dict as `collate` makes it. `view`: the part of an
    image that training sees, random by the batches' seed.

    The loader gives this rank's share only, so Accelerate must not shard it again.
    """
    images = TrainImages(source, view, batches.seed, max_unreadable)
    return build_loader(images, batches, collate, num_workers)


def chosen_images(source: ImageSource, num_samples: Optional[int] = None) -> list[int]:
    """Indices of the images that eval_loader gives, increasing: num_samples at equal distances, or all."""
    return evenly_spread(range(len(source)), len(source) if num_samples is None else num_samples)


def eval_loader(
    source: ImageSource,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_samples: Optional[int] = None,
) -> "WorkerLoader":
    """DataLoader over this rank's share of the evaluation images; every image is in exactly one batch of one rank.

    With num_samples, that many images at equal distances, because files are sorted by class; all images if there are
    fewer. Rank r gets the images r, r + world_size, ... All ranks get equally many batches, because the processes of a
    sharded model compute together; a rank's last batch may be smaller, or empty.
    """
    chosen = chosen_images(source, num_samples)
    mine = chosen[rank::world_size]
    per_rank = -(-len(chosen) // world_size)
    batches = [mine[start : start + batch_size] for start in range(0, per_rank, batch_size)]
    collate_fn = functools.partial(collate, image_size=image_size)
    return build_loader(EvalImages(source, image_size), batches, collate_fn, num_workers)


def images_to_show(images: ImageSource, size: int, count: int, unreadable: UnreadableLog) -> torch.Tensor:
    """Up to `count` evaluation images, spread over all of them because files are sorted by class: (N, 3, S, S) in
    [0, 1]. Raises DataError where none of them can be read."""
    cropped = EvalImages(images, size)
    items = [cropped[i] for i in chosen_images(images, count)]
    for item in items:
        unreadable.add(item["unreadable"])
    readable = [item["pixels"] for item in items if item["pixels"] is not None]
    if not readable:
        raise DataError(f"data.eval_split: none of {len(items)} evaluation images can be read")
    return torch.stack(readable).float() / 255


def build_loader(
    images: torch.utils.data.Dataset,
    batches: Union[TrainBatches, Sequence[list]],
    collate_fn: Callable[[list], Any],
    num_workers: int,
) -> "WorkerLoader":
    """DataLoader with num_workers processes. `batches`: lists of indices of `images`, one list for each batch."""
    return WorkerLoader(
        images,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # the loader draws a seed from it, and would else move the global generator
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerLoader(torch.utils.data.DataLoader):
    """A DataLoader whose processes are started with SIGTERM blocked. `start_worker` would block it too late: some
    libraries (Arrow) start threads within a fork, and a thread that receives the signal ends the process. Raises
    RunError where there is no shared memory to start a process with. There are at most as many processes as cores: more
    would wait for each other."""

    def __init__(self, *args, num_workers: int = 0, **options):
        super().__init__(*args, num_workers=min(num_workers, cores()), **options)

    def __iter__(self) -> Iterator:
        with _waiting_for_workers():  # of persistent workers, a second pass waits for all
            return _batches(super().__iter__())

    def _get_iterator(self) -> Iterator:  # overrides torch's method, which starts the processes
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super()._get_iterator()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super()._get_iterator()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # torch's __del__ would look for this attribute of the half-built iterator, and print an error without it
            torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown = True
            raise RunError(shared_memory_in_words(), everywhere=True) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _batches(iterator: Iterator) -> Iterator:
    """The batches of a DataLoader's iterator."""
    while True:
        with _waiting_for_workers():
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _waiting_for_workers() -> Iterator[None]:
    """Within this context, a run that is asked to stop does not wait for ever (see waiting_for_images). Its data
    loading processes are killed then, because the run would wait for them at its end, whatever they wait for."""
    try:
        with waiting_for_images():
            yield
    except StoppedWaiting:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for each process that is killed
        for worker in multiprocessing.active_children():
            worker.kill()
        raise


def shared_memory_in_words() -> str:
    """The error message for a full /dev/shm."""
    size = os.statvfs("/dev/shm")
    return (
        f"/dev/shm, through which data loading processes hand over their images, is full; it holds "
        f"{size.f_blocks * size.f_frsize / 2**20:g} MiB in all; expected more of it (docker run --shm-size=8g, or "
        "--ipc=host), a lower data.num_workers, or data.num_workers 0, which needs none"
    )


def start_worker(worker_id: int) -> None:
    """Set up a data loading process: one thread, no reaction to signals that are meant for the run (they reach the
    whole process group, and the main process acts on them), and an end when it fails to send a batch, because the main
    process would wait for that batch for ever."""
    torch.set_num_threads(1)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_parents_sigterm, daemon=True).start()


def _end_worker(error: BaseException, batch: Any) -> None:
    """End the process. Called in the thread that sends batches, when it could not send `batch`."""
    if "shared memory" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
        os._exit(SHARED_MEMORY_FULL)
    traceback.print_exception(error)
    os._exit(1)


def _end_on_parents_sigterm() -> None:
    """End the process at a SIGTERM from the main process, and at no other: when the main process exits, it sends
    SIGTERM to the workers that are left and waits for them."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
