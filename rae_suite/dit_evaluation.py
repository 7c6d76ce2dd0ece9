"""What a stage-2 run measures while it goes on: the loss on held-out images, and metrics of drawn ones."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Optional, Union

import torch
from accelerate import Accelerator

from rae_suite.autoencoders import Autoencoder
from rae_suite.errors import DataError
from rae_suite.flow import interpolate, velocity_loss, velocity_target
from rae_suite.generation_metrics import (
    GenerationReference,
    ImageStatistics,
    build_spaces,
    check_encoder_takes,
    generation_metrics,
    measure_images,
    warn_of_few,
)
from rae_suite.generation_reference import (
    check_count,
    given_statistics,
    open_reference,
    read_reference,
    reference_of_data,
)
from rae_suite.image_sets import CroppedImages, ImageSet
from rae_suite.labels import Classes
from rae_suite.launch import to_device
from rae_suite.loaders import chosen_images
from rae_suite.metric_names import DRAWN_METRICS
from rae_suite.metrics import gather_rows
from rae_suite.randomness import EVAL_STREAM, seeded_generator
from rae_suite.settings import ImagesConfig
from rae_suite.settings_dit import DiTEvalConfig, DrawnEvalConfig
from rae_suite.sources import ImageSource, SubsetSource

# at which the loss on held-out images is measured: the middles of as many parts of the distribution
NUM_FIXED_TIMES = 4


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module,
    encode: Callable,
    loader: Iterable,
    classes: Classes,
    times: Callable,
    seed: int,
    accelerator: Accelerator,
    on_unreadable: Callable,
    sharded: bool,
) -> dict:
    """Mean loss over all images at NUM_FIXED_TIMES times, with noise that is a function of the seed, the image and the
    time: a curve of it shows the model alone, where the training loss shows the draws as well. Every process calls
    this.

    Args:
        model: in eval mode, its labels never dropped.
        encode: pixels (B, 3, S, S) in [0, 1] to latents (B, C, h, w).
        loader: this process's share, batches as loaders.collate makes them; one may be empty.
        classes: of the images.
        times: uniform numbers (B,) to times, as training draws them.
        sharded: whether the model is shared out among the processes (FSDP), which then all have equally many batches.

    Returns:
        `loss`; `loss_time1`, ... at each time, from data to noise; `num_samples`.

    Raises:
        DataError: no image can be read.
    """
    names = [f"loss_time{k + 1}" for k in range(NUM_FIXED_TIMES)]
    rows = []
    for batch in loader:
        on_unreadable(batch["unreadable"])
        empty = len(batch["pixels"]) == 0
        if empty and not sharded:
            continue
        pixels, index, labels = to_device(batch["pixels"], accelerator.device), batch["index"], batch["label"]
        if empty:  # the other processes wait for this one in each forward pass: it joins in with a black image
            pixels, index, labels = pixels.new_zeros(1, *pixels.shape[1:]), index.new_zeros(1), labels.new_zeros(1)
        latents, labels = encode(pixels.float() / 255), classes.of(labels).to(accelerator.device)
        row = {"index": index}
        for k, name in enumerate(names):
            noise = torch.stack([image_noise(latents[0], seed, i, k) for i in index.tolist()])
            t = times(torch.full((len(latents),), (k + 0.5) / NUM_FIXED_TIMES, device=latents.device))
            with accelerator.autocast():
                predicted = model(interpolate(latents, noise, t), t, labels).sample
            row[name] = velocity_loss(predicted, velocity_target(latents, noise, t, model.config.prediction))
        if not empty:
            rows.append(row)
    table, _ = gather_rows(rows, ["index", *names])
    if len(table["index"]) == 0:
        raise DataError("data.eval_split: none of the evaluation images can be read")
    means = {name: table[name].mean().item() for name in names}
    return {"num_samples": len(table["index"]), "loss": sum(means.values()) / NUM_FIXED_TIMES, **means}


def image_noise(like: torch.Tensor, seed: int, index: int, k: int) -> torch.Tensor:
    """Noise of image `index` at the k-th time, float32 on the device of `like`, whose shape (C, h, w) it has."""
    return torch.randn(like.shape, generator=seeded_generator(seed, EVAL_STREAM, index, k)).to(like.device)


@dataclass
class Comparison:
    """How a run's drawn images are measured: the `metrics`, the features that these are of, and what gives the
    reference, which is read when it is first needed."""

    metrics: list
    spaces: list
    read: Callable[[], Optional[GenerationReference]]
    reference: Optional[GenerationReference] = None


def open_comparison(
    settings: Union[DiTEvalConfig, DrawnEvalConfig],
    count: tuple[int, str],
    batch_size: int,
    num_workers: int,
    rae: Autoencoder,
    accelerator: Accelerator,
    held_out: Optional[CroppedImages] = None,
) -> Comparison:
    """What drawn images are compared with: `settings.reference`, else the images `held_out`, if there are any.

    Args:
        count: how many are drawn, and the setting that says so.
        rae: whose encoder's features are meant.

    Raises:
        ConfigError: a reference that does not do for the metrics, too few images, or an Inception network that cannot
            be had.
    """
    metrics, place = [name for name in settings.metrics if name in DRAWN_METRICS], None
    if settings.reference is not None:
        place = open_reference(settings.reference, "eval.reference", num_workers)
        place.check_has(metrics)
        if place.images is not None and any(DRAWN_METRICS[name].features == "encoder" for name in metrics):
            check_encoder_takes(rae, place.images)
    check_count(count[0], metrics, "the samples are", count[1])
    if held_out is not None and place is None:
        check_count(held_out.count, metrics, "the evaluation has", "data.eval_split")
    spaces = build_spaces(metrics, settings.inception_path, "eval.inception_path", rae, accelerator)
    if accelerator.is_main_process:
        warn_of_few(metrics, spaces, count[0])
    common = (metrics, spaces, accelerator, batch_size)
    if place is not None:
        given_statistics(place, metrics, spaces)  # of other networks or damaged: not to be found after hours of drawing
        return Comparison(metrics, spaces, partial(read_reference, place, *common))
    if held_out is not None:
        return Comparison(metrics, spaces, partial(reference_of_data, held_out, *common, "data.eval_split"))
    return Comparison(metrics, spaces, lambda: None)  # the Inception Score needs none


def run_comparison(
    settings: DiTEvalConfig, data: ImagesConfig, held_out: ImageSource, rae: Autoencoder, accelerator: Accelerator
) -> Comparison:
    """How a run measures its drawn images: as `open_comparison`, with the run's held-out images."""
    chosen = SubsetSource(held_out, chosen_images(held_out, settings.num_samples))
    images = CroppedImages(chosen, f"{len(chosen)} held-out images", "data", rae.image_size, data)
    count = (settings.num_generated, "eval.num_generated")
    return open_comparison(settings, count, settings.batch_size, data.num_workers, rae, accelerator, images)


def measure_set(comparison: Comparison, images: ImageSet, accelerator: Accelerator, batch_size: int) -> dict:
    """The comparison's metrics of images in files, by name. Every process calls this."""
    comparison.reference = comparison.reference or comparison.read()
    sets = [ImageStatistics(comparison.metrics, space, images.count, accelerator.device) for space in comparison.spaces]
    measure_images(images, sets, accelerator, batch_size, "measured")
    return values_of(sets, comparison, accelerator)


@torch.no_grad()
def measure_drawn(
    comparison: Comparison, draw: Callable, labels: torch.Tensor, batch_size: int, accelerator: Accelerator
) -> dict:
    """The comparison's metrics of the images that are drawn now, and `num_generated`. Every process calls this, and
    draws its share in equally many batches.

    Args:
        draw: labels (B,) and the images' indices, a list, to uint8 images (B, 3, H, W).
        labels: of all images, (N,).
    """
    comparison.reference = comparison.reference or comparison.read()
    world, rank, count = accelerator.num_processes, accelerator.process_index, len(labels)
    sets = [ImageStatistics(comparison.metrics, space, count, accelerator.device) for space in comparison.spaces]
    for start in range(0, -(-count // world), batch_size):
        places = [place * world + rank for place in range(start, min(start + batch_size, -(-count // world)))]
        mine = [place for place in places if place < count]  # the last of a process may be one too many
        images = draw(labels[[min(place, count - 1) for place in places]], [min(place, count - 1) for place in places])
        for part in sets if mine else ():
            part.update(images[: len(mine)], torch.tensor(mine))
    for part in sets:
        part.merge_processes(accelerator)
    return {**values_of(sets, comparison, accelerator), "num_generated": count}


def values_of(sets: list, comparison: Comparison, accelerator: Accelerator) -> dict:
    """The comparison's metrics of merged statistics, by name."""
    values = {}
    for part in sets:
        values |= generation_metrics(part, comparison.reference, accelerator)
    return values
