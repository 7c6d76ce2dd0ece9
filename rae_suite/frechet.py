"""Frechet distances between images and their reconstructions: rFID on Inception features, rFDD on an encoder's.

The distance itself, the Inception network's interface and the resize are clean-fid's (arXiv 2104.11222); what is
written here is the accumulation in constant memory over many processes. Images are uint8 (B, 3, H, W) on both sides.

    rfid        Inception of 2015, resized inside the network, not antialiased: clean-fid's `legacy_tensorflow`, the
                mode that published RAE figures compare with
    rfid_clean  the same network, antialiased resize: clean-fid's `clean`. Never to be mixed with the other
    rfdd        a frozen encoder's patch tokens, mean over the grid
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub.constants import HF_HOME
from PIL import Image
from torch import nn

from rae_suite.digests import latents_digest
from rae_suite.errors import ConfigError, RunError
from rae_suite.files import NPZ_ERRORS, read_npz
from rae_suite.image_sets import ArrayImages
from rae_suite.inception import INCEPTION_WIDTH, load_inception
from rae_suite.launch import cores_of_process
from rae_suite.metric_names import FID_MODES
from rae_suite.moments import Moments
from rae_suite.sources import ImageSource

logger = logging.getLogger(__name__)

DEFAULT_CACHE = Path(HF_HOME) / "rae_references"


@dataclass
class Reference:
    """Mean (D,) and covariance (D, D) of the reference images' features, float64; `count` of images, None: unknown."""

    mean: np.ndarray
    covariance: np.ndarray
    count: Optional[int]


@dataclass(frozen=True)
class FrechetMetric:
    """One distance. `features` maps images, uint8 (B, 3, H, W), to (B, width); `network` identifies it in the cache."""

    name: str
    features: Callable
    width: int
    network: str

    def new_moments(self, device: torch.device) -> Moments:
        return Moments((self.width,), covariance=True, device=device)


@dataclass
class References:
    """What distances are measured to, by the metric's name. An evaluation computes those that are not `known` from its
    own images and keeps them: here, and on the main process in the metric's file if it has one."""

    known: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)

    def keep(self, name: str, reference: Reference, whole: bool) -> None:
        """`whole`: whether it is of all images; one of a part is not written."""
        self.known[name] = reference
        if whole and name in self.files:
            write_cache(self.files[name], name, reference)


class FrechetMeasurement:
    """One distance while an evaluation goes through the images of one process."""

    def __init__(self, metric: FrechetMetric, reference: Optional[Reference], device: torch.device):
        self.metric, self.reference = metric, reference
        self.fake = metric.new_moments(device)
        self.real = metric.new_moments(device) if reference is None else None

    def update(self, images: torch.Tensor, reconstructions: torch.Tensor, count: bool = True) -> None:
        """Add a batch, uint8 (B, 3, H, W) each; without `count` only its features are computed."""
        fake = self.metric.features(reconstructions)
        real = None if self.real is None else self.metric.features(images)
        if count:
            self.fake.update(fake)
            if real is not None:
                self.real.update(real)

    def merge_processes(self, accelerator: Accelerator) -> None:
        """Join what all processes have, and make a reference where there was none. Every process calls this."""
        self.fake.merge_processes(accelerator)
        if self.real is not None:
            self.real.merge_processes(accelerator)
            self.reference = self.made_reference()

    def made_reference(self) -> Reference:
        """The reference that the images stand for, after their moments were merged."""
        return reference_of(self.real, self.metric.name)

    def distance(self, accelerator: Accelerator) -> float:
        """To be called after merge_processes, by every process."""
        return distance(self.fake, self.reference, self.metric, accelerator)

    def warnings(self) -> list:
        """What makes this distance one that does not compare with others."""
        count = self.fake.count
        texts = few_images_warning(self.metric, count)
        if self.reference.count not in (None, count):
            texts.append(f"{self.metric.name}: {count} images are compared with a reference of {self.reference.count}")
        return texts


def few_images_warning(metric: FrechetMetric, count: int) -> list:
    """What to say of a distance of `count` images, none or one text."""
    if count > metric.width:
        return []
    text = f"{metric.name}: {count} images are too few for the covariance of {metric.width} features: "
    return [text + "the number depends on how many they are"]


def reference_of(moments: Moments, name: str) -> Reference:
    """The reference that merged moments stand for. Raises RunError for a single image: it has no covariance."""
    if moments.count < 2:
        raise RunError(f"{name}: {moments.count} images, a Frechet distance needs at least 2")
    return Reference(moments.mean.cpu().numpy(), moments.variance(correction=1).cpu().numpy(), moments.count)


def distance(moments: Moments, theirs: Reference, metric: FrechetMetric, accelerator: Accelerator) -> float:
    """Frechet distance of merged moments to a reference, computed once and told to all processes."""
    result = [None]
    if accelerator.is_main_process:
        from cleanfid.fid import frechet_distance  # slow to import

        ours = reference_of(moments, metric.name)
        few = any(side.count is not None and side.count <= metric.width for side in (ours, theirs))
        compute = frechet_distance_of_few if few else frechet_distance
        result = [float(compute(ours.mean, ours.covariance, theirs.mean, theirs.covariance))]
    return broadcast_object_list(result)[0]


def frechet_distance_of_few(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) for covariances of fewer samples than features.

    The matrix root in clean-fid's frechet_distance is not defined for such a singular product: it takes half a minute
    and may end in an imaginary number. With C = R R^T, tr sqrt(C1 C2) is the sum of the singular values of R1^T R2.
    """
    from scipy.linalg.lapack import dpstrf  # slow to import

    def root(covariance: np.ndarray) -> np.ndarray:
        factor, pivots, rank, _ = dpstrf(covariance, lower=1)  # Cholesky with pivoting, which stops at the rank
        rows = np.empty((len(covariance), rank))
        rows[pivots - 1] = np.tril(factor)[:, :rank]
        return rows

    overlap = np.linalg.svd(root(cov1).T @ root(cov2), compute_uv=False).sum()
    return np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * overlap


# --------------------------------------------------------------------------------------------------------------------
# Feature networks
# --------------------------------------------------------------------------------------------------------------------


def inception_metrics(names: list, path: Optional[str], key: str, accelerator: Accelerator) -> list:
    """A FrechetMetric for each of `names`, see FID_MODES; one network serves them all. Raises as `load_inception`."""
    if not names:
        return []
    from cleanfid.resize import build_resizer  # slow to import

    with accelerator.local_main_process_first():  # one download
        network, digest = load_inception(path, key, accelerator.device)
    clean_resize = build_resizer("clean")
    pool = ThreadPoolExecutor(cores_of_process(accelerator))  # Pillow resizes without the interpreter's lock

    def resized(images: torch.Tensor) -> torch.Tensor:
        arrays = pool.map(clean_resize, images.permute(0, 2, 3, 1).cpu().numpy())  # (299, 299, 3) each, float32
        return torch.from_numpy(np.stack(list(arrays))).permute(0, 3, 1, 2)

    @torch.no_grad()
    def features(images: torch.Tensor, mode: str) -> torch.Tensor:
        network.resize_inside = mode == "legacy_tensorflow"
        pixels = images.float() if network.resize_inside else resized(images)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 changes the third digit of a feature
            return network(pixels.to(accelerator.device))

    return [
        FrechetMetric(name, lambda images, mode=FID_MODES[name]: features(images, mode), INCEPTION_WIDTH, digest)
        for name in names
    ]


def encoder_metric(
    tokens: Callable, model: nn.Module, width: int, accelerator: Accelerator, name: str = "rfdd"
) -> FrechetMetric:
    """rfdd, or fdd of drawn images: `tokens` maps pixels (B, 3, S, S) in [0, 1] to the grid (B, width, h, w) of the
    frozen encoder of `model`."""

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        return tokens(images.to(accelerator.device).float() / 255).float().mean((2, 3))

    return FrechetMetric(name, features, width, latents_digest(model))


# --------------------------------------------------------------------------------------------------------------------
# References: cached, or given as a file
# --------------------------------------------------------------------------------------------------------------------


def cached_references(
    metrics: list,
    source: ImageSource,
    num_samples: Optional[int],
    image_size: int,
    accelerator: Accelerator,
    folder: Path = DEFAULT_CACHE,
) -> References:
    """The references of `metrics` that are in the cache, the same on all processes, and, on the main one, a place for
    those that are not there. The reference are the images that eval_loader gives of `source`."""
    if not metrics:
        return References()
    found, files = {}, {}
    if accelerator.is_main_process:
        images = f"{source.fingerprint()} {num_samples} centre crop {image_size}"  # looks at every file
        for metric in metrics:
            key = json.dumps([metric.name, metric.network, images, Image.__version__])
            file = folder / f"{metric.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
            files[metric.name], reference = file, read_cache(file)
            if reference is not None:
                found[metric.name] = reference
    [found] = broadcast_object_list([found])
    return References(found, files)


def read_cache(file: Path) -> Optional[Reference]:
    """The reference that `write_cache` has put there, or None."""
    if not file.exists():
        return None
    try:
        with np.load(file) as arrays:
            return Reference(arrays["mu"], arrays["sigma"], int(arrays["count"]))
    except NPZ_ERRORS as error:
        logger.warning(f"{file} is damaged ({error}), the reference is computed again")
        return None


def write_cache(file: Path, name: str, reference: Reference) -> None:
    """Keep a reference, in clean-fid's names: the file is also good for `--reference`."""
    beside = file.with_name(f".{file.stem}-{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(beside, mu=reference.mean, sigma=reference.covariance, count=reference.count)
        beside.replace(file)
    except OSError as error:
        logger.warning(f"the reference of {name} is not kept for another time: {error}")


def read_references(path: str, metrics: list, accelerator: Accelerator, batch_size: int, key: str) -> References:
    """The references of `metrics` from a file: `mu` and `sigma`, as clean-fid and ADM write them, or images `arr_0`,
    uint8 (N, H, W, 3). The features of one kind are of no use to another: mu and sigma serve a single metric.

    Raises ConfigError, about the setting `key`, for a file of another kind.
    """
    expected = "expected `mu` and `sigma`, or uint8 images `arr_0` (N, H, W, 3)"
    names, given = read_npz(Path(path), key, ("mu", "sigma", "count"), expected)
    if {"mu", "sigma"} <= names and len(metrics) == 1:
        reference = given_reference(given, ("mu", "sigma"), metrics[0], path, key)
        return References({metrics[0].name: reference})
    if "arr_0" not in names:
        several = f" for each of {len(metrics)} distances" if {"mu", "sigma"} <= names else ""
        raise ConfigError(f"{key}: {path} holds {', '.join(sorted(names))}, {expected}{several}")
    moments = [metric.new_moments(accelerator.device) for metric in metrics]
    pictures = ArrayImages(Path(path), key)
    for images, _ in pictures.batches(batch_size, accelerator.process_index, accelerator.num_processes):
        for metric, running in zip(metrics, moments, strict=True):
            running.update(metric.features(images))
    references = References()
    for metric, running in zip(metrics, moments, strict=True):
        running.merge_processes(accelerator)
        if running.count < 2:
            raise ConfigError(f"{key}: {path} holds {running.count} images, expected at least 2")
        references.known[metric.name] = reference_of(running, metric.name)
    return references


def given_reference(arrays: dict, names: tuple, metric: FrechetMetric, path: str, key: str) -> Reference:
    """The mean and covariance called `names` among the arrays of a file, checked, with `count` if the file has it.

    Raises ConfigError, about the setting `key`, for statistics that are not of the metric's features.
    """
    mean, covariance = (arrays[name] for name in names)
    name, both = names[0], " and ".join(names)
    if mean.shape != (metric.width,) or covariance.shape != mean.shape * 2:
        raise ConfigError(
            f"{key}: {name} in {path} has shape {mean.shape}, the features of {metric.name} ({metric.width},)"
        )
    if not all(values.dtype.kind == "f" for values in (mean, covariance)):
        found = f"{mean.dtype}, {covariance.dtype}"
        raise ConfigError(f"{key}: {both} in {path} are {found}, expected floating-point numbers")
    if not all(np.isfinite(values).all() for values in (mean, covariance)):
        raise ConfigError(f"{key}: {path} holds values that are not finite")
    count = arrays.get("count")  # this suite's files have it; somebody else's may mean something else
    count = int(count) if count is not None and count.ndim == 0 and count.dtype.kind == "i" else None
    return Reference(mean.astype(np.float64), covariance.astype(np.float64), count)
