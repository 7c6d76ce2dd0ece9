"""Exact mean and variance of a stream, in constant memory, merged over processes."""

from typing import Optional

import torch
from accelerate import Accelerator


class Moments:
    """Running mean and variance of samples of one shape, in float64.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), so the result does not depend on the
    order, the batch size or the number of processes beyond rounding (about 1e-12 relative).

    Args:
        shape: of one sample; for `covariance`, (D,).
        covariance: keep the D x D matrix instead of the elementwise variance.
        device: where to accumulate, by default on the CPU. Apple's GPUs have no float64: the CPU is used for them.
    """

    def __init__(self, shape: tuple, covariance: bool = False, device: Optional[torch.device] = None):
        device = torch.device("cpu") if device is None or device.type == "mps" else device
        self.count = 0
        self.covariance = covariance
        self.mean = torch.zeros(shape, dtype=torch.float64, device=device)
        squares = (*shape, *shape) if covariance else shape
        self._squares = torch.zeros(squares, dtype=torch.float64, device=device)  # sum of squared deviations

    def _product(self, deviations: torch.Tensor) -> torch.Tensor:
        """Sum over the samples (B, ...) of the squares, or of the outer products."""
        return deviations.T @ deviations if self.covariance else deviations.square().sum(0)

    def update(self, values: torch.Tensor) -> None:
        """Add samples (B, *shape); B may be 0."""
        if len(values) == 0:
            return
        values = values.to(self.mean.device).double()
        mean = values.mean(0)
        self.merge(len(values), mean, self._product(values - mean))

    def merge(self, count: int, mean: torch.Tensor, squares: torch.Tensor) -> None:
        """Add `count` samples of this mean and sum of squared deviations from it, float64."""
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self._squares += squares
        self._squares += self._product(delta[None]) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def squares(self) -> torch.Tensor:
        """Sum of the squared deviations from the mean, shape (*shape), or of their outer products (D, D)."""
        return self._squares

    def merge_processes(self, accelerator: Accelerator) -> None:
        """Replace the moments of this process's samples by those of all processes'. Every process calls this."""
        if accelerator.num_processes == 1:
            return
        total = accelerator.reduce(self.mean.new_tensor([self.count]), "sum").item()
        mean = accelerator.reduce(self.mean * self.count, "sum") / max(total, 1)
        self._squares += self._product((self.mean - mean)[None]) * self.count
        self._squares = accelerator.reduce(self._squares, "sum")
        self.mean, self.count = mean, int(total)

    def variance(self, correction: int = 0) -> torch.Tensor:
        """Variance, shape (*shape), or covariance (D, D), divided by count - correction (0: that of a population)."""
        return self._squares / (self.count - correction)
