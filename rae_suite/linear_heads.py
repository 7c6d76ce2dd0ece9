"""Linear classifiers on cached features: many heads trained at once, chosen on held-out images, saved and loaded."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from rae_suite.cli import ALL_AT_LEAST_0, ALL_POSITIVE, DISTINCT, POSITIVE, Limit, setting
from rae_suite.errors import ConfigError, RunError
from rae_suite.features import Features, progress
from rae_suite.files import write_folder
from rae_suite.moments import Moments
from rae_suite.settings import FEW_TASKS, SEED

MOMENTUM = 0.9
MOST_WIDENINGS = 8  # of a sweep whose best setting is at its edge

SELECTION_STREAM, ORDER_STREAM = 3, 4  # second words of seeds, as in rae_suite/randomness.py

HEAD_KEYS = {
    "classes", "features", "image_size", "model", "weights", "seed", "holdout_fraction", "lr", "weight_decay",
    "num_train_samples",
}  # fmt: skip  # of a head's config.json

SELECTION = Limit(lambda value: 0 < value < 1, "a number in (0, 1)")


@dataclass
class HeadTrainingConfig:
    """The heads: SGD with Nesterov momentum 0.9, cosine decay to zero, weights and biases from zero."""

    lrs: tuple[float, ...] = setting((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), ALL_POSITIVE, DISTINCT)
    """Peak learning rates to try, for features of variance 1; beyond the first and the last where these are the best:
    wide features take smaller ones."""
    weight_decays: tuple[float, ...] = setting((1e-5, 1e-4), ALL_AT_LEAST_0, DISTINCT)
    """Factors of half the squared weights in the loss to try, each with each learning rate; larger ones too where the
    last is the best."""
    selection_fraction: float = setting(0.1, SELECTION)
    """Share of the training images, the same of every class, that the choice is made on; in (0, 1)."""
    epochs: float = setting(10, POSITIVE)
    """Length of training in epochs."""
    min_steps: int = setting(2000, POSITIVE)
    """Steps that are taken at least: small data sets are gone through more often."""
    batch_size: int = setting(1024, POSITIVE)
    """Images of one step; all if they are fewer."""
    seed: int = setting(0, SEED)
    """Seed of data.holdout_fraction, of the selection part and of the order of the images."""
    cpu_threads: Optional[int] = setting(None, POSITIVE, FEW_TASKS)
    """Threads of each process on a CPU; none: the machine's cores shared out among its processes."""


def hold_out(labels: torch.Tensor, fraction: float, seed: int) -> tuple:
    """Rows of `labels` in two parts, (to train on, held out): floor(N * fraction) are held out, of each class its share
    to within one image. Raises ConfigError when a part would be empty."""
    order = np.random.default_rng((seed, SELECTION_STREAM)).permutation(len(labels))
    order = order[np.argsort(labels.numpy()[order], kind="stable")]  # by class, shuffled within each
    steps = np.floor(np.arange(len(labels) + 1) * fraction + 1e-9)  # the small number is for 10 * 0.1 and the like
    held = steps[1:] > steps[:-1]  # one in every 1 / fraction of that order
    if held.all() or not held.any():
        raise ConfigError(
            f"train.selection_fraction: {fraction} of {len(labels)} training images leaves {held.sum()} to choose on "
            f"and {(~held).sum()} to train on, expected some of both"
        )
    return torch.from_numpy(np.sort(order[~held])), torch.from_numpy(np.sort(order[held]))


class LinearHead(nn.Module):
    """A linear classifier of K classes: logits = ((features - mean) / std) @ weight.T + bias.

    weight (K, D), bias (K,), mean and std (D,) of the training features, all float32. `config` has `classes`, the names
    in the order of the logits; `features`, their kind; `image_size`, `model`, `weights` and `seed` of its training; the
    chosen `lr` and `weight_decay`; and the figures that were measured.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, config: dict):
        super().__init__()
        for name, tensor in (("weight", weight), ("bias", bias), ("mean", mean), ("std", std)):
            self.register_buffer(name, tensor.contiguous())
        self.config = config

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, D) to logits (B, K)."""
        return F.linear((features.float() - self.mean) / self.std, self.weight, self.bias)

    def save(self, folder: Path) -> None:
        """Write head.safetensors and config.json, both or neither."""

        def write(beside: Path) -> None:
            beside.mkdir()
            save_file(self.state_dict(), beside / "head.safetensors")
            (beside / "config.json").write_text(json.dumps(self.config, indent=1))

        write_folder(folder, write, main_process=True, wait=lambda: None)

    @classmethod
    def load(cls, folder: str) -> "LinearHead":
        """Raises ConfigError, about the setting `head`, when the folder holds none."""
        path = Path(folder)
        for name in ("config.json", "head.safetensors"):
            if not (path / name).is_file():
                raise ConfigError(
                    f"head: {folder} has no {name}, expected the folder head/ of a run of linear_probe.py"
                )
        try:
            head = cls(**load_file(path / "head.safetensors"), config=json.loads((path / "config.json").read_text()))
            missing = HEAD_KEYS - head.config.keys()
            len(head.config.get("classes", []))
        except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"head: {folder} is no head of linear_probe.py: {str(error).splitlines()[0]}") from error
        if missing:
            raise ConfigError(f"head: {folder}/config.json lacks {', '.join(sorted(missing))}")
        shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
        number, width = len(head.config["classes"]), head.mean.numel()
        if shapes != {"weight": (number, width), "bias": (number,), "mean": (width,), "std": (width,)}:
            raise ConfigError(f"head: {folder} has {number} classes in config.json and tensors of shapes {shapes}")
        return head


@dataclass
class TrainingSet:
    """Features and the labels (N,) of their rows, with the statistics (D,) that standardise them, on the device that
    heads are trained on."""

    features: Features
    labels: torch.Tensor
    num_classes: int
    mean: torch.Tensor
    std: torch.Tensor

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Standardised features of the rows, and a one for the bias: (B, D + 1), float32."""
        values = (self.features.rows(rows).to(self.mean.device).float() - self.mean) / self.std
        return F.pad(values, (0, 1), value=1.0)


def training_set(features: Features, labels: torch.Tensor, num_classes: int, device: torch.device) -> TrainingSet:
    """Statistics are those of all rows: they use no label, so the selection part may take part in them. On features of
    variance 1 one grid of learning rates fits all models."""
    moments = Moments((features.width,), device=device)
    for block in features.blocks(torch.arange(len(features)), 0):
        moments.update(features.rows(block))
    std = moments.variance().sqrt().clamp_min(1e-6)  # a constant feature is zero once the mean is taken off
    return TrainingSet(features, labels, num_classes, moments.mean.float().to(device), std.float().to(device))


def batches(rows: torch.Tensor, batch_size: int, num_steps: int, seed: int) -> Iterator:
    """`num_steps` batches from a stream of permutations of `rows`: every row is drawn equally often, to within one."""
    stream, number = rows[:0], 0
    for _ in range(num_steps):
        while len(stream) < batch_size:
            order = np.random.default_rng((seed, ORDER_STREAM, number)).permutation(len(rows))
            stream, number = torch.cat([stream, rows[torch.from_numpy(order)]]), number + 1
        yield stream[:batch_size]
        stream = stream[batch_size:]


def train_heads(
    data: TrainingSet, rows: torch.Tensor, settings: list, config: HeadTrainingConfig, name: str
) -> torch.Tensor:
    """Train H heads at once on `rows`, one for each (lr, weight_decay) of `settings`.

    A head minimises its own mean cross-entropy + weight_decay / 2 * |weight|^2, a convex problem; the bias is free. The
    heads' weights are columns of one matrix, so that a step is two matrix products for all of them.

    Returns:
        (D + 1, H, K), float32; the last row are the biases. A head that diverged holds inf or nan.
    """
    device, heads, classes = data.mean.device, len(settings), data.num_classes
    batch_size = min(config.batch_size, len(rows))
    steps = max(config.min_steps, math.ceil(config.epochs * len(rows) / batch_size))
    print(f"{name}: {heads} of {classes} classes, {len(rows)} images, {steps} steps of {batch_size}", flush=True)
    lr, weight_decay = torch.tensor(settings, device=device).repeat_interleave(classes, dim=0).T  # (H*K,) each
    weight = torch.zeros(data.features.width + 1, heads * classes, device=device)  # (D + 1, H*K)
    velocity = torch.zeros_like(weight)
    for step, batch in enumerate(progress(batches(rows, batch_size, steps, config.seed), steps, name)):
        inputs, target = data.inputs(batch), data.labels[batch].to(device)  # (B, D + 1), (B,)
        errors = (inputs @ weight).view(batch_size, heads, classes).softmax(dim=2)
        errors[torch.arange(batch_size, device=device), :, target] -= 1  # gradient of the loss in the logits, times B
        gradient = inputs.T @ errors.flatten(1) / batch_size  # (D + 1, H*K)
        gradient[:-1] += weight_decay * weight[:-1]
        velocity.mul_(MOMENTUM).add_(gradient)
        gradient.add_(velocity, alpha=MOMENTUM)  # Nesterov's look ahead
        weight -= lr * (0.5 * (1 + math.cos(math.pi * step / steps))) * gradient
    return weight.view(-1, heads, classes)


def compare_heads(data: TrainingSet, rows: torch.Tensor, heads: torch.Tensor, settings: list) -> list:
    """The sweep's table, a dict for each head: lr, weight_decay, top1 and loss on `rows`; None where it diverged."""
    correct, loss = torch.zeros(2, len(settings), dtype=torch.float64)
    for block in data.features.blocks(rows, heads[0].numel()):
        logits = (data.inputs(block) @ heads.flatten(1)).view(-1, *heads.shape[1:])  # (B, H, K)
        target = data.labels[block].to(logits.device)[:, None].expand(-1, len(settings))  # (B, H)
        correct += (logits.argmax(dim=2) == target).sum(0).cpu()
        loss += F.cross_entropy(logits.transpose(1, 2), target, reduction="none").sum(0).cpu()
    sweep = []
    for (lr, weight_decay), head, right, total_loss in zip(settings, heads.unbind(1), correct, loss, strict=True):
        values = [right.item() / len(rows), total_loss.item() / len(rows)] if head.isfinite().all() else [None, None]
        sweep.append({"lr": lr, "weight_decay": weight_decay, "top1": values[0], "loss": values[1]})
    return sweep


def fit(data: TrainingSet, config: HeadTrainingConfig) -> tuple:
    """(weights (D + 1, K) of the final head, the sweep's table, place of the chosen line in it).

    The choice is made on the selection part, see `choose`. While the chosen learning rate, or the largest weight decay,
    is at the edge of what was tried, the sweep goes on beyond that edge: which values fit depends on the features'
    width and on the number of images. The chosen settings are trained again on all images: published figures use all of
    them too. With a single setting there is nothing to choose. Raises RunError when heads diverge.
    """
    lrs, decays = sorted(config.lrs), sorted(config.weight_decays)
    sweep, best = [{"lr": lrs[0], "weight_decay": decays[0], "top1": None, "loss": None}], 0
    if len(lrs) * len(decays) > 1:
        rows, held_out = hold_out(data.labels, config.selection_fraction, config.seed)
        sweep, tried = [], set()
        for _ in range(1 + MOST_WIDENINGS):
            settings = [(lr, decay) for lr in lrs for decay in decays if (lr, decay) not in tried]
            tried |= set(settings)
            heads = train_heads(data, rows, settings, config, "heads of the sweep")
            sweep += compare_heads(data, held_out, heads, settings)
            best = choose(sweep, len(held_out))
            wider = widened(lrs, decays, None if best is None else sweep[best])
            if wider == (lrs, decays):
                break
            lrs, decays = wider
        if best is None:
            raise RunError(f"train.lrs: all heads diverged, down to a learning rate of {min(lr for lr, _ in tried):g}")
    chosen = sweep[best]["lr"], sweep[best]["weight_decay"]
    final = train_heads(data, torch.arange(len(data.labels)), [chosen], config, "final head")
    if not final.isfinite().all():
        raise RunError(f"train.lrs: the head diverged with a learning rate of {chosen[0]}")
    return final[:, 0], sweep, best


def choose(sweep: list, num_images: int) -> Optional[int]:
    """Place of the best line: of all whose top-1 is within a standard error of the highest, the one with the lowest
    loss, because few images cannot tell such lines apart, and the loss shows a head that blows up. None: all
    diverged."""
    finite = [i for i, line in enumerate(sweep) if line["top1"] is not None and math.isfinite(line["loss"])]
    if not finite:
        return None
    most = max(sweep[i]["top1"] for i in finite)
    share = (most * num_images + 2) / (num_images + 4)  # Agresti and Coull 1998: also of few images, all of them right
    error = math.sqrt(share * (1 - share) / (num_images + 4))
    return min((i for i in finite if sweep[i]["top1"] >= most - error), key=lambda i: sweep[i]["loss"])


def widened(lrs: list, decays: list, chosen: Optional[dict]) -> tuple:
    """Both ascending lists, with one more value beyond an edge that the chosen line is at, in the step that the list
    has there. A list of one value stays. `chosen`: None where all heads diverged, which smaller learning rates mend."""
    if len(lrs) > 1 and (chosen is None or chosen["lr"] == lrs[0]):
        lrs = [float(f"{lrs[0] ** 2 / lrs[1]:.4g}"), *lrs]
    elif len(lrs) > 1 and chosen["lr"] == lrs[-1]:
        lrs = [*lrs, float(f"{lrs[-1] ** 2 / lrs[-2]:.4g}")]
    if len(decays) > 1 and chosen is not None and chosen["weight_decay"] == decays[-1] and decays[-2] > 0:
        decays = [*decays, float(f"{decays[-1] ** 2 / decays[-2]:.4g}")]
    return lrs, decays


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> list:
    """[low, high] of a share, by default at 95% (Wilson 1927)."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


@torch.no_grad()
def evaluate_head(features: Features, labels: torch.Tensor, head: LinearHead) -> tuple:
    """(figures, counts (K, K) by true and predicted class) of a head on all features: top1, and for 5 classes or more
    top5, with intervals, num_samples and per_class. `labels` are those of the rows, (N,)."""
    classes, total, top5_correct = head.config["classes"], len(features), 0
    number = len(classes)
    confusion = torch.zeros(number * number, dtype=torch.int64)
    for block in features.blocks(torch.arange(total), number):
        logits = head(features.rows(block).to(head.mean.device))
        best = logits.topk(min(5, number)).indices.cpu()  # (B, 5), the highest first
        confusion += torch.bincount(labels[block] * number + best[:, 0], minlength=number * number)
        top5_correct += (best == labels[block][:, None]).any(dim=1).sum().item()
    confusion = confusion.view(number, number)
    right, counts = confusion.diag().tolist(), confusion.sum(1).tolist()
    figures = {"top1": sum(right) / total, "top1_interval": wilson_interval(sum(right), total)}
    if number >= 5:
        figures |= {"top5": top5_correct / total, "top5_interval": wilson_interval(top5_correct, total)}
    figures["num_samples"] = total
    figures["per_class"] = [
        {"class": name, "num_samples": n, "top1": correct / n if n else None}
        for name, n, correct in zip(classes, counts, right, strict=True)
    ]
    return figures, confusion
