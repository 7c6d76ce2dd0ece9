"""Images that are measured as they are, in one order and of one size: the array arr_0 of an .npz file, or a folder.

    images = open_images("samples.npz", "samples")            # looks at the header, or at the first file
    for pixels, index in images.batches(64, rank, world_size):  # this process's share, uint8 (B, 3, H, W) and (B,)

Nothing is cropped or resized: generated images are what they are, and a reference was cropped when it was made. Images
of data sets, which come in any size, are CroppedImages. An .npz file is read batch by batch: 50,000 images of 256 px
are 10 GB."""

import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from accelerate import Accelerator

from rae_suite.errors import ConfigError, DataError, UnreadableImage, renamed_settings
from rae_suite.files import NPZ_ERRORS, read_npz, write_image_npz, writing
from rae_suite.images import to_tensor
from rae_suite.loaders import UnreadableLog, build_loader, collate, eval_loader
from rae_suite.settings import ImagesConfig
from rae_suite.sources import ImageSource, SubsetSource
from rae_suite.splits import scan_folder

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError)


class ImageSet:
    """`count` images of `height` x `width` pixels, in an order. `name`: where they are; `key`: the setting that says
    so; `endings`: kinds of their files, as ("png",)."""

    def __init__(self, name: str, key: str, count: int, height: int, width: int, endings: tuple):
        self.name, self.key, self.count, self.height, self.width = name, key, count, height, width
        self.endings = endings

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple]:
        """This process's share as (pixels uint8 (B, 3, height, width), index int64 (B,)): batches rank, rank +
        world_size, ... of the images in their order. Raises DataError for images that cannot be read."""
        raise NotImplementedError


def open_images(path: str, key: str, num_images: Optional[int] = None, num_workers: int = 0) -> ImageSet:
    """The images in an .npz file or a folder, the first `num_images` of them. Raises ConfigError, about the setting
    `key`, when there are none, or fewer than that."""
    place = Path(path)
    if place.is_dir():
        images = FileImages(place, key, num_workers)
    elif place.is_file():
        images = ArrayImages(place, key)
    else:
        raise ConfigError(f"{key}: {path} does not exist, expected an .npz file or a folder of images")
    if num_images is not None and num_images > images.count:
        raise ConfigError(f"{key}: {path} holds {images.count} images, expected at least {num_images}")
    images.count = images.count if num_images is None else num_images
    return images


def shares(count: int, batch_size: int, rank: int, world_size: int) -> Iterator[range]:
    """The indices of each of this process's batches, where batches are dealt in turn."""
    for start in range(rank * batch_size, count, batch_size * world_size):
        yield range(start, min(start + batch_size, count))


# --------------------------------------------------------------------------------------------------------------------
# Arrays
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def open_array(path: Path) -> Iterator[tuple]:
    """(stream of the data, shape, dtype, whether in Fortran's order) of arr_0 in an .npz file."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
        yield stream, shape, dtype, fortran_order


class ArrayImages(ImageSet):
    """arr_0 of an .npz file, uint8 (N, H, W, 3), as ADM and its successors keep samples and references."""

    def __init__(self, path: Path, key: str):
        expected = "expected uint8 images `arr_0` (N, H, W, 3)"
        names, _ = read_npz(path, key, (), expected)
        if "arr_0" not in names:
            raise ConfigError(f"{key}: {path} holds {', '.join(sorted(names))}, {expected}")
        try:
            with open_array(path) as (_, shape, dtype, fortran_order):
                pass
        except NPZ_ERRORS as error:
            raise ConfigError(f"{key}: arr_0 in {path} is damaged ({error})") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order:
            order = " in Fortran's order" if fortran_order else ""
            raise ConfigError(f"{key}: arr_0 in {path} is {dtype} {shape}{order}, expected uint8 (N, H, W, 3)")
        if 0 in shape:
            raise ConfigError(f"{key}: arr_0 in {path} holds no images, its shape is {shape}")
        super().__init__(str(path), key, *shape[:3], ("npz",))

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple]:
        image_bytes = self.height * self.width * 3
        try:
            with open_array(Path(self.name)) as (stream, *_):
                place = 0
                for indices in shares(self.count, batch_size, rank, world_size):
                    stream.seek((indices.start - place) * image_bytes, 1)  # over the other processes' batches
                    place = indices.stop
                    data = np.frombuffer(stream.read(len(indices) * image_bytes), np.uint8)
                    pixels = torch.from_numpy(data.reshape(len(indices), self.height, self.width, 3).copy())
                    yield pixels.permute(0, 3, 1, 2), torch.arange(indices.start, indices.stop)
        except DAMAGED as error:
            raise DataError(f"{self.key}: arr_0 in {self.name} is damaged ({error})") from error


class SharedArray:
    """Images, uint8 (N, S, S, 3), that all processes write as they come, packed into one .npz file at the end. Several
    nodes need a common file system.

    `chosen`: the increasing numbers that the images are given with; row i of arr_0 is the i-th of those that came.
    """

    def __init__(self, file: Path, chosen: Sequence, size: int, accelerator: Accelerator):
        self.file, self.chosen, self.accelerator = file, np.asarray(chosen), accelerator
        self.rows_file = file.with_name(f".{file.stem}.npy")
        with writing(file):
            if accelerator.is_main_process:
                np.lib.format.open_memmap(self.rows_file, "w+", np.uint8, (len(chosen), size, size, 3)).flush()
            accelerator.wait_for_everyone()
            self.rows = np.lib.format.open_memmap(self.rows_file, "r+")

    def add(self, index: torch.Tensor, images: torch.Tensor) -> None:
        """`images`, uint8 (B, 3, S, S), have the numbers `index` (B,)."""
        self.rows[np.searchsorted(self.chosen, index.numpy())] = images.permute(0, 2, 3, 1).cpu().numpy()

    def finish(self, index: torch.Tensor, **arrays: np.ndarray) -> None:
        """Pack the images `index`, those that came, and other arrays beside them. Every process calls this."""
        self.rows.flush()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            rows = np.searchsorted(self.chosen, index.numpy())
            write_image_npz(self.file, (self.rows[row] for row in rows), len(rows), self.rows.shape[1], arrays)
            self.rows_file.unlink()


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def natural_order(name: str) -> list:
    """A key that sorts names with their numbers as numbers: 2.png before 10.png, and 000002.png before 000010.png."""
    return [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]


class FileImages(ImageSet):
    """The image files below a folder, all of one size, in the natural order of their paths."""

    def __init__(self, folder: Path, key: str, num_workers: int):
        self.num_workers = num_workers
        with renamed_settings("data.path", key):
            source = scan_folder(str(folder))
        names = [source.name(i) for i in range(len(source))]
        self.source = SubsetSource(source, sorted(range(len(names)), key=lambda i: natural_order(names[i])))
        endings = tuple(sorted({Path(name).suffix[1:].lower() for name in names}))
        try:
            width, height = self.source.load(0).size
        except UnreadableImage as error:
            raise ConfigError(f"{key}: {error}") from error
        super().__init__(str(folder), key, len(names), height, width, endings)

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple]:
        batches = [list(indices) for indices in shares(self.count, batch_size, rank, world_size)]
        dataset = ImagesOfOneSize(self.source, self.height, self.width, self.key)
        for batch in build_loader(dataset, batches, collate, self.num_workers):
            yield batch["pixels"], batch["index"]


class ImagesOfOneSize(torch.utils.data.Dataset):
    """Images of a source by number, for `collate`. Raises DataError, about the setting `key`, for an image that cannot
    be read or has another size: a metric of the others would be that of another set."""

    def __init__(self, source: ImageSource, height: int, width: int, key: str):
        self.source, self.height, self.width, self.key = source, height, width, key

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        try:
            image = self.source.load(index)
        except UnreadableImage as error:
            raise DataError(f"{self.key}: {error}") from error
        if image.size != (self.width, self.height):
            raise DataError(
                f"{self.key}: {self.source.name(index)} is {image.width} x {image.height} pixels, "
                f"{self.source.name(0)} {self.width} x {self.height}; expected images of one size"
            )
        return {"pixels": to_tensor(image), "index": index, "label": -1, "unreadable": []}


class CroppedImages(ImageSet):
    """The images of a data set through ADM's centre crop to `size` pixels. Unreadable ones are named and left out until
    they are more than `data.max_unreadable`, of the group `key` of settings."""

    def __init__(self, source: ImageSource, name: str, key: str, size: int, data: ImagesConfig):
        super().__init__(name, key, len(source), size, size, ("cropped",))
        self.source, self.num_workers = source, data.num_workers
        self.unreadable = UnreadableLog(data.max_unreadable, setting=f"{key}.max_unreadable")

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple]:
        for batch in eval_loader(self.source, self.height, batch_size, self.num_workers, rank, world_size):
            self.unreadable.add(batch["unreadable"])
            if len(batch["pixels"]):
                yield batch["pixels"], batch["index"]
