"""Reconstruction metrics: PSNR, SSIM and LPIPS, each the mean of per-image values, on one or many processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Optional

import torch
from accelerate import Accelerator
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from data import DataError

PSNR_CAP = 100.0  # dB, for an image that is reconstructed exactly: a mean must stay finite
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False}


def quantize(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in about [0, 1], clamped and rounded to the 8-bit grid."""
    return (pixels.float().clamp(0, 1) * 255).round() / 255


def image_metrics(images: torch.Tensor, reconstructions: torch.Tensor, names: Sequence, perceptual) -> dict:
    """Per-image values (B,) of the metrics `names` for two batches (B, 3, H, W) in [0, 1], 8-bit grid.

    psnr: dB, peak 1, at most PSNR_CAP. ssim: 11 x 11 Gaussian window of sigma 1.5. lpips: `perceptual` on [-1, 1].
    """
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


@torch.no_grad()
def evaluate_reconstructions(
    reconstruct: Callable,
    loader: Iterable,
    names: Sequence,
    accelerator: Accelerator,
    perceptual: Optional[Callable] = None,
    on_unreadable: Callable = lambda names: None,
) -> dict:
    """Mean metrics of `reconstruct` over the images of all processes' loaders, each image counted once.

    Args:
        reconstruct: pixels (B, 3, H, W) in [0, 1] to reconstructions of the same shape and range.
        loader: this process's share, batches as data.collate makes them; one may be empty.
        names: metrics, see `image_metrics`.
        perceptual: LPIPS network, for "lpips".
        on_unreadable: called with the names of images that could not be read.

    Returns:
        dict of `num_samples` and the metrics' means.

    Raises:
        DataError: no image could be read.
    """
    sums = torch.zeros(1 + len(names), dtype=torch.float64)  # on the CPU: Apple's GPUs have no float64
    for batch in loader:
        on_unreadable(batch["unreadable"])
        if len(batch["pixels"]) == 0:
            continue
        images = batch["pixels"].to(accelerator.device).float() / 255  # already on the 8-bit grid
        values = image_metrics(images, quantize(reconstruct(images)), names, perceptual)
        sums[0] += len(images)
        sums[1:] += torch.stack([values[name].cpu().double().sum() for name in names])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum")
    total, *means = sums.tolist()
    if total == 0:
        raise DataError("data.eval_split: none of the evaluation images can be read")
    return {"num_samples": int(total), **{name: mean / total for name, mean in zip(names, means, strict=True)}}
