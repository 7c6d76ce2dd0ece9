"""The folder of sampled images: which are there already, files that are whole or absent, one .npz of all of them.

    images/000000.png    image 0, and so on
    samples.npz          all of them as arr_0 (N, H, W, 3) uint8, if asked for
    labels.csv           file, class index and class name of each
    grid.png             some of them, a column for each class
    settings.json        what decides the pixels: a folder is continued with the same alone
    results.json         how they were drawn; written last

An image is written beside its place and renamed, so that a process may be killed at any moment.
"""

import csv
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rae_suite.errors import ConfigError
from rae_suite.files import NPZ_ERRORS, replacing, write_image_npz, write_text, writing
from rae_suite.pictures import class_grid
from rae_suite.sources import evenly_spread

NPZ, GRID, LABELS, SETTINGS, RESULTS = "samples.npz", "grid.png", "labels.csv", "settings.json", "results.json"
GRID_COLUMNS, GRID_ROWS = 10, 6  # at most
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"
READERS = 8  # threads that encode or decode PNG files
READ_AHEAD = 256  # images


def image_file(folder: Path, index: int) -> Path:
    return folder / "images" / f"{index:06d}.png"


def check_same_settings(folder: Path, settings: dict, key: str) -> None:
    """Raise ConfigError, about the setting `key`, when the folder has images that other settings drew."""
    try:
        old = json.loads((folder / SETTINGS).read_text())
    except FileNotFoundError:
        if (folder / "images").exists() or (folder / NPZ).exists():
            raise ConfigError(f"{key}: {folder} has images and no {SETTINGS}, expected a new folder") from None
        return
    except ValueError as error:
        raise ConfigError(f"{key}: {folder / SETTINGS} is damaged ({error}), choose another folder") from error
    for name, value in settings.items():
        if old.get(name) != value:
            raise ConfigError(
                f"{key}: {folder} has images of other settings: {name} is {old.get(name)!r} there and {value!r} now; "
                "choose another folder"
            )


def prepare_images(folder: Path) -> None:
    """Make the folder of images, without what a killed process left half-written."""
    images = image_file(folder, 0).parent
    with writing(images):
        images.mkdir(exist_ok=True)
        for partial in images.glob(".*.partial"):
            partial.unlink()


def missing_images(folder: Path, count: int) -> list:
    """Indices below `count` of images that are not there, or not whole."""
    return [index for index in range(count) if not is_whole_png(image_file(folder, index))]


def is_whole_png(path: Path) -> bool:
    """Whether a file begins and ends as a PNG does."""
    try:
        with path.open("rb") as file:
            start = file.read(len(PNG_START))
            file.seek(-len(PNG_END), io.SEEK_END)
            return start == PNG_START and file.read() == PNG_END
    except OSError:  # not there, or shorter
        return False


def write_images(folder: Path, indices: Sequence, images: torch.Tensor) -> None:
    """Write images, uint8 (B, 3, H, W), under their indices. Raises WriteError."""
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    with writing(folder / "images"), ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda index, array: _write_png(image_file(folder, index), array), indices, arrays))


def _write_png(path: Path, array: np.ndarray) -> None:
    beside = path.with_name(f".{path.name}.partial")
    Image.fromarray(array).save(beside, format="PNG")
    beside.replace(path)


def read_images(folder: Path, indices: Sequence) -> Iterator[np.ndarray]:
    """Images, uint8 (H, W, 3), in the order of `indices`; some are read ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(indices), READ_AHEAD):
            part = indices[start : start + READ_AHEAD]
            yield from pool.map(lambda index: np.array(Image.open(image_file(folder, index))), part)


def is_whole_npz(folder: Path, count: int, size: int) -> bool:
    """Whether samples.npz has `count` images of `size` x `size` pixels."""
    try:
        with zipfile.ZipFile(folder / NPZ) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            whole = archive.getinfo("arr_0.npy").file_size == file.tell() + count * size * size * 3
            return whole and shape == (count, size, size, 3) and dtype == np.uint8
    except NPZ_ERRORS:
        return False


def pack(folder: Path, count: int, size: int) -> None:
    """Write samples.npz from the PNG files. Raises WriteError."""
    write_image_npz(folder / NPZ, read_images(folder, range(count)), count, size)


def write_grid(folder: Path, labels: torch.Tensor, class_names: dict) -> None:
    """Write grid.png: of classes that are spread evenly over those that were drawn, a column of the first images of
    each, under its name."""
    classes = evenly_spread(labels.unique().tolist(), GRID_COLUMNS, with_last=True)
    columns = [(labels == label).nonzero().flatten().tolist()[:GRID_ROWS] for label in classes]
    chosen = [index for row in zip(*columns, strict=False) for index in row]  # as many rows as the shortest column has
    images = torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in read_images(folder, chosen)])
    with replacing(folder / GRID) as beside:
        names = [class_names.get(label, str(label)) for label in classes]
        Image.fromarray(class_grid(images, names).numpy()).save(beside)


def write_labels(folder: Path, labels: torch.Tensor, class_names: dict) -> None:
    """Write labels.csv."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "label", "name"])
    for index, label in enumerate(labels.tolist()):
        table.writerow([image_file(folder, index).name, label, class_names.get(label, "")])
    write_text(folder / LABELS, text.getvalue())
