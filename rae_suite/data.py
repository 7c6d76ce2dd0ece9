"""Images for training and evaluation: where they come from, how they are cropped, and in which order they are drawn.

Nothing here needs launching. A run uses it like this:

    train, evaluation = load_splits(cfg, seed=0)                      # cfg: the `data` group of the configuration
    batches = TrainBatches(len(train), global_batch_size=512, micro_batch_size=64, rank=0, world_size=8, seed=0,
                           start_step=0, total_steps=40_000)
    for batch in train_loader(train, batches, image_size=256, num_workers=cfg.num_workers):
        batch["pixels"]                                               # uint8 (B, 3, 256, 256)

All randomness is a function of (seed, epoch, index): neither the number of workers or ranks nor a resume changes it.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import os
import re
import signal
import stat
import struct
import tempfile
import threading
import time
import zipfile
import zlib

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
SPLIT_NAMES = ("train", "val", "valid", "validation", "test")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label")
SAVED_DATASET_FILES = ("dataset_dict.json", "state.json", "dataset_info.json")  # of `datasets`' save_to_disk
MAX_ASPECT_RATIO = 100  # a resized shorter side would make the longer one, and the memory for it, huge
WHOLE = None  # key of data that has no split level
INDEX_CACHE = os.path.join(HF_HOME, "rae_indexes")  # lists of the files in large folders
INDEXED_FROM = 10_000  # files: to list fewer takes no time that counts
INDEX_FORMAT = 1  # to be raised when other files are listed, or in another way
SETTLED = 2.0  # seconds since a folder's last change: two changes within a clock tick leave the same time behind
# what becomes of reading a damaged .npz file
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)

# The second word of every seed keeps the random streams apart: NumPy pads (1, 2) with zeros, so it equals (1, 2, 0).
HOLDOUT_STREAM, ORDER_STREAM, CROP_STREAM = 0, 1, 2


class DataError(ValueError):
    """Bad input. The message is one line with the file or setting, the value found and what is expected."""

    def __init__(self, message):
        # A DataLoader raises a worker's error again with the whole traceback as its message; its last line is ours.
        last_line = str(message).strip().splitlines()[-1]
        super().__init__(re.sub(r"^[\w.]*DataError: ", "", last_line))


class UnreadableImage(Exception):
    """One image that cannot be decoded; `name` says which, `reason` why."""

    def __init__(self, name, reason):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


# ----------------------------------------------------------------------------------------------------------------------
# Conversions and crops


def to_rgb(image):
    """Any PIL image as 8-bit RGB, upright.

    Transparent pixels (RGBA, LA, palette or colour-key transparency) are composited on white, as image viewers show
    them; plain `convert("RGB")` would uncover whatever colour is stored under them. Grayscale of 16 bits (I;16, and I,
    in which Pillow keeps 16-bit PGM) is scaled from [0, 65535], floats (F) from [0, 1], 1.0 being white, both clipped:
    the range follows from the mode, never from the values. An animation gives its first frame. EXIF orientation is
    applied, ICC profiles are not. Raises what Pillow raises for a damaged or truncated file.
    """
    image.seek(0)
    image.load()  # here, so that a truncated file fails before anything could hide it
    orientation = _orientation(image)
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        values[values == image.info.get("transparency")] = 65535  # a PNG's transparent grey
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # rounded; 65535 -> 255
    elif image.mode == "F":
        values = np.clip(np.nan_to_num(np.asarray(image)), 0.0, 1.0)
        image = Image.fromarray(np.rint(values * 255.0).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":  # else it would be copied
        image = image.convert("RGB")
    return image if orientation is None else image.transpose(orientation)


def _orientation(image):
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


def center_crop(image, size):
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


def random_crop(image, size, resize_size, generator):
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


def _resize_window(image, new_size, left, top, size):
    """The size x size window at (left, top) of the image resized to new_size: columns, then rows, as Pillow does it.

    The columns by Pillow, which takes a region's borders as float32. Rounded ones would change some pixels by a level,
    and the rows could make two of it: so the region is one between borders that float32 holds exactly.
    The rows by torch, twice as fast and within a level of Pillow. It resizes whole images alone: the rows that the
    window does not need are there, but empty, and what becomes of them is cut off.
    """
    x_scale, y_scale = image.width / new_size[0], image.height / new_size[1]
    step = new_size[0] // math.gcd(new_size[0], image.width)
    step //= step & -step  # every step-th column's border is a whole number of halves, quarters, ...
    start, end = left // step * step, -(-(left + size) // step) * step
    first_column, last_column = _span_read(start, end, x_scale, image.width)
    first_row, last_row = _span_read(top, top + size, y_scale, image.height)
    rows = np.empty((image.height, size, 3), dtype=np.uint8)
    image = image.crop((first_column, first_row, last_column, last_row))
    box = (start * x_scale - first_column, 0, end * x_scale - first_column, image.height)
    image = image.resize((end - start, image.height), Image.Resampling.BICUBIC, box)
    rows[first_row:last_row] = np.asarray(image)[:, left - start : left - start + size]
    pixels = torch.from_numpy(rows).permute(2, 0, 1)[None]  # (H, size, 3) -> (1, 3, H, size)
    pixels = F.interpolate(pixels, (new_size[1], size), mode="bicubic", antialias=True)
    return pixels[0, :, top : top + size].contiguous()


def _span_read(start, end, scale, length):
    """The span of pixels, out of `length`, that resized pixels start to end are made of; for columns and rows alike."""
    support = 2 * max(scale, 1)  # of the bicubic filter, widened where it reduces
    return max(0, math.floor(start * scale - support)), min(length, math.ceil(end * scale + support))


def training_resize_size(image_size, resize_size=None):
    """The shorter side before the random crop: data.resize_size, or 1.5 times the image size (384 for 256 px)."""
    if resize_size is None:
        return round(1.5 * image_size)
    if resize_size < image_size:
        raise DataError(
            f"data.resize_size: {resize_size} is smaller than the image size; expected {image_size} or more"
        )
    return resize_size


def to_tensor(image):
    """An RGB PIL image as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))  # twice as fast as a permutation


# ----------------------------------------------------------------------------------------------------------------------
# Sources: a numbered list of images


@contextlib.contextmanager
def _open_image(file):
    """Pillow's image of a path or a stream, not decoded yet. A PNG's checksums are compared here: the decoder does not
    look at those of the pixels. Raises ValueError for what is no file to read, and for PostScript."""
    if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("no regular file")  # a pipe would be waited on for ever
    with Image.open(file) as image:
        if image.format == "EPS":
            raise ValueError("PostScript, a program that Ghostscript would have to run")
        if image.format != "PNG":
            yield image
            return
        image.verify()
    with Image.open(file) as image:  # again: after verify nothing can be decoded
        yield image


class ImageSource:
    """A numbered list of images. Subclasses give `__len__`, `name`, `label`, `class_names`, `fingerprint` and `_open`.

    `name(i)` is the file's path or 'split[i]'. `label(i)` is the class index, or None; it never decodes the image.
    `class_names` is the list that label indexes, or None. `fingerprint(indices)` changes when images are added,
    removed, renamed or replaced, of those with the given indices or of all: a key for what was computed from them.
    """

    class_names = None

    def load(self, i):
        """Image i as RGB. Raises UnreadableImage, whatever the decoder says."""
        try:
            with _open_image(self._open(i)) as image:
                if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels, sides over 1 : {MAX_ASPECT_RATIO}")
                return to_rgb(image)
        except UnidentifiedImageError as error:  # its own words have an address in memory, another one each time
            raise UnreadableImage(self.name(i), "no image of a known format") from error
        except Exception as error:  # damaged files make decoders raise almost anything; see UnreadableLog for the bound
            raise UnreadableImage(self.name(i), f"{type(error).__name__}: {error}") from error


class FileSource(ImageSource):
    """Image files below a folder.

    `paths` and `ends` are the files' paths relative to root as `join_paths` gives them, `labels` class indices or None.
    One byte string: 1.3 million paths take about 60 MB, which forked workers share (reference counts would copy a list
    of str).
    """

    def __init__(self, root, paths, ends, labels=None, class_names=None):
        self.root = root
        self._bytes = paths
        self._ends = ends
        self._labels = None if labels is None else np.asarray(labels, dtype=np.int32)
        self.class_names = class_names

    def __len__(self):
        return len(self._ends)

    def _path(self, i):
        """Of image i below root, as bytes."""
        return self._bytes[self._ends[i - 1] if i else 0 : self._ends[i]]

    def name(self, i):
        return os.path.join(self.root, os.fsdecode(self._path(i)))

    def label(self, i):
        return None if self._labels is None else int(self._labels[i])

    def fingerprint(self, indices=None):
        """From the files' paths below root, sizes and times of change: their content is not read."""
        digest = hashlib.sha256()
        for i in range(len(self)) if indices is None else indices:
            digest.update(self._path(i) + b"\0")
            try:
                status = os.stat(self.name(i))
            except OSError:
                continue  # gone since: it will be named as unreadable
            digest.update(struct.pack("<qq", status.st_size, status.st_mtime_ns))
        return digest.hexdigest()

    def _open(self, i):
        return self.name(i)


def join_paths(files):
    """Paths as one byte string, and where in it each ends, int64 (N,)."""
    encoded = [os.fsencode(file) for file in files]
    return b"".join(encoded), np.cumsum([len(file) for file in encoded], dtype=np.int64)


class ColumnSource(ImageSource):
    """A `datasets.Dataset`, read undecoded so that its images take the same path as files do.

    Labels come from a ClassLabel, integer or string column (strings are numbered in sorted order); missing ones and
    the Hub's -1 are None. Which column holds them is settled at first use, because training needs no labels.
    Raises DataError for an image or label column that is absent, ambiguous or of the wrong type.
    """

    def __init__(self, dataset, split, image_column=None, label_column=None):
        import datasets

        if len(dataset) == 0:
            raise DataError(f"data.path: split '{split}' has no rows")
        self.split = split
        self._dataset = dataset
        self._label_setting = label_column
        if label_column is not None:
            _find_label_column(dataset, split, label_column)
        self._column = find_image_column(dataset, split, image_column)
        self._images = dataset.select_columns([self._column]).with_format(None)
        if isinstance(dataset.features[self._column], datasets.Image):
            self._images = self._images.cast_column(self._column, datasets.Image(decode=False))

    def __len__(self):
        return len(self._dataset)

    def name(self, i):
        return f"{self.split}[{i}]"

    def label(self, i):
        labels = self._labels_and_names[0]
        return None if labels is None or labels[i] < 0 else int(labels[i])

    @property
    def class_names(self):
        return self._labels_and_names[1]

    @functools.cached_property
    def _labels_and_names(self):
        """(int64 array (N,) with -1 for a missing label, list of names), either or both None."""
        column = _find_label_column(self._dataset, self.split, self._label_setting)
        if column is None:
            return None, None
        feature = self._dataset.features[column]
        values = self._dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        if feature.dtype in ("string", "large_string"):
            names = sorted({value for value in values if value is not None})
            numbers = {name: number for number, name in enumerate(names)}
            values = [numbers.get(value) for value in values]
        else:
            names = getattr(feature, "names", None)
        return np.array([-1 if value is None else value for value in values], dtype=np.int64), names

    def fingerprint(self, indices=None):
        """That of `datasets`, which follows from the data's origin and all that was done to it, with sizes and times of
        the files that hold the rows, and of those that a column of paths names."""
        digest = hashlib.sha256(f"{self._dataset._fingerprint} {self.split} {self._column}".encode())
        rows = self._dataset
        if indices is not None:
            digest.update(np.asarray(indices, dtype=np.int64).tobytes())
            rows = rows.select(indices)
        files = [file["filename"] for file in self._dataset.cache_files]
        if _dtype(rows.features[self._column]).endswith("string"):
            files += rows[self._column]
        for file in files:
            if file is not None and os.path.isfile(file):
                status = os.stat(file)
                digest.update(f"{os.path.basename(file)} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def _open(self, i):
        return _open_value(self._images[int(i)][self._column])


def _open_value(value):
    """What Image.open takes, of an undecoded image: bytes, a path, or a dict of both as `datasets` keeps them."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ValueError("the row holds no image")
    return io.BytesIO(value) if isinstance(value, bytes) else value


class HeldSource(ImageSource):
    """Undecoded images in memory: (name, value) each, the value bytes, a path, or a dict of both. No labels."""

    def __init__(self, images):
        self._images = images

    def __len__(self):
        return len(self._images)

    def name(self, i):
        return self._images[i][0]

    def label(self, i):
        return None

    def fingerprint(self):
        """From the names and what was read; the content of files that paths name is not looked at."""
        digest = hashlib.sha256()
        for name, value in self._images:
            parts = value if isinstance(value, dict) else {"bytes": value}
            for part in (name, parts.get("path"), parts.get("bytes")):
                part = part if isinstance(part, bytes) else repr(part).encode()
                digest.update(struct.pack("<q", len(part)) + part)
        return digest.hexdigest()

    def _open(self, i):
        return _open_value(self._images[i][1])


class SubsetSource(ImageSource):
    """The images of another source with the given indices; names stay those of the other source."""

    def __init__(self, source, indices):
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self):
        return len(self._indices)

    def name(self, i):
        return self._source.name(int(self._indices[i]))

    def label(self, i):
        return self._source.label(int(self._indices[i]))

    def load(self, i):
        return self._source.load(int(self._indices[i]))

    def fingerprint(self, indices=None):
        return self._source.fingerprint(self._indices if indices is None else self._indices[indices])

    @property
    def class_names(self):
        return self._source.class_names


# ----------------------------------------------------------------------------------------------------------------------
# Splits


def load_splits(cfg, seed, need_eval=True):
    """(training images, evaluation images or None), as the `data` group of the configuration asks.

    The evaluation images are, in this order: the training images themselves if data.eval_split equals data.train_split;
    the split data.eval_split; a seeded share data.holdout_fraction of the training images, max(1, round(n*f)) of them,
    which leaves the training set also when need_eval is false. Data without a split level is all training data.
    Raises DataError for anything missing or contradictory.
    """
    fraction = cfg.holdout_fraction
    if not 0 <= fraction < 1:
        raise DataError(f"data.holdout_fraction: found {fraction}, expected 0 <= fraction < 1")
    splits = find_splits(cfg)
    same = cfg.eval_split == cfg.train_split
    if fraction > 0 and (same or cfg.eval_split in splits):
        raise DataError(
            f"data.holdout_fraction: {fraction} holds images out, but data.eval_split '{cfg.eval_split}' names an "
            "existing split; expected only one of the two"
        )
    if WHOLE not in splits and cfg.train_split not in splits:
        raise _missing_split(cfg, splits, "train_split")
    train = splits[WHOLE if WHOLE in splits else cfg.train_split]()
    if same:
        return train, train if need_eval else None
    if fraction > 0:
        train, held_out = _hold_out(train, fraction, seed)
        return train, held_out if need_eval else None
    if not need_eval:
        return train, None
    if cfg.eval_split not in splits:
        raise _missing_split(cfg, splits, "eval_split")
    return train, splits[cfg.eval_split]()


def load_split(cfg, split):
    """The images of one split. Data without a split level (plain class folders, one saved Dataset) is given whole.

    Because of the latter, code that needs training and evaluation images apart must call load_splits. Raises DataError.
    """
    splits = find_splits(cfg, split)
    if WHOLE in splits:
        source = splits[WHOLE]()
        logger.info("data.path %s has no split level: all %d images are used", cfg.path, len(source))
        return source
    if split not in splits:
        setting = "train_split" if split == cfg.train_split else "eval_split"
        raise _missing_split(cfg, splits, setting, split)
    return splits[split]()


def load_eval_images(cfg, seed):
    """The evaluation images alone, as load_splits gives them. Where they are a split of their own, the training split
    need not be there, and data without a split level is given whole, as by load_split. Raises DataError."""
    if cfg.holdout_fraction == 0 and cfg.eval_split != cfg.train_split:
        return load_split(cfg, cfg.eval_split)
    return load_splits(cfg, seed)[1]


def find_splits(cfg, *more_names):
    """{split name: function that opens it as an ImageSource}; the only key is WHOLE where there is no split level.

    `more_names` are split names that count besides data.train_split and data.eval_split. Raises DataError.
    """
    if not cfg.path:
        raise DataError(f"data.path: found {cfg.path!r}, expected an image folder, a saved data set or a Hub id")
    path = os.path.expanduser(os.fspath(cfg.path))
    if os.path.isdir(path):
        if cfg.config_name is not None:
            raise DataError(
                f"data.config_name: '{cfg.config_name}' is for Hub data sets, but data.path {path} is a local folder"
            )
        if any(os.path.isfile(os.path.join(path, name)) for name in SAVED_DATASET_FILES):
            return _dataset_splits(_load_from_disk(path), cfg)
        return _folder_splits(path, cfg, more_names)
    if os.path.exists(path):
        raise DataError(f"data.path: {path} is a file, expected a folder or a Hub data set id")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise DataError(f"data.path: {path} does not exist; expected an image folder or a saved data set")
    return _dataset_splits(_load_from_hub(path, cfg.config_name), cfg)


def _missing_split(cfg, splits, setting, name=None):
    name = getattr(cfg, setting) if name is None else name
    if WHOLE in splits:
        found = f"{cfg.path} has no split level and counts as training data"
    else:
        found = f"{cfg.path} has the splits {', '.join(sorted(splits))}"
    remedy = "a data.train_split that exists"
    if setting == "eval_split":
        remedy = "a data.eval_split that exists (data.train_split's name evaluates on the training images)"
        remedy += " or a data.holdout_fraction above 0"
    return DataError(f"data.{setting}: there is no split '{name}': {found}; expected {remedy}")


def _hold_out(source, fraction, seed):
    """Two disjoint SubsetSources, (training, held out), both in the source's order."""
    count = max(1, round(len(source) * fraction))
    if count >= len(source):
        raise DataError(
            f"data.holdout_fraction: {fraction} of {len(source)} images holds out {count} and leaves none to train on"
        )
    order = np.random.default_rng((seed, HOLDOUT_STREAM)).permutation(len(source))
    return SubsetSource(source, np.sort(order[count:])), SubsetSource(source, np.sort(order[:count]))


# Folders of image files -----------------------------------------------------------------------------------------------


def _folder_splits(path, cfg, more_names=()):
    """Splits of a folder of image files; `<path>/<split>/<class>/*`, `<path>/<class>/*`, or images anywhere below."""
    for setting in ("image_column", "label_column"):
        if getattr(cfg, setting) is not None:
            raise DataError(
                f"data.{setting}: '{getattr(cfg, setting)}' names a column, but data.path {path} is a folder of files"
            )
    wanted = {cfg.train_split, cfg.eval_split, *more_names}
    names = split_folders(path, wanted)
    if not names:
        return {WHOLE: functools.partial(scan_folder, path, class_folders(path))}
    # One numbering of the classes for both splits, also where a class is absent from one of them.
    folders = {name: os.path.join(path, name) for name in names}
    classes = {name: class_folders(folders[name]) for name in names if name in wanted}
    union = sorted(set().union(*classes.values()))
    return {
        name: functools.partial(scan_folder, folders[name], classes.get(name, ()), union if classes.get(name) else ())
        for name in names
    }


def split_folders(path, wanted=()):
    """Names of the split folders in `path`, or [] if it has no split level. Raises DataError if there are no images.

    Folders named as splits (`wanted`, train, val, valid, validation, test) are splits unless a single one that holds
    images directly stands among other folders: that is a class which happens to be called 'train'.
    """
    files, folders = _list_folder(path)
    if files:
        return []
    folders = [name for name in folders if _has_images(os.path.join(path, name))]
    if not folders:
        raise DataError(f"data.path: {path} holds no image files; expected {', '.join(IMAGE_EXTENSIONS)}")
    hits = [name for name in folders if name in SPLIT_NAMES or name in wanted]
    if len(hits) == 1 and len(folders) > 1 and _list_folder(os.path.join(path, hits[0]))[0]:
        return []
    return folders if hits else []


def class_folders(path):
    """Sorted names of the folders in `path` that hold images, or [] if images also lie in `path` itself."""
    files, folders = _list_folder(path)
    return [] if files else [name for name in folders if _has_images(os.path.join(path, name))]


def scan_folder(path, classes=(), class_names=()):
    """The images below `path` as a FileSource, in sorted order. Raises DataError if there are none.

    `classes` are its class folders, numbered by their place in `class_names` (default: `classes`, as torchvision's
    ImageFolder does); without classes there are no labels.
    """
    class_names = list(class_names or classes)
    paths, ends, counts = _listing(path, classes)
    if not paths:
        raise DataError(f"data.path: {path} holds no image files; expected {', '.join(IMAGE_EXTENSIONS)}")
    labels = np.repeat([class_names.index(name) for name in classes], counts) if classes else None
    return FileSource(path, paths, ends, labels, class_names or None)


def _listing(path, classes):
    """(paths, ends, counts): all images below `path` as `join_paths` gives them, and the number in each class folder.

    The list of a large folder is kept in INDEX_CACHE: to list 1.3 million files on a network drive takes minutes. It is
    good for as long as no folder has changed, which any file or folder that is added, removed or renamed does to the
    folder around it. Processes write it beside its place and rename it.
    """
    place = os.path.abspath(path)
    key = json.dumps([INDEX_FORMAT, IMAGE_EXTENSIONS, place, *classes])
    cache = os.path.join(INDEX_CACHE, hashlib.sha256(os.fsencode(place)).hexdigest()[:32] + ".npz")
    listing = _read_listing(cache, key, path)
    if listing is not None:
        return listing
    started = time.time_ns()
    stamps, files, counts = {}, [], []
    for name in classes or [""]:
        files += _walk(os.path.join(path, name), f"{name}/" if name else "", stamps)
        counts.append(len(files) - sum(counts))
    listing = (*join_paths(files), np.array(counts))
    settled = all(stamp is not None and stamp[2] < started - SETTLED * 1e9 for stamp in stamps.values())
    if len(files) >= INDEXED_FROM and settled:
        _write_listing(cache, key, stamps, listing)
    return listing


def _stamp(folder):
    """Inode and times of change (ns) of a folder, or None where there is none. The times tell when its list of files
    last changed, also where a program has put the modification time back."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _read_listing(cache, key, path):
    """What `_write_listing` has put there, or None where there is nothing or a folder has changed since."""
    if not os.path.exists(cache):
        return None
    try:
        with np.load(cache) as arrays:
            stamps = json.loads(str(arrays["stamps"]))
            if str(arrays["key"]) != key or any(
                _stamp(os.path.join(path, folder)) != tuple(stamp) for folder, stamp in stamps.items()
            ):
                return None
            return arrays["paths"].tobytes(), arrays["ends"], arrays["counts"]
    except DAMAGED as error:
        logger.warning("%s is damaged (%s), %s is listed again", cache, error, path)
        return None


def _write_listing(cache, key, stamps, listing):
    paths, ends, counts = listing
    try:
        os.makedirs(INDEX_CACHE, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=INDEX_CACHE) as folder:
            beside = os.path.join(folder, "index.npz")
            paths = np.frombuffer(paths, np.uint8)
            np.savez(beside, key=key, stamps=json.dumps(stamps), paths=paths, ends=ends, counts=counts)
            os.replace(beside, cache)
    except OSError as error:
        logger.warning("the list of files is not kept for the next start: %s", error)


def _entries(path):
    """(entry, whether it is a folder) of everything in `path` that is not hidden, without a stat per file."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry, entry.is_dir()
    except OSError as error:
        raise DataError(f"data.path: {path} cannot be listed: {error.strerror}") from error


def _list_folder(path):
    """(names of image files, names of folders), each sorted."""
    files, folders = [], []
    for entry, is_folder in _entries(path):
        if is_folder and not _is_loop(entry, path):
            folders.append(entry.name)
        elif not is_folder and entry.name.lower().endswith(IMAGE_EXTENSIONS):
            files.append(entry.name)
    return sorted(files), sorted(folders)


def _is_loop(entry, path):
    """Whether a linked folder contains the folder that links to it."""
    if not entry.is_symlink():
        return False
    target, here = os.path.realpath(entry.path), os.path.realpath(path)
    return os.path.commonpath([target, here]) == target


def _walk(path, prefix, stamps):
    """Paths of all images below `path`, each with `prefix` before it: a folder's files before its folders, each sorted.

    `stamps` gets {prefix of the folder: its stamp} of all folders.
    """
    stamps[prefix] = _stamp(path)  # before it is listed: a change meanwhile shows the next time
    files, folders = _list_folder(path)
    for name in files:
        yield prefix + name
    for name in folders:
        yield from _walk(os.path.join(path, name), f"{prefix}{name}/", stamps)


def _has_images(path):
    """Whether there is an image anywhere below; stops at the first, so a large folder is not listed twice."""
    folders = []
    for entry, is_folder in _entries(path):
        if is_folder and not _is_loop(entry, path):
            folders.append(entry.path)
        elif not is_folder and entry.name.lower().endswith(IMAGE_EXTENSIONS):
            return True
    return any(_has_images(folder) for folder in folders)


# `datasets` -----------------------------------------------------------------------------------------------------------


def _load_from_disk(path):
    import datasets

    try:
        return datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.path: {path} is not a complete saved data set: {one_line(error)}") from error


def _load_from_hub(path, config_name):
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import constants

    try:
        return datasets.load_dataset(path, name=config_name)
    except (ConnectionError, DatasetNotFoundError) as error:
        hint = "; HF_HUB_OFFLINE is set, so only cached data sets are found" if constants.HF_HUB_OFFLINE else ""
        if path == "data/digits":
            hint += "; scripts/prepare_data.py digits --output data/digits makes this one"
        raise DataError(
            f"data.path: '{path}' is neither a local folder nor a Hub data set that can be reached{hint}: "
            f"{one_line(error)}"
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"data.path: Hub data set '{path}' with data.config_name {config_name!r} cannot be loaded: "
            f"{one_line(error)}"
        ) from error


def _dataset_splits(dataset, cfg):
    open_split = functools.partial(ColumnSource, image_column=cfg.image_column, label_column=cfg.label_column)
    if not isinstance(dataset, dict):
        return {WHOLE: functools.partial(open_split, dataset, cfg.train_split)}
    return {name: functools.partial(open_split, rows, name) for name, rows in dataset.items()}


def find_image_column(dataset, split, asked):
    """Name of the image column: the one asked for, the only Image column, or a usual name."""
    import datasets

    features = dataset.features
    if asked is not None:
        _check_column(features, split, "image_column", asked, _can_hold_images, "Image, binary or string (a path)")
        return asked
    candidates = [name for name in features if isinstance(features[name], datasets.Image)]
    if not candidates:
        candidates = [name for name in IMAGE_COLUMNS if name in features and _can_hold_images(features[name])]
    column = _choose(candidates, IMAGE_COLUMNS, split, "image_column")
    if column is None:
        raise DataError(f"data.image_column: no image column among {', '.join(features)} in split '{split}'; name it")
    return column


def _find_label_column(dataset, split, asked):
    """Name of the label column: the one asked for, the only ClassLabel column, a usual name, or None."""
    import datasets

    features = dataset.features
    if asked is not None:
        _check_column(features, split, "label_column", asked, _can_hold_labels, "ClassLabel, integer or string")
        return asked
    candidates = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
    if not candidates:
        candidates = [name for name in LABEL_COLUMNS if name in features and _can_hold_labels(features[name])]
    return _choose(candidates, LABEL_COLUMNS, split, "label_column")


def _check_column(features, split, setting, name, accepts, expected):
    if name not in features:
        raise DataError(f"data.{setting}: no column '{name}' in split '{split}'; found {', '.join(features)}")
    if not accepts(features[name]):
        raise DataError(f"data.{setting}: column '{name}' has type {features[name]}, expected {expected}")


def _choose(candidates, usual_names, split, setting):
    """The only candidate, or the only one with a usual name; None if there are no candidates."""
    if len(candidates) > 1:
        usual = [name for name in candidates if name in usual_names]
        if len(usual) != 1:
            raise DataError(f"data.{setting}: split '{split}' has {', '.join(candidates)}; name the one to use")
        return usual[0]
    return candidates[0] if candidates else None


def _can_hold_images(feature):
    import datasets

    if isinstance(feature, dict):  # a plain {"bytes": ..., "path": ...} column
        return "bytes" in feature or "path" in feature
    return isinstance(feature, datasets.Image) or re.fullmatch(r"(large_)?(binary|string)", _dtype(feature)) is not None


def _can_hold_labels(feature):
    return re.fullmatch(r"u?int\d+|(large_)?string", _dtype(feature)) is not None


def _dtype(feature):
    """The type of a column of single values, or ''."""
    import datasets

    return feature.dtype if isinstance(feature, (datasets.Value, datasets.ClassLabel)) else ""


def one_line(error, limit=300):
    return " ".join(str(error).split())[:limit] or type(error).__name__


# ----------------------------------------------------------------------------------------------------------------------
# Data sets for the loaders


class TrainImages(torch.utils.data.Dataset):
    """Randomly cropped training images, indexed by (epoch, index).

    Item: pixels uint8 (3, image_size, image_size), index, and the names of images found unreadable on the way. The crop
    depends on (seed, epoch, index) alone. An unreadable image is replaced by the next readable one (the last is
    followed by the first), whose index is then given. Raises DataError when max_unreadable + 1 images in a row fail.
    """

    def __init__(self, source, image_size, resize_size=None, seed=0, max_unreadable=10):
        self.source = source
        self.image_size = image_size
        self.resize_size = training_resize_size(image_size, resize_size)
        self.seed = seed
        self.max_unreadable = max_unreadable

    def __len__(self):
        return len(self.source)

    def __getitem__(self, epoch_and_index):
        epoch, index = epoch_and_index
        unreadable = []
        for offset in range(min(self.max_unreadable + 1, len(self.source))):
            shown = (index + offset) % len(self.source)
            try:
                image = self.source.load(shown)
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            seed = (self.seed, CROP_STREAM, epoch, index)
            pixels = random_crop(image, self.image_size, self.resize_size, seed)
            return {"pixels": pixels, "index": shown, "unreadable": unreadable}
        raise too_many_in_a_row(unreadable, self.max_unreadable)


def too_many_in_a_row(unreadable, max_unreadable):
    """The DataError for max_unreadable + 1 images in a row that cannot be read, or all if there are fewer, with their
    names."""
    if len(unreadable) <= max_unreadable:
        return DataError(
            f"data.path: none of {len(unreadable)} training images can be read; the last is {unreadable[-1]}"
        )
    return DataError(
        f"data.max_unreadable: {len(unreadable)} images in a row cannot be read, expected at most {max_unreadable}; "
        f"the last is {unreadable[-1]}"
    )


class EvalImages(torch.utils.data.Dataset):
    """Centre-cropped evaluation images, indexed by int.

    Item: pixels uint8 (3, image_size, image_size), index, unreadable names. An unreadable image has pixels None and is
    dropped by `collate`, so that no other image counts twice.
    """

    def __init__(self, source, image_size):
        self.source = source
        self.image_size = image_size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            image = self.source.load(index)
        except UnreadableImage as error:
            return {"pixels": None, "index": index, "unreadable": [str(error)]}
        return {"pixels": to_tensor(center_crop(image, self.image_size)), "index": index, "unreadable": []}


def collate(samples, image_size=0):
    """Batch of samples: pixels uint8 (B, 3, S, S), index int64 (B,), unreadable list[str].

    Samples without pixels are left out; B may be 0, and then S is image_size.
    """
    readable = [sample for sample in samples if sample["pixels"] is not None]
    empty = torch.empty((0, 3, image_size, image_size), dtype=torch.uint8)
    return {
        "pixels": torch.stack([sample["pixels"] for sample in readable]) if readable else empty,
        "index": torch.tensor([sample["index"] for sample in readable], dtype=torch.int64),
        "unreadable": [name for sample in samples for name in sample["unreadable"]],
    }


class UnreadableLog:
    """Counts distinct unreadable images, warns once for each, and stops when they are too many.

    `add` raises DataError when more than max_unreadable distinct names were added. Each process counts what it reads.
    `what` and `setting`: what the names are of, and the setting with the bound.
    """

    def __init__(self, max_unreadable, what="image", setting="data.max_unreadable"):
        self.max_unreadable = max_unreadable
        self.what = what
        self.setting = setting
        self.names = set()

    def add(self, names):
        for name in names:
            if name in self.names:
                continue
            self.names.add(name)
            if len(self.names) > self.max_unreadable:
                raise DataError(
                    f"{self.setting}: {len(self.names)} {self.what}s cannot be read, expected at most "
                    f"{self.max_unreadable}; the last is {name}"
                )
            logger.warning("unreadable %s %d (at most %d): %s", self.what, len(self.names), self.max_unreadable, name)


# ----------------------------------------------------------------------------------------------------------------------
# Order and loaders


class TrainBatches:
    """The micro-batches of one rank, from start_step to total_steps: lists of (epoch, index) for TrainImages.

    The global batch of step s is slice s % steps_per_epoch of the epoch's permutation, a function of (seed, epoch);
    images that do not fill a last one wait for another epoch. Micro-batch m of rank r is the contiguous piece
    m*world_size + r of it, so the images of a step do not depend on how they are shared out. All micro-batches of a
    step are given, then those of the next step.
    Raises DataError for fewer images than one global batch, or sizes that do not divide.
    """

    def __init__(
        self, num_images, global_batch_size, micro_batch_size, rank, world_size, seed, start_step, total_steps
    ):
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
            raise DataError(
                f"global batch size {global_batch_size} is not a multiple of micro-batch size {micro_batch_size} "
                f"times {world_size} processes = {micro_batch_size * world_size}"
            )
        if num_images < global_batch_size:
            raise DataError(
                f"data.path: {num_images} training images are fewer than one global batch of {global_batch_size}"
            )
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} is outside of 0..{world_size - 1}")
        self.num_images = num_images
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start_step = start_step
        self.total_steps = total_steps

    @property
    def steps_per_epoch(self):
        return self.num_images // self.global_batch_size

    @property
    def micro_batches_per_step(self):
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __len__(self):
        return max(0, self.total_steps - self.start_step) * self.micro_batches_per_step

    def __iter__(self):
        order_epoch, order = None, None
        for step in range(self.start_step, self.total_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng((self.seed, ORDER_STREAM, epoch)).permutation(self.num_images)
                order_epoch = epoch
            for micro_batch in range(self.micro_batches_per_step):
                piece = micro_batch * self.world_size + self.rank
                start = step_in_epoch * self.global_batch_size + piece * self.micro_batch_size
                yield [(epoch, int(index)) for index in order[start : start + self.micro_batch_size]]


def train_loader(source, batches, image_size, resize_size=None, max_unreadable=10, num_workers=0):
    """DataLoader over the micro-batches of a TrainBatches; each is a dict as `collate` makes it. Crops use its seed.

    It is already this rank's share: Accelerate must not shard it again.
    """
    images = TrainImages(source, image_size, resize_size, batches.seed, max_unreadable)
    return _loader(images, batches, collate, num_workers)


def evenly_spread(items, count):
    """`count` of the items at equal distances, in their order; all of them if they are fewer."""
    count = min(count, len(items))
    return [items[position * len(items) // count] for position in range(count)]


def chosen_images(source, num_samples=None):
    """Indices of the images that eval_loader gives, increasing."""
    return evenly_spread(range(len(source)), len(source) if num_samples is None else num_samples)


def eval_loader(source, image_size, batch_size, num_workers=0, rank=0, world_size=1, num_samples=None):
    """DataLoader over this rank's share of the evaluation images; every image is in exactly one batch of one rank.

    With num_samples, that many images spread evenly over the source (files are sorted by class), or all if fewer.
    Rank r gets the images r, r + world_size, ... All ranks get equally many batches, as a sharded model needs; the last
    one may be smaller, or empty.
    """
    chosen = chosen_images(source, num_samples)
    mine = chosen[rank::world_size]
    per_rank = -(-len(chosen) // world_size)
    batches = [mine[start : start + batch_size] for start in range(0, per_rank, batch_size)]
    collate_fn = functools.partial(collate, image_size=image_size)
    return _loader(EvalImages(source, image_size), batches, collate_fn, num_workers)


def _loader(images, batches, collate_fn, num_workers):
    return WorkerLoader(
        images,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # the loader draws a seed from it, and would else move the global generator
    )


class WorkerLoader(torch.utils.data.DataLoader):
    """A DataLoader whose processes have SIGTERM blocked from their first moment: `start_worker` comes too late for the
    threads that some libraries (Arrow) start again within a fork, and one that takes the signal ends the process."""

    def __iter__(self):
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_worker(worker_id):
    """One thread per worker; signals meant for the run, which reach the whole process group, are the main process's."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent():
    """End at a SIGTERM from the main process alone: it ends leftover workers with one when it exits, and waits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
