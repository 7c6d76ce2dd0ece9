"""Classes of images: which there are, and the numbers by which a network knows them."""

from dataclasses import dataclass
from typing import Optional, Union

import numpy as np
import torch

from rae_suite.errors import ConfigError, DataError
from rae_suite.sources import ImageSource
from rae_suite.streams import Stream


def read_labels(source: ImageSource, setting: str) -> tuple:
    """(labels (N,) int64, {label: name of the class} of those that occur). Numbers without names are their own names.

    Raises ConfigError, about the split that `setting` chose, when an image has no label.
    """
    source.check_labels()
    labels = [source.label(i) for i in range(len(source))]
    missing = labels.count(None)
    if missing:
        raise ConfigError(
            f"{setting}: {missing} of {len(labels)} images have no label; expected class folders, or a column of "
            "labels (data.label_column)"
        )
    names = source.class_names
    return np.array(labels), {label: str(names[label] if names else label) for label in sorted(set(labels))}


def number_labels(labels: np.ndarray, names: dict, classes: list) -> torch.Tensor:
    """Labels as places of their names in `classes`: each split numbers its classes in its own way."""
    place = {name: i for i, name in enumerate(classes)}
    values, which = np.unique(labels, return_inverse=True)
    return torch.tensor([place[names[value]] for value in values])[torch.from_numpy(which)]


@dataclass(frozen=True)
class Classes:
    """The classes that a network knows: `num`, and their `names` in the order of their indices, or None.

    `places`: index of the class of each label of the images, by the label; None: they are the same. `labelled`: whether
    the images have labels; if not, all are of class 0.
    """

    num: int
    names: Optional[tuple]
    places: Optional[tuple] = None
    labelled: bool = True

    def of(self, labels: torch.Tensor) -> torch.Tensor:
        """Class indices (B,) of labels (B,) as batches have them. Raises DataError for an image without a label, or
        with a number that is no class."""
        if not self.labelled:
            return torch.zeros_like(labels)
        known = self.num if self.places is None else len(self.places)
        wrong = labels[(labels < 0) | (labels >= known)]
        if len(wrong):
            found = "no label" if wrong[0] < 0 else f"label {wrong[0]}"
            raise DataError(f"data.label_column: an image has {found}, expected a number from 0 to {known - 1}")
        return labels if self.places is None else torch.tensor(self.places)[labels]


def find_classes(
    images: Union[ImageSource, Stream], num_classes: Optional[int], class_names: Optional[tuple], setting: str
) -> Classes:
    """The classes of `images`, as far as `num_classes` and `class_names` (model.num_classes, model.class_names) do not
    say otherwise. `setting`: what chose the images.

    Raises ConfigError for more classes than were asked for, and for images without labels where there are classes.
    """
    images.check_labels()
    if not has_labels(images):
        if (num_classes or 1) > 1 or class_names is not None:
            key, value = ("model.class_names", list(class_names)) if class_names else ("model.num_classes", num_classes)
            raise ConfigError(
                f"{key}: {value}, but the images of {setting} have no labels; expected class folders, or a column of "
                "labels (data.label_column)"
            )
        return Classes(1, None, labelled=False)
    names = None if images.class_names is None else tuple(map(str, images.class_names))
    if isinstance(images, ImageSource):
        labels, _ = read_labels(images, setting)
        highest = int(labels.max())
    else:
        highest = -1 if names is None else len(names) - 1
    if class_names is not None:
        return Classes(len(class_names), class_names, places_of(names, class_names, highest, setting))
    if names is None and not isinstance(images, ImageSource) and num_classes is None:
        raise ConfigError("model.num_classes: needed, because the labels of a stream have no names")
    found = highest + 1 if names is None else len(names)
    if num_classes is not None and found > num_classes:
        raise ConfigError(f"model.num_classes: {num_classes}, but the images of {setting} are of {found} classes")
    return Classes(num_classes or found, names if num_classes in (None, found) else None)


def has_labels(images: Union[ImageSource, Stream]) -> bool:
    if isinstance(images, Stream):
        return images.has_labels
    return any(images.label(i) is not None for i in range(len(images)))


def places_of(names: Optional[tuple], class_names: tuple, highest: int, setting: str) -> Optional[tuple]:
    """See Classes. Raises ConfigError for a class of the images that is not among `class_names`."""
    if names is None:  # numbers: they are indices of the class names
        if highest >= len(class_names):
            raise ConfigError(f"model.class_names: {len(class_names)} names, but {setting} has the label {highest}")
        return None
    unknown = [name for name in names if name not in class_names]
    if unknown:
        raise ConfigError(
            f"model.class_names: the images of {setting} have {len(unknown)} classes that are not named, such as "
            f"{unknown[0]!r}"
        )
    return tuple(class_names.index(name) for name in names)
