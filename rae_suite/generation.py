"""Images drawn by a stage-2 model: noise of each image, latents, 8-bit pixels. A command and an evaluation in training
draw the same ones.

The noise of an image is a function of the seed and the image's index. What batch it is drawn in, and by which process,
changes its pixels only as far as matrix products of another shape are summed in another order.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Optional

import torch

from rae_suite.errors import RunError
from rae_suite.flow import guidance_is_on, guided_velocity, sample_ode, sampling_times
from rae_suite.metrics import to_8bit
from rae_suite.randomness import SAMPLE_STREAM, seeded_generator
from rae_suite.settings_dit import SamplingConfig


def image_noise(indices: Sequence, shape: Sequence, seed: int) -> torch.Tensor:
    """Standard normal noise (B, *shape) of the images `indices`, float32 on the CPU: the same for every device."""
    return torch.stack([torch.randn(shape, generator=seeded_generator(seed, SAMPLE_STREAM, i)) for i in indices])


def draw_latents(
    transformer: torch.nn.Module,
    labels: torch.Tensor,
    noise: torch.Tensor,
    sampling: SamplingConfig,
    shift: float,
    guide: Optional[torch.nn.Module] = None,
) -> torch.Tensor:
    """Normalised latents (B, C, h, w) of classes `labels` (B,) from `noise` (B, C, h, w), float32.

    Args:
        transformer, guide: RAEDiTModels in eval mode; the guide is used where guidance is on. Of `sampling.guide`, a
            name, only "off" is looked at: the transformer's base head is no guide then.
        labels, noise: on the transformer's device.
        shift: factor of flow.shift_times.

    Raises:
        ValueError: classifier-free guidance of a model that was trained without it.
    """
    scale, interval, internal = sampling.guidance_scale, sampling.guidance_interval, sampling.guide != "off"
    velocity = guided_velocity(transformer, guide, labels, scale, interval, internal)
    times = sampling_times(sampling.num_inference_steps, shift, sampling.end)
    return sample_ode(velocity, noise, times, sampling.solver)


def count_passes(sampling: SamplingConfig, shift: float, kind: str) -> dict:
    """Passes of the model, and of the guide, for each image: two of the model where classifier-free guidance is on.
    `kind`: the guidance, as modeling_dit.guidance_kind names it."""
    times = sampling_times(sampling.num_inference_steps, shift, sampling.end)
    calls = times[:-1] if sampling.solver == "euler" else torch.cat([times[:-1], times[1:]])
    guided = sum(guidance_is_on(t, sampling.guidance_scale, sampling.guidance_interval) for t in calls)
    twice = guided if kind == "classifier-free guidance" else 0
    return {"model": len(calls) + twice, "guide": guided if kind == "autoguidance" else 0}


@torch.no_grad()
def draw_images(
    transformer: torch.nn.Module,
    rae: torch.nn.Module,
    labels: torch.Tensor,
    indices: Sequence,
    seed: int,
    sampling: SamplingConfig,
    shift: float,
    guide: Optional[torch.nn.Module] = None,
    rounding: str = "truncate",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """Images, uint8 (B, 3, H, W) on the models' device.

    Args:
        transformer, rae, guide: on one device and in eval mode; see `draw_latents`.
        labels: (B,) class indices.
        indices: the images' numbers, which with the seed decide their noise.
        rounding: to 8 bit: "truncate" as published, or "round".
        autocast: makes the context of the models' precision (an accelerator's `autocast`).

    Raises:
        RunError: pixels that are not finite, with the image's number: in 8 bit they would look like an image.
    """
    device, config = rae.device, transformer.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = image_noise(indices, shape, seed).to(device)
    with autocast():
        latents = draw_latents(transformer, labels.to(device), noise, sampling, shift, guide)
        pixels = rae.decode(latents).sample.float()
    broken = ~pixels.isfinite().flatten(1).all(1)
    if broken.any():
        message = f"image {indices[broken.nonzero()[0].item()]} has pixels that are not finite"
        raise RunError(message, everywhere=True)
    return to_8bit(pixels, rounding)
