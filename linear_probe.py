"""Train and evaluate a linear classifier on the frozen latents of an autoencoder.

    python linear_probe.py --model runs/dinov2_b/final --data.path /data/imagenet_hf
    accelerate launch --num_processes 8 linear_probe.py --model runs/dinov2_b/final --data.path /data/imagenet_hf
    python linear_probe.py --eval_only --head runs/linear_probe/head --data.path /data/imagenet_hf

The evaluation images are the split `validation`, or what --data.eval_split says (`val` for most image folders).
Models are RAE folders or Hub ids, or diffusers' AutoencoderRAE and AutoencoderKL. Published top-1 on ImageNet-1k
(RAE paper): DINOv2-B 84.5, SigLIP2-B 79.1, MAE-B 68.0, SD-VAE 8.0. configs/linear_probe.yaml, the default --config,
has the protocol and what it gives on the handwritten digits.

 1. Features of all images, centre-cropped as in every evaluation, are extracted once, by all processes, and cached.
 2. A grid of learning rates and weight decays is trained at once on a part of the training images, each head with its
    own, and the best on the other part, held out, is chosen. The evaluation images have no say in it.
 3. The chosen settings are trained again on all training images: that head is evaluated, once, and saved.

Steps 2 and 3 are the main process's alone, because they take minutes on a GPU; the other processes end after step 1.
Results do not depend on the number of processes. In --output_dir: results.json, confusion.png and head/.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from rae_suite.autoencoders import DEFAULT_IMAGE_SIZE, Autoencoder, load_autoencoder
from rae_suite.cli import ALL_AT_LEAST_0, POSITIVE, Limit, config_dict, parse, require, setting
from rae_suite.digests import latents_digest
from rae_suite.errors import ConfigError, DataError, RunError
from rae_suite.files import make_folder, write_folder, writing
from rae_suite.launch import data_errors_end_this_process, measuring_accelerator, quiet_transformers, run_main
from rae_suite.loaders import UnreadableLog, eval_loader
from rae_suite.moments import Moments
from rae_suite.results import save_results
from rae_suite.run_folder import lock_run_folder
from rae_suite.settings import FEW_TASKS, SEED, ImagesConfig
from rae_suite.sources import ImageSource
from rae_suite.splits import load_eval_images, load_splits

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "linear_probe.yaml"  # when no --config is given
MOMENTUM = 0.9
SHARD_BYTES = 2**28  # of features in one file of the cache: what the main process gathers before it writes
BLOCK_ELEMENTS = 2**24  # numbers in the tensors that a pass over features works on: 64 MiB in float32
SELECTION_STREAM, ORDER_STREAM = 3, 4  # second words of seeds, as in rae_suite/randomness.py
HEAD_KEYS = {
    "classes", "features", "image_size", "model", "weights", "seed", "holdout_fraction", "lr", "weight_decay",
    "num_train_samples",
}  # fmt: skip  # of a head's config.json
CACHE_FORMAT = 1  # to be raised when the meaning of cached features changes
SHOWN_CLASSES = 20  # in tables and lists of confusions; results.json has all classes
ANNOTATED_CLASSES = 30  # up to so many, the confusion matrix shows numbers and names


# --------------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------------


ALL_POSITIVE = Limit(lambda values: all(value > 0 for value in values), "positive numbers")
DISTINCT = Limit(lambda values: 0 < len(values) == len(set(values)), "one or more, distinct")
SELECTION = Limit(lambda value: 0 < value < 1, "a number in (0, 1)")


@dataclass
class FeaturesConfig:
    """What the classifier sees, and how it is computed."""

    kind: Optional[Literal["mean", "mean_max", "flat", "tokens"]] = None
    """mean: of the latent (C, h, w) over its patches; mean_max: that and the maximum; flat: the whole latent; tokens:
    mean of the encoder's patch tokens without latent statistics. None: mean, or with eval_only what the head takes."""
    image_size: Optional[int] = setting(None, POSITIVE)
    """Side in pixels, for models that take any size; none: 256, or with eval_only what the head takes."""
    batch_size: int = setting(128, POSITIVE)
    """Images of one forward pass of each process."""
    mixed_precision: Optional[Literal["no", "fp16", "bf16"]] = None
    """Autocast precision of the encoder; none: what `accelerate launch` was told. The heads are float32."""
    cache_dir: Optional[str] = None
    """Folder that features are kept in; none: rae_features in HF_HOME."""


@dataclass
class HeadTrainingConfig:
    """The heads: SGD with Nesterov momentum 0.9, cosine decay to zero, weights and biases from zero."""

    lrs: tuple[float, ...] = setting((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), ALL_POSITIVE, DISTINCT)
    """Peak learning rates to try, for features of variance 1; wide features take smaller ones."""
    weight_decays: tuple[float, ...] = setting((1e-5, 1e-4), ALL_AT_LEAST_0, DISTINCT)
    """Factors of half the squared weights in the loss to try, each with each learning rate."""
    selection_fraction: float = setting(0.1, SELECTION)
    """Share of the training images, the same of every class, that the choice is made on; in (0, 1)."""
    epochs: float = setting(10, POSITIVE)
    """Length of training in epochs."""
    min_steps: int = setting(2000, POSITIVE)
    """Steps that are taken at least: small data sets are gone through more often."""
    batch_size: int = setting(1024, POSITIVE)
    """Images of one step; all if they are fewer."""
    seed: int = setting(0, SEED)
    """Seed of data.holdout_fraction, of the selection part and of the order of the images."""
    cpu_threads: Optional[int] = setting(None, POSITIVE, FEW_TASKS)
    """Threads of each process on a CPU; none: the machine's cores shared out among its processes."""


@dataclass
class LinearProbeConfig:
    """Settings of linear_probe.py."""

    model: Optional[str] = None
    """Folder or Hub id of the autoencoder; with eval_only none: the one that the head was trained on."""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    """The images. With eval_only, data without a split level is taken whole, unless eval_split names another split than
    the default."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    train: HeadTrainingConfig = field(default_factory=HeadTrainingConfig)
    eval_only: bool = False
    """Evaluate a saved head instead of training one."""
    head: Optional[str] = None
    """Folder of the head that eval_only evaluates."""
    allow_absent_classes: bool = False
    """Whether the evaluation images may lack some classes of the training images."""
    output_dir: Optional[str] = None
    """Folder of the results, which replace earlier ones; none: runs/linear_probe, or with eval_only
    runs/linear_probe_eval."""


def check(config: LinearProbeConfig) -> None:
    """Raise ConfigError for what can be seen without loading anything."""
    if config.eval_only:
        require(config.head is not None, "head", "the folder of a head, which eval_only evaluates", None)
        inside = config.output_dir is not None and (Path(config.output_dir) / "head").exists()
        require(not inside, "output_dir", "another folder than that of a head's training", config.output_dir)
    else:
        require(config.model is not None, "model", "the folder or Hub id of an autoencoder", None)
        require(config.head is None, "head", "nothing unless eval_only is given", config.head)


# --------------------------------------------------------------------------------------------------------------------
# Images and classes
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class LabelledImages:
    """Images of one split, and `labels` (N,), int64: the places of their classes in the head's list of classes."""

    source: ImageSource
    labels: torch.Tensor


def load_images(config: LinearProbeConfig, head: Optional["LinearHead"]) -> tuple:
    """(training images, evaluation images, classes of the head, those of them that the evaluation images lack). With a
    trained head the training images are None, and need not be there unless evaluation images are held out of them."""
    train = None
    if head is None:
        train_source, source = load_splits(config.data, config.train.seed)
        labels, names = read_labels(train_source, "data.train_split")
        classes, trained_on = list(names.values()), "the training split"
        require(len(classes) > 1, "data.train_split", "images of at least 2 classes", classes)
        train = LabelledImages(train_source, number_labels(labels, names, classes))
        if len(config.train.lrs) * len(config.train.weight_decays) > 1:
            hold_out(train.labels, config.train.selection_fraction, config.train.seed)  # raises when nothing is left
    else:
        source = load_eval_images(config.data, config.train.seed)
        classes, trained_on = head.config["classes"], f"the head {config.head}"
    labels, names = read_labels(source, "data.eval_split")
    absent = check_classes(list(names.values()), classes, trained_on, config.allow_absent_classes)
    return train, LabelledImages(source, number_labels(labels, names, classes)), classes, absent


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


def check_classes(found: list, classes: list, trained_on: str, allow_absent: bool) -> list:
    """The classes that the evaluation images lack. Raises ConfigError when there are some and that is not allowed, or
    when the evaluation images have classes that `trained_on` lacks."""

    def some(names: list) -> str:
        count = f"{len(names)} class{'es' if len(names) > 1 else ''}"
        return f"{count} ({', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''})"

    known, seen = set(classes), set(found)
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ConfigError(f"data.eval_split: it has {some(unknown)} that {trained_on} lacks; expected the same classes")
    absent = [name for name in classes if name not in seen]
    if absent and not allow_absent:
        raise ConfigError(
            f"data.eval_split: it lacks {some(absent)} of the {len(classes)} of {trained_on}; expected all of them, or "
            "allow_absent_classes"
        )
    return absent


def hold_out(labels: torch.Tensor, fraction: float, seed: int) -> tuple:
    """Rows of `labels` in two parts, (to train on, held out): floor(N * fraction) are held out, of each class its share
    to within one image. Raises ConfigError when a part would be empty."""
    order = np.random.default_rng((seed, SELECTION_STREAM)).permutation(len(labels))
    order = order[np.argsort(labels.numpy()[order], kind="stable")]  # by class, shuffled within each
    steps = np.floor(np.arange(len(labels) + 1) * fraction + 1e-9)  # the small number is for 10 * 0.1 and the like
    held = steps[1:] > steps[:-1]  # one in every 1 / fraction of that order
    if held.all() or not held.any():
        raise ConfigError(
            f"train.selection_fraction: {fraction} of {len(labels)} training images leaves {held.sum()} to choose on "
            f"and {(~held).sum()} to train on, expected some of both"
        )
    return torch.from_numpy(np.sort(order[~held])), torch.from_numpy(np.sort(order[held]))


# --------------------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------------------


def image_features(model: Autoencoder, pixels: torch.Tensor, kind: str) -> torch.Tensor:
    """Pixels (B, 3, S, S) in [0, 1] to features (B, D), float32; see FeaturesConfig.kind."""
    latent = (model.tokens(pixels) if kind == "tokens" else model.encode(pixels)).float()  # (B, C, h, w)
    if kind == "flat":
        return latent.flatten(1)  # (B, C*h*w)
    if kind == "mean_max":
        return torch.cat([latent.mean((2, 3)), latent.amax((2, 3))], dim=1)  # (B, 2C)
    return latent.mean((2, 3))  # (B, C)


@dataclass
class Extractor:
    """Turns images into features, and holds all that decides them."""

    model: Autoencoder
    kind: str
    image_size: int
    accelerator: Accelerator
    weights: str  # hash of what the latents depend on, weights and settings
    width: int = 0  # D

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, S, S) in [0, 255] to features (B, D), float16, on the device.

        That is what the cache holds: ImageNet-1k at width 768 takes 2.0 GB of disk and page cache instead of 3.9. A
        rounding of 2**-11 relative does not change which class wins, and the range is wide enough for what ends in a
        LayerNorm: at most sqrt(C), or sqrt(C) / sqrt(1e-5) with latent statistics, about 9000 for C = 768.
        """
        with self.accelerator.autocast():
            features = image_features(self.model, pixels.to(self.accelerator.device).float() / 255, self.kind)
        return features.half()


def build_extractor(
    config: LinearProbeConfig, model: Autoencoder, head: Optional["LinearHead"], accelerator
) -> Extractor:
    """Raises ConfigError when the model takes other images or has no such features, or the head takes others."""
    kind, size, size_key = config.features.kind, config.features.image_size, "features.image_size"
    if head is not None:
        needed = head.config["features"]
        require(kind in (None, needed), "features.kind", f"{needed}, which {config.head} was trained on", kind)
        kind = needed
        if size is None:
            size, size_key = head.config["image_size"], "head"
    if model.image_size is not None:
        expected = f"images of {model.image_size} px, which {model.name} takes"
        require(size in (None, model.image_size), size_key, expected, size)
    extractor = Extractor(
        model=model.to(accelerator.device),
        kind=kind or "mean",
        image_size=size or model.image_size or DEFAULT_IMAGE_SIZE,
        accelerator=accelerator,
        weights=latents_digest(model.model),
    )
    try:
        extractor.width = extractor(torch.zeros(1, 3, extractor.image_size, extractor.image_size)).shape[1]
    except ConfigError as error:  # of Autoencoder.tokens
        raise ConfigError(f"features.kind: {kind} is not to be had: {error}") from error
    except RuntimeError as error:  # of a convolution, for a size of which nothing is left
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{size_key}: {extractor.image_size} px do not fit {model.name}: {reason}") from error
    if head is not None and extractor.width != len(head.mean):
        raise ConfigError(
            f"head: {config.head} takes {len(head.mean)} features, the {kind} features of {model.name} are "
            f"{extractor.width}"
        )
    return extractor


def cache_key(source: ImageSource, extractor: Extractor) -> dict:
    """Everything that decides the features of `source`."""
    return {
        "format": CACHE_FORMAT,
        "images": source.fingerprint(),
        "num_images": len(source),
        "image_size": extractor.image_size,
        "features": extractor.kind,
        "precision": extractor.accelerator.mixed_precision,
        "model": extractor.model.kind,
        "weights": extractor.weights,
    }


class Features:
    """Cached features (N, D), float16, in the order of the images; memory-mapped, so they are read when asked for.

    `index` (N,) are the images' numbers in their source, increasing; `unreadable` names the images without features.
    Raises OSError, ValueError, KeyError or SafetensorError when the folder is not complete.
    """

    def __init__(self, folder: Path):
        record = json.loads((folder / "features.json").read_text())
        self.folder, self.width, self.unreadable = folder, record["width"], record["unreadable"]
        files = [load_file(folder / shard_name(i)) for i in range(len(record["shards"]))]
        if [tuple(file["features"].shape) for file in files] != [(rows, self.width) for rows in record["shards"]]:
            raise ValueError("shapes differ from those in features.json")
        self.shards = [file["features"] for file in files]
        self.ends = torch.tensor(record["shards"]).cumsum(0)
        self.index = torch.cat([file["index"] for file in files])

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of the rows `numbers` (B,)."""
        out = torch.empty(len(numbers), self.width, dtype=torch.float16)
        shard_of = torch.bucketize(numbers, self.ends, right=True)
        for i in shard_of.unique().tolist():
            here = shard_of == i
            start = self.ends[i] - len(self.shards[i])
            out[here] = self.shards[i][numbers[here] - start]
        return out

    def blocks(self, numbers: torch.Tensor, elements: int) -> tuple:
        """`numbers` in pieces, so that `elements` for each row make about BLOCK_ELEMENTS in a piece."""
        return numbers.split(max(1, BLOCK_ELEMENTS // max(elements, self.width)))


def shard_name(i: int) -> str:
    return f"features-{i:05d}.safetensors"


class FeatureWriter:
    """Fills a folder that `Features` reads. Rows come in the order of the images."""

    def __init__(self, folder: Path, width: int):
        self.folder, self.width = folder, width
        self.rows_per_shard = max(1, SHARD_BYTES // (2 * width))
        self.pending, self.shards = [], []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, features: torch.Tensor, index: torch.Tensor) -> None:
        """Features (B, D) of the images `index` (B,)."""
        self.pending.append((features, index))
        if sum(len(rows) for _, rows in self.pending) >= self.rows_per_shard:
            self._write()

    def _write(self, everything: bool = False) -> None:
        features, index = (torch.cat(column) for column in zip(*self.pending, strict=True))
        size = self.rows_per_shard
        while len(index) >= size or (everything and len(index)):
            shard = {"features": features[:size].contiguous(), "index": index[:size].contiguous()}
            save_file(shard, self.folder / shard_name(len(self.shards)))
            self.shards.append(len(shard["index"]))
            features, index = features[size:], index[size:]
        self.pending = [(features, index)]

    def close(self, unreadable: list, key: dict) -> None:
        self._write(everything=True)
        record = {"width": self.width, "shards": self.shards, "unreadable": unreadable, "key": key}
        (self.folder / "features.json").write_text(json.dumps(record, indent=1))


def progress(items: Iterable, total: int, name: str, shown: bool = True) -> Iterator:
    """The items, with a progress bar on a terminal and a line a minute elsewhere."""
    bar = tqdm(items, name, total, leave=False, disable=None if shown else True)
    said = time.monotonic()
    for i, item in enumerate(bar, start=1):
        yield item
        if shown and bar.disable and time.monotonic() - said > 60:
            print(f"{name}: {i} of {total}", flush=True)
            said = time.monotonic()


def extract(extractor: Extractor, source: ImageSource, config: LinearProbeConfig, folder: Path, key, name: str) -> None:
    """Write the features of all images to `folder`. Every process calls this; the main one writes.

    Batch b of the processes together holds the next images of the source, so that sorted batches give the source's
    order with any number of them.
    """
    accelerator, size = extractor.accelerator, min(config.features.batch_size, len(source))
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    loader = eval_loader(source, extractor.image_size, size, config.data.num_workers, rank, world)
    log, unreadable = UnreadableLog(config.data.max_unreadable), []
    writer = FeatureWriter(folder, extractor.width) if main else None
    with data_errors_end_this_process(accelerator):
        for batch in progress(loader, len(loader), name, main):
            log.add(batch["unreadable"])
            unreadable += batch["unreadable"]
            count = len(batch["index"])
            features = torch.zeros(size, extractor.width, dtype=torch.float16, device=accelerator.device)
            index = torch.full((size,), -1, device=accelerator.device)  # -1: no image, all processes gather alike
            if count:
                features[:count] = extractor(batch["pixels"])
                index[:count] = batch["index"].to(accelerator.device)
            if not features.isfinite().all():  # CPU-GPU sync point
                raise RunError(
                    f"{name}: not finite in float16, computed with precision {accelerator.mixed_precision}",
                    everywhere=True,
                )
            features, index = accelerator.gather((features, index))
            if main:
                order = index.argsort()[(index < 0).sum() :]
                writer.add(features[order].cpu(), index[order].cpu())
    unreadable = gather_object(unreadable)
    if len(unreadable) == len(source):
        raise DataError(f"{name}: none of {len(source)} images can be read")
    if main:
        writer.close(unreadable, key)


def open_features(folder: Path) -> Optional[Features]:
    """The cached features in `folder`, or None."""
    if not folder.exists():
        return None
    try:
        return Features(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        print(f"{folder} is damaged, its features are extracted again: {str(error).splitlines()[0]}")
        return None


def lock_cache(folder: Path, num_bytes: int) -> TextIO:
    """Hold a cache folder, which must have room for the features, until the result is closed."""
    make_folder(str(folder), "features.cache_dir")
    free = shutil.disk_usage(folder).free
    expected = f"a folder with {num_bytes / 1e9:.2f} GB left for features (there are {free / 1e9:.2f})"
    require(num_bytes < free, "features.cache_dir", expected, str(folder.parent))
    try:
        return lock_run_folder(folder)
    except BlockingIOError:
        raise ConfigError(f"features.cache_dir: another run is extracting these features to {folder}") from None


def cached_features(
    extractor: Extractor, source: ImageSource, config: LinearProbeConfig, cache_dir: Path, name: str
) -> Optional[Features]:
    """Features of all images, from the cache or put there. Every process calls this, the main one gets them.

    A cache folder is filled beside its place and renamed: one that was not finished is never found.
    """
    accelerator = extractor.accelerator
    main, key, folder, features = accelerator.is_main_process, {}, Path(), None
    if main:  # the state of every file is read for it
        key = cache_key(source, extractor)
        folder = cache_dir / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        features = open_features(folder / "features")
        print(f"{name}: {len(source)} images, {'found in' if features else 'extracted to'} {folder}", flush=True)
    [found] = broadcast_object_list([features is not None])
    if not found:
        lock = lock_cache(folder, 2 * len(source) * extractor.width) if main else None
        accelerator.wait_for_everyone()

        def write(beside: Path) -> None:
            extract(extractor, source, config, beside, key, name)

        write_folder(folder / "features", write, main, accelerator.wait_for_everyone)
        if main:
            features = Features(folder / "features")
            lock.close()
    if main:
        skipped, limit = len(features.unreadable), config.data.max_unreadable * accelerator.num_processes
        if len(features) + skipped != len(source):
            raise RunError(f"{folder} holds {len(features)} features and {skipped} gaps for {len(source)} images")
        if skipped > limit:
            raise DataError(
                f"data.max_unreadable: {skipped} images could not be read when {folder} was written, expected at most "
                f"{limit}; the last is {features.unreadable[-1]}"
            )
    return features


# --------------------------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------------------------


class LinearHead(nn.Module):
    """A linear classifier of K classes: logits = ((features - mean) / std) @ weight.T + bias.

    weight (K, D), bias (K,), mean and std (D,) of the training features, all float32. `config` has `classes`, the names
    in the order of the logits; `features`, their kind; `image_size`, `model`, `weights` and `seed` of its training; the
    chosen `lr` and `weight_decay`; and the figures that were measured.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, config: dict):
        super().__init__()
        for name, tensor in (("weight", weight), ("bias", bias), ("mean", mean), ("std", std)):
            self.register_buffer(name, tensor.contiguous())
        self.config = config

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, D) to logits (B, K)."""
        return F.linear((features.float() - self.mean) / self.std, self.weight, self.bias)

    def save(self, folder: Path) -> None:
        """Write head.safetensors and config.json, both or neither."""

        def write(beside: Path) -> None:
            beside.mkdir()
            save_file(self.state_dict(), beside / "head.safetensors")
            (beside / "config.json").write_text(json.dumps(self.config, indent=1))

        write_folder(folder, write, main_process=True, wait=lambda: None)

    @classmethod
    def load(cls, folder: str) -> "LinearHead":
        """Raises ConfigError, about the setting `head`, when the folder holds none."""
        path = Path(folder).expanduser()
        for name in ("config.json", "head.safetensors"):
            if not (path / name).is_file():
                raise ConfigError(
                    f"head: {folder} has no {name}, expected the folder head/ of a run of linear_probe.py"
                )
        try:
            head = cls(**load_file(path / "head.safetensors"), config=json.loads((path / "config.json").read_text()))
            missing = HEAD_KEYS - head.config.keys()
            len(head.config.get("classes", []))
        except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"head: {folder} is no head of linear_probe.py: {str(error).splitlines()[0]}") from error
        if missing:
            raise ConfigError(f"head: {folder}/config.json lacks {', '.join(sorted(missing))}")
        shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
        number, width = len(head.config["classes"]), head.mean.numel()
        if shapes != {"weight": (number, width), "bias": (number,), "mean": (width,), "std": (width,)}:
            raise ConfigError(f"head: {folder} has {number} classes in config.json and tensors of shapes {shapes}")
        return head


def load_head(config: LinearProbeConfig) -> LinearHead:
    """The head that eval_only evaluates. Raises ConfigError when there is none, or it has seen the held-out images."""
    head = LinearHead.load(config.head)
    if config.data.holdout_fraction > 0:
        seed, fraction = head.config["seed"], head.config["holdout_fraction"]
        why = f"as for {config.head} (another one holds out images that it was trained on)"
        require(config.train.seed == seed, "train.seed", f"{seed} {why}", config.train.seed)
        found = config.data.holdout_fraction
        require(found == fraction, "data.holdout_fraction", f"{fraction} {why}", found)
    return head


@dataclass
class TrainingSet:
    """Features and the labels (N,) of their rows, with the statistics (D,) that standardise them, on the device that
    heads are trained on."""

    features: Features
    labels: torch.Tensor
    num_classes: int
    mean: torch.Tensor
    std: torch.Tensor

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Standardised features of the rows, and a one for the bias: (B, D + 1), float32."""
        values = (self.features.rows(rows).to(self.mean.device).float() - self.mean) / self.std
        return F.pad(values, (0, 1), value=1.0)


def training_set(features: Features, labels: torch.Tensor, num_classes: int, device: torch.device) -> TrainingSet:
    """Statistics are those of all rows: they use no label, so the selection part may take part in them. On features of
    variance 1 one grid of learning rates fits all models."""
    moments = Moments((features.width,), device=device)
    for block in features.blocks(torch.arange(len(features)), 0):
        moments.update(features.rows(block))
    std = moments.variance().sqrt().clamp_min(1e-6)  # a constant feature is zero once the mean is taken off
    return TrainingSet(features, labels, num_classes, moments.mean.float().to(device), std.float().to(device))


def batches(rows: torch.Tensor, batch_size: int, num_steps: int, seed: int) -> Iterator:
    """`num_steps` batches from a stream of permutations of `rows`: every row is drawn equally often, to within one."""
    stream, number = rows[:0], 0
    for _ in range(num_steps):
        while len(stream) < batch_size:
            order = np.random.default_rng((seed, ORDER_STREAM, number)).permutation(len(rows))
            stream, number = torch.cat([stream, rows[torch.from_numpy(order)]]), number + 1
        yield stream[:batch_size]
        stream = stream[batch_size:]


def train_heads(
    data: TrainingSet, rows: torch.Tensor, settings: list, config: HeadTrainingConfig, name: str
) -> torch.Tensor:
    """Train H heads at once on `rows`, one for each (lr, weight_decay) of `settings`.

    A head minimises its own mean cross-entropy + weight_decay / 2 * |weight|^2, a convex problem; the bias is free. The
    heads' weights are columns of one matrix, so that a step is two matrix products for all of them.

    Returns:
        (D + 1, H, K), float32; the last row are the biases. A head that diverged holds inf or nan.
    """
    device, heads, classes = data.mean.device, len(settings), data.num_classes
    batch_size = min(config.batch_size, len(rows))
    steps = max(config.min_steps, math.ceil(config.epochs * len(rows) / batch_size))
    print(f"{name}: {heads} of {classes} classes, {len(rows)} images, {steps} steps of {batch_size}", flush=True)
    lr, weight_decay = torch.tensor(settings, device=device).repeat_interleave(classes, dim=0).T  # (H*K,) each
    weight = torch.zeros(data.features.width + 1, heads * classes, device=device)  # (D + 1, H*K)
    velocity = torch.zeros_like(weight)
    for step, batch in enumerate(progress(batches(rows, batch_size, steps, config.seed), steps, name)):
        inputs, target = data.inputs(batch), data.labels[batch].to(device)  # (B, D + 1), (B,)
        errors = (inputs @ weight).view(batch_size, heads, classes).softmax(dim=2)
        errors[torch.arange(batch_size, device=device), :, target] -= 1  # gradient of the loss in the logits, times B
        gradient = inputs.T @ errors.flatten(1) / batch_size  # (D + 1, H*K)
        gradient[:-1] += weight_decay * weight[:-1]
        velocity.mul_(MOMENTUM).add_(gradient)
        gradient.add_(velocity, alpha=MOMENTUM)  # Nesterov's look ahead
        weight -= lr * (0.5 * (1 + math.cos(math.pi * step / steps))) * gradient
    return weight.view(-1, heads, classes)


def compare_heads(data: TrainingSet, rows: torch.Tensor, heads: torch.Tensor, settings: list) -> list:
    """The sweep's table, a dict for each head: lr, weight_decay, top1 and loss on `rows`; None where it diverged."""
    correct, loss = torch.zeros(2, len(settings), dtype=torch.float64)
    for block in data.features.blocks(rows, heads[0].numel()):
        logits = (data.inputs(block) @ heads.flatten(1)).view(-1, *heads.shape[1:])  # (B, H, K)
        target = data.labels[block].to(logits.device)[:, None].expand(-1, len(settings))  # (B, H)
        correct += (logits.argmax(dim=2) == target).sum(0).cpu()
        loss += F.cross_entropy(logits.transpose(1, 2), target, reduction="none").sum(0).cpu()
    sweep = []
    for (lr, weight_decay), head, right, total_loss in zip(settings, heads.unbind(1), correct, loss, strict=True):
        values = [right.item() / len(rows), total_loss.item() / len(rows)] if head.isfinite().all() else [None, None]
        sweep.append({"lr": lr, "weight_decay": weight_decay, "top1": values[0], "loss": values[1]})
    return sweep


def fit(data: TrainingSet, config: HeadTrainingConfig) -> tuple:
    """(weights (D + 1, K) of the final head, the sweep's table, place of the chosen line in it).

    The best top-1 on the selection part wins, of several the one with the lowest loss there. Its settings are trained
    again on all images: published figures use all of them too. With a single setting there is nothing to choose.
    Raises RunError when heads diverge.
    """
    settings = [(lr, weight_decay) for lr in config.lrs for weight_decay in config.weight_decays]
    sweep, best = [dict(zip(("lr", "weight_decay"), settings[0], strict=True), top1=None, loss=None)], 0
    if len(settings) > 1:
        rows, held_out = hold_out(data.labels, config.selection_fraction, config.seed)
        heads = train_heads(data, rows, settings, config, "heads of the sweep")
        sweep = compare_heads(data, held_out, heads, settings)
        finite = [i for i, line in enumerate(sweep) if line["top1"] is not None]
        if not finite:
            raise RunError(f"train.lrs: all heads diverged, down to a learning rate of {min(config.lrs)}")
        best = max(finite, key=lambda i: (sweep[i]["top1"], -sweep[i]["loss"]))
    final = train_heads(data, torch.arange(len(data.labels)), [settings[best]], config, "final head")
    if not final.isfinite().all():
        raise RunError(f"train.lrs: the head diverged with a learning rate of {settings[best][0]}")
    return final[:, 0], sweep, best


# --------------------------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------------------------


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> list:
    """[low, high] of a share, by default at 95% (Wilson 1927)."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


@torch.no_grad()
def evaluate_head(features: Features, labels: torch.Tensor, head: LinearHead) -> tuple:
    """(figures, counts (K, K) by true and predicted class) of a head on all features: top1, and for 5 classes or more
    top5, with intervals, num_samples and per_class. `labels` are those of the rows, (N,)."""
    classes, total, top5_correct = head.config["classes"], len(features), 0
    number = len(classes)
    confusion = torch.zeros(number * number, dtype=torch.int64)
    for block in features.blocks(torch.arange(total), number):
        logits = head(features.rows(block).to(head.mean.device))
        best = logits.topk(min(5, number)).indices.cpu()  # (B, 5), the highest first
        confusion += torch.bincount(labels[block] * number + best[:, 0], minlength=number * number)
        top5_correct += (best == labels[block][:, None]).any(dim=1).sum().item()
    confusion = confusion.view(number, number)
    right, counts = confusion.diag().tolist(), confusion.sum(1).tolist()
    figures = {"top1": sum(right) / total, "top1_interval": wilson_interval(sum(right), total)}
    if number >= 5:
        figures |= {"top5": top5_correct / total, "top5_interval": wilson_interval(top5_correct, total)}
    figures["num_samples"] = total
    figures["per_class"] = [
        {"class": name, "num_samples": n, "top1": correct / n if n else None}
        for name, n, correct in zip(classes, counts, right, strict=True)
    ]
    return figures, confusion


def most_confused(confusion: torch.Tensor, classes: list, count: int = SHOWN_CLASSES) -> list:
    """The most frequent mistakes, as dicts of `class`, `predicted` and `count`."""
    number = len(classes)
    values, places = confusion.clone().fill_diagonal_(0).flatten().topk(min(count, number * number))
    pairs = zip(values.tolist(), places.tolist(), strict=True)
    return [{"class": classes[p // number], "predicted": classes[p % number], "count": v} for v, p in pairs if v]


def draw_confusion(confusion: torch.Tensor, classes: list, title: str, path: Path) -> None:
    """The confusion matrix as a picture: with names and counts for few classes; for many, a pixel or more for each pair
    of classes beside the list of the most frequent mistakes."""
    from matplotlib.colors import PowerNorm  # slow to import
    from matplotlib.figure import Figure

    share = confusion / confusion.sum(1, keepdim=True).clamp_min(1)  # of each true class
    few = len(classes) <= ANNOTATED_CLASSES
    side = max(4.0, 0.45 * len(classes)) + 2 if few else 12.0
    figure = Figure(figsize=(side if few else side + 6, side), layout="constrained", dpi=110)
    if few:
        axis = figure.add_subplot()
    else:
        axis, mistakes = figure.subplots(1, 2, width_ratios=(12, 4))
        # a square root brings out single mistakes, a maximum keeps them when there are more classes than pixels
        factor = -(-len(classes) // 1000)
        share = F.max_pool2d(share[None], factor, ceil_mode=True)[0]
    extent = None if few else (-0.5, len(classes) - 0.5, len(classes) - 0.5, -0.5)
    image = axis.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest", extent=extent)
    figure.colorbar(image, ax=axis, shrink=0.6, label="share of the true class")
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    if few:
        names = [short(name) for name in classes]
        axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axis.set_yticks(range(len(names)), names)
        for row, column in confusion.nonzero().tolist():
            colour = "white" if share[row, column] > 0.4 else "black"
            axis.text(column, row, confusion[row, column].item(), ha="center", va="center", color=colour, fontsize=9)
    else:
        pairs = most_confused(confusion, classes)
        mistakes.barh(range(len(pairs)), [pair["count"] for pair in pairs], color="tab:blue")
        mistakes.set_yticks(range(len(pairs)), [f"{short(p['class'])}\nas {short(p['predicted'])}" for p in pairs])
        mistakes.invert_yaxis()
        mistakes.set(xlabel="images", title="most frequent mistakes")
    with writing(path):
        figure.savefig(path)


def short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "\u2026"


def percent(share: Optional[float]) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def sweep_table(sweep: list, best: int) -> str:
    """The heads that were tried, with a star at the chosen one."""
    lines = [f"{'lr':>10}{'weight decay':>14}{'held-out top-1':>16}{'held-out loss':>15}"]
    for i, line in enumerate(sweep):
        loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
        star = " *" if i == best else ""
        lines.append(f"{line['lr']:>10g}{line['weight_decay']:>14g}{percent(line['top1']):>16}{loss:>15}{star}")
    return "\n".join(lines)


def class_table(per_class: list) -> str:
    """Top-1 of each class; of many classes, of the worst."""
    shown, title = per_class, "class"
    if len(per_class) > SHOWN_CLASSES:
        seen = [line for line in per_class if line["num_samples"]]
        shown, title = sorted(seen, key=lambda line: line["top1"])[:SHOWN_CLASSES], f"worst {SHOWN_CLASSES} classes"
    width = max(len(title), *(len(short(line["class"])) for line in shown))
    lines = [f"{title:<{width}}{'N':>8}{'top-1':>9}"]
    for line in shown:
        lines.append(f"{short(line['class']):<{width}}{line['num_samples']:>8}{percent(line['top1']):>9}")
    return "\n".join(lines)


def report(results: dict, output_dir: Path) -> None:
    """Print the tables."""
    sweep, lrs = results["sweep"], results["config"]["train"]["lrs"]
    if sweep is not None:
        print(sweep_table(sweep, results["chosen"]))
        if len(lrs) > 1 and results["lr"] in (min(lrs), max(lrs)):
            print(f"note: {results['lr']:g} is at the edge of train.lrs, others may be better")
    print(f"\n{class_table(results['per_class'])}\n")
    if results["absent_classes"]:
        names = [short(name) for name in results["absent_classes"]]
        more = f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
        print(f"classes without evaluation images: {', '.join(names[:SHOWN_CLASSES])}{more}")
    if results["num_unreadable"]:
        print(f"evaluation images that cannot be read, not counted: {results['num_unreadable']}")
    for name, label in (("top1", "top-1"), ("top5", "top-5")):
        if name in results:
            print(f"{label}   {percent(results[name])} % of {results['num_samples']} images, "
                  f"95% interval {' to '.join(percent(end) for end in results[f'{name}_interval'])}")  # fmt: skip
        else:
            print(f"{label}   left out: {results['num_classes']} classes are fewer than 5")
    print(f"results {output_dir / 'results.json'}\npicture {output_dir / 'confusion.png'}")
    if sweep is not None:
        print(f"head    {output_dir / 'head'}")


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


def main(argv: Optional[list] = None) -> None:
    config = parse(
        LinearProbeConfig, "linear_probe.py", "Linear classifier on frozen latents.", argv, DEFAULT_CONFIG, check=check
    )
    quiet_transformers()
    accelerator = measuring_accelerator(
        config.features.mixed_precision, "features.mixed_precision", config.train.cpu_threads
    )

    # everything that can be wrong is looked at before features are extracted
    head = load_head(config) if config.eval_only else None
    train_images, eval_images, classes, absent = load_images(config, head)
    model = load_autoencoder(config.model or head.config["model"])
    extractor = build_extractor(config, model, head, accelerator)
    default_dir = "runs/linear_probe_eval" if config.eval_only else "runs/linear_probe"
    output_dir = make_folder(config.output_dir or default_dir, "output_dir")
    cache_dir = make_folder(config.features.cache_dir or f"{HF_HOME}/rae_features", "features.cache_dir")
    if accelerator.is_main_process:
        print(describe(extractor, classes, train_images, eval_images, head), flush=True)

    # features, by all processes
    clock, train_features = time.monotonic(), None
    if head is None:
        train_features = cached_features(extractor, train_images.source, config, cache_dir, "training features")
    eval_features = cached_features(extractor, eval_images.source, config, cache_dir, "evaluation features")
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    seconds = {"features": time.monotonic() - clock}

    # the head, by the main process
    clock, device, sweep, best = time.monotonic(), accelerator.device, None, None
    if head is None:
        labels = train_images.labels[train_features.index]
        data = training_set(train_features, labels, len(classes), device)
        weights, sweep, best = fit(data, config.train)
        about = {
            "classes": classes,
            **provenance(extractor),
            "seed": config.train.seed,
            "holdout_fraction": config.data.holdout_fraction,
            "num_train_samples": len(labels),
        }
        chosen = {name: sweep[best][name] for name in ("lr", "weight_decay")}
        head = LinearHead(weights[:-1].T, weights[-1], data.mean, data.std, {**about, **chosen})
        seconds["train"] = time.monotonic() - clock
    figures, confusion = evaluate_head(eval_features, eval_images.labels[eval_features.index], head.to(device))

    results = {
        **figures,
        "num_classes": len(classes),
        "split": eval_images.source.split,
        "num_unreadable": len(eval_features.unreadable),
        "absent_classes": absent,
        "most_confused": most_confused(confusion, classes),
        **provenance(extractor),
        **{name: head.config[name] for name in ("lr", "weight_decay", "num_train_samples")},
        "sweep": sweep,
        "chosen": best,
        "seconds": seconds,
        "config": config_dict(config),
    }
    title = f"top-1 {percent(figures['top1'])} % of {len(eval_features)} images"
    draw_confusion(confusion, classes, title, output_dir / "confusion.png")
    if not config.eval_only:
        head.config |= {name: figures[name] for name in figures if name != "per_class"}
        head.save(output_dir / "head")
    save_results(output_dir / "results.json", results)
    report(results, output_dir)


def describe(
    extractor: Extractor,
    classes: list,
    train: Optional[LabelledImages],
    evaluation: LabelledImages,
    head: Optional[LinearHead],
) -> str:
    """What is about to happen, in a few lines."""
    model, precision = extractor.model, extractor.accelerator.mixed_precision
    images = "" if train is None else f"{len(train.labels)} training and "
    lines = [
        f"{model.kind} {model.name}: {extractor.kind} features of width {extractor.width}, precision {precision}",
        f"{images}{len(evaluation.labels)} evaluation images of {len(classes)} classes, {extractor.image_size} px",
        f"evaluation split: {evaluation.source.split}",
    ]
    if head is not None and head.config["weights"] != extractor.weights:
        lines.append(f"note: the head was trained on other weights, those of {head.config['model']} at that time")
    return "\n".join(lines)


def provenance(extractor: Extractor) -> dict:
    """What a result and a head say about their features."""
    name = extractor.model.name
    return {
        # a folder from wherever the head is used later
        "model": os.path.abspath(name) if os.path.isdir(name) else name,
        "model_kind": extractor.model.kind,
        "weights": extractor.weights,
        "features": extractor.kind,
        "feature_width": extractor.width,
        "image_size": extractor.image_size,
        "precision": extractor.accelerator.mixed_precision,
    }


if __name__ == "__main__":
    run_main(main)
