"""Exact mean and variance of a model's latents over its training images, stored so that `encode` normalises with them.

    python scripts/compute_latent_stats.py --model runs/dinov2_b/final --data.path /data/imagenet
        into the model folder: from then on its latents have mean 0 and standard deviation 1, and `decode` undoes it

    accelerate launch --multi_gpu --mixed_precision bf16 scripts/compute_latent_stats.py --model user/my-rae \\
            --data.path /data/imagenet --output my-rae-normalised --stats_file stats.safetensors
        on several GPUs, into a new folder, and as a file of `mean` and `var` (.safetensors or .pt)

    python scripts/compute_latent_stats.py --train_config configs/dinov2_b.yaml --data.path /data/imagenet \\
            --stats_file stats.safetensors
        before there is a model, for train_rae.py --config configs/dinov2_b.yaml --model.latent_stats stats.safetensors:
        the encoder is what that config describes; a second file can name a local copy of it

Images are centre-cropped as in evaluation, and each is counted with its mirror image (--flip false: without). The
published statistics flip at random; both ways is the exact value of that. By default all images of the training split.
Mean and population variance, (C, h, w) each, are accumulated in float64 (see moments.py): order, batch size and number
of processes do not matter. Statistics that the model already has are ignored and replaced. Latents are computed in
float32, or in what `accelerate launch --mixed_precision` says, on a GPU when there is one.

Before the new folder or file takes its place, it is loaded from disk and normalised latents of up to 256 images, spread
over the split, are measured: a mean or a standard deviation far from 0 and 1 ends with exit code 1 and leaves what was
there as it was. So does an interruption.
A latent entry that never changes has variance 0. It normalises to 0, as the formula is (z - mean) / sqrt(var + 1e-5),
and is decoded as its mean. The table counts the entries whose variance is below 1e-5.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the repository root
from modeling_rae import LATENT_VAR_EPS, RAEModel
from rae_suite.cli import AT_LEAST_0, POSITIVE, Limit, parse, require, setting
from rae_suite.errors import DataError, RunError, error_names_setting
from rae_suite.files import check_links, check_output_file, replacing, write_folder
from rae_suite.latent_stats import LatentReader
from rae_suite.launch import (
    measuring_accelerator,
    quiet_transformers,
    run_main,
)
from rae_suite.loaders import chosen_images
from rae_suite.model_loading import FoundModel, find_model, load_rae, rae_of
from rae_suite.published_rae import PublishedOptions, check_options_used
from rae_suite.rae_networks import build_rae, build_rae_config, give_latent_stats, save_rae
from rae_suite.settings import ImagesConfig
from rae_suite.settings_rae import parse_config
from rae_suite.sources import ImageSource
from rae_suite.splits import load_splits
from rae_suite.values import PathText

CHECK_IMAGES = 256
# An entry's mean over that many images is off by 1/16 on average.
MAX_CHECK_MEAN, CHECK_STD_RANGE = 0.25, (0.5, 2.0)


AT_LEAST_2 = Limit(lambda value: value >= 2, "at least 2 images")


@dataclass
class LatentStatsConfig:
    """Settings of compute_latent_stats.py."""

    model: Optional[PathText] = None
    """Folder or Hub id of an RAE; with an output also a checkpoint, diffusers' AutoencoderRAE, or a decoder file of the
    published code. Of a run folder: its final/, else its newest checkpoint."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights of a run's checkpoint: the moving average, or those that are trained."""
    published: PublishedOptions = field(default_factory=PublishedOptions)
    """What a decoder file of the published code, as a model, does not hold."""
    train_config: tuple[PathText, ...] = ()
    """Instead of a model: YAML files of a training run, later ones win."""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    """The images, as in the training run; statistics are those of the training split."""
    output: Optional[PathText] = None
    """New folder for the model with its statistics; none: they go into the model's own folder."""
    stats_file: Optional[PathText] = None
    """File for `mean` and `var`, .safetensors or .pt."""
    num_samples: Optional[int] = setting(None, AT_LEAST_2)
    """Images that are used, spread evenly over the split; none: all."""
    flip: bool = True
    """Whether each image's mirror image counts too."""
    batch_size: int = setting(64, POSITIVE)
    """Images of one batch in each process."""
    seed: int = setting(0, AT_LEAST_0)
    """Seed of data.holdout_fraction: the training run's."""
    json: Optional[PathText] = None
    """File for the printed table, for machines."""


def check(config: LatentStatsConfig) -> None:
    """Raise ConfigError for what can be seen without loading anything."""
    require((config.model is None) != (not config.train_config), "model", "either it or train_config", config.model)
    check_options_used(config.published, [config.model])
    for file in config.train_config:
        require(Path(file).is_file(), "train_config", "YAML files that exist", file)
    if config.train_config:
        require(config.output is None, "output", "nothing with train_config: there is no model yet", config.output)
        require(config.stats_file is not None, "stats_file", "a file, the only result with train_config", None)
    if config.output is not None:
        output = Path(config.output).resolve()
        free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
        inside = output.is_relative_to(Path(config.model).resolve())
        require(free and not inside, "output", "a new folder outside of the model", config.output)
    check_output_file(config.json, "json")
    if config.stats_file is not None:
        known = Path(config.stats_file).suffix in (".safetensors", ".pt")
        require(known, "stats_file", "a name that ends in .safetensors or .pt", config.stats_file)


# --------------------------------------------------------------------------------------------------------------------
# Images, model, and the places to write to
# --------------------------------------------------------------------------------------------------------------------


def load_images(config: LatentStatsConfig) -> ImageSource:
    """The training images. Raises DataError for fewer than two."""
    images, _ = load_splits(config.data, config.seed, need_eval=False)
    if len(images) < 2:
        raise DataError(f"data.path: {config.data.path} has {len(images)} training image, expected at least 2")
    return images


def training_model(files: tuple, latent_stats: Optional[str]) -> RAEModel:
    """The autoencoder that train_rae.py builds from the YAML `files`, with the statistics of a file. Its decoder has
    one block: the encoder's weights, random ones too, do not depend on it."""
    config = parse_config([part for file in files for part in ("--config", file)])
    model = replace(config.model, latent_stats=latent_stats, decoder_num_hidden_layers=1)
    return build_rae(model, config.train.seed, build_rae_config(model)).eval()


def find_source(config: LatentStatsConfig) -> Optional[FoundModel]:
    """The model that --model names; None with a training config. Raises ConfigError."""
    if config.model is None:
        return None
    found = find_model(config.model, "model", config.weights)
    if config.output is None and found.side != "kl":  # no RAE at all, which is said where it is read
        expected = f"a new folder for {found.words}, which is no folder of this suite that statistics can go into"
        require(found.side == "rae" and Path(found.place).is_dir(), "output", expected, None)
    return found


def model_folder(found: FoundModel) -> Optional[Path]:
    """The folder of an RAE's files, that of the cache for a Hub id; None where the model is read from something else.
    Raises ConfigError for a link in it that leads somewhere else: what is there would be copied."""
    if found.side != "rae":
        return None
    place = Path(found.place)
    folder = (place if place.is_dir() else Path(snapshot_download(found.place))).resolve()
    check_links(folder, folder.rglob("*"), "model")
    return folder


def check_writable(folder: Path, key: str) -> None:
    """Make `folder` if it is missing. Raises ConfigError, about the setting `key`, unless files can be made in it."""
    with error_names_setting(key):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


# --------------------------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------------------------


def check_normalised(reader: LatentReader, model: RAEModel) -> dict:
    """Mean and standard deviation, over all entries, of the normalised latents of some images, the root mean square of
    the entries' own means, and the number of images. Raises RunError when they are far from 0, 1 and 0."""
    moments, num_images = reader.moments(model.to(reader.accelerator.device), True, CHECK_IMAGES)
    mean = moments.mean.mean().item()
    std = (moments.variance() + (moments.mean - mean).square()).mean().sqrt().item()
    mean_rms = moments.mean.square().mean().sqrt().item()  # a LayerNorm's mean over channels is 0 in any case
    low, high = CHECK_STD_RANGE
    if not (mean_rms <= MAX_CHECK_MEAN and low <= std <= high):  # nan is refused too
        raise RunError(
            f"normalised latents have mean {mean:.3g} ({mean_rms:.3g} for an entry) and standard deviation {std:.3g}, "
            "expected about 0 and 1; nothing was replaced"
        )
    return {"num_images": num_images, "mean": mean, "mean_rms": mean_rms, "std": std}


# --------------------------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------------------------


def write_model(
    model: RAEModel, source: Optional[Path], target: Path, stats: dict, check: Callable, accelerator: Accelerator
) -> None:
    """Put the model with `stats` in the place of `target`, after `check` of the model that is loaded from it. Of a
    model folder `source`, precision of the weights, other files, and whether the encoder is bundled stay as they
    are."""

    def write(folder: Path) -> None:
        if accelerator.is_main_process and source is None:
            give_latent_stats(model, **stats)
            save_rae(model, model.state_dict(), folder)
        elif accelerator.is_main_process:
            copy = RAEModel.from_pretrained(source, dtype="auto")
            give_latent_stats(copy, **stats)
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model*.safetensors*"))
            copy.save_pretrained(folder, include_encoder=copy.config.encoder_bundled)
        accelerator.wait_for_everyone()
        check(load_rae(str(folder), "output"))

    write_folder(target, write, accelerator.is_main_process, accelerator.wait_for_everyone)


def write_file(path: Path, stats: dict, check: Callable, accelerator: Accelerator) -> None:
    """Write `stats` to `path`, after `check` of the new file."""
    main = accelerator.is_main_process
    with replacing(path) if main else nullcontext() as beside:
        if main:
            (save_file if path.suffix == ".safetensors" else torch.save)(stats, beside)
        [written] = broadcast_object_list([beside])
        check(str(written))
        accelerator.wait_for_everyone()


def report(
    config: LatentStatsConfig, split: str, stats: dict, num_images: int, num_unreadable: int, fresh: dict
) -> None:
    """Print the table, and write it for machines if asked. `split`: which images these are, in words; `fresh`: what
    `check_normalised` found."""
    std = stats["var"].double().sqrt()
    results = {
        "model": config.model,
        "train_config": list(config.train_config),
        "data": config.data.path,
        "split": split,
        "num_images": num_images,
        "num_unreadable": num_unreadable,
        "flip": config.flip,
        "latent_shape": list(std.shape),
        "mean_min": stats["mean"].min().item(),
        "mean_max": stats["mean"].max().item(),
        "std_min": std.min().item(),
        "std_mean": std.mean().item(),
        "std_max": std.max().item(),
        "num_constant": int((stats["var"] < LATENT_VAR_EPS).sum()),
        "normalised": fresh,
        "output": config.output or config.model,
        "stats_file": config.stats_file,
    }
    if config.json is not None:
        Path(config.json).write_text(json.dumps(results, indent=2) + "\n")
    mirrored = ", each with its mirror image" if config.flip else ""
    skipped = f", {num_unreadable} unreadable skipped" if num_unreadable else ""
    rows = {
        "images": f"{num_images}{mirrored}{skipped}",
        "split": split,
        "latents (C, h, w)": " x ".join(map(str, std.shape)),
        "mean of an entry": f"{stats['mean'].min():.4f} to {stats['mean'].max():.4f}",
        "std of an entry": f"{std.min():.4f} to {std.max():.4f}, on average {std.mean():.4f}",
        "variance < 1e-5": f"{results['num_constant']} of {std.numel()} entries",
        "normalised": "mean {mean:.4f} (rms of entries {mean_rms:.4f}), std {std:.4f}, over {num_images} images "
        "read again".format(**fresh),
        "model": results["output"],
        "file": config.stats_file,
    }
    print("\n".join(f"{name:<19}{text}" for name, text in rows.items() if text is not None))


def main() -> None:
    config = parse(LatentStatsConfig, "compute_latent_stats.py", "Exact statistics of an RAE's latents.", check=check)
    quiet_transformers()
    accelerator = measuring_accelerator()

    # everything that can be wrong is looked at before anything expensive starts
    images = load_images(config)
    found = find_source(config)
    model = training_model(config.train_config, None) if found is None else rae_of(found, "model", config.published)
    model.to(accelerator.device)
    source = None if found is None else model_folder(found)
    target = source if config.output is None else Path(config.output).resolve()
    places = {"stats_file": config.stats_file, "json": config.json, "output" if config.output else "model": target}
    for key, path in places.items():
        if path is not None:
            check_writable(Path(path).absolute().parent, key)

    reader = LatentReader(images, config.data, config.batch_size, config.flip, accelerator)
    stats, num_images = reader.stats(model, config.num_samples)
    fresh = {}
    if target is not None:
        check_written = lambda written: fresh.update(check_normalised(reader, written))  # noqa: E731
        write_model(model, source, target, stats, check_written, accelerator)

    def check_file(file: str) -> None:
        if config.train_config:  # with a model, the same numbers have just been checked
            fresh.update(check_normalised(reader, training_model(config.train_config, file)))

    if config.stats_file is not None:
        write_file(Path(config.stats_file), stats, check_file, accelerator)
    if accelerator.is_main_process:
        num_unreadable = len(chosen_images(images, config.num_samples)) - num_images
        report(config, images.split, stats, num_images, num_unreadable, fresh)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
