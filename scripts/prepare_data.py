"""Make or convert the images that the other scripts read. Needs a CPU only and fetches nothing.

    python scripts/prepare_data.py digits --output data/digits
        scikit-learn's 1,797 handwritten digits as PNG class folders: 1,437 to train on, 180 for validation, 180 for
        testing. A few seconds.

    python scripts/prepare_data.py dummy --output data/dummy --num_images 2000 --num_classes 10 --size 256 \\
            --splits train:0.8,validation:0.1,test:0.1
        Synthetic images whose colours, shape and texture depend on the class. About 40 images of 256 px a second.

    python scripts/prepare_data.py convert --input /data/imagenet --output data/imagenet_hf --num_workers 8
        Class folders (<input>/<split>/<class>/*, or <input>/<class>/* which is then split) to a folder that
        `datasets.load_from_disk` reads. The files' bytes go in unchanged; unreadable ones are named and left out.

Every command prints how many images each split got (`--json FILE` writes it too). It writes beside --output and renames
so that --output is complete or absent, and does nothing when --output already holds what was asked for. Bad input ends
with one line on stderr and exit code 2, a full disk with code 1.
"""

import argparse
import colorsys
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional, Union

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root
from rae_suite.cli import LARGEST
from rae_suite.errors import DataError, OneLineParser, UnreadableImage, renamed_settings
from rae_suite.files import check_folder, check_output_file, remove, writing
from rae_suite.folders import class_folders
from rae_suite.launch import run_main
from rae_suite.loaders import UnreadableLog
from rae_suite.settings import MOST_TASKS
from rae_suite.sources import FileSource
from rae_suite.splits import scan_folder, split_folders

RECORD = "prepare_data.json"  # settings and counts of a finished folder
DEFAULT_SPLITS = "train:0.8,validation:0.1,test:0.1"
CHUNK = 1024  # images checked at a time: to check all at once would queue a million tasks


def main(argv: Optional[list] = None) -> None:
    args = parse_arguments(argv)
    check_folder(str(Path(args.output).absolute().parent), "--output")
    check_output_file(args.json, "--json")
    try:
        # rae_suite names settings of the training scripts
        with renamed_settings("data.path", "--input"), renamed_settings("data.max_unreadable", "--max_unreadable"):
            counts = args.run(args)
    except OSError as error:  # of reading: what cannot be written is a WriteError
        raise DataError(error) from error
    if args.json:
        write_json(args.json, {"output": args.output, "counts": counts})
    for split, count in counts.items():
        print(f"{split:>12} {count:>9,} images")


def parse_arguments(argv: Optional[list]) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{digits,dummy,convert}")

    digits = commands.add_parser("digits", help="scikit-learn's handwritten digits as class folders")
    digits.add_argument("--size", type=int, default=32, help="side in pixels")
    digits.set_defaults(run=prepare_digits)

    dummy = commands.add_parser("dummy", help="synthetic images as class folders")
    dummy.add_argument("--num_images", type=int, default=1000, help="of all splits together")
    dummy.add_argument("--num_classes", type=int, default=10)
    dummy.add_argument("--size", type=int, default=256, help="side in pixels")
    dummy.add_argument("--splits", default=DEFAULT_SPLITS, help="name:share,... with shares that sum to 1")
    dummy.set_defaults(run=prepare_dummy)

    convert = commands.add_parser("convert", help="class folders to a `datasets` folder")
    convert.add_argument("--input", required=True, help="folder of class folders, with or without split folders")
    convert.add_argument("--splits", help=f"name:share,... of an input without split folders ({DEFAULT_SPLITS})")
    convert.add_argument("--max_unreadable", type=int, default=10, help="stop when more files than that are unreadable")
    convert.add_argument("--num_workers", type=int, default=4, help="files decoded at a time, and writing processes")
    convert.set_defaults(run=prepare_converted)

    for command in (digits, dummy, convert):
        command.add_argument("--output", required=True, help="folder to write; must not exist or be empty")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--json", metavar="FILE", help="also write the counts here")
    args = parser.parse_args(argv)
    for name, least, most in (
        ("num_images", 1, 10**8),
        ("num_classes", 1, 10**8),
        ("size", 1, 2**14),
        ("num_workers", 1, MOST_TASKS),
        ("seed", 0, LARGEST),
        ("max_unreadable", 0, LARGEST),
    ):
        if not least <= getattr(args, name, 1) <= most:
            parser.error(f"--{name}: found {getattr(args, name)}, expected a number from {least} to {most}")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Commands: each returns {split: number of images}


def prepare_digits(args: argparse.Namespace) -> dict[str, int]:
    """The 8x8 digits (values 0..16) scaled to 0..255, enlarged with bicubic interpolation, split 80/10/10 by class."""
    settings = {"command": "digits", "size": args.size, "seed": args.seed}

    def write(folder: Path) -> dict[str, int]:
        from sklearn.datasets import load_digits  # slow to import

        digits = load_digits()
        splits = split_indices(digits.target, parse_splits(DEFAULT_SPLITS), args.seed)
        for split, indices in splits.items():
            for index in indices:
                pixels = np.rint(digits.images[index] * (255 / 16)).astype(np.uint8)
                image = Image.fromarray(pixels).resize((args.size, args.size), Image.Resampling.BICUBIC)
                save_png(image, folder, split, str(digits.target[index]), index)
        return {split: len(indices) for split, indices in splits.items()}

    return build_folder(args.output, settings, write, count_pngs)


def prepare_dummy(args: argparse.Namespace) -> dict[str, int]:
    """Synthetic images; image i has class i % num_classes and is a function of (seed, i)."""
    shares = parse_splits(args.splits)
    settings = {name: getattr(args, name) for name in ("num_images", "num_classes", "size", "splits", "seed")}
    width = len(str(args.num_classes - 1))

    def write(folder: Path) -> dict[str, int]:
        labels = np.arange(args.num_images) % args.num_classes
        splits = split_indices(labels, shares, args.seed)
        for split, indices in splits.items():
            for index in indices:
                image = dummy_image(args.size, labels[index], args.num_classes, (args.seed, index))
                save_png(image, folder, split, f"class_{labels[index]:0{width}d}", index)
        return {split: len(indices) for split, indices in splits.items()}

    return build_folder(args.output, {"command": "dummy", **settings}, write, count_pngs)


def prepare_converted(args: argparse.Namespace) -> dict[str, int]:
    """Class folders as a DatasetDict with the columns image (the file's bytes) and label (ClassLabel)."""
    if not Path(args.input).is_dir():
        raise DataError(f"--input: {args.input} does not exist; expected a folder of class folders")
    settings = {"command": "convert", "input": os.path.abspath(args.input), "splits": args.splits, "seed": args.seed}

    def write(folder: Path) -> dict[str, int]:
        sources = find_sources(args.input, args.splits, args.seed)
        return write_dataset(drop_unreadable(sources, args), folder, args.num_workers)

    return build_folder(args.output, settings, write, count_rows)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def build_folder(
    output: str, settings: dict, write: Callable[[Path], dict[str, int]], count: Callable[[Path], int]
) -> dict[str, int]:
    """Let `write` fill a folder beside `output`, add a record of its settings and counts, and rename it to `output`.

    A finished `output` with the same settings is kept. Raises DataError for anything else that is there: other
    settings, missing images, or files that this script did not write.

    Args:
        write: fills a folder and returns {split: number of images}.
        count: the number of images in the folder of a split.
    """
    folder = Path(os.path.abspath(output))
    if (folder / RECORD).is_file():
        return check_finished(output, settings, read_record(folder / RECORD), count)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise DataError(f"--output: {output} exists and is not a folder of this script; expected a new or empty folder")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        with writing(folder):
            partial.mkdir(parents=True)
        counts = write(partial)
        write_json(partial / RECORD, {"settings": settings, "counts": counts})
        with writing(folder):
            partial.rename(folder)
    finally:
        remove(partial)
    return counts


def check_finished(output: str, settings: dict, record: dict, count: Callable[[Path], int]) -> dict[str, int]:
    """The counts of a finished folder. Raises DataError when its `record` has other settings, or images are missing."""
    if record["settings"] != settings:
        names = sorted(set(settings) | set(record["settings"]))
        name = next(name for name in names if settings.get(name) != record["settings"].get(name))
        raise DataError(
            f"--output: {output} was made with {name} {record['settings'].get(name)}, not {settings.get(name)}; "
            "remove it or choose another folder"
        )
    for split, expected in record["counts"].items():
        found = count(Path(output, split))
        if found != expected:
            raise DataError(
                f"--output: {output} has {found} images in '{split}', expected {expected}; remove it and run again"
            )
    print(f"{output} is complete: nothing to do")
    return record["counts"]


def count_pngs(folder: Path) -> int:
    return sum(name.endswith(".png") for _, _, files in os.walk(folder) for name in files)


def count_rows(folder: Path) -> int:
    import datasets

    try:
        return len(datasets.load_from_disk(folder))
    except (OSError, ValueError):
        return 0


def save_png(image: Image.Image, folder: Path, split: str, class_name: str, index: int) -> None:
    file = folder / split / class_name / f"{index:06d}.png"
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)


def read_record(file: Path) -> dict:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {"settings": record["settings"], "counts": record["counts"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--output: {file} is damaged; remove the folder and run again") from error


def write_json(file: Union[str, Path], value: dict) -> None:
    with writing(Path(file)):
        Path(file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Splits


def parse_splits(text: str) -> dict[str, float]:
    """{name: share} of 'train:0.8,validation:0.2'. Raises DataError unless the names differ and the shares sum to 1."""
    shares = {}
    for part in text.split(","):
        name, _, share = part.strip().partition(":")
        try:
            shares[name] = float(share) if name not in shares and name.isidentifier() else 0.0
        except ValueError:
            shares[name] = 0.0
        if not 0 < shares[name] <= 1:
            raise DataError(
                f"--splits: found '{part}' in '{text}', expected different names with shares: train:0.8,..."
            )
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"--splits: the shares of '{text}' sum to {sum(shares.values()):g}, expected 1")
    return shares


def split_indices(labels: np.ndarray, shares: dict[str, float], seed: int) -> dict[str, list[int]]:
    """{split: sorted indices} with every class shuffled and divided by the shares.

    Each image goes to the split that is furthest behind its share. Because the images of a class come one after the
    other, the totals and each class differ from the shares by an image or two. Raises DataError if a split gets no
    image.
    """
    generator = np.random.default_rng(seed)
    splits = {name: [] for name in shares}
    order = [index for label in np.unique(labels) for index in generator.permutation(np.flatnonzero(labels == label))]
    for position, index in enumerate(order, start=1):
        furthest_behind = max(shares, key=lambda name: shares[name] * position - len(splits[name]))
        splits[furthest_behind].append(int(index))
    for name, indices in splits.items():
        if not indices:
            raise DataError(f"--splits: '{name}' gets none of {len(order)} images, expected at least one")
    return {name: sorted(indices) for name, indices in splits.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic images


def dummy_image(size: int, label: int, num_classes: int, seed: Sequence[int]) -> Image.Image:
    """An RGB image of size x size: a colour gradient, stripes, and a shaded polygon on top.

    The class sets the hue, the direction and width of the stripes and the number of corners; the seed everything else.
    """
    generator = np.random.default_rng(seed)
    hue = label / num_classes
    y, x = np.mgrid[0:size, 0:size] / size  # (S, S) each, in [0, 1)
    angle = generator.uniform(0, 2 * math.pi)
    ramp = 0.5 + ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)) / math.sqrt(2)  # (S, S) in [0, 1]
    light, dark = (
        color(hue + 0.5, 0.35, generator.uniform(0.75, 0.95)),
        color(hue + 0.4, 0.6, generator.uniform(0.2, 0.5)),
    )
    pixels = ramp[..., None] * light + (1 - ramp[..., None]) * dark  # (S, S, 3)

    direction = math.pi * label / num_classes
    frequency = 3 + 4 * (label % 3)
    wave = (x * math.cos(direction) + y * math.sin(direction)) * frequency + generator.uniform()
    stripes = np.sin(2 * math.pi * wave)[..., None]  # (S, S, 1)
    pixels = pixels + 0.12 * stripes

    mask = polygon_mask(size, 3 + label % 5, generator)[..., None]  # (S, S, 1) in [0, 1]
    shape = color(hue, 0.85, 0.9) * (0.6 + 0.4 * ramp[..., None]) - 0.05 * stripes
    pixels = mask * shape + (1 - mask) * pixels
    return Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def polygon_mask(size: int, corners: int, generator: np.random.Generator) -> np.ndarray:
    """Coverage (S, S) in [0, 1] of a regular polygon at a random place, drawn four times larger to smooth its edges."""
    center = generator.uniform(0.35, 0.65, 2)
    radius = generator.uniform(0.2, 0.33)
    turns = generator.uniform() + np.arange(corners) / corners
    points = [
        tuple(4 * size * (center + radius * np.array([math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)])))
        for turn in turns
    ]
    mask = Image.new("L", (4 * size, 4 * size))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return np.asarray(mask.reduce(4), dtype=np.float64) / 255


def color(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB (3,) in [0, 1]; the hue counts full turns."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


# ----------------------------------------------------------------------------------------------------------------------
# Conversion


def find_sources(path: str, splits: Optional[str], seed: int) -> dict[str, tuple[FileSource, Sequence[int]]]:
    """{split: (source, indices)} of class folders, all splits with the same class names."""
    names = split_folders(path)
    if names and splits:
        raise DataError(f"--splits: '{splits}' was given, but {path} already has the splits {', '.join(names)}")
    folders = {name: os.path.join(path, name) for name in names} if names else {None: path}
    classes = {name: class_folders(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        if not classes[name]:
            raise DataError(f"--input: {folder} holds images without class folders; expected {folder}/<class>/<image>")
    class_names = sorted(set().union(*classes.values()))
    sources = {name: scan_folder(folder, classes[name], class_names) for name, folder in folders.items()}
    if names:
        return {name: (source, range(len(source))) for name, source in sources.items()}
    source = sources[None]
    labels = np.array([source.label(i) for i in range(len(source))])
    shares = parse_splits(splits or DEFAULT_SPLITS)
    return {name: (source, indices) for name, indices in split_indices(labels, shares, seed).items()}


def drop_unreadable(
    sources: dict[str, tuple[FileSource, Sequence[int]]], args: argparse.Namespace
) -> dict[str, tuple[FileSource, list[int]]]:
    """`sources` without the images that cannot be decoded, each of which is named in a warning.

    Raises DataError when there are more than --max_unreadable. Threads are enough, because decoders release the GIL.
    """
    log = UnreadableLog(args.max_unreadable)
    readable = {}
    with ThreadPoolExecutor(args.num_workers) as pool:
        for split, (source, indices) in sources.items():
            kept = []
            for start in range(0, len(indices), CHUNK):
                chunk = indices[start : start + CHUNK]
                names = pool.map(functools.partial(unreadable_name, source), chunk)
                for index, name in zip(chunk, names, strict=True):
                    log.add([name] if name else [])
                    kept += [] if name else [index]
            if not kept:
                raise DataError(f"--input: split '{split}' has no readable image")
            readable[split] = (source, kept)
    return readable


def unreadable_name(source: FileSource, index: int) -> Optional[str]:
    """The name of an image that cannot be decoded, None for another."""
    try:
        source.load(index)
    except UnreadableImage as error:
        return error.name
    return None


def image_row(source: FileSource, index: int) -> dict:
    """What `datasets` takes of an image: its path, and where that is not UTF-8, its bytes."""
    file, name = source.file(index), source.name(index)
    if file == name:
        return {"bytes": None, "path": file}
    with open(file, "rb") as content:
        return {"bytes": content.read(), "path": name}


def write_dataset(sources: dict[str, tuple[FileSource, list[int]]], folder: Path, num_workers: int) -> dict[str, int]:
    """Write a DatasetDict. save_to_disk puts the bytes of the files that the rows name into its tables."""
    import datasets

    splits = datasets.DatasetDict()
    for split, (source, indices) in sources.items():
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=source.class_names))
        rows = {
            "image": [image_row(source, i) for i in indices],
            "label": [source.label(i) for i in indices],
        }
        splits[split] = datasets.Dataset.from_dict(rows, features=features, split=datasets.NamedSplit(split))
    is_small = min(len(rows) for rows in splits.values()) < CHUNK  # to start processes would take longer
    with writing(folder):
        splits.save_to_disk(folder, num_proc=None if is_small or num_workers == 1 else num_workers)
    return {split: len(rows) for split, rows in splits.items()}


if __name__ == "__main__":
    run_main(main)
