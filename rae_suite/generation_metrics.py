"""Metrics of generated images: FID, sFID, Inception Score, precision and recall, as ADM's evaluator defines them.

    space = inception_space(None, "eval.inception_path", accelerator)
    place = open_reference(path, "eval.reference")                        # see rae_suite/generation_reference.py
    reference = read_reference(place, names, [space], accelerator, batch_size)
    statistics = ImageStatistics(names, space, num_images, accelerator.device)
    for images, index in ...:                             # in any order, by any process, in batches of any size
        statistics.update(images, index)
    statistics.merge_processes(accelerator)
    values = generation_metrics(statistics, reference, accelerator)

ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py) needs TensorFlow and all features in memory. Here
the network is NVIDIA's translation of the same graph, means and covariances are accumulated in float64 (ADM sums means
in float32, which moves an FID by less than 0.0003), and only precision and recall keep features. The distance is
clean-fid's: scipy's matrix root, with ADM's rule for one that is not finite; of fewer images than features it is
computed by rank. The same on a frozen encoder's features has names of its own: fdd, precision_encoder, recall_encoder.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from accelerate import Accelerator

from rae_suite.autoencoders import Autoencoder
from rae_suite.cli import require
from rae_suite.frechet import FrechetMetric, distance, encoder_metric, few_images_warning
from rae_suite.image_sets import ImageSet
from rae_suite.inception import INCEPTION_WIDTH, SPATIAL_WIDTH, load_inception_parts
from rae_suite.launch import data_errors_end_this_process, progress_bar
from rae_suite.metric_names import DRAWN_METRICS
from rae_suite.precision_recall import precision_and_recall

logger = logging.getLogger(__name__)

SCORE_CHUNK = 5_000  # images of a part of the Inception Score
SHUFFLE_SEED = 2020  # torch-fidelity's


@dataclass(frozen=True)
class FeatureSpace:
    """The features that images are compared on.

    `kind`: "inception" or "encoder". `distances`: {name: FrechetMetric} of those that are defined on them. `features`
    maps images, uint8 (B, 3, H, W), to {distance's name: (B, width)} in the same order; precision, recall and `logits`
    take the first ones. `network`: a digest of the network's weights.
    """

    kind: str
    distances: dict
    features: Callable
    network: str
    logits: Optional[Callable] = None

    @property
    def main(self) -> FrechetMetric:
        return next(iter(self.distances.values()))


def inception_space(path: Optional[str], key: str, accelerator: Accelerator) -> FeatureSpace:
    """Pooled (FID) and spatial (sFID) Inception features. Arguments and errors as of
    `inception.load_inception_parts`."""
    with accelerator.local_main_process_first():  # one download
        parts = load_inception_parts(path, key, accelerator.device)
    widths = {"fid": INCEPTION_WIDTH, "sfid": SPATIAL_WIDTH}
    distances = {name: FrechetMetric(name, None, width, parts.digest) for name, width in widths.items()}

    def features(images: torch.Tensor) -> dict:
        return dict(zip(widths, parts.features(images.to(accelerator.device)), strict=True))

    return FeatureSpace("inception", distances, features, parts.digest, parts.logits)


def encoder_space(model: Autoencoder, accelerator: Accelerator) -> FeatureSpace:
    """Mean patch tokens of the model's frozen encoder. Raises ConfigError for a model without one."""
    model.to(accelerator.device)
    with torch.no_grad():
        width = model.tokens(torch.zeros(1, 3, model.image_size, model.image_size, device=accelerator.device)).shape[1]
    metric = encoder_metric(model.tokens, model.model, width, accelerator, name="fdd")
    return FeatureSpace("encoder", {"fdd": metric}, lambda images: {"fdd": metric.features(images)}, metric.network)


def build_spaces(
    names: Sequence, inception_path: Optional[str], key: str, encoder: Optional[Autoencoder], accelerator: Accelerator
) -> list:
    """The features that the metrics `names` are of. `inception_path`, of the setting `key`: see `inception_space`;
    `encoder` is needed for its own metrics alone."""
    kinds = {DRAWN_METRICS[name].features for name in names}
    spaces = [inception_space(inception_path, key, accelerator)] if "inception" in kinds else []
    return spaces + ([encoder_space(encoder, accelerator)] if "encoder" in kinds else [])


def check_encoder_takes(encoder: Autoencoder, images: ImageSet) -> None:
    """Raise ConfigError, about the images' setting, for images of a size or shape that the encoder does not take."""
    size = f"{images.width} x {images.height} pixels"
    require(images.height == images.width, images.key, f"square images, as {encoder.name} takes them", size)
    encoder.check_size(images.height, images.key)


def warn_of_few(names: Sequence, spaces: Sequence, count: int) -> None:
    """Say which distances of `count` images depend on how many they are."""
    for space in spaces:
        for metric in [metric for name, metric in space.distances.items() if name in names]:
            for text in few_images_warning(metric, count):
                logger.warning(text)


class InceptionScore:
    """exp of the mean KL divergence of each image's classes from all images', in consecutive chunks of 5,000 images;
    the score is the mean over the chunks (Salimans et al., arXiv 1606.03498).

    Sums are kept for each chunk, not probabilities: mean KL = mean of sum p log p, less sum q log q of the mean q.
    `count` images are numbered from 0. The order decides the chunks: images sorted by class would ruin the score.
    `shuffled` deals them to chunks by torch-fidelity's permutation instead.
    """

    def __init__(self, count: int, classes: int, shuffled: bool = False, chunk: int = SCORE_CHUNK):
        places = np.arange(count)
        if shuffled:
            places[np.random.RandomState(SHUFFLE_SEED).permutation(count)] = np.arange(count)
        self.chunks = torch.from_numpy(places // chunk)
        # by chunk: sums of the probabilities, the sum of their p log p, the number of images
        self.sums = torch.zeros(-(-count // chunk), classes + 2, dtype=torch.float64)

    def update(self, logits: torch.Tensor, index: torch.Tensor) -> None:
        """Add images with logits (B, classes) and numbers `index` (B,)."""
        log_p = logits.cpu().double().log_softmax(1)
        p = log_p.exp()
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones(len(p), 1, dtype=torch.float64)], dim=1)
        self.sums.index_add_(0, self.chunks[index.cpu()], rows)

    def merge_processes(self, accelerator: Accelerator) -> None:
        """Join what all processes have. Every process calls this."""
        if accelerator.num_processes > 1:
            self.sums = accelerator.reduce(self.sums.to(accelerator.device), "sum").cpu()

    def score(self) -> float:
        """The mean over the chunks that have images, after merge_processes."""
        sums = self.sums[self.sums[:, -1] > 0]
        q = sums[:, :-2] / sums[:, -1:]
        mean_kl = sums[:, -2] / sums[:, -1] - torch.special.xlogy(q, q).sum(1)
        return mean_kl.exp().mean().item()


class ImageStatistics:
    """What metrics need of one set of images, while they go by: moments in constant memory, and features of each image
    for precision and recall alone.

    Args:
        names: metrics, see DRAWN_METRICS; those of other features are left aside.
        space: the features.
        count: images of the set, numbered from 0.
        device: where moments are accumulated.
        kept: numbers of the images whose features are kept; none: all.
        shuffled: see InceptionScore.
    """

    def __init__(
        self,
        names: Sequence,
        space: FeatureSpace,
        count: int,
        device: torch.device,
        kept: Optional[Sequence] = None,
        shuffled: bool = False,
    ):
        self.names = [name for name in names if DRAWN_METRICS[name].features == space.kind]
        self.space = space
        self.moments = {n: metric.new_moments(device) for n, metric in space.distances.items() if n in self.names}
        self.keeps = any(DRAWN_METRICS[name].needs == "images" for name in self.names)
        self.kept = None if kept is None else torch.as_tensor(kept)
        self.score = None
        if "is" in self.names:
            classes = space.logits(torch.zeros(1, space.main.width, device=device)).shape[1]
            self.score = InceptionScore(count, classes, shuffled)
        self.batches = []  # of (numbers, features) of kept images
        # once merged: the kept images' numbers (N,), increasing, and features (N, width); how many images there were
        self.numbers: Optional[torch.Tensor] = None
        self.features: Optional[torch.Tensor] = None
        self.count = 0

    def update(self, images: torch.Tensor, index: torch.Tensor) -> None:
        """Add images, uint8 (B, 3, H, W), with the numbers `index` (B,)."""
        features = self.space.features(images)
        main = features[self.space.main.name]
        for name, moments in self.moments.items():
            moments.update(features[name])
        if self.score is not None:
            self.score.update(self.space.logits(main), index)
        if self.keeps:
            chosen = slice(None) if self.kept is None else torch.isin(index.cpu(), self.kept)
            self.batches.append((index.cpu()[chosen], main.float().cpu()[chosen]))
        self.count += len(images)

    def merge_processes(self, accelerator: Accelerator) -> None:
        """Join what all processes have. Every process calls this, once."""
        for moments in self.moments.values():
            moments.merge_processes(accelerator)
        if self.score is not None:
            self.score.merge_processes(accelerator)
        if self.keeps:
            nothing = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.space.main.width))
            parts = zip(nothing, *self.batches, strict=True)
            numbers, features = (torch.cat(part).to(accelerator.device) for part in parts)
            self.batches = []
            if accelerator.num_processes > 1:  # they have different numbers of images: shorter ones are filled up
                features = accelerator.gather(accelerator.pad_across_processes(features))
                numbers = accelerator.gather(accelerator.pad_across_processes(numbers, pad_index=-1))
                features, numbers = features[numbers >= 0], numbers[numbers >= 0]
            order = numbers.argsort()
            self.numbers, self.features = numbers[order].cpu(), features[order]
        self.count = int(accelerator.reduce(torch.tensor(self.count, device=accelerator.device), "sum"))


def measure_images(
    images: ImageSet,
    statistics: Sequence,
    accelerator: Accelerator,
    batch_size: int,
    name: str,
    on_batch: Callable = lambda pixels, index: None,
) -> None:
    """Fill the ImageStatistics of all features with the images, and merge them. Every process calls this. `name` is
    that of the progress bar; `on_batch` gets pixels and index of each of this process's batches.

    Raises RunError where one process finds an image that cannot be read."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    bar = progress_bar(images.batches(batch_size, rank, world_size), accelerator, name)
    bar.total = -(-images.count // (batch_size * world_size))
    with data_errors_end_this_process(accelerator):
        for pixels, index in bar:
            for part in statistics:
                part.update(pixels, index)
            on_batch(pixels, index)
    for part in statistics:
        part.merge_processes(accelerator)


@dataclass
class GenerationReference:
    """What generated images are compared with: `statistics` {distance's name: Reference}; `features` {kind of features:
    (M, width)} of single images, for precision and recall; `facts` of where they come from, for the results."""

    statistics: dict
    features: dict
    facts: dict


def generation_metrics(
    statistics: ImageStatistics,
    reference: Optional[GenerationReference],
    accelerator: Accelerator,
    float16: bool = False,
) -> dict:
    """The metrics that the statistics were made for, by name. Every process calls this, after merge_processes.

    `reference`: None is enough for the Inception Score. `float16`: whether distances for precision and recall are
    rounded as in ADM's evaluator."""
    space, values = statistics.space, {}
    for name, moments in statistics.moments.items():
        values[name] = distance(moments, reference.statistics[name], space.distances[name], accelerator)
    if statistics.score is not None:
        values["is"] = statistics.score.score()
    if statistics.keeps:
        both = precision_and_recall(reference.features[space.kind], statistics.features, accelerator, float16)
        ending = "" if space.kind == "inception" else "_encoder"
        values.update({f"precision{ending}": both[0], f"recall{ending}": both[1]})
    return {name: values[name] for name in statistics.names}
