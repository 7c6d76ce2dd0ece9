"""The optimizers of stage 2: AdamW, or Muon for the matrices with AdamW for all else.

Muon (https://kellerjordan.github.io/posts/muon/) is torch's. RAEv2's recipe names the package `gram_newton_schulz`. Its
update is the same but for how a matrix is made orthogonal: each of its five Newton-Schulz iterations has coefficients
of its own (Polar Express, arXiv 2505.16932) and works on the Gram matrix, while torch's five have one triple (3.4445,
-4.7750, 2.0315) and work on the matrix in bfloat16. Both leave singular values that are only about 1, torch's further
from it. As there, momentum is Nesterov's, every parameter of two dimensions is a matrix (the label table and learnt
tokens too; kernels of patch embeddings, with four, are not), and the step is scaled by 0.2 sqrt(longer side), so that
AdamW's learning rate fits (arXiv 2502.16982).
"""

import re
from collections.abc import Iterable

import torch
from torch import nn

from rae_suite.errors import ConfigError
from rae_suite.settings_dit import DiTOptimizerConfig


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for `matrices` and a fused AdamW for `others`, as one optimizer: two groups of parameters, one
    state. Where `found_inf`, a scalar on the device, is 1, a step changes nothing, as with the fused AdamW alone."""

    found_inf = None

    def __init__(self, matrices: Iterable, others: Iterable, settings: DiTOptimizerConfig):
        common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        muon = torch.optim.Muon(matrices, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw", **common)
        adamw = torch.optim.AdamW(others, betas=settings.betas, eps=settings.eps, fused=True, **common)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.muon, self.adamw = muon, adamw

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for part, group in zip((self.muon, self.adamw), self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # loading a state replaces both
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        if self.found_inf is None:
            self.muon.step()
        else:
            self._step_muon_unless(self.found_inf.bool())

    def _step_muon_unless(self, failed: torch.Tensor) -> None:
        """Muon's step, undone where `failed`: torch's Muon cannot leave a step out without the host knowing."""
        matrices = [p for p in self.muon.param_groups[0]["params"] if p.grad is not None]
        for p in matrices:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            # the momentum's mean with itself is itself
            p.grad.copy_(torch.where(failed, state["momentum_buffer"], p.grad))
        before = [p.clone() for p in matrices]
        self.muon.step()
        for p, kept in zip(matrices, before, strict=True):
            p.copy_(torch.where(failed, kept, p))


def is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2


def check_optimizer(settings: DiTOptimizerConfig, sharded: bool) -> None:
    """Raise ConfigError for Muon on a sharded model: each process would have to see whole matrices."""
    if settings.type == "muon" and sharded:
        raise ConfigError("optimizer.type: muon does not work with FSDP2, expected adamw, or data parallelism (DDP)")


def build_optimizer(model: nn.Module, settings: DiTOptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if settings.type == "muon":
        return MuonWithAdamW(filter(is_matrix, trained), [p for p in trained if not is_matrix(p)], settings)
    return torch.optim.AdamW(trained, settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True)


def optimizer_lines(model: nn.Module, settings: DiTOptimizerConfig) -> list:
    """Which parameters Muon has and which AdamW, in short; nothing where AdamW has all."""
    if settings.type == "adamw":
        return []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lines = []
    for title, wanted in (("Muon", True), ("AdamW", False)):
        mine = {name: p for name, p in trained.items() if is_matrix(p) == wanted}
        kinds = ", ".join(dict.fromkeys(map(kind_of, mine)))
        lines.append(f"{title}: {len(mine)} tensors, {sum(p.numel() for p in mine.values()) / 1e6:.2f}M, {kinds}")
    return lines


def kind_of(name: str) -> str:
    """A parameter's name without the numbers of blocks; biases and norms are one kind each."""
    if name.endswith(".bias"):
        return "biases"
    return "norms" if "norm" in name.split(".")[-2] else re.sub(r"\.\d+\.", ".*.", name)
