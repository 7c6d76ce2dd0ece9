"""Features for linear probing: what a classifier sees of an autoencoder's latents, extracted once by all processes and
cached."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from rae_suite.autoencoders import Autoencoder
from rae_suite.cli import POSITIVE, require, setting
from rae_suite.errors import ConfigError, DataError, RunError
from rae_suite.files import make_folder, write_folder
from rae_suite.launch import data_errors_end_this_process
from rae_suite.loaders import UnreadableLog, eval_loader
from rae_suite.run_folder import lock_run_folder
from rae_suite.settings import ImagesConfig
from rae_suite.sources import ImageSource
from rae_suite.values import PathText

SHARD_BYTES = 2**28  # of features in one file of the cache: what the main process gathers before it writes

BLOCK_ELEMENTS = 2**24  # numbers in the tensors that a pass over features works on: 64 MiB in float32

CACHE_FORMAT = 1  # to be raised when the meaning of cached features changes


@dataclass
class FeaturesConfig:
    """What the classifier sees, and how it is computed."""

    kind: Optional[Literal["mean", "mean_max", "flat", "tokens", "cls"]] = None
    """mean: of the latent (C, h, w) over its patches; mean_max: that and the maximum; flat: the whole latent; tokens:
    mean of the encoder's patch tokens without latent statistics; cls: the encoder's CLS token. None: mean, or with
    eval_only what the head takes."""
    image_size: Optional[int] = setting(None, POSITIVE)
    """Side in pixels, for models that take any size; none: 256, of an encoder alone 224, or with eval_only what the
    head takes."""
    batch_size: int = setting(128, POSITIVE)
    """Images of one forward pass of each process."""
    mixed_precision: Optional[Literal["no", "fp16", "bf16"]] = None
    """Autocast precision of the encoder; none: what `accelerate launch` was told. The heads are float32."""
    cache_dir: Optional[PathText] = None
    """Folder that features are kept in; none: rae_features in HF_HOME."""


def image_features(model: Autoencoder, pixels: torch.Tensor, kind: str) -> torch.Tensor:
    """Pixels (B, 3, S, S) in [0, 1] to features (B, D), float32; see FeaturesConfig.kind."""
    if kind == "cls":
        return model.cls(pixels).float()  # (B, C)
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


def extract(
    extractor: Extractor,
    source: ImageSource,
    settings: FeaturesConfig,
    data: ImagesConfig,
    folder: Path,
    key: dict,
    name: str,
) -> None:
    """Write the features of all images to `folder`. Every process calls this; the main one writes.

    Batch b of the processes together holds the next images of the source, so that sorted batches give the source's
    order with any number of them.
    """
    accelerator, size = extractor.accelerator, min(settings.batch_size, len(source))
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    loader = eval_loader(source, extractor.image_size, size, data.num_workers, rank, world)
    log, unreadable = UnreadableLog(data.max_unreadable), []
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
    extractor: Extractor, source: ImageSource, settings: FeaturesConfig, data: ImagesConfig, cache_dir: Path, name: str
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
            extract(extractor, source, settings, data, beside, key, name)

        write_folder(folder / "features", write, main, accelerator.wait_for_everyone)
        if main:
            features = Features(folder / "features")
            lock.close()
    if main:
        skipped, limit = len(features.unreadable), data.max_unreadable * accelerator.num_processes
        if len(features) + skipped != len(source):
            raise RunError(f"{folder} holds {len(features)} features and {skipped} gaps for {len(source)} images")
        if skipped > limit:
            raise DataError(
                f"data.max_unreadable: {skipped} images could not be read when {folder} was written, expected at most "
                f"{limit}; the last is {features.unreadable[-1]}"
            )
    return features
