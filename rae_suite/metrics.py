"""Reconstruction metrics on one or many processes: PSNR, SSIM and LPIPS as means of per-image values, rFID and rFDD.

Both sides are 8-bit images, each image counts once, and pairs stay aligned, whatever the batch size.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rae_suite.errors import DataError
from rae_suite.frechet import FrechetMeasurement, FrechetMetric, References
from rae_suite.launch import progress_bar, to_device
from rae_suite.metric_names import METRICS

logger = logging.getLogger(__name__)


def to_8bit(pixels: torch.Tensor, rounding: str = "round") -> torch.Tensor:
    """Pixels in about [0, 1], clamped, as uint8. `rounding`: "round", or "truncate" as the published evaluation."""
    scaled = pixels.float().clamp(0, 1) * 255
    return (scaled.round() if rounding == "round" else scaled).to(torch.uint8)  # the cast truncates


def quantize(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in about [0, 1], clamped and rounded to the 8-bit grid."""
    return to_8bit(pixels).float() / 255


def image_metrics(images: torch.Tensor, reconstructions: torch.Tensor, names: Sequence, perceptual) -> dict:
    """Per-image values (B,) of the metrics `names` (see METRICS) for two batches (B, 3, H, W) in [0, 1], 8-bit grid.
    `perceptual`: LPIPS network, for those that need it."""
    return {name: METRICS[name].of_images(reconstructions, images, perceptual) for name in names}


@dataclass
class Evaluation:
    """What was measured on N images: `index` (N,), increasing, in the source; per-image `values`, (N,) each; and the
    Frechet `distances`. The same on all processes."""

    index: torch.Tensor
    values: dict
    distances: dict

    def summary(self) -> dict:
        """`num_samples`, means and distances by name."""
        means = {name: values.mean().item() for name, values in self.values.items()}
        return {"num_samples": len(self.index), **means, **self.distances}


def gather_rows(batches: list, columns: list, unreadable: int = 0) -> tuple:
    """(columns by name, float64 (N,) each; sum of `unreadable`) of what all processes have, which all call this.
    `batches`: dictionaries of tensors (B,); "index" among them decides the order, so sums do not depend on the
    processes."""
    mine = torch.zeros(len(columns), 0, dtype=torch.float64)  # on the CPU: Apple's GPUs have no float64
    if batches:
        mine = torch.stack([torch.cat([batch[name] for batch in batches]).cpu().double() for name in columns])
    gathered = gather_object([(mine, unreadable)])
    rows = torch.cat([part for part, _ in gathered], dim=1)
    rows = rows[:, rows[columns.index("index")].argsort()]
    return dict(zip(columns, rows, strict=True)), sum(count for _, count in gathered)


class Evaluator:
    """Measures reconstructions of the images of all processes' loaders, as often as it is called.

    Args:
        loader: this process's share, batches as loaders.collate makes them; one may be empty.
        accelerator: of all processes.
        names: per-image metrics, see `image_metrics`.
        perceptual: LPIPS network, for "lpips".
        distances: FrechetMetric of each distance to measure.
        references: what they are measured to; those that are not known are made from these images.
        on_unreadable: called with the names of images that could not be read.
        rounding: of reconstructions to 8 bit, see `to_8bit`.
        sharded: whether the model is shared out among the processes (FSDP): the loaders then have equally many batches.
    """

    def __init__(
        self,
        loader: Iterable,
        accelerator: Accelerator,
        names: Sequence,
        perceptual: Optional[Callable] = None,
        distances: Sequence[FrechetMetric] = (),
        references: Optional[References] = None,
        on_unreadable: Callable = lambda names: None,
        rounding: str = "round",
        sharded: bool = False,
    ):
        self.loader, self.accelerator, self.names, self.perceptual = loader, accelerator, list(names), perceptual
        self.distances, self.references = distances, References() if references is None else references
        self.on_unreadable, self.rounding, self.sharded = on_unreadable, rounding, sharded
        self.warned = set()

    @torch.no_grad()
    def __call__(
        self, reconstruct: Callable, on_batch: Callable = lambda *batch: None, bar: Optional[str] = None
    ) -> Evaluation:
        """Every process calls this.

        Args:
            reconstruct: (pixels (B, 3, H, W) in [0, 1], index (B,)) to reconstructions of the same shape and range.
            on_batch: called with index and both sides, uint8 (B, 3, H, W), of each of this process's batches.
            bar: name of a progress bar; None: no bar.

        Returns:
            Evaluation; values of a reconstruction that is not finite are nan, and so are then all distances.

        Raises:
            DataError: no image could be read.
        """
        device, batches, unreadable = self.accelerator.device, [], 0
        known = self.references.known
        measurements = [FrechetMeasurement(metric, known.get(metric.name), device) for metric in self.distances]
        for batch in self.loader if bar is None else progress_bar(self.loader, self.accelerator, bar):
            self.on_unreadable(batch["unreadable"])
            unreadable += len(batch["unreadable"])
            images, index, empty = to_device(batch["pixels"], device), batch["index"], len(batch["pixels"]) == 0
            if empty and not self.sharded:
                continue
            if empty:  # the other processes wait for this one in each forward pass: it joins in with a black image
                images, index = images.new_zeros(1, *images.shape[1:]), index.new_zeros(1)
            pixels = images.float() / 255
            output = reconstruct(pixels, index)
            broken = ~output.isfinite().flatten(1).all(1)  # an 8-bit image would hide what is not finite
            reconstructions = to_8bit(output, self.rounding)
            for measurement in measurements:
                measurement.update(images, reconstructions, count=not empty)
            if empty:
                continue
            values = image_metrics(pixels, reconstructions.float() / 255, self.names, self.perceptual)
            values = {name: value.masked_fill(broken, torch.nan) for name, value in values.items()}
            batches.append({"index": index, **values, "broken": broken})
            on_batch(index, images, reconstructions)
        table, unreadable = gather_rows(batches, ["index", *self.names, "broken"], unreadable)
        if len(table["index"]) == 0:
            raise DataError("data.eval_split: none of the evaluation images can be read")
        distances = self._distances(measurements, unreadable == 0, finite=not table["broken"].any())
        return Evaluation(table["index"].long(), {name: table[name] for name in self.names}, distances)

    def _distances(self, measurements: list, whole: bool, finite: bool) -> dict:
        """The distances by name; nan unless all reconstructions are finite. References that were made are kept."""
        distances = {}
        for measurement in measurements:
            name = measurement.metric.name
            measurement.merge_processes(self.accelerator)
            if name not in self.references.known:
                self.references.keep(name, measurement.reference, whole)
            if self.accelerator.is_main_process and name not in self.warned:
                for text in measurement.warnings():
                    logger.warning(text)
                    self.warned.add(name)
            distances[name] = measurement.distance(self.accelerator) if finite else math.nan
        return distances
