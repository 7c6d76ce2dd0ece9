"""Numbered lists of images: files below a folder, rows of a data set, images in memory, parts of such lists."""

import functools
import hashlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Optional, Union

import numpy as np
from PIL import Image, UnidentifiedImageError

from rae_suite.errors import DataError, UnreadableImage
from rae_suite.images import DEFAULT_MEGAPIXELS, _open_image, to_rgb

if TYPE_CHECKING:  # slow to import
    import datasets

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label")
MAX_ASPECT_RATIO = 100  # a resized shorter side would make the longer one, and the memory for it, huge
Undecoded = Union[bytes, str, dict]  # an image that is not decoded yet: bytes of its file, a path, or a dict of both
HeldImage = tuple[str, Undecoded, Optional[int]]  # name, image, label


class ImageSource:
    """A numbered list of images. Subclasses give `__len__`, `name`, `label`, `class_names`, `fingerprint` and `_open`.

    `name(i)` is the file's path, see `shown_name`, or 'split[i]'. `label(i)` is the class index, or None; it never
    decodes the image.
    `list_digest()` is of the list alone: the same wherever the data lies, another when images are added or renamed.
    `class_names` is the list that label indexes, or None. `check_labels()` raises DataError where several label columns
    could be meant. Commands that need labels call it; for the others such images have no labels.
    `fingerprint(indices)` changes when images are added, removed, renamed or replaced, of those with the given indices
    or of all: a key for what was computed from them. `split` says in words which images of the data these are, as
    splits.py has found them. An image of more than `max_megapixels` is unreadable.
    """

    class_names: Optional[list] = None
    split: Optional[str] = None
    max_megapixels: float = DEFAULT_MEGAPIXELS

    def check_labels(self) -> None:
        pass

    def load(self, i: int) -> Image.Image:
        """Image i as RGB. Raises UnreadableImage, whatever the decoder says."""
        try:
            with _open_image(self._open(i)) as image:
                if image.width * image.height > self.max_megapixels * 1e6:
                    raise ValueError(
                        f"{image.width * image.height / 1e6:.4g} megapixels, and data.max_megapixels is "
                        f"{self.max_megapixels:g}"
                    )
                if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels, sides over 1 : {MAX_ASPECT_RATIO}")
                return to_rgb(image)
        except UnidentifiedImageError as error:  # its message has a memory address, which differs each time
            raise UnreadableImage(self.name(i), "no image of a known format") from error
        except Exception as error:  # damaged files make decoders raise almost anything; see UnreadableLog for the bound
            raise UnreadableImage(self.name(i), f"{type(error).__name__}: {error}") from error


class FileSource(ImageSource):
    """Image files below a folder.

    `paths` and `ends` are the files' paths relative to root as `join_paths` gives them, `labels` class indices or None.
    The paths are one byte string, because forked workers share its memory: about 60 MB for 1.3 million paths. Of a list
    of str each worker would get a copy, as reading an item writes to the item's reference count.
    """

    def __init__(
        self,
        root: str,
        paths: bytes,
        ends: np.ndarray,
        labels: Optional[np.ndarray] = None,
        class_names: Optional[list] = None,
    ):
        self.root = root
        self._bytes = paths
        self._ends = ends
        self._labels = None if labels is None else np.asarray(labels, dtype=np.int32)
        self.class_names = None if class_names is None else [shown_name(name) for name in class_names]

    def __len__(self) -> int:
        return len(self._ends)

    def _path(self, i: int) -> bytes:
        """Path of image i below root."""
        return self._bytes[self._ends[i - 1] if i else 0 : self._ends[i]]

    def file(self, i: int) -> str:
        """Path of image i, as the system's calls take it."""
        return os.path.join(self.root, os.fsdecode(self._path(i)))

    def name(self, i: int) -> str:
        return shown_name(self.file(i))

    def label(self, i: int) -> Optional[int]:
        return None if self._labels is None else int(self._labels[i])

    def fingerprint(self, indices: Optional[Sequence[int]] = None) -> str:
        """Digest of the files' paths below root, sizes and modification times. The files are not read."""
        digest = hashlib.sha256()
        for i in range(len(self)) if indices is None else indices:
            digest.update(self._path(i) + b"\0")
            try:
                status = os.stat(self.file(i))
            except OSError:
                continue  # the file is gone: reading it will name it as unreadable
            digest.update(struct.pack("<qq", status.st_size, status.st_mtime_ns))
        return digest.hexdigest()

    def list_digest(self) -> str:
        return hashlib.sha256(self._bytes).hexdigest()

    def _open(self, i: int) -> str:
        return self.file(i)


def shown_name(name: str) -> str:
    """The name of a file or folder as text that can be written anywhere: bytes that are not UTF-8 become \\xe9 and the
    like."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def join_paths(files: Iterable[str]) -> tuple[bytes, np.ndarray]:
    """Paths as one byte string, and where in it each ends, int64 (N,)."""
    encoded = [os.fsencode(file) for file in files]
    return b"".join(encoded), np.cumsum([len(file) for file in encoded], dtype=np.int64)


class ColumnSource(ImageSource):
    """A `datasets.Dataset`, read undecoded so that its images take the same path as files do.

    Labels come from a ClassLabel, integer or string column (strings are numbered in sorted order). A missing label and
    the Hub's -1 are None. Raises DataError for an image column that is absent, ambiguous or of the wrong type, and for
    a label column that was asked for and cannot be used. An ambiguous label column that nobody asked for is an error of
    check_labels only, because most commands need no labels.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        split: str,
        image_column: Optional[str] = None,
        label_column: Optional[str] = None,
    ):
        import datasets

        if len(dataset) == 0:
            raise DataError(f"data.path: split '{split}' has no rows")
        self.split = self._split = split
        self._dataset = dataset
        self._label_column, self._label_problem = None, None
        try:
            self._label_column = find_label_column(dataset, split, label_column)
        except DataError as error:
            if label_column is not None:
                raise
            self._label_problem = error
        self._column = find_image_column(dataset, split, image_column)
        self._images = dataset.select_columns([self._column]).with_format(None)
        if isinstance(dataset.features[self._column], datasets.Image):
            self._images = self._images.cast_column(self._column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, i: int) -> str:
        return f"{self._split}[{i}]"

    def check_labels(self) -> None:
        if self._label_problem is not None:
            raise self._label_problem

    def label(self, i: int) -> Optional[int]:
        labels = self._labels_and_names[0]
        return None if labels is None or labels[i] < 0 else int(labels[i])

    @property
    def class_names(self) -> Optional[list]:
        return self._labels_and_names[1]

    @functools.cached_property
    def _labels_and_names(self) -> tuple[Optional[np.ndarray], Optional[list]]:
        """(int64 array (N,) with -1 for a missing label, list of names), either or both None."""
        column = self._label_column
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

    def fingerprint(self, indices: Optional[Sequence[int]] = None) -> str:
        """Digest of the fingerprint of `datasets`, which follows from the data's origin and all that was done to it,
        and of sizes and modification times: those of the files that hold the rows, and of files that a column of paths
        names."""
        digest = hashlib.sha256(f"{self._dataset._fingerprint} {self._split} {self._column}".encode())
        rows = self._dataset
        if indices is not None:
            digest.update(np.asarray(indices, dtype=np.int64).tobytes())
            rows = rows.select(indices)
        files = [file["filename"] for file in self._dataset.cache_files]
        if _dtype(rows.features[self._column]).endswith("string"):
            files += rows[self._column]
        for file in files:
            if file is not None and os.path.isfile(file):  # pathlib raises OSError for a long text that is no path
                status = os.stat(file)
                digest.update(f"{os.path.basename(file)} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def list_digest(self) -> str:
        return hashlib.sha256(f"{self._dataset._fingerprint} {self.split}".encode()).hexdigest()

    def _open(self, i: int) -> Union[str, BinaryIO]:
        return _open_value(self._images[int(i)][self._column])


def _open_value(value: Optional[Undecoded]) -> Union[str, BinaryIO]:
    """A path or a stream of an undecoded image, as Image.open takes them. Raises ValueError where there is no image."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ValueError("the row holds no image")
    return io.BytesIO(value) if isinstance(value, bytes) else value


class HeldSource(ImageSource):
    """Undecoded images in memory."""

    def __init__(
        self,
        images: Sequence[HeldImage],
        class_names: Optional[list] = None,
        max_megapixels: float = DEFAULT_MEGAPIXELS,
    ):
        self._images = images
        self.class_names = class_names
        self.max_megapixels = max_megapixels

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        return self._images[i][0]

    def label(self, i: int) -> Optional[int]:
        return self._images[i][2]

    def fingerprint(self, indices: Optional[Sequence[int]] = None) -> str:
        """Digest of the names, and of the bytes and paths in memory. The files that paths name are not read."""
        digest = hashlib.sha256()
        for i in range(len(self)) if indices is None else indices:
            name, value, _ = self._images[i]
            parts = value if isinstance(value, dict) else {"bytes": value}
            for part in (name, parts.get("path"), parts.get("bytes")):
                part = part if isinstance(part, bytes) else repr(part).encode()
                digest.update(struct.pack("<q", len(part)) + part)
        return digest.hexdigest()

    def _open(self, i: int) -> Union[str, BinaryIO]:
        return _open_value(self._images[i][1])


def evenly_spread(items: Sequence, count: int, with_last: bool = False) -> list:
    """`count` of the items at equal distances, in their order, beginning with the first; all items if there are fewer.
    `with_last`: ending with the last."""
    count = min(count, len(items))
    if with_last:
        return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]
    return [items[i * len(items) // count] for i in range(count)]


class SubsetSource(ImageSource):
    """The images of another source with the given indices; names stay those of the other source."""

    def __init__(self, source: ImageSource, indices: Sequence[int]):
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, i: int) -> str:
        return self._source.name(int(self._indices[i]))

    def label(self, i: int) -> Optional[int]:
        return self._source.label(int(self._indices[i]))

    def check_labels(self) -> None:
        self._source.check_labels()

    def load(self, i: int) -> Image.Image:
        return self._source.load(int(self._indices[i]))

    def fingerprint(self, indices: Optional[Sequence[int]] = None) -> str:
        return self._source.fingerprint(self._indices if indices is None else self._indices[indices])

    def list_digest(self) -> str:
        return hashlib.sha256(self._source.list_digest().encode() + self._indices.tobytes()).hexdigest()

    @property
    def class_names(self) -> Optional[list]:
        return self._source.class_names


def find_image_column(
    dataset: Union["datasets.Dataset", "datasets.DatasetInfo"], split: str, asked: Optional[str]
) -> str:
    """Name of the image column: the one `asked` for, the only Image column, or a usual name. Raises DataError."""
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


def find_label_column(
    dataset: Union["datasets.Dataset", "datasets.DatasetInfo"], split: str, asked: Optional[str]
) -> Optional[str]:
    """Name of the label column: the one `asked` for, the only ClassLabel column, a usual name, or None. Raises
    DataError."""
    import datasets

    features = dataset.features
    if asked is not None:
        _check_column(features, split, "label_column", asked, _can_hold_labels, "ClassLabel, integer or string")
        return asked
    candidates = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
    if not candidates:
        candidates = [name for name in LABEL_COLUMNS if name in features and _can_hold_labels(features[name])]
    return _choose(candidates, LABEL_COLUMNS, split, "label_column")


def _check_column(
    features: dict, split: str, setting: str, name: str, accepts: Callable[[Any], bool], expected: str
) -> None:
    """Raise DataError unless there is a column `name` of a type that `accepts` takes, in words `expected`."""
    if name not in features:
        raise DataError(f"data.{setting}: no column '{name}' in split '{split}'; found {', '.join(features)}")
    if not accepts(features[name]):
        raise DataError(f"data.{setting}: column '{name}' has type {features[name]}, expected {expected}")


def _choose(candidates: list, usual_names: tuple, split: str, setting: str) -> Optional[str]:
    """The only candidate, or the only one with a usual name; None without candidates. Raises DataError."""
    if len(candidates) > 1:
        usual = [name for name in candidates if name in usual_names]
        if len(usual) != 1:
            raise DataError(f"data.{setting}: split '{split}' has {', '.join(candidates)}; name the one to use")
        return usual[0]
    return candidates[0] if candidates else None


def _can_hold_images(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):  # a plain {"bytes": ..., "path": ...} column
        return "bytes" in feature or "path" in feature
    return isinstance(feature, datasets.Image) or re.fullmatch(r"(large_)?(binary|string)", _dtype(feature)) is not None


def _can_hold_labels(feature: Any) -> bool:
    return re.fullmatch(r"u?int\d+|(large_)?string", _dtype(feature)) is not None


def _dtype(feature: Any) -> str:
    """The type of a column of single values, or ''."""
    import datasets

    return feature.dtype if isinstance(feature, (datasets.Value, datasets.ClassLabel)) else ""
