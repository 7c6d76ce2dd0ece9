"""Tables and the confusion matrix of a linear probe."""

from pathlib import Path
from typing import Optional

import torch
from torch.nn import functional as F

from rae_suite.files import writing

SHOWN_CLASSES = 20  # in tables and lists of confusions; results.json has all classes

ANNOTATED_CLASSES = 30  # up to so many, the confusion matrix shows numbers and names


def most_confused(confusion: torch.Tensor, classes: list, count: int = SHOWN_CLASSES) -> list:
    """The most frequent mistakes, as dicts of `class`, `predicted` and `count`."""
    number = len(classes)
    values, places = confusion.clone().fill_diagonal_(0).flatten().topk(min(count, number * number))
    pairs = zip(values.tolist(), places.tolist(), strict=True)
    return [{"class": classes[p // number], "predicted": classes[p % number], "count": v} for v, p in pairs if v]


def draw_confusion(confusion: torch.Tensor, classes: list, title: str, path: Path) -> None:
    """The confusion matrix as a picture: with names and counts for few classes; for many, a pixel or more for each pair
    of classes beside the list of the most frequent mistakes."""
    from matplotlib.colors import PowerNorm  # slow to import
    from matplotlib.figure import Figure

    share = confusion / confusion.sum(1, keepdim=True).clamp_min(1)  # of each true class
    few = len(classes) <= ANNOTATED_CLASSES
    side = max(4.0, 0.45 * len(classes)) + 2 if few else 12.0
    figure = Figure(figsize=(side if few else side + 6, side), layout="constrained", dpi=110)
    if few:
        axis = figure.add_subplot()
    else:
        axis, mistakes = figure.subplots(1, 2, width_ratios=(12, 4))
        # a square root brings out single mistakes, a maximum keeps them when there are more classes than pixels
        factor = -(-len(classes) // 1000)
        share = F.max_pool2d(share[None], factor, ceil_mode=True)[0]
    extent = None if few else (-0.5, len(classes) - 0.5, len(classes) - 0.5, -0.5)
    image = axis.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest", extent=extent)
    figure.colorbar(image, ax=axis, shrink=0.6, label="share of the true class")
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    if few:
        names = [short(name) for name in classes]
        axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axis.set_yticks(range(len(names)), names)
        for row, column in confusion.nonzero().tolist():
            colour = "white" if share[row, column] > 0.4 else "black"
            axis.text(column, row, confusion[row, column].item(), ha="center", va="center", color=colour, fontsize=9)
    else:
        pairs = most_confused(confusion, classes)
        mistakes.barh(range(len(pairs)), [pair["count"] for pair in pairs], color="tab:blue")
        mistakes.set_yticks(range(len(pairs)), [f"{short(p['class'])}\nas {short(p['predicted'])}" for p in pairs])
        mistakes.invert_yaxis()
        mistakes.set(xlabel="images", title="most frequent mistakes")
    with writing(path):
        figure.savefig(path)


def short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "\u2026"


def percent(share: Optional[float]) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def sweep_table(sweep: list, best: int) -> str:
    """The heads that were tried, with a star at the chosen one."""
    lines = [f"{'lr':>10}{'weight decay':>14}{'held-out top-1':>16}{'held-out loss':>15}"]
    for i, line in enumerate(sweep):
        loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
        star = " *" if i == best else ""
        lines.append(f"{line['lr']:>10g}{line['weight_decay']:>14g}{percent(line['top1']):>16}{loss:>15}{star}")
    return "\n".join(lines)


def class_table(per_class: list) -> str:
    """Top-1 of each class; of many classes, of the worst."""
    shown, title = per_class, "class"
    if len(per_class) > SHOWN_CLASSES:
        seen = [line for line in per_class if line["num_samples"]]
        shown, title = sorted(seen, key=lambda line: line["top1"])[:SHOWN_CLASSES], f"worst {SHOWN_CLASSES} classes"
    width = max(len(title), *(len(short(line["class"])) for line in shown))
    lines = [f"{title:<{width}}{'N':>8}{'top-1':>9}"]
    for line in shown:
        lines.append(f"{short(line['class']):<{width}}{line['num_samples']:>8}{percent(line['top1']):>9}")
    return "\n".join(lines)
