"""One update of a network: its learning rate, its gradient's norm, and a step that is not taken where a number is not
finite. The host does not wait for the device anywhere here; `StepRecord.read` is where it does."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rae_suite.settings import LRScheduleConfig


def learning_rate(step: int, peak: float, schedule: LRScheduleConfig, steps_per_epoch: int) -> float:
    """Learning rate of the 0-based `step`: a function of the step alone, so there is no scheduler to save."""
    warmup, end = decay_steps(schedule, steps_per_epoch)
    if step < warmup:
        return peak * ((step + 1) / warmup if schedule.warmup_from_zero else 1.0)
    if schedule.type == "constant":
        return peak
    final = schedule.final_lr / peak
    if step >= end:
        return peak * final
    progress = (step - warmup) / (end - warmup)
    if schedule.type == "linear":
        return peak * (1 - (1 - final) * progress)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def stretched(schedule: LRScheduleConfig, steps: int) -> LRScheduleConfig:
    """The schedule, with the end of its decay after that many steps where it is to end with the run."""
    return replace(schedule, decay_end_step=steps) if schedule.stretch else schedule


def starting_step(step: Optional[int], epoch: float, steps_per_epoch: int) -> int:
    """The step at which something begins: as given, else that of the epoch."""
    return round(epoch * steps_per_epoch) if step is None else step


def decay_steps(schedule: LRScheduleConfig, steps_per_epoch: int) -> tuple[int, int]:
    """Steps at which the warm-up and the decay end."""
    warmup, end = schedule.warmup_steps, schedule.decay_end_step
    warmup = int(schedule.warmup_epochs * steps_per_epoch) if warmup is None else warmup
    return warmup, max(warmup, int(schedule.decay_end_epoch * steps_per_epoch) if end is None else end)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def no_sync_except_last(accelerator: Accelerator, network: nn.Module, i: int, count: int) -> Any:
    """Context of the backward pass of micro-batch `i` of `count`: processes exchange gradients in the last one only."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(i == count - 1)
        return nullcontext()
    return nullcontext() if i == count - 1 else accelerator.no_sync(network)


def gradient_norm(parameters: Iterable) -> torch.Tensor:
    """Norm of all gradients together; of sharded ones the whole norm, on every process."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def mean_over_micro_batches(terms: list) -> dict:
    """Means of scalar tensors by name, from a dictionary of them for each micro-batch."""
    vectors = [torch.stack([value.float() for value in values.values()]) for values in terms]
    mean = sum(vectors[1:], vectors[0]) / len(terms)  # in the order of the micro-batches
    return dict(zip(terms[0], mean.unbind(), strict=True))


def mean_over_processes(accelerator: Accelerator, values: dict) -> dict:
    """Means of scalar tensors by name over all processes, in one vector on the device. nan and inf reach all."""
    mean = accelerator.reduce(torch.stack([value.float() for value in values.values()]), "mean")
    return dict(zip(values, mean.unbind(), strict=True))


@dataclass
class Update:
    """What an update of a network came to. All tensors are scalars on the device: nothing here waits for them."""

    values: dict  # by name, means over micro-batches and processes
    finite: dict  # bool, of those that must be finite, in the order in which they are named
    failed: torch.Tensor  # bool, the same on all processes: something here or in an update before is not finite
    rate: dict  # name and value of the learning rate


class StepRecord:
    """The numbers of a step, on their way from the device to the host, which goes on meanwhile."""

    def __init__(self, step: int, updates: list, absent: Iterable = ()):
        """`absent`: names that the record has in any case, with None, because an update may not have been made."""
        self.step, self.absent = step, absent
        self.layout = [(list(update.values), list(update.finite), update.rate) for update in updates]
        numbers = [part for update in updates for part in (update.values, update.finite)]
        values = torch.cat([torch.stack(list(part.values())) for part in numbers])
        # from a CUDA GPU into pinned memory; from others, whose copies could not be waited for, at once
        self.values = values.to("cpu", non_blocking=values.is_cuda)
        self.arrived = torch.cuda.Event() if values.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> dict:
        """Wait for the numbers.

        Returns:
            dict of all updates' values and learning rates by name; `step`, 1-based; `stop`, whether some process was
            asked to stop; and `nonfinite`: the name of a value that is nan or inf, or None.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers = iter(self.values.tolist())
        record = {"step": self.step}
        for names, watched, rate in self.layout:
            record |= {**{name: next(numbers) for name in names}, **rate}
            finite = {name: next(numbers) for name in watched}
            record["nonfinite"] = next((name for name in watched if not finite[name]), None)
            if record["nonfinite"] is not None:
                break  # the updates after it changed nothing
        record["stop"] = record["stop"] > 0
        return record | {name: None for name in self.absent if name not in record}


def apply_update(
    accelerator: Accelerator,
    optimizer: Any,
    values: dict,
    watched: Iterable,
    norm: str,
    rate: dict,
    failed: Union[bool, torch.Tensor] = False,
) -> Update:
    """Take the optimizer's step unless a number is not finite.

    Args:
        values: see Update.
        watched: names of those that must be finite, beside the gradient's norm.
        norm: name of the gradient's norm.
        rate: see Update.
        failed: whether an update before this one was not made.
    """
    scaler = accelerator.scaler
    finite = torch.stack([values[name] for name in (*watched, norm)]).isfinite()
    # The fused kernel leaves parameters, moments and step counts alone where found_inf is 1. We do not call
    # scaler.step: its only input here is whether a gradient is inf or nan, which the norm already shows.
    fused = optimizer.optimizer
    fused.found_inf = (failed | ~finite.all()).float()
    fused.step()
    fused.found_inf = None
    if scaler is not None:
        # an fp16 overflow is normal while the scale is above 1: the scaler halves it and the step is skipped silently
        finite[-1] |= scaler.scale(torch.ones_like(values[norm])) >= 1
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    named = dict(zip((*watched, norm), finite.unbind(), strict=True))
    return Update(values, named, failed | ~finite.all(), rate)
