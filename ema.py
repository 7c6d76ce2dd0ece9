"""Exponential moving average of a module's parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from checkpointing import fill


class EMA:
    """Shadow copy of a module's parameters, float32, ema = decay * ema + (1 - decay) * parameter.

    Only parameters are averaged: the decoder has no buffers. Frozen ones are kept too, so that a state dict is whole.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module = module
        self.decay = decay
        self.shadow = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the module's present parameters."""
        parameters = [p.detach().float() for _, p in self.module.named_parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - self.decay)

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
        fill(self.shadow, state, "EMA state")
