"""The pictures of a run: grids of reconstructions and training curves."""

from pathlib import Path

import matplotlib
import torch
from torchvision.utils import make_grid

matplotlib.use("Agg")  # no display on a training machine
import matplotlib.pyplot as plt  # noqa: E402

MIN_TILE = 96  # pixels: smaller images are enlarged by a whole factor, so that a grid can be looked at


def reconstruction_grid(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Images over their reconstructions, (N, 3, H, W) each in [0, 1], as one uint8 picture (H', W', 3)."""
    enlarge = -(-MIN_TILE // images.shape[-1])
    rows = torch.cat([images, reconstructions.clamp(0, 1)]).cpu()
    rows = rows.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    grid = make_grid(rows, nrow=len(images), padding=4, pad_value=1.0)  # (3, H', W')
    return (grid * 255).round().to(torch.uint8).permute(1, 2, 0)


def plot_curves(lines: list, path: Path) -> None:
    """Draw the lines of a metrics.jsonl: loss terms, GAN balance and evaluation metrics over steps."""
    train = [line for line in lines if line["kind"] == "train"]
    evals = [line for line in lines if line["kind"] == "eval" and line["model"] == "ema"]
    panels = [
        ("reconstruction loss", train, ["recon", "lpips"]),
        ("adversarial loss", train, ["gan", "disc_loss"]),
        ("mean logits", train, ["logits_real", "logits_fake"]),
        ("adaptive weight", train, ["adaptive_weight"]),
        ("gradient norm", train, ["grad_norm"]),
        ("learning rate", train, ["lr", "lr_disc"]),
        ("PSNR in dB, EMA", evals, ["psnr"]),
        ("SSIM and LPIPS, EMA", evals, ["ssim", "lpips"]),
    ]
    figure, axes = plt.subplots(2, 4, figsize=(18, 7), layout="constrained")
    for axis, (title, source, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in source if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if source is evals else None)
                axis.legend()
        if title == "gradient norm":
            axis.set_yscale("log")  # the first steps are far above the rest
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)
