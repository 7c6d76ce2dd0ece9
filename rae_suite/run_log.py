"""What a run writes down while it goes on: metrics.jsonl, sample grids, curves; which model is the best."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from rae_suite.files import list_steps, remove, step_of, writing
from rae_suite.hub import Publisher
from rae_suite.launch import say
from rae_suite.loaders import UnreadableLog
from rae_suite.metrics_file import MetricsFile
from rae_suite.pictures import GridLayout, plot_curves, progress_strip
from rae_suite.run_folder import RunState
from rae_suite.trackers import show_picture


class RunLog:
    """The log of a run, written by the main process; every process calls its methods."""

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        state: RunState,
        steps_per_epoch: int,
        unreadable: UnreadableLog,
        report_to: tuple,
    ):
        self.accelerator, self.run_dir, self.state = accelerator, run_dir, state
        self.steps_per_epoch, self.unreadable = steps_per_epoch, unreadable
        self.file = MetricsFile(run_dir / "metrics.jsonl", accelerator.is_main_process, "csv" in report_to)

    def write(self, kind: str, values: dict) -> None:
        """Write one line: `kind` "train", or "eval" of the `model` among the values."""
        step = self.state.step
        place = {"step": step, "epoch": round(step / self.steps_per_epoch, 4)}
        self.file.append({"kind": kind, **place, "time": round(time.time(), 3), **values})
        prefix = f"eval_{values['model']}" if kind == "eval" else kind
        numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        with writing(self.run_dir / "logs"):
            self.accelerator.log(numbers, step=step)

    def train(self, record: dict, images_per_second: float) -> None:
        """Write the numbers of a training step (StepRecord.read)."""
        values = {k: v for k, v in record.items() if k not in ("step", "stop", "nonfinite")}
        counts = {"skipped_steps": self.state.skipped_steps, "images_per_second": round(images_per_second, 3)}
        self.write("train", {**values, **counts})

    def forget_after(self, step: int) -> None:
        """Drop what there is of steps after `step`: the run goes on from there and writes it again."""
        self.file.forget_after(step)
        if self.accelerator.is_main_process:
            for path in (
                *list_steps(self.run_dir / "samples", r"\.png"),
                *list_steps(self.run_dir / "pairs", "-(raw|ema)"),
            ):
                if step_of(path) > step:
                    remove(path)
        self.accelerator.wait_for_everyone()  # other processes write pictures of the same names

    def picture(self, name: str, grid: np.ndarray, layout: GridLayout) -> None:
        """Write a sample grid, uint8 (H, W, 3), and show it to the trackers as `name`; draw the curves and the strip of
        all grids. Called by the main process alone."""
        path = self.run_dir / "samples" / f"step-{self.state.step:08d}.png"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grid).save(path)
        plot_curves(self.file.read(), self.run_dir / "curves.png")
        progress_strip(list_steps(path.parent, r"\.png"), self.run_dir / "progress.png", layout)
        for tracker in self.accelerator.trackers:
            with writing(self.run_dir / "logs"):
                show_picture(tracker, name, grid, self.state.step)

    def is_best(self, metric: str, value: float, higher_is_better: bool, images: str) -> bool:
        """Whether `value`, of the averaged model, is the best so far among those that compare with it, which are of the
        same `images`, in words; it is then the one to beat."""
        state, sign = self.state, 1 if higher_is_better else -1
        best_of = f"{metric} of {images}"
        if state.best_of != best_of:  # a continued run may be evaluated otherwise
            state.best, state.best_of = None, best_of
        if not math.isfinite(value) or state.best is not None and sign * value <= sign * state.best:
            return False
        state.best = value
        return True

    def summary(self, metrics: tuple, images: str) -> str:
        """First and last evaluation of the averaged model, and where the files are. `images`: what they are of."""
        evals = [line for line in self.file.read() if line["kind"] == "eval" and line["model"] == "ema"]
        rows = [f"{f'EMA model, {images}':<28}{'before':>10}{'after':>10}"]
        first, last = (evals[0], evals[-1]) if evals else ({}, {})  # the file may have been deleted
        if any(first.get(count) != last.get(count) for count in ("num_samples", "num_generated")):
            first = {}  # not comparable
        for name in metrics:
            values = (line.get(name) for line in (first, last))
            rows.append(f"{name:<28}" + "".join(f"{'-' if v is None else f'{v:.4f}':>10}" for v in values))
        if self.state.skipped_steps:
            rows.append(f"steps skipped, not finite: {self.state.skipped_steps} of {self.state.step}")
        picture = self.run_dir / "samples" / f"step-{last.get('step', self.state.step):08d}.png"
        places = {
            "pictures": picture,
            "curves": self.run_dir / "curves.png",
            "progress": self.run_dir / "progress.png",
            "model": self.run_dir / "final",
        }
        if self.accelerator.device.type == "cuda":
            rows.append(f"peak GPU memory of a process: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        return "\n".join([*rows, *(f"{what:<10}{place}" for what, place in places.items())])


def upload(
    accelerator: Accelerator, publisher: Optional[Publisher], log: RunLog, export: Callable[[Path], None]
) -> None:
    """Start to upload the model as it is now, which `export` writes into a folder, unless an upload is on its way.
    Every process calls this; `publisher`: of the main process."""
    step = log.state.step
    [busy] = broadcast_object_list([publisher is not None and publisher.busy()])
    if busy:
        say(accelerator, f"step {step}: not uploaded, the upload before is still on its way")
        return
    folder = log.run_dir / "hub" / f"step-{step:08d}"
    export(folder)
    if publisher is not None:
        publisher.push(folder)
