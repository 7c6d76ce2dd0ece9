"""Pictures of both stages: grids of reconstructions and of drawn images, training curves."""

import functools
import logging
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

from rae_suite.files import step_of, writing
from rae_suite.metric_names import DISTANCE, GENERATION_METRICS, METRICS
from rae_suite.sources import evenly_spread

logger = logging.getLogger(__name__)

MIN_TILE = 96  # pixels: smaller images are enlarged by a whole factor, so that a grid can be looked at
PADDING = 4  # pixels between the images of a grid
PROGRESS_ROWS = 8
HEADING = 16  # pixels of a line of text
RAW_CAPTION = "{}: the weights in training. Their average, above, still lags behind."


def reconstruction_grid(
    images: torch.Tensor, reconstructions: torch.Tensor, raw: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Images over their reconstructions, (N, 3, H, W) each in [0, 1], as one uint8 picture (H', W', 3). `raw`: those of
    the weights in training, in a third row that a line of text below explains."""
    if raw is None:
        return _tiles(torch.cat([images, reconstructions]), len(images))
    return _with_caption(_tiles(torch.cat([images, reconstructions, raw]), len(images)), RAW_CAPTION.format("Last row"))


def comparison_grid(images: torch.Tensor, reconstructions: torch.Tensor, labels: list) -> torch.Tensor:
    """Images, reconstructions and four times their absolute difference below each other, (N, 3, H, W) each in [0, 1],
    under their labels, as one uint8 picture (H', W', 3)."""
    difference = 4 * (images - reconstructions).abs()
    grid = _tiles(torch.cat([images, reconstructions, difference]), len(images))
    return _with_labels(grid, labels)


def class_grid(images: torch.Tensor, names: list, raw: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Images, uint8 (N, 3, H, W), in rows with one of each class, under the classes' names, as one uint8 picture
    (H', W', 3). `raw`: as many of the weights in training, below, with a line of text that explains them."""
    rows = images if raw is None else torch.cat([images, raw])
    grid = _with_labels(_tiles(rows.float() / 255, len(names)), names)
    return grid if raw is None else _with_caption(grid, RAW_CAPTION.format("Lower half"))


def _with_caption(grid: torch.Tensor, text: str) -> torch.Tensor:
    """The grid (H, W, 3) with a line of text below it."""
    picture = Image.new("RGB", (grid.shape[1], grid.shape[0] + HEADING), "white")
    picture.paste(Image.fromarray(grid.numpy()))
    ImageDraw.Draw(picture).text((PADDING, grid.shape[0]), text, fill="black")
    return torch.from_numpy(np.array(picture))


def _with_labels(grid: torch.Tensor, labels: list) -> torch.Tensor:
    """The grid (H, W, 3) with a line of text above it, a label for each column; one that is too long is cut."""
    picture = Image.new("RGB", (grid.shape[1], grid.shape[0] + HEADING), "white")
    picture.paste(Image.fromarray(grid.numpy()), (0, HEADING))
    draw = ImageDraw.Draw(picture)
    width = (grid.shape[1] - PADDING) / len(labels)
    for i, label in enumerate(labels):
        while draw.textlength(label) > width - PADDING and len(label) > 1:
            label = label[:-1]
        draw.text((PADDING + i * width, 3), label, fill="black")
    return torch.from_numpy(np.array(picture))


def named_rows(rows: dict) -> torch.Tensor:
    """Rows of as many images, {name: (N, 3, H, W) in [0, 1]}, each under its name, as one uint8 picture (H', W', 3)."""
    return torch.cat([_with_labels(_tiles(images, len(images)), [name]) for name, images in rows.items()])


def image_grid(images: torch.Tensor, per_row: int) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] in rows of `per_row` as one uint8 picture (H', W', 3)."""
    return _tiles(images, per_row)


def _tiles(rows: torch.Tensor, per_row: int) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] in rows of `per_row`, small ones enlarged, as one uint8 picture (H', W', 3)."""
    enlarge = -(-MIN_TILE // rows.shape[-1])
    rows = rows.clamp(0, 1).cpu().repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    grid = make_grid(rows, nrow=per_row, padding=PADDING, pad_value=1.0)  # (3, H', W')
    return (grid * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


@dataclass(frozen=True)
class GridLayout:
    """Rows of a sample grid: their number, the row (0-based) that changes over a run, and the one that stays, with its
    name, or None. `heading`, `footing`: pixels of lines of text above and below the rows."""

    rows: int
    shown: int
    fixed: Optional[int] = None
    fixed_name: str = ""
    heading: int = 0
    footing: int = 0

    def with_raw(self, rows: int) -> "GridLayout":
        """That of a grid which has more rows below, of the weights in training, and a line about them."""
        return replace(self, rows=self.rows + rows, footing=HEADING)


RECONSTRUCTIONS = GridLayout(rows=2, shown=1, fixed=0, fixed_name="images")


def progress_strip(samples: list, path: Path, layout: GridLayout) -> None:
    """How one row of the sample grids changed over a run, at up to PROGRESS_ROWS steps, the first and the last among
    them, below the row that stays. `samples` are the grids (step-*.png), in order; one that cannot be read is left
    out."""
    pictures = read_pictures(evenly_spread(samples, PROGRESS_ROWS, with_last=True))
    last = list(pictures.values())[-1]
    text = layout.heading + layout.footing
    height = (last.shape[0] - text - PADDING) // layout.rows  # a row of images with the padding above it

    def row(picture: np.ndarray, number: int) -> np.ndarray:
        start = layout.heading + number * height
        return picture[start : start + height]

    rows = [] if layout.fixed is None else [(layout.fixed_name, row(last, layout.fixed))]
    for file, picture in pictures.items():
        if picture.shape[1] == last.shape[1]:  # a continued run may show other images
            rows.append((f"step {step_of(file)}", row(picture, layout.shown)))
    margin = 80  # pixels for the labels
    strip = Image.new("RGB", (margin + last.shape[1], height * len(rows) + PADDING), "white")
    draw = ImageDraw.Draw(strip)
    for i, (label, pixels) in enumerate(rows):
        strip.paste(Image.fromarray(pixels), (margin, i * height))
        draw.text((PADDING, i * height + height // 2), label, fill="black")
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


# names of training lines that share a panel, and its title; any other name has a panel of its own
PANELS = {
    "recon": "reconstruction loss",
    "lpips": "reconstruction loss",
    "gan": "adversarial loss",
    "disc_loss": "adversarial loss",
    "logits_real": "mean logits",
    "logits_fake": "mean logits",
    "grad_norm": "gradient norm",
    "disc_grad_norm": "gradient norm",
    "lr": "learning rate",
    "lr_disc": "learning rate",
}
NOT_DRAWN = (
    "kind",
    "step",
    "epoch",
    "time",
    "model",
    "num_samples",
    "num_generated",
    "skipped_steps",
    "images_per_second",
)
LOGARITHMIC = ("gradient norm", f"{DISTANCE}, EMA")  # where their first values are far above the rest


def panels_of(lines: list) -> dict:
    """{title: {name: points (step, value)}} of the lines of a metrics.jsonl, in the order in which names first occur:
    what training wrote, then the evaluations of the averaged model."""
    panels = {}
    for kind in ("train", "eval"):
        for line in (line for line in lines if line["kind"] == kind and line.get("model", "ema") == "ema"):
            for name, value in line.items():
                plain = name.rpartition("/")[2]  # of a metric in a set of eval.sets
                if plain in NOT_DRAWN or value is None:
                    continue
                title = PANELS.get(name, name.replace("_", " "))
                if kind == "eval":
                    metric = METRICS.get(plain) or GENERATION_METRICS.get(plain.partition("_time")[0])  # loss_time1
                    title = f"{name.replace('_', ' ') if metric is None else metric.panel}, EMA"
                panels.setdefault(title, {}).setdefault(name, []).append((line["step"], value))
    return panels


def plot_curves(lines: list, path: Path) -> None:
    """Draw the lines of a metrics.jsonl over steps: everything that it has, related values in one panel."""
    from matplotlib.figure import Figure  # slow to import

    panels = panels_of(lines)
    rows = max(1, -(-len(panels) // 4))
    height = 3.5 * rows
    figure = Figure(figsize=(18, height))  # fixed margins: to calculate them takes as long as the whole drawing again
    figure.subplots_adjust(0.04, 0.5 / height, 0.99, 1 - 0.35 / height, wspace=0.2, hspace=0.34)
    axes = figure.subplots(rows, 4, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        for name, points in series.items():
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
        axis.legend()
        values = [value for points in series.values() for _, value in points]
        if title in LOGARITHMIC and 0 < 10 * min(values) < max(values):
            axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", scilimits=(-2, 4))  # 2e-4, say: long numbers reach into the next panel
        if title == "accuracy":
            axis.set_ylim(0, 1)  # around 0.5 an axis of its own would make a trend of noise
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with writing(path):
        figure.savefig(path, dpi=80)
