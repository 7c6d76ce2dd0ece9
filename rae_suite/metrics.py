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

from rae_suite.data import DataError
from rae_suite.frechet import FrechetMetric, distance, reference_of, write_cache
from rae_suite.runtime import to_device

logger = logging.getLogger(__name__)

PSNR_CAP = 100.0  # dB, for an image that is reconstructed exactly: a mean must stay finite
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False, "rfid": False, "rfid_clean": False, "rfdd": False}
IMAGE_METRICS = ("psnr", "ssim", "lpips")


def to_8bit(pixels: torch.Tensor, rounding: str = "round") -> torch.Tensor:
    """Pixels in about [0, 1], clamped, as uint8. `rounding`: "round", or "truncate" as the published evaluation."""
    scaled = pixels.float().clamp(0, 1) * 255
    return (scaled.round() if rounding == "round" else scaled).to(torch.uint8)  # the cast truncates


def quantize(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in about [0, 1], clamped and rounded to the 8-bit grid."""
    return to_8bit(pixels).float() / 255


def image_metrics(images: torch.Tensor, reconstructions: torch.Tensor, names: Sequence, perceptual) -> dict:
    """Per-image values (B,) of the metrics `names` for two batches (B, 3, H, W) in [0, 1], 8-bit grid.

    psnr: dB, peak 1, at most PSNR_CAP. ssim: 11 x 11 Gaussian window of sigma 1.5. lpips: `perceptual` on [-1, 1].
    """
    # a second to import: not for --help
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    values = {}
    if "psnr" in names:
        psnr = peak_signal_noise_ratio(reconstructions, images, 1.0, reduction="none", dim=(1, 2, 3))
        values["psnr"] = psnr.clamp(max=PSNR_CAP)
    if "ssim" in names:
        ssim = structural_similarity_index_measure(reconstructions, images, data_range=1.0, reduction="none")
        values["ssim"] = ssim.view(-1)
    if "lpips" in names:
        values["lpips"] = perceptual(2 * images - 1, 2 * reconstructions - 1).view(-1)
    return values


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


def warn_of_numbers(metric: FrechetMetric, count: int) -> None:
    """Say once what makes a Frechet distance of `count` images one that does not compare with others."""
    if metric.warned:
        return
    if count <= metric.width:
        metric.warned = True
        logger.warning(
            f"{metric.name}: {count} images are too few for the covariance of {metric.width} features: the number "
            "depends on how many they are"
        )
    if metric.reference.count not in (None, count):
        metric.warned = True
        logger.warning(f"{metric.name}: {count} images are compared with a reference of {metric.reference.count}")


@torch.no_grad()
def evaluate_reconstructions(
    reconstruct: Callable,
    loader: Iterable,
    names: Sequence,
    accelerator: Accelerator,
    perceptual: Optional[Callable] = None,
    on_unreadable: Callable = lambda names: None,
    frechet: Sequence[FrechetMetric] = (),
    rounding: str = "round",
    on_batch: Callable = lambda index, images, reconstructions: None,
    sharded: bool = False,
) -> Evaluation:
    """Measure `reconstruct` on the images of all processes' loaders. Every process calls this.

    Args:
        reconstruct: (pixels (B, 3, H, W) in [0, 1], index (B,)) to reconstructions of the same shape and range.
        loader: this process's share, batches as data.collate makes them; one may be empty.
        names: per-image metrics, see `image_metrics`.
        perceptual: LPIPS network, for "lpips".
        on_unreadable: called with the names of images that could not be read.
        frechet: distances to measure; those without a reference get one from these images.
        rounding: of reconstructions to 8 bit, see `to_8bit`.
        on_batch: called with index and both sides, uint8 (B, 3, H, W), of each of this process's batches.
        sharded: whether the model is shared out among the processes (FSDP): the loaders then have equally many batches.

    Returns:
        Evaluation; values of a reconstruction that is not finite are nan, and so are then all distances.

    Raises:
        DataError: no image could be read.
    """
    device = accelerator.device
    fake = [metric.new_moments(device) for metric in frechet]
    real = [metric.new_moments(device) if metric.reference is None else None for metric in frechet]
    index, values, broken, unreadable = [], {name: [] for name in names}, [], 0
    for batch in loader:
        on_unreadable(batch["unreadable"])
        unreadable += len(batch["unreadable"])
        empty = len(batch["pixels"]) == 0
        if empty and not sharded:
            continue
        images, image_index = to_device(batch["pixels"], device), batch["index"]
        if empty:  # the other processes wait for this one in each forward pass: it joins in with a black image
            images, image_index = images.new_zeros(1, *images.shape[1:]), image_index.new_zeros(1)
        pixels = images.float() / 255
        output = reconstruct(pixels, image_index)
        finite = output.isfinite().flatten(1).all(1)  # an 8-bit image would hide what is not
        reconstructions = to_8bit(output, rounding)
        features = [
            (metric.features(reconstructions), None if moments is None else metric.features(images))
            for metric, moments in zip(frechet, real, strict=True)
        ]
        if empty:
            continue
        for name, value in image_metrics(pixels, reconstructions.float() / 255, names, perceptual).items():
            values[name].append(value.where(finite, torch.nan))
        broken.append(~finite)
        for (fake_features, real_features), fake_moments, real_moments in zip(features, fake, real, strict=True):
            fake_moments.update(fake_features)
            if real_moments is not None:
                real_moments.update(real_features)
        index.append(image_index)
        on_batch(image_index, images, reconstructions)

    mine = torch.zeros(len(names) + 2, 0, dtype=torch.float64)  # on the CPU: Apple's GPUs have no float64
    if index:
        rows = [torch.cat(index), *(torch.cat(values[name]) for name in names), torch.cat(broken)]
        mine = torch.stack([row.cpu().double() for row in rows])
    gathered = gather_object([(mine, unreadable)])
    everyone = torch.cat([rows for rows, _ in gathered], dim=1)
    everyone = everyone[:, everyone[0].argsort()]  # in the source's order: sums do not depend on the processes
    if everyone.shape[1] == 0:
        raise DataError("data.eval_split: none of the evaluation images can be read")
    complete, finite = not any(count for _, count in gathered), not everyone[-1].any()
    distances = {}
    for metric, fake_moments, real_moments in zip(frechet, fake, real, strict=True):
        fake_moments.merge_processes(accelerator)
        if real_moments is not None:
            real_moments.merge_processes(accelerator)
            metric.reference = reference_of(real_moments, metric.name)
            if metric.cache is not None and complete:
                write_cache(metric)
        if accelerator.is_main_process:
            warn_of_numbers(metric, fake_moments.count)
        distances[metric.name] = distance(fake_moments, metric, accelerator) if finite else math.nan
    return Evaluation(everyone[0].long(), dict(zip(names, everyone[1:-1], strict=True)), distances)
