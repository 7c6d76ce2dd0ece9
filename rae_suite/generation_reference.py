"""What generated images are compared with: ADM's .npz files, images, or a data set, and files that are made of it.

ADM's files hold mean and covariance of the Inception features of the whole training set, `mu`, `sigma` (FID), `mu_s`,
`sigma_s` (sFID), and `arr_0`, 10,000 images that serve precision and recall alone. Where a file has no statistics, they
are those of its images, as in ADM's evaluator. Statistics of the file and of its images never stand side by side for
Inception features: what the file lacks is then left out. Files of this suite also hold `mu_fdd` and `sigma_fdd`, of an
encoder's features, with digests of the networks.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from accelerate import Accelerator

from rae_suite.errors import ConfigError
from rae_suite.files import read_npz
from rae_suite.frechet import Reference, given_reference, reference_of
from rae_suite.generation_metrics import (
    FeatureSpace,
    GenerationReference,
    ImageStatistics,
    measure_images,
)
from rae_suite.image_sets import ArrayImages, CroppedImages, FileImages, ImageSet, SharedArray
from rae_suite.metric_names import DRAWN_METRICS
from rae_suite.precision_recall import NEIGHBOURS
from rae_suite.sources import evenly_spread

STATISTICS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s"), "fdd": ("mu_fdd", "sigma_fdd")}  # names in files
NUM_IMAGES = 10_000  # of a reference that is made, for precision and recall: as many as in ADM's files
EXPECTED = "expected ADM's `mu`, `sigma`, `mu_s`, `sigma_s` and images `arr_0`, or some of them"


@dataclass
class ReferencePlace:
    """A reference that was looked at, and not yet read: the `names` of the arrays in an .npz file, and its images, or
    those of a folder."""

    path: str
    key: str
    images: Optional[ImageSet]
    names: set = field(default_factory=set)

    def in_file(self, distance: str) -> bool:
        """Whether the statistics of a distance stand in the file."""
        return set(STATISTICS[distance]) <= self.names

    def lacks(self, name: str) -> Optional[str]:
        """Why a metric cannot be measured with this reference; None: it can."""
        metric = DRAWN_METRICS[name]
        if metric.needs == "images" and self.images is None:
            return "it has no images `arr_0`"
        if metric.needs == "statistics" and not self.in_file(name):
            if self.images is None:
                return f"it has neither {' and '.join(f'`{part}`' for part in STATISTICS[name])} nor images `arr_0`"
            others = [part for other in ("fid", "sfid") for part in STATISTICS[other] if part in self.names]
            if others and metric.features == "inception":
                return f"it has `{others[0]}` and no `{STATISTICS[name][0]}`, which its images must not replace"
        return None

    def check_has(self, names: Sequence) -> None:
        """Raise ConfigError for a metric that cannot be measured with this reference."""
        for name in names:
            if reason := self.lacks(name):
                raise ConfigError(f"{self.key}: {self.path} does not do for {name}: {reason}")


def open_reference(path: str, key: str, num_workers: int = 0) -> ReferencePlace:
    """Look at a reference: an .npz file or a folder of images of one size. Raises ConfigError, about the setting `key`,
    for anything else."""
    place = Path(path)
    if place.is_dir():
        return ReferencePlace(path, key, FileImages(place, key, num_workers))
    if not place.is_file():
        raise ConfigError(f"{key}: {path} does not exist, expected an .npz file or a folder of images")
    names, _ = read_npz(place, key, (), EXPECTED)
    images = ArrayImages(place, key) if "arr_0" in names else None
    if images is None and not any(set(pair) <= names for pair in STATISTICS.values()):
        raise ConfigError(f"{key}: {path} holds {', '.join(sorted(names))}, {EXPECTED}")
    return ReferencePlace(path, key, images, names)


def given_statistics(place: ReferencePlace, names: Sequence, spaces: Sequence) -> tuple[dict, str]:
    """({distance's name: Reference} of those of the metrics `names` that stand in the file, what the file was made
    from). Raises ConfigError for statistics of other features or networks."""
    distances = [metric for space in spaces for name, metric in space.distances.items() if name in names]
    given = [metric for metric in distances if place.in_file(metric.name)]
    if not place.names:
        return {}, "unknown"
    kinds = [space.kind for space in spaces]
    wanted = ("count", "made_from", *kinds, *(part for metric in given for part in STATISTICS[metric.name]))
    _, arrays = read_npz(Path(place.path), place.key, wanted, EXPECTED)
    for space in spaces:
        check_network(arrays, space, place)
    statistics = {
        metric.name: given_reference(arrays, STATISTICS[metric.name], metric, place.path, place.key) for metric in given
    }
    return statistics, str(arrays.get("made_from", "unknown"))


def read_reference(
    place: ReferencePlace, names: Sequence, spaces: Sequence, accelerator: Accelerator, batch_size: int
) -> GenerationReference:
    """What the metrics `names`, none of which the place lacks, need of it, on the features `spaces`. Every process
    calls this. Raises ConfigError for statistics of other features or networks, and for too few images."""
    statistics, made_from = given_statistics(place, names, spaces)
    features = {}
    computed = [name for name in names if DRAWN_METRICS[name].needs and name not in statistics]
    if computed:
        check_count(place.images.count, computed, f"{place.path} holds", place.key)
        sets = [ImageStatistics(computed, space, place.images.count, accelerator.device) for space in spaces]
        measure_images(place.images, sets, accelerator, batch_size, "reference")
        of_images, features = references_of(sets)
        statistics.update(of_images)
    sources = {name: " and ".join(STATISTICS[name]) if place.in_file(name) else "the images" for name in statistics}
    facts = facts_of(place.path, made_from, place.images, statistics, sources)
    return GenerationReference(statistics, features, facts)


def reference_of_data(
    images: CroppedImages,
    names: Sequence,
    spaces: Sequence,
    accelerator: Accelerator,
    batch_size: int,
    key: str,
    save_to: Optional[Path] = None,
) -> GenerationReference:
    """The reference that a data set is. NUM_IMAGES of its images, spread evenly over them, serve precision and recall.
    With `save_to` it is also written as a file for `open_reference`, and for ADM's evaluator; `names` are then all that
    the features have. Every process calls this.

    Raises ConfigError, about the setting `key`, for too few images, and WriteError.
    """
    chosen = evenly_spread(range(images.count), NUM_IMAGES)
    wanted = [name for name in names if DRAWN_METRICS[name].needs]
    check_count(images.count, wanted, f"{images.name} holds", key)
    sets = [ImageStatistics(wanted, space, images.count, accelerator.device, kept=chosen) for space in spaces]
    array = None if save_to is None else SharedArray(save_to, chosen, images.height, accelerator)
    picked = torch.tensor(chosen)

    def keep(pixels: torch.Tensor, index: torch.Tensor) -> None:
        shown = torch.isin(index, picked)
        if array is not None and shown.any():
            array.add(index[shown], pixels[shown])

    measure_images(images, sets, accelerator, batch_size, "reference", keep)
    check_count(sets[0].count, wanted, f"{images.name} holds", key)  # without unreadable ones
    statistics, features = references_of(sets)
    if array is not None:
        arrays = {"count": np.int64(sets[0].count), "made_from": np.str_(images.name)}
        arrays.update({space.kind: np.str_(space.network) for space in spaces})
        for name, reference in statistics.items():
            arrays.update(zip(STATISTICS[name], (reference.mean, reference.covariance), strict=True))
        array.finish(sets[0].numbers, **arrays)
    facts = facts_of(images.name, images.name, images, statistics, dict.fromkeys(statistics, "the data set"))
    kept = [len(part.numbers) for part in sets if part.keeps]
    return GenerationReference(statistics, features, {**facts, "num_images": max(kept, default=0)})


def references_of(sets: Sequence) -> tuple:
    """({distance's name: Reference}, {kind of features: features}) of merged ImageStatistics."""
    statistics = {name: reference_of(moments, name) for part in sets for name, moments in part.moments.items()}
    return statistics, {part.space.kind: part.features for part in sets if part.keeps}


def check_network(arrays: dict, space: FeatureSpace, place: ReferencePlace) -> None:
    """Raise ConfigError for statistics that another network computed, where the file says so."""
    digest = str(arrays.get(space.kind, space.network))
    if digest != space.network:
        raise ConfigError(
            f"{place.key}: the statistics in {place.path} are of another network, {space.kind} {digest[:12]}, "
            f"expected {space.network[:12]}"
        )


def check_count(count: int, names: Sequence, what: str, key: str) -> None:
    """Raise ConfigError, about the setting `key`, for fewer images than the metrics `names` are defined on. `what`: how
    the sentence "... n images" begins."""
    needs = {"images": NEIGHBOURS + 1, "statistics": 2}
    needed = max([needs.get(DRAWN_METRICS[name].needs, 1) for name in names], default=1)
    if count < needed:
        raise ConfigError(f"{key}: {what} {count} images, expected at least {needed} for {', '.join(names)}")


def facts_of(path: str, made_from: str, images: Optional[ImageSet], statistics: dict, sources: dict) -> dict:
    """What the results say of a reference: where it is, what it was made from, and for each distance the source of mean
    and covariance, the number of images in them (None: unknown) and their digest, the same for the same statistics."""
    described = {
        name: {"from": sources[name], "num_images": reference.count, "sha256": digest_of(reference)}
        for name, reference in statistics.items()
    }
    size = "unknown" if images is None else [images.height, images.width]
    count = 0 if images is None else images.count
    return {"path": path, "made_from": made_from, "statistics": described, "image_size": size, "num_images": count}


def digest_of(reference: Reference) -> str:
    """SHA-256 of a mean and a covariance."""
    return hashlib.sha256(reference.mean.tobytes() + reference.covariance.tobytes()).hexdigest()
