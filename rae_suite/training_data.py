"""The images of a training run: a numbered list or a stream, and the loader of this process's share."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional, Union

from accelerate import Accelerator

from rae_suite.checkpoints import checkpoints
from rae_suite.cli import require
from rae_suite.errors import ConfigError
from rae_suite.files import write_text
from rae_suite.images import TrainingView
from rae_suite.lanes import StreamLoader
from rae_suite.loaders import TrainBatches, train_loader
from rae_suite.settings import DataConfig, TrainConfig
from rae_suite.sources import ImageSource
from rae_suite.splits import load_splits
from rae_suite.stored_latents import StoredLatents, latent_loader
from rae_suite.streams import Stream, load_stream_eval_images, open_stream

SHARDS = "shards.json"  # in the run folder: Stream.record


@dataclass
class TrainingData:
    """Training images, a numbered list or a stream, and evaluation images."""

    path: str  # data.path
    images: Union[ImageSource, Stream]
    batches: Optional[TrainBatches]  # the order in which a list is drawn; None for a stream
    eval_images: ImageSource
    num_images: Optional[int]  # None where a stream's number is not known
    steps_per_epoch: int
    latents: Optional[StoredLatents] = None  # of the images; None: they are encoded on the fly

    def total_steps(self, train: TrainConfig) -> int:
        return train.max_steps or max(1, round(train.epochs * self.steps_per_epoch))

    @property
    def list_digest(self) -> Optional[str]:
        """Digest of a list's images, None for a stream."""
        return None if self.batches is None else self.images.list_digest()

    @property
    def shards(self) -> Optional[str]:
        """Fingerprint of a stream's shards, None for a list."""
        return self.images.fingerprint() if self.batches is None else None


def read_shards(run_dir: Path) -> Optional[list]:
    """The Stream.record with which the run in this folder began; None before a checkpoint. Raises ConfigError."""
    file = run_dir / SHARDS
    if not checkpoints(run_dir) or not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}); without it the shards that are there now are taken") from None


def write_shards(run_dir: Path, data: TrainingData, main_process: bool) -> None:
    """Write the Stream.record that `read_shards` reads; nothing for a list of images."""
    if data.batches is None and main_process:
        write_text(run_dir / SHARDS, json.dumps(data.images.record()))


def open_data(
    data: DataConfig, train: TrainConfig, eval_samples: Optional[int], accelerator: Accelerator, micro_batch: int
) -> TrainingData:
    """Find the images. `eval_samples`: how many evaluation images a stream is to hold. Raises ConfigError where no data
    are named, and DataError."""
    require(data.path or data.mixture, "data.path", "a folder of images, or a Hub data set id", data.path)
    if data.streaming:
        began = read_shards(Path(train.output_dir))
        stream = open_stream(data, train.global_batch_size, train.seed, accelerator, began)
        eval_images = load_stream_eval_images(data, eval_samples)
        return TrainingData(data.path, stream, None, eval_images, stream.num_images, stream.steps_per_epoch)
    images, eval_images = load_splits(data, train.seed)
    batches = TrainBatches(
        len(images),
        train.global_batch_size,
        micro_batch,
        accelerator.process_index,
        accelerator.num_processes,
        train.seed,
        start_step=0,
        total_steps=0,
    )
    return TrainingData(data.path, images, batches, eval_images, len(images), batches.steps_per_epoch)


def evaluated_on(data: DataConfig) -> str:
    """What a run's metrics are of, in words."""
    return "training images" if data.eval_split == data.train_split else "held-out images"


def open_loader(
    data: TrainingData,
    settings: DataConfig,
    train: TrainConfig,
    accelerator: Accelerator,
    image_size: int,
    start_step: int,
    total_steps: int,
    lanes: Optional[list],
) -> Iterable:
    """This process's micro-batches from `start_step` on. `lanes`: states of a stream's lanes there, None at its
    beginning."""
    if data.batches is None:
        return StreamLoader(
            data.images,
            settings,
            image_size,
            accelerator.process_index,
            accelerator.num_processes,
            train.gradient_accumulation_steps,
            lanes,
        )
    batches = replace(data.batches, start_step=start_step, total_steps=total_steps)
    view = TrainingView(image_size, settings.resize_size, settings.crop, settings.flip)
    if data.latents is not None:
        return latent_loader(data.latents, data.images, batches, view, settings.max_unreadable, settings.num_workers)
    return train_loader(data.images, batches, view, settings.max_unreadable, settings.num_workers)
