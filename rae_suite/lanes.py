"""Lanes of a stream: each shuffles its own part of the shards, and says in a few numbers where it stands."""

import numpy as np
import torch

from rae_suite.errors import DataError, UnreadableImage
from rae_suite.images import TrainingView
from rae_suite.loaders import label_of, too_many_in_a_row
from rae_suite.randomness import LANE_CROP_STREAM, MIXTURE_STREAM, WINDOW_STREAM
from rae_suite.shards import UnreadableShard, read_shard, shard_name
from rae_suite.sources import HeldSource


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
        """The next image, undecoded: (name, value, label)."""
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
            yield from read_shard(origin.shards[shard], origin.columns, start, stop, step, self.retries)
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
        self.view = TrainingView(image_size, cfg.resize_size, cfg.crop, cfg.flip)
        self.max_unreadable, self.max_megapixels = cfg.max_unreadable, cfg.max_megapixels
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
        """pixels uint8 (lane_batch, 3, S, S), label int64 (lane_batch,), -1 where there is none, names of unreadable
        images met on the way, lane, and the state after."""
        unreadable = []
        images = [self._draw(unreadable) for _ in range(self.stream.lane_batch)]
        pixels, labels = torch.stack([pixels for pixels, _ in images]), torch.tensor([label for _, label in images])
        state = self.state()
        return {"pixels": pixels, "label": labels, "unreadable": unreadable, "lane": self.lane, "state": state}

    def _draw(self, unreadable):
        """The next image, cropped, and its label."""
        epoch, place = divmod(self.count, self.stream.steps_per_epoch * self.stream.lane_batch)
        if self.stream.by_epoch and epoch and place == 0:
            self.sources[0].restart(epoch)
        which = 0
        if len(self.sources) > 1:
            generator = np.random.default_rng((self.stream.seed, MIXTURE_STREAM, self.lane, self.count))
            which = generator.choice(len(self.sources), p=self.weights)
        failed = []
        while len(failed) <= self.max_unreadable:
            source = HeldSource([self.sources[which].draw()], max_megapixels=self.max_megapixels)
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
