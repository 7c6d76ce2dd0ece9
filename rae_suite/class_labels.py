"""Which classes a set of images is drawn from: balanced, random, or some that are named.

Names are looked up by a function of modeling_dit.py, because the pipeline there travels without this folder.
"""

from collections.abc import Sequence
from typing import Optional

import torch

from modeling_dit import find_class
from rae_suite.errors import ConfigError


def balanced_labels(num_samples: int, classes: Sequence, seed: int) -> torch.Tensor:
    """Labels (N,) with each of `classes` equally often, in an order that the seed decides.

    As the published sampler has them for a multiple of the number of classes: sorted by class, then permuted. Files in
    the order of their classes would ruin an inception score, which compares consecutive images. Of other numbers the
    rest are different classes, which the seed chooses, at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    each, rest = divmod(num_samples, len(classes))
    places = torch.arange(len(classes)).repeat_interleave(each)
    places = places[torch.randperm(len(places), generator=generator)]
    tail = torch.randperm(len(classes), generator=generator)[:rest]
    return torch.tensor(classes)[torch.cat([places, tail])]


def random_labels(num_samples: int, classes: Sequence, seed: int) -> torch.Tensor:
    """Labels (N,), each drawn from `classes` with equal probabilities."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(classes)[torch.randint(len(classes), (num_samples,), generator=generator)]


def indices_of_classes(asked: Sequence, class_names: Optional[dict], num_classes: int, key: str) -> list:
    """Indices of the classes that are `asked` for by name or index, all of them where none is. Raises ConfigError,
    about the setting `key`, with the nearest names, for one that does not exist or is given twice."""
    try:
        found = [find_class(label, class_names or {}, num_classes) for label in asked]
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    for index in found:
        if found.count(index) > 1:
            raise ConfigError(f"{key}: expected each class once, got class {index} {found.count(index)} times")
    return found or list(range(num_classes))
