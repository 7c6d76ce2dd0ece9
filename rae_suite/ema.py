"""Exponential moving average of a module's parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rae_suite.sharding import load_tensors_into


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, which may be sharded; in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """Shadow copy of a module's parameters, float32, ema = decay * ema + (1 - decay) * parameter.

    Only parameters are averaged; buffers are constants (rotary tables). Frozen parameters are kept too, so that a state
    dict of them is whole.
    With `warmup` the decay rises to its value as min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = False):
        self.module, self.decay, self.warmup = module, decay, warmup
        self.shadow = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    def decay_of(self, step: int) -> float:
        """Decay of the 0-based `step`."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def lags(self, steps: int) -> bool:
        """Whether the weights that training began with still count for more than 5 % of the average after `steps`."""
        share = 1.0
        for step in range(steps):
            share *= self.decay_of(step)
            if share <= 0.05:
                return False
        return True

    @torch.no_grad()
    def update(self, step: int, unless: Optional[torch.Tensor] = None) -> None:
        """Take the 0-based `step` towards the module's present parameters, `unless` this bool scalar on their device is
        true: the host does not need to know."""
        shadow = [_local(tensor) for tensor in self.shadow.values()]
        parameters = [_local(p.detach()).float() for p in self.module.parameters()]
        decay, weight = (
            torch.full((), value, dtype=torch.float32, device=shadow[0].device)
            for value in (self.decay_of(step), 1 - self.decay_of(step))
        )
        if unless is not None:
            decay.masked_fill_(unless, 1)
            weight.masked_fill_(unless, 0)
        # The published order. The same sum as one lerp is rounded differently, and with a decay near 1 the average
        # moves by few float32 steps: after 8 steps at 0.9995 the change of a norm's weights was 8 % off.
        torch._foreach_mul_(shadow, decay)
        torch._foreach_addcmul_(shadow, parameters, [weight] * len(shadow))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the module computes with the averaged parameters. Its own are kept beside them, which
        takes no more memory than the gradients of a training step."""
        parameters = [p.detach() for p in self.module.parameters()]
        kept = [p.clone() for p in parameters]
        self._copy(self.shadow.values(), parameters)
        try:
            yield
        finally:
            self._copy(kept, parameters)

    @staticmethod
    def _copy(values: Iterable, parameters: list) -> None:
        """In place: FSDP gathers a sharded parameter from the memory that it was given."""
        for value, parameter in zip(values, parameters, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict:
        return dict(self.shadow)

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError on other names or shapes."""
        load_tensors_into(self.shadow, state, "EMA state")
