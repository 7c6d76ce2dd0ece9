"""The bookkeeping of a training loop: what is due after a step, numbers that are read late, stops, and speed."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from accelerate import Accelerator
from tqdm import tqdm

from rae_suite.checkpoints import last_checkpoint
from rae_suite.errors import RunError
from rae_suite.launch import say, to_device
from rae_suite.run_folder import RunState
from rae_suite.signals import StoppedWaiting, StopSignal
from rae_suite.updates import StepRecord


def steps_behind(device: torch.device) -> int:
    """Steps by which reading a record lags behind. 1 on a GPU: the host reads the numbers of step n while the GPU
    computes step n + 1. 0 elsewhere. The same on all processes."""
    return 1 if device.type == "cuda" else 0


def step_batches(loader: Iterable, count: int, device: torch.device, on_unreadable: Callable) -> Iterator[list]:
    """The micro-batches of each step, `count` at a time: (pixels (B, 3, S, S) in [0, 1] or, where they are stored,
    latents (B, C, h, w), on the device; labels (B,) on the CPU). `on_unreadable` is told the names of images that could
    not be read."""
    micro_batches = iter(loader)
    while True:
        batches = []
        for _ in range(count):
            batch = next(micro_batches)
            on_unreadable(batch["unreadable"])
            if "latents" in batch:
                batches.append((to_device(batch["latents"], device).float(), batch["label"]))
            else:
                batches.append((to_device(batch["pixels"], device).float() / 255, batch["label"]))
        yield batches


def stop_on_nonfinite(record: dict, state: RunState, limit: int, accelerator: Accelerator, run_dir: Path) -> None:
    """Count a step with a value that is not finite; raise RunError when there were more than `limit` in a row."""
    if record["nonfinite"] is None:
        state.nonfinite_in_a_row = 0
        return
    state.nonfinite_in_a_row += 1
    where = f"{record['nonfinite']} is {record[record['nonfinite']]} at step {record['step']}"
    if state.nonfinite_in_a_row > limit:
        raise RunError(f"{where}; {last_checkpoint(run_dir)}")
    state.skipped_steps += 1
    say(accelerator, f"skipped: {where} ({state.nonfinite_in_a_row} in a row of at most {limit})")


class Due(NamedTuple):
    """What is to be done after a step."""

    logging: bool
    evaluation: bool
    samples: bool
    upload: bool
    checkpoint: bool


class Steps:
    """Where a run's loop stands. `stopping`: whether some process was asked to stop, so that this step is the last."""

    def __init__(
        self,
        config: Any,
        accelerator: Accelerator,
        state: RunState,
        total_steps: int,
        steps_per_epoch: int,
        run_dir: Path,
    ):
        """`config`: settings with the groups train, eval, logging and hub."""
        self.config, self.accelerator, self.state, self.run_dir = config, accelerator, state, run_dir
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.stop, self.stopping = StopSignal(), False
        self.pending = deque()  # records of steps that were not read yet, the oldest first
        self.bar = tqdm(
            total=total_steps,
            initial=state.step,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds: a log file is not flooded
            disable=not (config.logging.progress_bar and accelerator.is_main_process),
        )
        self.clock, self.clocked = time.perf_counter(), state.step

    @property
    def stop_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.stop.received is not None

    def next(self, batches: Iterator, save: Callable[[], None]) -> Optional[list]:
        """The micro-batches of the next step; None where the run was asked to stop while it waited for them, and is
        saved as it is. Raises StoppedWaiting where other processes wait for this one, which must end then."""
        try:
            return next(batches)
        except StoppedWaiting:
            if self.accelerator.num_processes > 1:
                raise
        self.stopping = True
        self.read(everything=True)
        save()
        self.stopped_early()
        return None

    def add(self, record: StepRecord) -> None:
        """A step was taken; its numbers are on their way."""
        self.pending.append(record)
        self.state.step += 1

    def due(self) -> Due:
        """What is to be done after this step: all of it at the end, a line of the log after the first one too."""
        logging, evaluation, train = self.config.logging, self.config.eval, self.config.train
        evaluation = self._is_due(evaluation.every_steps, evaluation.every_epochs)
        every = logging.samples_every_steps
        return Due(
            logging=self.state.step == 1 or self._is_due(logging.every_steps),
            evaluation=evaluation,
            samples=evaluation if every is None else self._is_due(every),
            upload=bool(self.config.hub.every_steps) and self._is_due(self.config.hub.every_steps),
            checkpoint=self._is_due(train.save_every_steps, train.save_every_epochs),
        )

    def _is_due(self, every_steps: Optional[int], every_epochs: float = 0) -> bool:
        """Whether what is done every so many steps, or epochs where that is None, is due now."""
        every = every_steps or max(1, round(every_epochs * self.steps_per_epoch))
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def read(self, everything: bool) -> Optional[dict]:
        """The newest record that has arrived, after all before it were looked at; `everything`: that of this step.
        Raises RunError for values that are not finite (see stop_on_nonfinite)."""
        record = None
        while self.pending and (
            everything or self.stopping or len(self.pending) > steps_behind(self.accelerator.device)
        ):
            record = self.pending.popleft().read()
            stop_on_nonfinite(record, self.state, self.config.train.max_nonfinite_steps, self.accelerator, self.run_dir)
            self.stopping = self.stopping or record["stop"]
        self.bar.update()
        return record

    def images_per_second(self, loss: float) -> float:
        """Speed since this was last asked; shown on the progress bar, with the loss."""
        now = time.perf_counter()
        rate = (self.state.step - self.clocked) * self.config.train.global_batch_size / (now - self.clock)
        self.bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{rate:.1f}", refresh=False)
        self.clock, self.clocked = now, self.state.step
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within this context is not counted: images per second are those of training."""
        pause = time.perf_counter()
        yield
        self.clock += time.perf_counter() - pause

    def stopped_early(self) -> bool:
        """Whether the run ends here before its end, because it was asked to. Says so."""
        if not self.stopping or self.state.step == self.total_steps:
            return False
        by = self.stop.received or "another process"
        say(self.accelerator, f"stopped by {by} after step {self.state.step}, saved; the same command continues")
        return True
