"""Where images come from: folders and data sets, their splits, and what is held out for evaluation."""

import functools
import hashlib
import json
import logging
import os
import re
import tempfile
import time

import numpy as np
from huggingface_hub.constants import HF_HOME

from rae_suite.errors import DataError, one_line
from rae_suite.files import NPZ_ERRORS
from rae_suite.images import IMAGE_EXTENSIONS
from rae_suite.randomness import HOLDOUT_STREAM
from rae_suite.sources import ColumnSource, FileSource, SubsetSource, join_paths

logger = logging.getLogger(__name__)

SPLIT_NAMES = ("train", "val", "valid", "validation", "test")
SAVED_DATASET_FILES = ("dataset_dict.json", "state.json", "dataset_info.json")  # of `datasets`' save_to_disk
WHOLE = None  # key of data that has no split level
INDEX_CACHE = os.path.join(HF_HOME, "rae_indexes")  # lists of the files in large folders
INDEXED_FROM = 10_000  # files: to list fewer takes no time that counts
INDEX_FORMAT = 1  # to be raised when other files are listed, or in another way
SETTLED = 2.0  # seconds since a folder's last change: two changes within a clock tick leave the same time behind


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
    path = os.fspath(cfg.path)
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
    except NPZ_ERRORS as error:
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
