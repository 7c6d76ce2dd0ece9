"""One image: decoded to RGB, cropped for training or evaluation."""

import contextlib
import functools
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import BinaryIO, Optional, Union

import numpy as np
import torch
from PIL import Image, TiffImagePlugin, features
from torch.nn import functional as F

from rae_suite.errors import DataError
from rae_suite.png import is_png, needed_parts

JPEG_2000 = (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
# Not EPS, which is a program that Ghostscript would have to run
IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".avifs", *JPEG_2000, ".bmp", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# what a build of Pillow may lack: its name there, and in words
OPTIONAL_CODECS = {
    **dict.fromkeys((".avif", ".avifs"), ("avif", "AVIF")),
    **dict.fromkeys(JPEG_2000, ("jpg_2000", "JPEG 2000")),
}
SIGNED = 2  # TIFF's SampleFormat
DEFAULT_MEGAPIXELS = 179.0  # what Pillow allows; a file of some kilobytes may claim any number
Image.MAX_IMAGE_PIXELS = None  # sources.py looks at the number, under a setting and with the image's name
# Pillow reads this kind of file with another byte order or sense of grey, but not with both (as of 13.0)
TiffImagePlugin.OPEN_INFO.setdefault((TiffImagePlugin.MM, 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))


@functools.cache
def _missing_endings() -> tuple[str, ...]:
    """Those of OPTIONAL_CODECS that this build of Pillow does not read."""
    return tuple(ending for ending, (codec, _) in OPTIONAL_CODECS.items() if not features.check(codec))


def check_codecs(files: Iterable[str]) -> None:
    """Raise DataError for the first file of a format that this build of Pillow does not read. `files`: names that
    end in one of IMAGE_EXTENSIONS."""
    missing = _missing_endings()
    if not missing:
        return  # without a look at the names, which may be a million
    for file in files:
        if file.lower().endswith(missing):
            name = OPTIONAL_CODECS[PurePath(file.lower()).suffix][1]
            raise DataError(
                f"data.path: {file} is of the format {name}, which this build of Pillow does not read; expected Pillow "
                "from PyPI's wheels, 11.3 or newer"
            )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, upright.

    Transparent pixels (RGBA, LA, palette or colour-key transparency) are composited on white, as image viewers show
    them; plain `convert("RGB")` would uncover whatever colour is stored under them. Grayscale of 16 bits (I;16, and I,
    in which Pillow keeps 16-bit PGM) is scaled from [0, 65535], of 12 bits from [0, 4095], floats (F) from [0, 1], 1.0
    being white, all clipped: the range follows from the kind of file, never from the values. A TIFF whose 0 is white is
    turned round. An animation gives its first frame. EXIF orientation is applied, ICC profiles are not. Raises
    ValueError for samples that have no defined black and white, and what Pillow raises for a damaged file.
    """
    image.seek(0)
    bits = _bits_of_sample(image)  # before loading, which forgets them
    image.load()  # here, so that a truncated file fails before anything could hide it
    orientation, key = _orientation(image), image.info.get("transparency")
    if image.mode in ("1", "L") and isinstance(key, int):  # a grey that is transparent
        values = np.array(image.convert("L"))
        values[values == _grey_8bit(key, bits)] = 255
        image = Image.fromarray(values)
    elif image.mode.startswith("I"):
        white = 4095 if bits == 12 else 65535
        values = np.clip(np.asarray(image).astype(np.int64), 0, white)
        values[values == key] = white
        values = white - values if _zero_is_white(image) else values
        image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))  # rounded
    elif image.mode == "F":
        values = np.clip(np.nan_to_num(np.asarray(image)), 0.0, 1.0)
        values = 1.0 - values if _zero_is_white(image) else values
        image = Image.fromarray(np.rint(values * 255.0).astype(np.uint8))
    elif image.mode == "La":  # premultiplied grey
        values, alpha = np.moveaxis(np.asarray(image).astype(np.int64), 2, 0)
        image = Image.fromarray(np.minimum(values + 255 - alpha, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":  # else it would be copied
        image = image.convert("RGB")
    return image if orientation is None else image.transpose(orientation)


def _bits_of_sample(image: Image.Image) -> int:
    """Bits of a grey value in the file, before it is loaded; 8 where it makes no difference. Raises ValueError for
    samples of a TIFF whose black and white are not defined, and for a PNG's transparent colour that Pillow cuts."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
        if SIGNED in image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, ()) or (image.mode == "I" and bits == 32):
            raise ValueError(f"TIFF samples that are signed or integers of 32 bits ({bits} bits): which is white?")
        return bits
    stored = str(image.tile[0][3]) if image.format == "PNG" and image.tile else ""
    if stored == "RGB;16B" and "transparency" in image.info:
        raise ValueError("a transparent colour of 16 bits, of which 8 are read")
    return {"L;2": 2, "L;4": 4}.get(stored, 8)


def _zero_is_white(image: Image.Image) -> bool:
    """Whether a TIFF stores black as the highest value. Only samples of more than 8 bits need it: Pillow inverts the
    others while it decodes them."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _grey_8bit(value: int, bits: int) -> int:
    """A PNG's transparent grey on the scale of its decoded pixels. Pillow scales pixels of 2 or 4 bits to 8, but not
    the transparent grey (as of 13.0), so this scales it. A value too large for `bits` is scaled already and stays."""
    return value * 255 // (2**bits - 1) if value < 2**bits else value


def _orientation(image: Image.Image) -> Optional[Image.Transpose]:
    """The transposition that makes the image upright (EXIF tag 274), or None."""
    transpositions = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        return transpositions.get(image.getexif().get(274))
    except (SyntaxError, struct.error, ValueError, TypeError):
        return None  # a damaged EXIF block names no orientation; the pixels are fine


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop, used for evaluation (guided-diffusion, image_datasets.py).

    Halves with a box filter while the shorter side is at least 2*size, resizes the shorter side to size (bicubic), and
    cuts the middle out. `image` is an RGB PIL image, the result one of size x size.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(
    image: Image.Image, size: int, resize_size: int, generator: Union[np.random.Generator, int, Sequence[int]]
) -> torch.Tensor:
    """The training transform: shorter side to resize_size (bicubic, antialiased), random size x size window, no flip.

    Torchvision's Resize(resize_size, BICUBIC) on PIL images followed by a crop, uniform over all positions, as uint8
    (3, size, size); but only the window is computed, and a value differs by at most 1/255 from that. `image` is an RGB
    PIL image, `generator` a NumPy Generator, or a seed (an int or a sequence of ints) for one.
    """
    generator = np.random.default_rng(generator)
    short, long = min(image.size), max(image.size)
    new_long = int(resize_size * long / short)
    new_size = (resize_size, new_long) if image.width <= image.height else (new_long, resize_size)
    top = int(generator.integers(new_size[1] - size + 1))
    left = int(generator.integers(new_size[0] - size + 1))
    if image.height > 2 * image.width:  # Pillow 13 resizes the rows of such an image first, which gives other pixels
        return to_tensor(image.resize(new_size, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)))
    return _resize_window(image, new_size, left, top, size)


def _resize_window(image: Image.Image, new_size: tuple[int, int], left: int, top: int, size: int) -> torch.Tensor:
    """The size x size window at (left, top) of the image resized to new_size: columns, then rows, as Pillow does it.

    Pillow resizes the columns. It takes a region's borders as float32, and rounded borders would change some pixels by
    a level, which the rows could make two levels: so the region is widened to borders that float32 holds exactly.
    Torch resizes the rows, because it is twice as fast and within a level of Pillow. It has no region, only whole
    images: so rows that the window does not need are left uninitialised, and the output rows made of them are cut off.
    """
    x_scale, y_scale = image.width / new_size[0], image.height / new_size[1]
    step = new_size[0] // math.gcd(new_size[0], image.width)
    step //= step & -step  # every step-th column's border is a whole number of halves, quarters, ...
    start, end = left // step * step, -(-(left + size) // step) * step
    first_column, last_column = _source_span(start, end, x_scale, image.width)
    first_row, last_row = _source_span(top, top + size, y_scale, image.height)
    rows = np.empty((image.height, size, 3), dtype=np.uint8)
    image = image.crop((first_column, first_row, last_column, last_row))
    box = (start * x_scale - first_column, 0, end * x_scale - first_column, image.height)
    image = image.resize((end - start, image.height), Image.Resampling.BICUBIC, box)
    rows[first_row:last_row] = np.asarray(image)[:, left - start : left - start + size]
    pixels = torch.from_numpy(rows).permute(2, 0, 1)[None]  # (H, size, 3) -> (1, 3, H, size)
    pixels = F.interpolate(pixels, (new_size[1], size), mode="bicubic", antialias=True)
    return pixels[0, :, top : top + size].contiguous()


def _source_span(start: int, end: int, scale: float, length: int) -> tuple[int, int]:
    """(first, end) of the source pixels, out of `length`, that the resized pixels `start` to `end` are made of."""
    support = 2 * max(scale, 1)  # of the bicubic filter, widened where it reduces
    return max(0, math.floor(start * scale - support)), min(length, math.ceil(end * scale + support))


def training_resize_size(image_size: int, resize_size: Optional[int] = None) -> int:
    """The shorter side before the random crop: data.resize_size, or 1.5 times the image size (384 for 256 px). Raises
    DataError for a resize size below the image size."""
    if resize_size is None:
        return round(1.5 * image_size)
    if resize_size < image_size:
        raise DataError(
            f"data.resize_size: {resize_size} is smaller than the image size; expected {image_size} or more"
        )
    return resize_size


@dataclass(frozen=True)
class TrainingView:
    """What training sees of an image, uint8 (3, size, size): `crop` "random" (stage 1), see random_crop, or "center"
    (stage 2), see center_crop; with `flip` its mirror image half of the time. The call's `seed` decides both."""

    size: int
    resize_size: Optional[int] = None
    crop: str = "random"
    flip: bool = False

    def __call__(self, image: Image.Image, seed: Sequence[int]) -> torch.Tensor:
        generator = np.random.default_rng(seed)
        if self.crop == "center":
            pixels = to_tensor(center_crop(image, self.size))
        else:
            pixels = random_crop(image, self.size, training_resize_size(self.size, self.resize_size), generator)
        return pixels.flip(2) if self.mirrors(generator) else pixels

    def mirrors(self, generator: np.random.Generator) -> bool:
        """Whether the mirror image is seen. Of a centre crop, which draws nothing, the call's generator decides this
        with its first number."""
        return self.flip and generator.random() < 0.5


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB PIL image as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))  # twice as fast as a permutation


@contextlib.contextmanager
def _open_image(file: Union[str, BinaryIO]) -> Iterator[Image.Image]:
    """Pillow's image of a path or a stream, not decoded yet; of a PNG, without what its picture does not depend on, and
    with checksums compared: the decoder does not look at those of the pixels. Raises ValueError for what is no file to
    read, and for PostScript."""
    if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("no regular file")  # a pipe would be waited on for ever
    with open(file, "rb") if isinstance(file, str) else contextlib.nullcontext(file) as stream:
        with Image.open(needed_parts(stream) if is_png(stream) else stream) as image:
            if image.format == "EPS":
                raise ValueError("PostScript, a program that Ghostscript would have to run")
            yield image
