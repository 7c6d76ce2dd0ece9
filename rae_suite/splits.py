"""Where images come from: folders and data sets, their splits, and what is held out for evaluation."""

import functools
import os
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Optional, Union

import numpy as np

from rae_suite.errors import DataError, one_line
from rae_suite.folders import SHARD_ENDINGS, class_folders, has_images, list_folder, list_images
from rae_suite.images import IMAGE_EXTENSIONS, check_codecs
from rae_suite.randomness import HOLDOUT_STREAM
from rae_suite.settings import ImagesConfig
from rae_suite.sources import ColumnSource, FileSource, ImageSource, SubsetSource

if TYPE_CHECKING:  # slow to import
    import datasets

SPLIT_NAMES = ("train", "val", "valid", "validation", "test")
SAVED_DATASET_FILES = ("dataset_dict.json", "state.json", "dataset_info.json")  # of `datasets`' save_to_disk
WHOLE = None  # key of data that has no split level
Splits = dict[Optional[str], Callable[[], ImageSource]]  # {name: opens that split}; the only name may be WHOLE


def load_splits(cfg: ImagesConfig, seed: int, need_eval: bool = True) -> tuple[ImageSource, Optional[ImageSource]]:
    """(training images, evaluation images or None), as the `data` group of the configuration asks.

    The evaluation images are, in this order: the training images themselves if data.eval_split equals data.train_split;
    the split data.eval_split; a seeded share data.holdout_fraction of the n training images, max(1, round(n * share))
    of them. Held-out images are left out of the training images also when need_eval is false, so that commands agree
    on the training images. Data without a split level is all training data, unless another data.train_split than the
    default was asked for. Raises DataError for anything missing or contradictory.
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
    train = _open_split(cfg, splits, "train_split")
    if same:
        return train, train if need_eval else None
    if fraction > 0:
        train, held_out = _hold_out(train, fraction, seed)
        held_out.split = held_out_in_words(fraction, cfg.train_split, seed)
        train.split = f"{cfg.train_split} without the {held_out.split}"
        return train, held_out if need_eval else None
    if not need_eval:
        return train, None
    if cfg.eval_split not in splits:
        raise _missing_split(cfg, splits, "eval_split")
    return train, _open_split(cfg, splits, "eval_split")


def _open_split(cfg: ImagesConfig, splits: Splits, setting: str) -> ImageSource:
    """The images of the split that `setting` (train_split or eval_split) names, or all images of data without a split
    level. Raises DataError, also where such data was asked for a split by another name than the setting's default."""
    name = getattr(cfg, setting)
    if name in splits:
        source = splits[name]()
        source.split, source.max_megapixels = name, cfg.max_megapixels
        return source
    if WHOLE not in splits or name != getattr(ImagesConfig, setting):
        raise _missing_split(cfg, splits, setting, f", or no data.{setting}, which means all images")
    source = splits[WHOLE]()
    source.split, source.max_megapixels = all_in_words(len(source)), cfg.max_megapixels
    return source


def all_in_words(count: int) -> str:
    """Words of results and model cards for all images of data without a split level."""
    return f"all {count} images (no splits)"


def held_out_in_words(fraction: float, train_split: str, seed: int) -> str:
    """Words of results and model cards for evaluation images that were held out of the training images."""
    return f"{100 * fraction:g}% held out of {train_split}, seed {seed}"


def load_eval_images(cfg: ImagesConfig, seed: int) -> ImageSource:
    """Only the evaluation images of load_splits. The training split may be missing where the evaluation images are a
    split of their own. Of data without a split level all images are evaluation images, unless another data.eval_split
    than the default was asked for. Raises DataError."""
    if cfg.holdout_fraction == 0 and cfg.eval_split != cfg.train_split:
        return _open_split(cfg, find_splits(cfg), "eval_split")
    return load_splits(cfg, seed)[1]


def find_splits(cfg: ImagesConfig) -> Splits:
    """{split name: function that opens the split}; the only key is WHOLE where there is no split level. Raises
    DataError."""
    if not cfg.path:
        raise DataError(f"data.path: found {cfg.path!r}, expected an image folder, a saved data set or a Hub id")
    path = os.fspath(cfg.path)
    if os.path.isdir(path):
        if cfg.config_name is not None:
            raise DataError(
                f"data.config_name: '{cfg.config_name}' is for Hub data sets, but data.path {path} is a local folder"
            )
        if any(os.path.isfile(os.path.join(path, name)) for name in SAVED_DATASET_FILES):
            return _dataset_splits(_load_from_disk(path), cfg)
        return _folder_splits(path, cfg)
    if os.path.exists(path):
        expected = in_shards() if path.endswith(SHARD_ENDINGS) else "expected a folder or a Hub data set id"
        raise DataError(f"data.path: {path} is a file, {expected}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise DataError(f"data.path: {path} does not exist; expected an image folder or a saved data set")
    return _dataset_splits(_load_from_hub(path, cfg.config_name), cfg)


def _missing_split(cfg: ImagesConfig, splits: Splits, setting: str, or_else: str = "") -> DataError:
    """The DataError for a split that is not there. `or_else`: one more remedy for data without a split level."""
    if WHOLE in splits:
        found = f"{cfg.path} has no split level and counts as training data"
    else:
        found, or_else = f"{cfg.path} has the splits {', '.join(sorted(splits))}", ""
    remedy = f"a data.{setting} that exists"
    if setting == "eval_split":
        remedy += " (data.train_split's name evaluates on the training images) or a data.holdout_fraction above 0"
    name = getattr(cfg, setting)
    return DataError(f"data.{setting}: there is no split '{name}': {found}; expected {remedy}{or_else}")


def _hold_out(source: ImageSource, fraction: float, seed: int) -> tuple[SubsetSource, SubsetSource]:
    """(training, held out): disjoint, together the source, both in its order. Raises DataError if all are held out."""
    count = max(1, round(len(source) * fraction))
    if count >= len(source):
        raise DataError(
            f"data.holdout_fraction: {fraction} of {len(source)} images holds out {count} and leaves none to train on"
        )
    order = np.random.default_rng((seed, HOLDOUT_STREAM)).permutation(len(source))
    return SubsetSource(source, np.sort(order[count:])), SubsetSource(source, np.sort(order[:count]))


def _folder_splits(path: str, cfg: ImagesConfig) -> Splits:
    """Splits of a folder of image files: `<path>/<split>/<class>/*`, `<path>/<class>/*`, or images anywhere below."""
    for setting in ("image_column", "label_column"):
        if getattr(cfg, setting) is not None:
            raise DataError(
                f"data.{setting}: '{getattr(cfg, setting)}' names a column, but data.path {path} is a folder of files"
            )
    wanted = {cfg.train_split, cfg.eval_split}
    names = split_folders(path, wanted)
    if not names:
        return {WHOLE: functools.partial(scan_folder, path, class_folders(path))}
    # Both splits number the classes alike, also where one split lacks a class.
    folders = {name: os.path.join(path, name) for name in names}
    classes = {name: class_folders(folders[name]) for name in names if name in wanted}
    all_classes = sorted(set().union(*classes.values()))
    return {
        name: functools.partial(
            scan_folder, folders[name], classes.get(name, ()), all_classes if classes.get(name) else ()
        )
        for name in names
    }


def split_folders(path: str, wanted: Collection[str] = ()) -> list[str]:
    """Names of the split folders in `path`, or [] if it has no split level. Raises DataError if there are no images.

    A folder is a split when it is called train, val, valid, validation, test or one of `wanted`, and then the folders
    beside it are splits too. Exception: a single folder of such a name that holds images itself and stands among other
    folders is a class which happens to be called 'train'.
    """
    files, folders, _ = list_folder(path)
    if files:
        return []
    folders = [name for name in folders if has_images(os.path.join(path, name))]
    if not folders:
        raise no_images(path)
    hits = [name for name in folders if name in SPLIT_NAMES or name in wanted]
    if len(hits) == 1 and len(folders) > 1 and list_folder(os.path.join(path, hits[0]))[0]:
        return []
    return folders if hits else []


def no_images(path: str) -> DataError:
    """The DataError for a folder without image files, which may hold shards."""
    names = (os.path.join(folder, name) for folder, _, files in os.walk(path) for name in sorted(files))
    shard = next((name for name in names if name.endswith(SHARD_ENDINGS)), None)
    if shard is None:
        return DataError(f"data.path: {path} holds no image files; expected {', '.join(IMAGE_EXTENSIONS)}")
    return DataError(f"data.path: {path} holds no image files but {os.path.relpath(shard, path)}, {in_shards()}")


def in_shards() -> str:
    """What is expected where images are in shards."""
    return (
        "from which training reads images with data.streaming: true; expected that, or for other commands image files "
        "or a folder of `datasets`' save_to_disk (load_dataset makes one of parquet files and tars)"
    )


def scan_folder(path: str, classes: Sequence[str] = (), class_names: Sequence[str] = ()) -> FileSource:
    """The images below `path`, in sorted order. Raises DataError if there are none.

    `classes` are the class folders in `path`. The label of a class is its place in `class_names` (default: in
    `classes`, as in torchvision's ImageFolder). Without classes there are no labels.
    """
    class_names = list(class_names or classes)
    paths, ends, counts = list_images(path, classes)
    if not paths:
        raise no_images(path)
    labels = np.repeat([class_names.index(name) for name in classes], counts) if classes else None
    source = FileSource(path, paths, ends, labels, class_names or None)
    check_codecs(source.name(i) for i in range(len(source)))
    return source


def _load_from_disk(path: str) -> Union["datasets.Dataset", "datasets.DatasetDict"]:
    import datasets

    try:
        return datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.path: {path} is not a complete saved data set: {one_line(error)}") from error


def _load_from_hub(path: str, config_name: Optional[str]) -> Union["datasets.Dataset", "datasets.DatasetDict"]:
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


def _dataset_splits(dataset: Union["datasets.Dataset", "datasets.DatasetDict"], cfg: ImagesConfig) -> Splits:
    open_split = functools.partial(ColumnSource, image_column=cfg.image_column, label_column=cfg.label_column)
    if not isinstance(dataset, dict):
        return {WHOLE: functools.partial(open_split, dataset, cfg.train_split)}
    return {name: functools.partial(open_split, rows, name) for name, rows in dataset.items()}
