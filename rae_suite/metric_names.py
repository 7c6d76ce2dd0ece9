"""The metrics of reconstructions and of stage 2, a row each. Settings, evaluations, best_metric, curves, results and
cards take them from here, so a new metric is a new row. Imports nothing that takes time: settings are made from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

PSNR_CAP = 100.0  # dB, for an image that is reconstructed exactly: a mean must stay finite


def psnr(reconstructions: Any, images: Any, perceptual: Optional[Callable]) -> Any:
    from torchmetrics.functional.image import peak_signal_noise_ratio  # a second: not for --help

    values = peak_signal_noise_ratio(reconstructions, images, 1.0, reduction="none", dim=(1, 2, 3))
    return values.clamp(max=PSNR_CAP)


def ssim(reconstructions: Any, images: Any, perceptual: Optional[Callable]) -> Any:
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(reconstructions, images, data_range=1.0, reduction="none").view(-1)


def ms_ssim(reconstructions: Any, images: Any, perceptual: Optional[Callable]) -> Any:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    values = multiscale_structural_similarity_index_measure(reconstructions, images, data_range=1.0, reduction="none")
    return values.view(-1)


def lpips(reconstructions: Any, images: Any, perceptual: Optional[Callable]) -> Any:
    return perceptual(2 * images - 1, 2 * reconstructions - 1).view(-1)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        title: as tables and cards name it.
        higher_is_better: its direction.
        panel: title of the panel of curves that it is drawn in.
        of_images: function of reconstructions, images, (B, 3, H, W) in [0, 1] on the 8-bit grid, and LPIPS's network,
            that gives a value for each image (B,); None for a Frechet distance.
        fid_mode: how clean-fid calls the resize before Inception; None where it plays no part.
        least_size: side in pixels of the smallest images that it is defined for.
    """

    title: str
    higher_is_better: bool
    panel: str
    of_images: Optional[Callable] = None
    fid_mode: Optional[str] = None
    least_size: int = 1


SIMILARITY, DISTANCE = "SSIM and LPIPS", "Frechet distances"
METRICS = {
    # peak 1, at most PSNR_CAP
    "psnr": Metric("PSNR (dB)", True, "PSNR in dB", psnr),
    # 11 x 11 Gaussian window of sigma 1.5
    "ssim": Metric("SSIM", True, SIMILARITY, ssim),
    # five scales (Wang et al. 2003); torchmetrics asks for a side of 176 pixels, though its error says 161
    "ms_ssim": Metric("MS-SSIM", True, SIMILARITY, ms_ssim, least_size=176),
    # 0.1 on VGG16 (arXiv 1801.03924)
    "lpips": Metric("LPIPS", False, SIMILARITY, lpips),
    # resized inside the network, not antialiased: what published figures compare with
    "rfid": Metric("rFID (legacy_tensorflow)", False, DISTANCE, fid_mode="legacy_tensorflow"),
    # resized with antialiasing: another number, never to be mixed with the one before
    "rfid_clean": Metric("rFID (clean)", False, DISTANCE, fid_mode="clean"),
    # on the frozen encoder's patch tokens, mean over the grid
    "rfdd": Metric("Frechet distance on the encoder's features", False, DISTANCE),
}


def metric_of(name: str) -> Metric:
    """The row of a metric, whose name may be that in a set of eval.sets: faces/psnr."""
    return METRICS[name.rpartition("/")[2]]


@dataclass(frozen=True)
class GenerationMetric:
    """One metric of stage 2.

    Attributes:
        title, higher_is_better, panel: as a Metric's.
        features: "inception" or "encoder", what drawn images are compared on; "" for what is no metric of them.
        needs: of a reference, "statistics" (mean and covariance), "images" (features of single ones) or nothing ("").
    """

    title: str
    higher_is_better: bool
    panel: str
    features: str = ""
    needs: str = ""


COVERAGE = "precision and recall"
GENERATION_METRICS = {
    # of the velocity, mean over the fixed times
    "loss": GenerationMetric("loss on held-out images", False, "loss on held-out images"),
    # as ADM's evaluator defines them
    "fid": GenerationMetric("FID", False, DISTANCE, "inception", "statistics"),
    "sfid": GenerationMetric("sFID", False, DISTANCE, "inception", "statistics"),
    "is": GenerationMetric("Inception Score", True, "Inception Score", "inception"),
    "precision": GenerationMetric("precision", True, COVERAGE, "inception", "images"),
    "recall": GenerationMetric("recall", True, COVERAGE, "inception", "images"),
    # the same on the frozen encoder's patch tokens, mean over the grid
    "fdd": GenerationMetric("FDD (encoder's features)", False, DISTANCE, "encoder", "statistics"),
    "precision_encoder": GenerationMetric("precision (encoder)", True, COVERAGE, "encoder", "images"),
    "recall_encoder": GenerationMetric("recall (encoder)", True, COVERAGE, "encoder", "images"),
}
# those of drawn images
DRAWN_METRICS = {name: metric for name, metric in GENERATION_METRICS.items() if metric.features}
IMAGE_METRICS = tuple(name for name, metric in METRICS.items() if metric.of_images is not None)
FID_MODES = {name: metric.fid_mode for name, metric in METRICS.items() if metric.fid_mode is not None}


def too_small_for(names: tuple, size: int) -> list:
    """Those of the metrics that images of `size` x `size` pixels are too small for."""
    return [name for name in names if name in METRICS and size < METRICS[name].least_size]
