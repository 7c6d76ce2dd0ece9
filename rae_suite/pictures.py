"""The pictures of a run: grids of reconstructions and training curves."""

import functools
import logging
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

from rae_suite.files import step_of, writing

logger = logging.getLogger(__name__)

MIN_TILE = 96  # pixels: smaller images are enlarged by a whole factor, so that a grid can be looked at
PADDING = 4  # pixels between the images of a grid
PROGRESS_ROWS = 8


def reconstruction_grid(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Images over their reconstructions, (N, 3, H, W) each in [0, 1], as one uint8 picture (H', W', 3)."""
    return _tiles(torch.cat([images, reconstructions]), len(images))


def comparison_grid(images: torch.Tensor, reconstructions: torch.Tensor, labels: list) -> torch.Tensor:
    """Images, reconstructions and four times their absolute difference below each other, (N, 3, H, W) each in [0, 1],
    under their labels, as one uint8 picture (H', W', 3)."""
    height = 16  # pixels of a label
    difference = 4 * (images - reconstructions).abs()
    grid = _tiles(torch.cat([images, reconstructions, difference]), len(images))
    picture = Image.new("RGB", (grid.shape[1], grid.shape[0] + height), "white")
    picture.paste(Image.fromarray(grid.numpy()), (0, height))
    draw = ImageDraw.Draw(picture)
    width = (grid.shape[1] - PADDING) / len(images)
    for i, label in enumerate(labels):
        draw.text((PADDING + i * width, 3), label, fill="black")
    return torch.from_numpy(np.array(picture))


def image_grid(images: torch.Tensor, per_row: int) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] in rows of `per_row` as one uint8 picture (H', W', 3)."""
    return _tiles(images, per_row)


def _tiles(rows: torch.Tensor, per_row: int) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] in rows of `per_row`, small ones enlarged, as one uint8 picture (H', W', 3)."""
    enlarge = -(-MIN_TILE // rows.shape[-1])
    rows = rows.clamp(0, 1).cpu().repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    grid = make_grid(rows, nrow=per_row, padding=PADDING, pad_value=1.0)  # (3, H', W')
    return (grid * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def progress_strip(samples: list, path: Path) -> None:
    """How reconstructions changed over a run: the images, and below them their reconstructions at up to PROGRESS_ROWS
    steps, the first and the last among them. `samples` are the run's sample grids (step-*.png), in order; one that
    cannot be read is left out."""
    pictures = read_pictures(spread_with_last(samples, PROGRESS_ROWS))
    last = list(pictures.values())[-1]
    half = (last.shape[0] - PADDING) // 2  # a row of images with the padding above it
    rows = [("images", last[:half])]
    for file, picture in pictures.items():
        if picture.shape == last.shape:  # a continued run may show other images
            rows.append((f"step {step_of(file)}", picture[half : 2 * half]))
    margin = 80  # pixels for the labels
    strip = Image.new("RGB", (margin + last.shape[1], half * len(rows) + PADDING), "white")
    draw = ImageDraw.Draw(strip)
    for i, (label, row) in enumerate(rows):
        strip.paste(Image.fromarray(row), (margin, i * half))
        draw.text((PADDING, i * half + half // 2), label, fill="black")
    with writing(path):
        strip.save(path)


def read_pictures(files: list) -> dict:
    """Pixels (H, W, 3) of those of the PNG files that can be read."""
    pictures = {}
    for file in files:
        try:
            pictures[file] = np.array(Image.open(file, formats=["PNG"]).convert("RGB"))
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            say_left_out(file, type(error).__name__)
    return pictures


@functools.cache  # once for each file: the strip is drawn again and again
def say_left_out(file: Path, reason: str) -> None:
    logger.warning("%s cannot be read (%s), it is left out of progress.png", file, reason)


def spread_with_last(items: list, count: int) -> list:
    """Up to `count` of the items at equal distances, in their order, the first and the last among them."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def save_pairs(
    folder: Path, wanted: set, index: torch.Tensor, images: torch.Tensor, reconstructions: torch.Tensor
) -> None:
    """Write those of a batch whose index is `wanted` as <index>.png in folder/images and folder/reconstructions. Both
    sides are uint8 (B, 3, H, W)."""
    for row, number in enumerate(index.tolist()):
        if number in wanted:
            for name, side in (("images", images), ("reconstructions", reconstructions)):
                picture = Image.fromarray(side[row].permute(1, 2, 0).cpu().numpy())
                with writing(folder / name):
                    (folder / name).mkdir(parents=True, exist_ok=True)
                    picture.save(folder / name / f"{number:08d}.png")


def plot_curves(lines: list, path: Path) -> None:
    """Draw the lines of a metrics.jsonl: loss terms, GAN balance and evaluation metrics over steps."""
    from matplotlib.figure import Figure  # slow to import

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
        ("Frechet distances, EMA", evals, ["rfid", "rfid_clean", "rfdd"]),
    ]
    panels = [panel for panel in panels if any(line.get(name) is not None for name in panel[2] for line in panel[1])]
    rows = max(1, -(-len(panels) // 4))
    height = 3.5 * rows
    figure = Figure(figsize=(18, height))  # fixed margins: to calculate them takes as long as the whole drawing again
    figure.subplots_adjust(0.04, 0.5 / height, 0.99, 1 - 0.35 / height, wspace=0.18, hspace=0.34)
    axes = figure.subplots(rows, 4, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, source, names) in zip(axes.flat, panels, strict=False):
        for name in names:
            points = [(line["step"], line[name]) for line in source if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if source is evals else None)
                axis.legend()
        if title in ("gradient norm", "Frechet distances, EMA"):
            axis.set_yscale("log")  # the first values are far above the rest
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with writing(path):
        figure.savefig(path, dpi=80)
