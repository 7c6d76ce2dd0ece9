"""Encode the training images of a stage-2 run once: their latents in shards, which train_dit.py then reads.

    accelerate launch --num_processes 8 scripts/encode_latents.py --model runs/dinov2_b/final \\
            --data.path /data/imagenet --output /scratch/imagenet_dinov2_b
    accelerate launch train_dit.py --config configs/ditdh_xl.yaml --data.latents /scratch/imagenet_dinov2_b

Each image is centre-cropped; its latent, and with --flip (the default, which train_dit.py's data.flip needs) that of
the crop's mirror image, go into .safetensors shards with its label and name, before normalisation. Mean and variance
of all latents are found on the way, exactly, and written as stats.safetensors, which `latents.stats` takes
(`latents.stats: compute` finds them by itself). What is in the folder: see rae_suite/stored_latents.py.

ImageNet-1k with DINOv2-B at 256 px (768 x 16 x 16) takes 0.5 TB in bf16, with both flips 1.0 TB; twice that in float32.
Size and time are said before the work starts, and a disk that is too small is refused. The same command continues after
an interruption, by any number of processes: of each process at most one shard is made again.

Losses are those of encoding on the fly: to the bit with --dtype float32 where --batch_size is the run's micro-batch,
and to about 1e-5 with another one; bf16 and fp16 round the latents. The encoder is that of --model, in float32 unless
--encoder_precision says bf16, which must be the run's latents.encoder_precision.
"""

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Optional, TextIO

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root
from rae_suite.cli import POSITIVE, parse, require, setting
from rae_suite.digests import encoder_digest
from rae_suite.errors import ConfigError, RunError, WriteError
from rae_suite.files import make_folder, remove, replacing, write_text
from rae_suite.latent_stats import encoder_autocast
from rae_suite.launch import (
    data_errors_end_this_process,
    measuring_accelerator,
    quiet_transformers,
    run_main,
    say,
    to_device,
)
from rae_suite.loaders import EvalImages, UnreadableLog, build_loader, collate
from rae_suite.model_loading import load_rae
from rae_suite.moments import Moments
from rae_suite.run_folder import lock_run_folder
from rae_suite.settings import SEED, ImagesConfig
from rae_suite.sources import ImageSource, join_paths
from rae_suite.splits import load_splits
from rae_suite.stored_latents import (
    DTYPES,
    FORMAT,
    INFO,
    SAME,
    STATS,
    latent_shape,
    read_info,
    read_moments,
    shard_name,
    shown,
    stats_of,
)
from rae_suite.values import PathText


@dataclass
class EncodeLatentsConfig:
    """Settings of encode_latents.py."""

    model: PathText
    """Folder or Hub id of an RAE; its decoder and its latents' statistics are not used."""
    output: PathText
    """Folder of the latents: a new or empty one, or one that the same command began."""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    """The images, as in the training run, whose training split is encoded."""
    flip: bool = True
    """Whether the mirror image of each crop is stored too."""
    dtype: Literal["float32", "bf16", "fp16"] = "bf16"
    """Type that latents are stored in."""
    encoder_precision: Literal["float32", "bf16"] = "float32"
    """Precision of the encoder, as in the training run."""
    batch_size: int = setting(64, POSITIVE)
    """Images of one batch in each process."""
    shard_images: int = setting(1024, POSITIVE)
    """Images of one shard, which a process holds in memory until it is written."""
    seed: int = setting(0, SEED)
    """Seed of data.holdout_fraction: the training run's."""


def check(config: EncodeLatentsConfig) -> None:
    """Raise ConfigError for what can be seen without loading anything."""
    for key in ("model", "output"):
        require(getattr(config, key) != "", key, "a folder", "nothing")


def describe(config: EncodeLatentsConfig, model: nn.Module, images: ImageSource) -> dict:
    """What latents.json says from the beginning."""
    return {
        "format": FORMAT,
        "encoder": encoder_digest(model),
        "encoder_precision": config.encoder_precision,
        "dtype": config.dtype,
        "flip": config.flip,
        "image_size": model.config.image_size,
        "shape": latent_shape(model),
        "num_images": len(images),
        "images": images.list_digest(),
        "shard_images": config.shard_images,
        "model": config.model,
        "data": config.data.path,
        "split": images.split,
        "class_names": images.class_names,
    }


# --------------------------------------------------------------------------------------------------------------------
# The folder
# --------------------------------------------------------------------------------------------------------------------


def take_folder(config: EncodeLatentsConfig, info: dict, accelerator: Accelerator) -> tuple[Path, Optional[TextIO]]:
    """The folder, new or begun with the same settings, and its lock on the main process. Raises ConfigError for any
    other folder and for one in which another process is at work."""
    folder, lock = make_folder(config.output, "output"), None
    if (folder / INFO).exists():
        begun = read_info(folder, "output")
        different = [name for name in SAME if begun[name] != info[name]]
        if different:
            words = (f"{name} is {shown(begun[name])} there and {shown(info[name])} now" for name in different)
            raise ConfigError(f"output: {folder} was begun for other latents: {'; '.join(words)}")
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ConfigError(f"output: {folder} is not empty and has no {INFO}, expected a new folder")
    accelerator.wait_for_everyone()  # all have looked
    if accelerator.is_main_process:
        try:
            lock = lock_run_folder(folder)
        except BlockingIOError:
            raise ConfigError(f"output: another process is at work in {folder}") from None
        for path in folder.glob(".*.partial*"):
            remove(path)
        if not (folder / INFO).exists():
            write_text(folder / INFO, json.dumps(info))
    accelerator.wait_for_everyone()
    return folder, lock


def shard_rows(info: dict, number: int) -> range:
    """Indices of the images of a shard."""
    start = number * info["shard_images"]
    return range(start, min(start + info["shard_images"], info["num_images"]))


def num_shards(info: dict) -> int:
    return -(-info["num_images"] // info["shard_images"])


def is_whole_shard(file: Path) -> bool:
    """Whether it is as long as its header says."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def bytes_of(info: dict, shards: list) -> int:
    """What the latents of these shards take, and mean and squares in float64; not labels and names."""
    images = sum(len(shard_rows(info, number)) for number in shards)
    numbers = (1 + info["flip"]) * math.prod(info["shape"])
    return numbers * (images * DTYPES[info["dtype"]].itemsize + len(shards) * 2 * torch.float64.itemsize)


def in_words(size: float) -> str:
    for unit, number in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= number or unit == "MB":
            return f"{size / number:.2f} {unit}"


def check_space(folder: Path, info: dict, missing: list) -> None:
    """Raise ConfigError where the disk has less space than the missing shards take."""
    needed, free = bytes_of(info, missing), shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"output: {in_words(needed)} are needed for {info['num_images']} images x {1 + info['flip']} views of "
            f"{' x '.join(map(str, info['shape']))} in {info['dtype']}, and {in_words(free)} are free in {folder}; "
            "expected another disk, dtype bf16, or flip false"
        )


# --------------------------------------------------------------------------------------------------------------------
# Encoding
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_batch(config: EncodeLatentsConfig, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels, uint8 (B, 3, S, S), to latents (B, V, C, h, w), float32 on the model's device. A batch with fewer images
    than the others is filled up: an image's latent depends on the shape of its batch in the last bits."""
    count = len(pixels)
    pixels = to_device(pixels, model.device).float() / 255
    pixels = torch.cat([pixels, pixels.new_zeros(config.batch_size - count, *pixels.shape[1:])])
    with encoder_autocast(config.encoder_precision, model.device):
        views = (pixels, pixels.flip(3)) if config.flip else (pixels,)
        latents = [model.encode(view, add_noise=False, normalize=False).latent.float() for view in views]
    return torch.stack(latents, dim=1)[:count]


class Shard:
    """A shard that is being filled. `rows`: indices of its images."""

    def __init__(self, info: dict, rows: range, device: torch.device):
        self.rows, self.dtype, views = rows, DTYPES[info["dtype"]], 1 + info["flip"]
        self.latents = torch.zeros(len(rows), views, *info["shape"], dtype=self.dtype)
        self.labels = torch.full((len(rows),), -1, dtype=torch.int64)
        self.readable = torch.zeros(len(rows), dtype=torch.bool)
        self.moments = [Moments(tuple(info["shape"]), device=device) for _ in range(views)]

    def add(self, batch: dict, latents: torch.Tensor) -> None:
        """Add the latents (B, V, C, h, w) of a batch. Raises RunError for one that is not finite in its stored type."""
        stored = latents.to(self.dtype)
        broken = ~stored.isfinite().flatten(1).all(1).cpu()
        if broken.any():
            raise RunError(
                f"the latent of image {batch['index'][broken][0]} is not finite as {str(self.dtype)[6:]}; its shard is "
                "not written",
                everywhere=True,
            )
        places = batch["index"] - self.rows.start
        self.latents[places] = stored.cpu()
        self.labels[places] = batch["label"]
        self.readable[places] = True
        for moments, view in zip(self.moments, latents.unbind(1), strict=True):
            moments.update(view)

    def write(self, file: Path, images: ImageSource) -> None:
        """Raises WriteError; nothing of the file is left then."""
        names, ends = join_paths([images.name(i) for i in self.rows])
        tensors = {
            "latents": self.latents,
            "labels": self.labels,
            "readable": self.readable,
            "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
            "name_ends": torch.from_numpy(ends),
            "count": torch.tensor([moments.count for moments in self.moments]),
            "mean": torch.stack([moments.mean for moments in self.moments]).cpu(),
            "squares": torch.stack([moments.squares for moments in self.moments]).cpu(),
        }
        try:
            with replacing(file) as beside:
                save_file(tensors, beside)
        except WriteError as error:
            remove(file.with_name(f".{file.stem}.partial{file.suffix}"))
            message = f"{error}; the shards that are there stay, and the same command continues"
            raise WriteError(message, everywhere=True) from error


def batch_rows(config: EncodeLatentsConfig, info: dict, number: int) -> list:
    """The batches of a shard, as lists of indices."""
    rows = shard_rows(info, number)
    return [list(rows[start : start + config.batch_size]) for start in range(0, len(rows), config.batch_size)]


def encode_shards(
    config: EncodeLatentsConfig,
    model: nn.Module,
    images: ImageSource,
    folder: Path,
    info: dict,
    missing: list,
    accelerator: Accelerator,
) -> None:
    """Write this process's share of the missing shards. The main process says how far it is."""
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    size, unreadable = info["image_size"], UnreadableLog(config.data.max_unreadable)
    batches = [rows for number in mine for rows in batch_rows(config, info, number)]
    collate_fn = partial(collate, image_size=size)
    loader = iter(build_loader(EvalImages(images, size), batches, collate_fn, config.data.num_workers))
    for number in progress(mine, accelerator):
        shard = Shard(info, shard_rows(info, number), model.device)
        for _ in batch_rows(config, info, number):
            batch = next(loader)
            unreadable.add(batch["unreadable"])
            if len(batch["pixels"]):
                shard.add(batch, encode_batch(config, model, batch["pixels"]))
        shard.write(folder / shard_name(number), images)


def progress(shards: list, accelerator: Accelerator) -> Iterator[int]:
    """This process's shards, with a bar on a terminal; elsewhere a line every minute and at the end."""
    bar = tqdm(total=len(shards), unit="shard", disable=None if accelerator.is_main_process else True, leave=False)
    start = said = time.monotonic()
    for done, number in enumerate(shards, 1):
        yield number
        bar.update()
        now = time.monotonic()
        if accelerator.is_main_process and bar.disable and (now - said > 60 or done == len(shards)):
            left = tqdm.format_interval((len(shards) - done) * (now - start) / done)
            print(f"{done} of {len(shards)} shards of the first process, {left} left", flush=True)
            said = now
    bar.close()


def announce(
    config: EncodeLatentsConfig,
    model: nn.Module,
    images: ImageSource,
    info: dict,
    missing: list,
    accelerator: Accelerator,
) -> None:
    """On the main process, say what the work takes: the space, and the time that follows from one batch."""
    crop = EvalImages(images, info["image_size"])
    rows = shard_rows(info, missing[0])[: config.batch_size]
    start = time.perf_counter()
    pixels = collate([crop[i] for i in rows], info["image_size"])["pixels"]
    reading = (time.perf_counter() - start) / len(rows) / max(1, config.data.num_workers)
    encode_batch(config, model, pixels).cpu()  # the first one is slower
    start = time.perf_counter()
    encode_batch(config, model, pixels).cpu()
    encoding = (time.perf_counter() - start) / len(rows)
    seconds = max(reading, encoding) if config.data.num_workers else reading + encoding
    speed = accelerator.num_processes / seconds
    count, total = sum(len(shard_rows(info, number)) for number in missing), num_shards(info)
    print(
        f"{info['num_images']} images x {1 + info['flip']} views of {' x '.join(map(str, info['shape']))} in "
        f"{info['dtype']}: {in_words(bytes_of(info, list(range(total))))} in {total} shards, of which "
        f"{total - len(missing)} are there; {count} images at about {speed:.1f} images/s, measured on one batch, take "
        f"about {tqdm.format_interval(count / speed)}",
        flush=True,
    )


def finish(folder: Path, info: dict) -> None:
    """On the main process, when all shards are there: statistics, and latents.json in full."""
    sizes, unreadable = [], []
    for number in range(num_shards(info)):
        file = folder / shard_name(number)
        sizes.append(file.stat().st_size)
        with safe_open(file, "pt") as shard:
            rows = (~shard.get_tensor("readable")).nonzero()[:, 0].tolist()
        unreadable += [shard_rows(info, number).start + row for row in rows]
    stats = stats_of(read_moments(folder, len(sizes), info["shape"], 1 + info["flip"]))
    digest = hashlib.sha256(json.dumps([info[name] for name in SAME]).encode())
    for name in ("mean", "var"):
        digest.update(stats[name].numpy().tobytes())
    with replacing(folder / STATS) as beside:
        save_file(stats, beside)
    full = {**info, "shards": sizes, "unreadable": unreadable, "digest": digest.hexdigest()}
    write_text(folder / INFO, json.dumps(full))
    skipped = f", {len(unreadable)} images could not be read" if unreadable else ""
    std = stats["var"].double().sqrt()
    print(
        f"{folder} has all latents{skipped}; the mean of an entry is {stats['mean'].min():.4f} to "
        f"{stats['mean'].max():.4f}, its standard deviation {std.min():.4f} to {std.max():.4f}\n"
        f"to train on them: train_dit.py --data.latents {folder}"
    )


def main() -> None:
    config = parse(EncodeLatentsConfig, "encode_latents.py", "Latents of a data set, in shards.", check=check)
    quiet_transformers()
    accelerator = measuring_accelerator()

    # everything that can be wrong is looked at before anything expensive starts
    images, _ = load_splits(config.data, config.seed, need_eval=False)
    model = load_rae(config.model, "model").to(accelerator.device)
    info = describe(config, model, images)
    folder, lock = take_folder(config, info, accelerator)
    missing = [number for number in range(num_shards(info)) if not is_whole_shard(folder / shard_name(number))]
    check_space(folder, info, missing)
    accelerator.wait_for_everyone()  # all have looked

    with data_errors_end_this_process(accelerator):
        if missing and accelerator.is_main_process:
            announce(config, model, images, info, missing, accelerator)
        encode_shards(config, model, images, folder, info, missing, accelerator)
    accelerator.wait_for_everyone()
    if not missing and "digest" in read_info(folder, "output"):
        say(accelerator, f"{folder} is finished: {num_shards(info)} shards")
    elif accelerator.is_main_process:
        finish(folder, info)
    with lock or nullcontext():
        accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
