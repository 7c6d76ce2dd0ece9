"""What a stage-2 run measures while it goes on: the loss on held-out images, and how far drawn images are from them."""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator

from rae_suite.flow import interpolate, velocity_loss, velocity_target
from rae_suite.frechet import FrechetMeasurement, FrechetMetric, Reference, References
from rae_suite.labels import Classes
from rae_suite.launch import to_device
from rae_suite.metrics import gather_rows
from rae_suite.randomness import EVAL_STREAM, seeded_generator

FIXED_TIMES = 4  # at which the loss on held-out images is measured: the middles of as many parts of the distribution


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
    """Mean loss over all images at FIXED_TIMES times, with noise that is a function of the seed, the image and the
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
    """
    names = [f"loss_time{k + 1}" for k in range(FIXED_TIMES)]
    rows, unreadable = [], 0
    for batch in loader:
        on_unreadable(batch["unreadable"])
        unreadable += len(batch["unreadable"])
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
            t = times(torch.full((len(latents),), (k + 0.5) / FIXED_TIMES, device=latents.device))
            with accelerator.autocast():
                predicted = model(interpolate(latents, noise, t), t, labels).sample
            row[name] = velocity_loss(predicted, velocity_target(latents, noise))
        if not empty:
            rows.append(row)
    table, _ = gather_rows(rows, ["index", *names], unreadable)
    means = {name: table[name].mean().item() for name in names}
    return {"num_samples": len(table["index"]), "loss": sum(means.values()) / FIXED_TIMES, **means}


def image_noise(like: torch.Tensor, seed: int, index: int, k: int) -> torch.Tensor:
    """Noise of image `index` at the k-th time, float32 on the device of `like`, whose shape (C, h, w) it has."""
    return torch.randn(like.shape, generator=seeded_generator(seed, EVAL_STREAM, index, k)).to(like.device)


def reference_of_images(
    metric: FrechetMetric, references: References, loader: Iterable, accelerator: Accelerator, on_unreadable: Callable
) -> Reference:
    """What distances of drawn images are measured to: the features of the loader's images, kept in `references`. Every
    process calls this."""
    if metric.name not in references.known:
        measurement, unreadable = FrechetMeasurement(metric, None, accelerator.device), 0
        for batch in loader:
            on_unreadable(batch["unreadable"])
            unreadable += len(batch["unreadable"])
            if len(batch["pixels"]):
                measurement.real.update(metric.features(to_device(batch["pixels"], accelerator.device)))
        unreadable = accelerator.reduce(torch.tensor(unreadable, device=accelerator.device), "sum").item()
        measurement.real.merge_processes(accelerator)
        references.keep(metric.name, measurement.made_reference(), whole=unreadable == 0)
    return references.known[metric.name]


@torch.no_grad()
def distance_of_drawn(
    draw: Callable,
    labels: torch.Tensor,
    batch_size: int,
    metric: FrechetMetric,
    reference: Reference,
    accelerator: Accelerator,
) -> float:
    """Frechet distance of drawn images to the reference. Every process calls this, and draws its share in equally many
    batches.

    Args:
        draw: labels (B,) and the images' indices, a list, to uint8 images (B, 3, H, W).
        labels: of all images, (N,).
    """
    world, rank, count = accelerator.num_processes, accelerator.process_index, len(labels)
    measurement = FrechetMeasurement(metric, reference, accelerator.device)
    for start in range(0, -(-count // world), batch_size):
        places = [place * world + rank for place in range(start, min(start + batch_size, -(-count // world)))]
        mine = [place for place in places if place < count]  # the last of a process may be one too many
        images = draw(labels[[min(place, count - 1) for place in places]], [min(place, count - 1) for place in places])
        if mine:
            measurement.fake.update(metric.features(images[: len(mine)]))
    measurement.merge_processes(accelerator)
    return measurement.distance(accelerator)
