"""Flow matching as pure functions: times, noisy latents, loss and label dropout of a training step, and sampling.

Time runs from 0 (data) to 1 (noise): x_t = (1 - t) * data + t * noise, with the velocity noise - data as the target
(rectified flow, arXiv 2209.03003). Sources: Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690)
and its published code, whose order of draws and of float operations is kept.

Sampling is implemented in modeling_dit.py, because the pipeline there travels without this folder; scripts take it from
here.
"""

import math
from typing import NamedTuple, Optional

import torch

from modeling_dit import (
    LEAST_TIME,
    RAEDiTOutput,
    autoguidance_velocity,
    cfg_velocity,
    guidance_is_on,
    guidance_kind,
    guide,
    guided_velocity,
    internal_velocity,
    predict_velocity,
    sample_ode,
    sampling_times,
    shift_times,
)
from rae_suite.randomness import FLOW_STREAM, seeded_generator
from rae_suite.settings_dit import parse_time_distribution

__all__ = [
    "Draws",
    "autoguidance_velocity",
    "cfg_velocity",
    "default_shift",
    "draw",
    "draw_by_place",
    "drop_labels",
    "guidance_is_on",
    "guidance_kind",
    "guide",
    "guided_velocity",
    "internal_velocity",
    "interpolate",
    "parse_time_distribution",
    "predict_velocity",
    "prediction_loss",
    "sample_ode",
    "sampling_times",
    "shift_factor",
    "shift_times",
    "training_times",
    "velocity_loss",
    "velocity_target",
]

MAX_TIME = 0.999  # of training: times above are not drawn


# Times ----------------------------------------------------------------------------------------------------------------


def shift_factor(dim: int, base: int = 4096) -> float:
    """Factor s = sqrt(dim / base) of `shift_times` for latents of `dim` = C * h * w numbers (RAE paper, section on the
    dimension-dependent noise schedule). Raises ValueError for s below 1, which would shift towards data."""
    if base < 1 or dim < base:
        raise ValueError(f"dim ({dim}) must be at least base ({base}), and base at least 1")
    return math.sqrt(dim / base)


def default_shift(dim: int, base: int = 4096) -> float:
    """`shift_factor`, and 1, no shift, for latents of fewer than `base` numbers."""
    return shift_factor(dim, base) if dim >= base else 1.0


def training_times(u: torch.Tensor, distribution: str, shift: float = 1.0) -> torch.Tensor:
    """Training times (B,) from uniform numbers u (B,) in [0, 1), on their device.

    "uniform": 0.999 u. "logit-normal_M_S": the sigmoid of a normal with mean M and standard deviation S, truncated to
    times up to 0.999 through the inverse of its distribution function. Then `shift_times`.
    """
    parameters = parse_time_distribution(distribution)
    if parameters is None:
        return shift_times(MAX_TIME * u, shift)
    mean, std = parameters
    highest = (math.log(MAX_TIME / (1 - MAX_TIME)) - mean) / std
    p = u * (0.5 * (1 + math.erf(highest / math.sqrt(2))))
    normal = torch.erfinv(2 * p - 1) * math.sqrt(2)  # not ndtri: it differs in the last bits from what was published
    return shift_times(torch.sigmoid(mean + std * normal).clamp(0, MAX_TIME), shift)


# The training step ----------------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """All randomness of a training step: noise (B, C, h, w), and uniform numbers (B,) in [0, 1) for times and for label
    dropout."""

    noise: torch.Tensor
    u_time: torch.Tensor
    u_drop: torch.Tensor


def draw(latents: torch.Tensor, generator: Optional[torch.Generator] = None) -> Draws:
    """The draws of a step on `latents` (B, C, h, w), in the published order: noise, times, label dropout. With a
    `generator`, which lives on the latents' device, all come from it; without one, from torch's global generators, the
    uniform numbers for times from the CPU's, as published."""
    batch, device = latents.shape[0], latents.device
    noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype, device=device)
    u_time = torch.rand(batch, generator=generator, device="cpu" if generator is None else device)
    u_drop = torch.rand(batch, generator=generator, device=device)
    return Draws(noise, u_time, u_drop)


def draw_by_place(latents: torch.Tensor, first: int, seed: int, step: int) -> Draws:
    """The draws of a step for latents (B, C, h, w) that have the places first, first + 1, ... in the global batch. Each
    sample's are a function of (seed, step, place): a batch that is split over micro-batches and processes has the
    same."""
    draws = []
    for i in range(len(latents)):
        generator = seeded_generator(seed, FLOW_STREAM, step, first + i, device=latents.device)
        draws.append(draw(latents[i : i + 1], generator))
    return Draws(*map(torch.cat, zip(*draws, strict=True)))


def interpolate(data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Noisy latents x_t = (1 - t) * data + t * noise, (B, C, h, w), from times (B,)."""
    t = t.view(-1, *[1] * (data.ndim - 1))  # (B, 1, 1, 1)
    return (1 - t) * data + t * noise


def velocity_target(
    data: torch.Tensor, noise: torch.Tensor, t: Optional[torch.Tensor] = None, prediction: str = "velocity"
) -> torch.Tensor:
    """What the model's velocity learns to be, (B, C, h, w): noise - data at every time. For a model whose `prediction`
    is "data", it is (x_t - data) / max(t, LEAST_TIME) as in RAEv2, which is smaller at times t (B,) below that; only
    then is `t` needed."""
    if prediction == "velocity":
        return noise - data
    share = (t / LEAST_TIME).clamp_max(1).view(-1, *[1] * (data.ndim - 1))  # (B, 1, 1, 1)
    return (noise - data) * share


def velocity_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, (B, C, h, w) to (B,), in float32. The step's loss is the mean over the batch,
    without weights for times."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


def prediction_loss(output: RAEDiTOutput, target: torch.Tensor) -> torch.Tensor:
    """The loss that a step minimises, of each sample (B,): `velocity_loss`, plus that of the base head if there is one
    (RAEv2, with weight 1)."""
    loss = velocity_loss(output.sample, target)
    return loss if output.base_sample is None else loss + velocity_loss(output.base_sample, target)


def drop_labels(labels: torch.Tensor, u_drop: torch.Tensor, probability: float, null_label: int) -> torch.Tensor:
    """Labels (B,) of which each is replaced by `null_label` where its uniform number is below `probability`."""
    return torch.where(u_drop < probability, null_label, labels)
