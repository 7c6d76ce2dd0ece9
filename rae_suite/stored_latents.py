"""Latents of a list of images on the disk: the folder that scripts/encode_latents.py writes, and training from it.

    latents.json              what the latents are of; when all are there, the shards too
    shard-00000.safetensors   `latents` (n, V, C, h, w), not normalised, V = 1 the centre crop, 2 its mirror image too;
                              `labels` (n,), -1 for none; `readable` (n,); `names`, bytes, of which each ends at its
                              `name_ends`; `count`, `mean`, `squares` of each view in float64, see moments.py
    stats.safetensors         `mean` and `var` (C, h, w) over all views, of the latents before they were rounded

Image i is row i % shard_images of shard i // shard_images. An image that could not be read has a row of zeros.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open

from rae_suite.digests import encoder_digest
from rae_suite.errors import ConfigError, DataError
from rae_suite.images import TrainingView
from rae_suite.latent_stats import LatentReader
from rae_suite.loaders import TrainBatches, build_loader, label_of, too_many_in_a_row
from rae_suite.moments import Moments
from rae_suite.randomness import CROP_STREAM
from rae_suite.settings_dit import Config
from rae_suite.sources import ImageSource

INFO, STATS = "latents.json", "stats.safetensors"
FORMAT = 1
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of latents.json, what a folder must have in common with the command that continues it
SAME = ("format", "encoder", "encoder_precision", "dtype", "flip", "image_size", "shape", "num_images", "images",
        "shard_images")  # fmt: skip


def latent_shape(rae: torch.nn.Module) -> list:
    return [rae.config.latent_channels, rae.config.latent_size, rae.config.latent_size]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class StoredLatents:
    """A finished folder of latents. `info`: what its latents.json says."""

    folder: Path
    info: dict
    _mapped: dict = field(default_factory=dict)  # {number: latents of that shard}

    @property
    def digest(self) -> str:
        """Of what the latents are of and of their statistics: the same wherever the folder lies."""
        return self.info["digest"]

    @cached_property
    def unreadable(self) -> frozenset:
        """Indices of the images that could not be read."""
        return frozenset(self.info["unreadable"])

    def latent(self, index: int, mirrored: bool) -> torch.Tensor:
        """The latent (C, h, w) of an image, in the type that it is stored in. Shards are mapped into memory when they
        are first used: only what is read leaves the disk, and no file stays open."""
        number, row = divmod(index, self.info["shard_images"])
        if number not in self._mapped:
            with safe_open(self.folder / shard_name(number), "pt") as shard:
                self._mapped[number] = shard.get_tensor("latents")
        return self._mapped[number][row, int(mirrored)]

    def moments(self, flip: bool) -> Moments:
        """Of the latents before rounding; with `flip` those of the mirror images too."""
        return read_moments(self.folder, len(self.info["shards"]), self.info["shape"], 1 + flip)

    def __str__(self) -> str:
        return f"{self.folder} ({self.info['dtype']}, {'both flips' if self.info['flip'] else 'one flip'})"


def read_moments(folder: Path, num_shards: int, shape: list, views: int) -> Moments:
    """The moments that the shards hold of their first `views` views, merged in the order of the shards."""
    moments = Moments(tuple(shape))
    for number in range(num_shards):
        with safe_open(folder / shard_name(number), "pt") as shard:
            parts = [shard.get_tensor(name)[:views] for name in ("count", "mean", "squares")]
        for count, mean, squares in zip(*parts, strict=True):
            moments.merge(int(count), mean, squares)
    return moments


def open_latents(config: Config, rae: torch.nn.Module, images: ImageSource) -> Optional[StoredLatents]:
    """The latents of data.latents; None where images are encoded on the fly. Raises ConfigError, before anything is
    read from them, for a folder that is not finished or damaged, and for latents of another encoder, of other images or
    in another precision than the settings say."""
    if config.data.latents is None:
        return None
    folder = Path(config.data.latents)
    info = read_info(folder, "data.latents")
    if "shards" not in info:
        raise ConfigError(f"data.latents: {folder} is not finished; the scripts/encode_latents.py that began continues")
    for expected, found, words in (
        (FORMAT, info["format"], "are of a format that is not known here"),
        (encoder_digest(rae), info["encoder"], f"are of another encoder than that of model.rae {config.model.rae}"),
        (rae.config.image_size, info["image_size"], "are of images of another size in pixels"),
        (config.latents.encoder_precision, info["encoder_precision"], "were encoded in another precision"),
        (len(images), info["num_images"], f"are of another number of images than {config.data.path} has to train on"),
        (images.list_digest(), info["images"], f"are of images with other names than those of {config.data.path}"),
    ):
        if found != expected:
            raise ConfigError(f"data.latents: those in {folder} {words}: {shown(found)}, expected {shown(expected)}")
    if config.data.flip and not info["flip"]:
        raise ConfigError(f"data.latents: {folder} has no mirror images, expected some or data.flip false")
    for number, size in enumerate(info["shards"]):
        file = folder / shard_name(number)
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
            raise ConfigError(f"data.latents: {file} is damaged: {found}, expected {size} bytes")
    return StoredLatents(folder, info)


def shown(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def read_info(folder: Path, key: str) -> dict:
    """What latents.json says. Raises ConfigError, about the setting `key`, where there is none."""
    try:
        info = json.loads((folder / INFO).read_text())
    except OSError as error:
        raise ConfigError(f"{key}: {folder} has no {INFO}, expected a folder of scripts/encode_latents.py") from error
    except ValueError as error:
        raise ConfigError(f"{key}: {folder / INFO} is damaged ({error})") from error
    if not isinstance(info, dict) or any(name not in info for name in SAME):
        raise ConfigError(f"{key}: {folder / INFO} is none of scripts/encode_latents.py")
    return info


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


class LatentsOfImages(torch.utils.data.Dataset):
    """Latents as training sees them, indexed by (epoch, index), with the choices of loaders.TrainImages: whether an
    image is mirrored is the same function of (seed, epoch, index), and one that could not be read is replaced by the
    same other one. Labels are those of the images now.

    Item: latents (C, h, w), not normalised; index, label, unreadable as there. Raises DataError as there.
    """

    def __init__(self, store: StoredLatents, source: ImageSource, view: TrainingView, seed: int, max_unreadable: int):
        self.store, self.source, self.view = store, source, view
        self.seed, self.max_unreadable = seed, max_unreadable
        label_of(source, 0)  # as in TrainImages

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, epoch_and_index: tuple) -> dict:
        epoch, index = epoch_and_index
        mirrored = self.view.mirrors(np.random.default_rng((self.seed, CROP_STREAM, epoch, index)))
        unreadable = []
        for offset in range(min(self.max_unreadable + 1, len(self.source))):
            place = (index + offset) % len(self.source)
            if place in self.store.unreadable:
                unreadable.append(f"{self.source.name(place)}: it could not be read when the latents were encoded")
                continue
            latents, label = self.store.latent(place, mirrored), label_of(self.source, place)
            return {"latents": latents, "index": place, "label": label, "unreadable": unreadable}
        raise too_many_in_a_row(unreadable, self.max_unreadable)


def collate_latents(samples: list) -> dict:
    """Batch of samples: latents (B, C, h, w), index and label int64 (B,), unreadable list[str]."""
    return {
        "latents": torch.stack([sample["latents"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples], dtype=torch.int64),
        "label": torch.tensor([sample["label"] for sample in samples], dtype=torch.int64),
        "unreadable": [name for sample in samples for name in sample["unreadable"]],
    }


def latent_loader(
    store: StoredLatents,
    source: ImageSource,
    batches: TrainBatches,
    view: TrainingView,
    max_unreadable: int,
    num_workers: int,
) -> torch.utils.data.DataLoader:
    """As loaders.train_loader, from stored latents. `view`: a centre crop, with its `flip`."""
    latents = LatentsOfImages(store, source, view, batches.seed, max_unreadable)
    return build_loader(latents, batches, collate_latents, num_workers)


@dataclass
class StoredStats:
    """The statistics that a folder of latents has, in the place of a LatentReader's, with the same methods."""

    store: StoredLatents
    flip: bool
    accelerator: Accelerator

    def digest(self, model: torch.nn.Module) -> str:
        """As LatentReader.digest."""
        return f"{self.store.digest} {self.flip}"

    def stats(self, model: torch.nn.Module) -> tuple[dict, int]:
        """As LatentReader.stats, which reads and encodes all images. The model is not used."""
        moments = self.store.moments(self.flip)
        return stats_of(moments), moments.count // (1 + self.flip)


def stats_of(moments: Moments) -> dict:
    """`mean` and `var`, float32 (C, h, w). Raises DataError for fewer than two samples."""
    if moments.count < 2:
        raise DataError(f"data.path: {moments.count} images can be read, expected at least 2")
    return {"mean": moments.mean.float(), "var": moments.variance().float()}


def latent_reader(
    config: Config, images: ImageSource, latents: Optional[StoredLatents], accelerator: Accelerator
) -> Union[LatentReader, StoredStats]:
    """What finds the statistics of a run's latents: its training images, or their stored latents. Both give the same
    numbers, because the encoder runs in latents.encoder_precision here too."""
    if latents is not None:
        return StoredStats(latents, config.data.flip, accelerator)
    batch_size, precision = config.eval.batch_size, config.latents.encoder_precision
    return LatentReader(images, config.data, batch_size, config.data.flip, accelerator, precision)
