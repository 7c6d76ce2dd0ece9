"""Lanes of a stream, and the loader of a process's lanes.

A lane shuffles its own part of the shards, and a few numbers, its state, say where it stands.
"""

import itertools
from collections.abc import Iterator
from typing import Optional

import numpy as np
import torch

from rae_suite.errors import DataError, UnreadableImage
from rae_suite.images import TrainingView
from rae_suite.loaders import WorkerLoader, cores, label_of, start_worker, too_many_in_a_row
from rae_suite.randomness import LANE_CROP_STREAM, MIXTURE_STREAM, WINDOW_STREAM
from rae_suite.settings import DataConfig
from rae_suite.shard_reading import UnreadableShard, read_shard
from rae_suite.shards import shard_name
from rae_suite.sources import HeldImage, HeldSource
from rae_suite.streams import Stream, shard_log


class LaneSource:
    """A lane's endless way through one source: pass after pass over its share, shuffled.

    Images are read into windows of `size`, and each window is given out in a random order. A window ends with its pass,
    so the last window of a pass may be smaller. While one window is given out the next is read: together they hold at
    most `size` undecoded images. So a few numbers say where the lane stands: where the window starts, and how many of
    its images were given. `state()` has these numbers, and the shards that were found unreadable, with the row from
    which on each is skipped.
    """

    def __init__(self, stream: Stream, source: int, lane: int, size: int, retries: int, state: Optional[dict] = None):
        """`source`: its index in the stream. `state`: of the LaneSource that this one goes on from."""
        self.stream, self.source, self.lane, self.size, self.retries = stream, source, lane, size, retries
        state = state or {"position": [0, 0, 0, None], "window": 0, "given": 0, "skipped": {}}
        self.position = state["position"]  # of the window's start: pass, shift, part of the share, row (None: first)
        self.window, self.given = state["window"], state["given"]
        self.skipped = {int(shard): value for shard, value in state["skipped"].items()}  # {shard: [row, reason]}
        self.reader = self._read_from(*self.position)
        self.window_is_open = False  # False until the window at `position` is read, also where a state was given
        self.left: list[HeldImage] = []  # images of the open window that were not given yet, the next one last
        self.next: list[tuple[list, HeldImage]] = []  # (position, image) of the next window, as far as it is read
        self.next_is_complete = False

    def state(self) -> dict:
        """Plain numbers, text and lists."""
        skipped = {str(shard): value for shard, value in self.skipped.items()}
        return {"position": self.position, "window": self.window, "given": self.given, "skipped": skipped}

    def draw(self) -> HeldImage:
        """The next image."""
        self._read_ahead()
        while not self.left:
            self._open_next_window()
            self._read_ahead()
        self.given += 1
        return self.left.pop()

    def restart(self, pass_number: int) -> None:
        """Go to the start of a pass. Images of the pass before that were not given yet are dropped."""
        start_is_read = bool(self.next) and self.position[0] < pass_number == self.next[0][0][0]
        if not start_is_read:
            self.reader = self._read_from(pass_number, 0, 0, None)
            self.next, self.next_is_complete = [], False
        self.left, self.window_is_open = [], True

    def _read_ahead(self) -> None:
        """Read images of the next window, as many as there is room for."""
        while not self.next_is_complete and len(self.left) + len(self.next) < self.size:
            item = next(self.reader)
            if item is not None:
                self.next.append(item)
            elif self.next:  # the end of a pass
                self.next_is_complete = True

    def _open_next_window(self) -> None:
        """Shuffle the next window and begin to give it out; of the first window, only the images that `given`
        leaves."""
        if self.window_is_open:
            self.window, self.given = self.window + 1, 0
        self.window_is_open = True
        self.position = self.next[0][0]
        seed = (self.stream.seed, WINDOW_STREAM, self.source, self.lane, self.window)
        order = np.random.default_rng(seed).permutation(len(self.next))
        self.left = [self.next[i][1] for i in order]
        del self.left[len(self.left) - self.given :]  # these were given before the run stopped
        self.next, self.next_is_complete = [], False

    def _read_from(
        self, pass_number: int, shift: int, first_part: int, row: Optional[int]
    ) -> Iterator[Optional[tuple[list, HeldImage]]]:
        """(position, image) from a position on, without end; None at the end of each pass.

        After a pass without any image the lane reads the share of the next lane (`shift` lanes further): a lane must
        not stand still as long as there are images, although these images come twice then. Raises DataError when no
        lane's share has an image.
        """
        while True:
            found = first_part > 0 or row is not None
            share = self.stream.share(self.source, (self.lane + shift) % self.stream.lanes, pass_number)
            for part in range(first_part, len(share)):
                for image_row, image in self._read_part(*share[part], row):
                    found = True
                    yield [pass_number, shift, part, image_row], image
                row = None
            yield None
            pass_number, shift, first_part = (pass_number + 1, 0, 0) if found else (pass_number, shift + 1, 0)
            if shift == self.stream.lanes:
                shards = self.stream.sources[self.source].shards
                reasons = [f"; {reason}" for _, reason in self.skipped.values()]
                raise DataError(
                    f"data.path: none of {len(shards)} shards gives an image, the first is {shard_name(shards[0])}"
                    + "".join(reasons[-1:])
                )

    def _read_part(
        self, shard: int, start: int, stop: Optional[int], step: int, row: Optional[int]
    ) -> Iterator[tuple[int, HeldImage]]:
        """(row, image) of one part of a share, see Stream.share, from `row` on if it isn't None. A shard that cannot be
        read to its end is noted in `skipped`."""
        if shard in self.skipped:
            first_skipped = self.skipped[shard][0]
            stop = first_skipped if stop is None else min(stop, first_skipped)
        origin = self.stream.sources[self.source]
        start = start if row is None else row
        if stop is not None and start >= stop:
            return
        try:
            yield from read_shard(origin.shards[shard], origin.columns, start, stop, step, self.retries)
        except UnreadableShard as error:
            self.skipped[shard] = [error.row, f"{shard_name(origin.shards[shard])}: {error.reason}"]


class Lane:
    """One lane: chunks of cropped training images from all sources, without end.

    The source of each image is drawn by weight. The images and their crops are a function of (seed, lane, how many
    images were given), so another Lane with this one's `state()` goes on where this one stands. An unreadable image is
    replaced by the next one of its source; max_unreadable + 1 in a row raise DataError.
    """

    def __init__(self, stream: Stream, lane: int, cfg: DataConfig, image_size: int, state: Optional[dict] = None):
        self.stream, self.lane = stream, lane
        self.view = TrainingView(image_size, cfg.resize_size, cfg.crop, cfg.flip)
        self.max_unreadable, self.max_megapixels = cfg.max_unreadable, cfg.max_megapixels
        self.count = 0 if state is None else state["count"]
        self.weights = [source.weight for source in stream.sources]
        states = [None] * len(stream.sources) if state is None else state["sources"]
        self.sources = [
            LaneSource(stream, i, lane, max(1, round(cfg.shuffle_buffer * weight)), cfg.shard_retries, states[i])
            for i, weight in enumerate(self.weights)
        ]

    def state(self) -> dict:
        """Plain numbers, text and lists."""
        return {"count": self.count, "sources": [source.state() for source in self.sources]}

    def chunk(self) -> dict:
        """The lane's part of the next global batch: pixels uint8 (lane_batch, 3, S, S), label int64 (lane_batch,), -1
        where there is none, unreadable (names of images), lane, and the state after these images."""
        unreadable = []
        images = [self._draw(unreadable) for _ in range(self.stream.lane_batch)]
        pixels, labels = torch.stack([pixels for pixels, _ in images]), torch.tensor([label for _, label in images])
        state = self.state()
        return {"pixels": pixels, "label": labels, "unreadable": unreadable, "lane": self.lane, "state": state}

    def _draw(self, unreadable: list) -> tuple[torch.Tensor, int]:
        """The next image, cropped, and its label. Adds the names of unreadable images before it to `unreadable`."""
        epoch, place = divmod(self.count, self.stream.steps_per_epoch * self.stream.lane_batch)
        if self.stream.by_epoch and epoch and place == 0:
            self.sources[0].restart(epoch)
        chosen = 0
        if len(self.sources) > 1:
            generator = np.random.default_rng((self.stream.seed, MIXTURE_STREAM, self.lane, self.count))
            chosen = generator.choice(len(self.sources), p=self.weights)
        failed = []
        while len(failed) <= self.max_unreadable:
            source = HeldSource([self.sources[chosen].draw()], max_megapixels=self.max_megapixels)
            try:
                image = source.load(0)
            except UnreadableImage as error:
                failed.append(str(error))
                continue
            unreadable += failed
            pixels = self.view(image, (self.stream.seed, LANE_CROP_STREAM, self.lane, self.count))
            self.count += 1
            return pixels, label_of(source, 0)
        raise too_many_in_a_row(failed, self.max_unreadable)


class LaneChunks(torch.utils.data.IterableDataset):
    """Chunks of the given lanes in turn, without end. Each worker takes every n-th lane, because a DataLoader asks its
    n workers one after the other: so the chunks come in the same order as without workers."""

    def __init__(self, stream: Stream, lanes: range, cfg: DataConfig, image_size: int, states: dict[int, dict]):
        self.stream, self.lanes, self.cfg, self.image_size, self.states = stream, lanes, cfg, image_size, states

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        mine = self.lanes if worker is None else self.lanes[worker.id :: worker.num_workers]
        lanes = [Lane(self.stream, lane, self.cfg, self.image_size, self.states.get(lane)) for lane in mine]
        while True:
            for lane in lanes:
                yield lane.chunk()


class StreamLoader:
    """This process's micro-batches, without end: dicts of pixels uint8 (B, 3, S, S), label int64 (B,), -1 where there
    is none, and unreadable, names of images.

    The lanes of rank r are the contiguous piece r of all lanes. `micro_batches`: number of micro-batches in a step.
    `states`: as an argument, the states of all lanes, None at the start of the stream; as an attribute, {lane: state}
    of this rank's lanes after the last step that was given out. Raises DataError when more than
    cfg.max_unreadable_shards shards cannot be read.
    """

    def __init__(
        self,
        stream: Stream,
        cfg: DataConfig,
        image_size: int,
        rank: int,
        world_size: int,
        micro_batches: int,
        states: Optional[list] = None,
    ):
        self.per_process = stream.lanes // world_size
        self.micro_batches = micro_batches
        lanes = range(rank * self.per_process, (rank + 1) * self.per_process)
        self.states = {lane: state for lane, state in enumerate(states or []) if lane in lanes}
        self.unreadable = shard_log(cfg)
        self.unreadable.names.update(*(source.unreadable for source in stream.sources))  # warned of already
        self.logged: set[tuple] = set()  # (source, shard) of each skipped shard that is in the log
        self.loader = WorkerLoader(
            LaneChunks(stream, lanes, cfg, image_size, dict(self.states)),
            batch_size=None,
            # a divisor, so that each has equally many lanes: else they would come in another order
            num_workers=max(n for n in range(cfg.num_workers + 1) if n <= cores() and cfg.num_workers % max(n, 1) == 0),
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # the loader draws a seed from it, and would else move the global generator
        )

    def __iter__(self) -> Iterator[dict]:
        chunks = iter(self.loader)
        while True:
            step = list(itertools.islice(chunks, self.per_process))
            for chunk in step:
                self.states[chunk["lane"]] = chunk["state"]
                self._log_skipped(chunk["state"])
            pixels, labels = (torch.cat([chunk[name] for chunk in step]) for name in ("pixels", "label"))
            pixels = pixels.pin_memory() if torch.cuda.is_available() else pixels
            names = [name for chunk in step for name in chunk["unreadable"]]
            for micro_batch, label in zip(*(t.chunk(self.micro_batches) for t in (pixels, labels)), strict=True):
                yield {"pixels": micro_batch, "label": label, "unreadable": names}
                names = []

    def _log_skipped(self, state: dict) -> None:
        """Log the shards that a lane's state says are skipped, each once: several lanes may read a shard."""
        for i, source in enumerate(state["sources"]):
            for shard, (row, reason) in source["skipped"].items():
                if (i, shard) not in self.logged:
                    self.logged.add((i, shard))
                    self.unreadable.add([f"{reason}; skipped from image {row} on"])
