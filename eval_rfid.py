"""Measure the reconstructions of autoencoders: rFID, PSNR, SSIM, LPIPS, and how they stand up to noise on the latents.

    python eval_rfid.py --model runs/dinov2_b/final --data.path /data/imagenet/val
    accelerate launch --num_processes 8 eval_rfid.py --model runs/dinov2_b/final --data.path /data/imagenet/val
    python eval_rfid.py --model runs/a/final stabilityai/sd-vae-ft-mse --latent_noise 0 0.2 0.4 0.8 --data.path ...

Models are RAE folders or Hub ids; run folders (their final/, else their newest checkpoint) and checkpoints (--weights
raw for the weights that are not averaged), also while the training goes on; diffusers' AutoencoderRAE, AutoencoderKL;
and decoder files of the published code, with --published.encoder and what else these do not hold. Several are measured
on the same images in one run. The published figures are rFIDs of the 50,000 ImageNet validation images, centre-cropped
to 256 px, in the mode `legacy_tensorflow` (the default): 0.57 for DINOv2-B (RAE paper). What makes two rFIDs
comparable is kept fixed: the reference are the same images through the same crop, the Inception network is that of
2015, both sides are 8-bit, every image counts once, and mode, number of images and rounding stand in the results.

In --output_dir: results.json, comparison.png (images, reconstructions and four times their difference, from the worst
PSNR to the best), and with --save_images and --save_npz the reconstructions themselves. Of several models or noises
each has its own comparison-<name>.png, and comparison.png has the same images as all of them reconstruct them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import torch
from accelerate import Accelerator
from PIL import Image

from rae_suite.autoencoders import DEFAULT_IMAGE_SIZE, Autoencoder
from rae_suite.cli import ALL_AT_LEAST_0, AT_LEAST_0, DISTINCT, POSITIVE, Limit, config_dict, parse, require, setting
from rae_suite.errors import ConfigError, RunError, error_names_setting
from rae_suite.files import make_folder, remove, writing
from rae_suite.frechet import (
    DEFAULT_CACHE,
    cached_references,
    encoder_metric,
    inception_metrics,
    read_references,
)
from rae_suite.image_sets import SharedArray
from rae_suite.launch import (
    data_errors_end_this_process,
    measuring_accelerator,
    quiet_transformers,
    run_main,
)
from rae_suite.loaders import EvalImages, UnreadableLog, chosen_images, eval_loader
from rae_suite.lpips_vgg16 import build_lpips
from rae_suite.metric_names import FID_MODES, IMAGE_METRICS, METRICS, too_small_for
from rae_suite.metrics import Evaluator, quantize
from rae_suite.model_loading import load_autoencoder
from rae_suite.output import print_once
from rae_suite.pictures import comparison_grid, named_rows, save_pairs
from rae_suite.published_rae import PublishedOptions, check_options_used
from rae_suite.randomness import seeded_generator
from rae_suite.results import results_folder, save_results
from rae_suite.run_models import is_run_folder, name_of_run
from rae_suite.settings import ImagesConfig, read_run_settings
from rae_suite.sources import ImageSource, evenly_spread
from rae_suite.splits import load_eval_images
from rae_suite.values import PathText

GRID_IMAGES = 12  # in comparison.png
WORST_IMAGES = 10  # named in the results

NOT_EMPTY = Limit(lambda values: len(values) > 0, "a model folder or Hub id")


@dataclass
class EvalRFIDConfig:
    """Settings of eval_rfid.py."""

    model: tuple[PathText, ...] = setting((), NOT_EMPTY)
    """Folders, checkpoints or Hub ids of the autoencoders."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights of a run's checkpoint: the moving average, or those that are trained."""
    published: PublishedOptions = field(default_factory=PublishedOptions)
    """What a decoder file of the published code, as a model, does not hold."""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    """The images. Data without a split level is taken whole, unless eval_split names another split than the default."""
    num_samples: Optional[int] = setting(None, POSITIVE)
    """Images that are evaluated, spread evenly over the split; none: all."""
    batch_size: int = setting(64, POSITIVE)
    """Images of one batch in each process."""
    image_size: Optional[int] = setting(None, POSITIVE)
    """Side in pixels, for models that take any size; none: that of the other models, or 256."""
    metrics: tuple[Literal[("rfid", *IMAGE_METRICS)], ...] = setting(("rfid", "psnr", "ssim", "lpips"), DISTINCT)
    """What is measured, PSNR in any case. rfid is the Frechet distance in each of `features`; ms_ssim needs images of
    176 pixels or more."""
    features: tuple[Literal["inception", "encoder"], ...] = setting(("inception",), DISTINCT)
    """Feature spaces of the Frechet distance; encoder: the frozen encoder of the first model, reported as rfdd."""
    fid_mode: tuple[Literal["legacy_tensorflow", "clean"], ...] = setting(("legacy_tensorflow",), DISTINCT)
    """Resize before Inception: legacy_tensorflow as published, reported as rfid; clean is reported as rfid_clean."""
    inception_path: Optional[PathText] = None
    """Local copy of inception-2015-12-05.pt; none: torch.hub's folder (TORCH_HOME), else downloaded."""
    vgg_weights: Literal["pretrained", "random"] = "pretrained"
    """"random" gives LPIPS an untrained VGG16: only for tests and demonstrations."""
    vgg_path: Optional[PathText] = None
    """Local copy of torchvision's vgg16-397923af.pth; none: torch.hub's folder (TORCH_HOME), else downloaded."""
    quantize: Literal["round", "truncate"] = "round"
    """How reconstructions become 8-bit; the published evaluation truncates."""
    latent_noise: tuple[float, ...] = setting((0.0,), DISTINCT, ALL_AT_LEAST_0)
    """Standard deviations of Gaussian noise that is added to the latents as a diffusion model sees them."""
    reference: Optional[PathText] = None
    """.npz file to compare with instead of the images: mu and sigma of features, or images arr_0."""
    reference_cache: Optional[PathText] = None
    """Folder in which the references' features are kept; none: rae_references in HF_HOME."""
    save_images: int = setting(0, AT_LEAST_0)
    """Pairs that are written as PNG, spread evenly over the images, for each row of the results."""
    save_npz: bool = False
    """Write all reconstructions as arr_0 (N, H, W, 3), for each row of the results. All processes write into one file:
    several nodes need a common file system."""
    output_dir: Optional[PathText] = None
    """Folder of the results; none: evaluations/<run>-<folder> of the first model, with -2, -3, ... after earlier
    ones."""
    mixed_precision: Optional[Literal["no", "fp16", "bf16"]] = None
    """Autocast precision of the autoencoder; none: what `accelerate launch` was told."""
    seed: int = setting(0, AT_LEAST_0)
    """Seed of the latent noise and of data.holdout_fraction (the training run's, to evaluate its held-out images)."""


def check(config: EvalRFIDConfig) -> None:
    """Raise ConfigError for what can be seen without loading anything."""
    has_rfid, inception = "rfid" in config.metrics, "inception" in config.features
    for key, value, used, needed in (
        ("reference", config.reference, has_rfid, "metrics has rfid"),
        (
            "vgg_path",
            config.vgg_path,
            "lpips" in config.metrics and config.vgg_weights == "pretrained",
            "LPIPS reads it",
        ),
        (
            "inception_path",
            config.inception_path,
            has_rfid and inception,
            "metrics has rfid, and features inception",
        ),
        ("reference_cache", config.reference_cache, config.reference is None, "there is no reference"),
    ):
        require(value is None or used, key, f"nothing unless {needed}", value)
    for key, used, needed in (
        ("features", has_rfid, "metrics has rfid"),
        ("fid_mode", has_rfid and inception, "metrics has rfid, and features inception"),
    ):
        value, default = getattr(config, key), getattr(EvalRFIDConfig, key)
        require(used or value == default, key, f"{list(default)} unless {needed}", list(value))
    if has_rfid and config.num_samples is not None:
        require(config.num_samples > 1, "num_samples", "at least 2 for a Frechet distance", config.num_samples)
    check_options_used(config.published, config.model)
    names = [row_name(model, noise) for model in config.model for noise in config.latent_noise]
    require(len(names) == len(set(names)), "model", "models whose last two folders differ", list(config.model))
    if config.reference is not None:
        require(Path(config.reference).is_file(), "reference", "an .npz file", config.reference)


def row_name(model: str, noise: float) -> str:
    """<run>-<folder>, or <user>-<name>, with the noise if there is some."""
    name = "-".join(name_of_run(model)).strip("/.")
    return f"{name}-noise{noise:g}" if noise else name


def load_models(config: EvalRFIDConfig) -> tuple:
    """(autoencoders, common image size). Raises ConfigError when they do not take the same size."""
    models = [load_autoencoder(source, "model", config.weights, config.published) for source in config.model]
    sizes = {model.image_size: model.name for model in models if model.image_size is not None}
    if config.image_size is not None:
        sizes[config.image_size] = "image_size"
    if len(sizes) > 1:
        found = ", ".join(f"{size} px ({name})" for size, name in sizes.items())
        raise ConfigError(f"model: expected models of one image size, got {found}")
    size = next(iter(sizes), DEFAULT_IMAGE_SIZE)
    for model in models:
        model.check_size(size, "image_size")
    small = too_small_for(config.metrics, size)
    require(not small, "metrics", f"metrics for images of {size} pixels", small)
    return models, size


def note_training_images(config: EvalRFIDConfig) -> None:
    """Say so where the images are a run's own folder, of which it held out a part, and all of them are measured."""
    if config.data.holdout_fraction > 0:
        return
    for model in config.model:
        places = (Path(model), *Path(model).absolute().parents[:2])
        run_dir = next((place for place in places if is_run_folder(place)), None)
        settings = {} if run_dir is None else read_run_settings(run_dir / "config.yaml")
        share, path = settings.get("data.holdout_fraction") or 0, settings.get("data.path")
        if share > 0 and path and os.path.realpath(path) == os.path.realpath(config.data.path):
            seed = settings.get("train.seed", 0)
            flags = f"--data.holdout_fraction {share:g}" + (f" --seed {seed}" if seed else "")
            print_once(f"note: {model} was trained on {1 - share:.0%} of these images; {flags} measures the others")


def inception_distances(config: EvalRFIDConfig, accelerator: Accelerator) -> list:
    """The distances on Inception features that are asked for."""
    wanted = "rfid" in config.metrics and "inception" in config.features
    names = [name for name, mode in FID_MODES.items() if mode in config.fid_mode] if wanted else []
    return inception_metrics(names, config.inception_path, "inception_path", accelerator)


def encoder_distances(config: EvalRFIDConfig, model: Autoencoder, accelerator: Accelerator) -> list:
    """The distance on the encoder's features, if it is asked for. Raises ConfigError for a model without encoder."""
    if "rfid" not in config.metrics or "encoder" not in config.features:
        return []
    require(model.image_size is not None, "features", "inception, or a first model with a frozen encoder", "encoder")
    pixels = torch.zeros(1, 3, model.image_size, model.image_size, device=accelerator.device)
    width = model.tokens(pixels).shape[1]
    return [encoder_metric(model.tokens, model.model, width, accelerator)]


def noise_like(latent: torch.Tensor, index: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal noise, a function of the seed and each image's index: batches and processes do not change it."""
    rows = [torch.randn(latent.shape[1:], generator=seeded_generator(seed, i)) for i in index.tolist()]
    return torch.stack(rows).to(latent.device, latent.dtype)


def reconstruction_of(model: Autoencoder, noise: float, seed: int, accelerator: Accelerator) -> Callable:
    """The function that evaluate_reconstructions measures."""

    def reconstruct(pixels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), accelerator.autocast():
            latent = model.encode(pixels)
            if noise > 0:
                latent = latent + noise * noise_like(latent, index, seed)
            return model.decode(latent).float()

    return reconstruct


# --------------------------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------------------------


class ReconstructionWriter:
    """Writes the reconstructions of one row as they come: some as pairs of PNG, all of them as one .npz if asked.

    Each process writes its own images; row i of the .npz is the i-th of the images that could be read.
    """

    def __init__(self, config: EvalRFIDConfig, folder: Path, chosen: list, size: int, accelerator: Accelerator):
        self.folder = folder
        self.pairs = set(evenly_spread(chosen, config.save_images))
        if accelerator.is_main_process and (self.pairs or config.save_npz):
            for name in ("images", "reconstructions"):  # of an earlier evaluation
                remove(folder / name)
            remove(folder / "reconstructions.npz")
            folder.mkdir(parents=True, exist_ok=True)
        self.array = None
        if config.save_npz:
            self.array = SharedArray(folder / "reconstructions.npz", chosen, size, accelerator)
        accelerator.wait_for_everyone()

    def add(self, index: torch.Tensor, images: torch.Tensor, reconstructions: torch.Tensor) -> None:
        save_pairs(self.folder, self.pairs, index, images, reconstructions)
        if self.array is not None:
            self.array.add(index, reconstructions)

    def finish(self, index: torch.Tensor) -> None:
        """Pack the images `index`, those that could be read, as `reconstructions.npz`."""
        if self.array is not None:
            self.array.finish(index)


def table(rows: list, names: list) -> str:
    """The results as text, a line for each model and noise."""
    width = max(len(row["model"]) for row in rows)
    lines = [f"{'model':<{width}}{'noise':>7}{'N':>8}" + "".join(f"{name:>12}" for name in names)]
    for row in rows:
        values = "".join(f"{row[name]:>12.4f}" for name in names)
        lines.append(f"{row['model']:<{width}}{row['latent_noise']:>7g}{row['num_samples']:>8}{values}")
    return "\n".join(lines)


@dataclass
class Measurement:
    """What all rows of the results share."""

    config: EvalRFIDConfig
    accelerator: Accelerator
    source: ImageSource
    chosen: list  # indices of the images in the source
    size: int  # side in pixels
    evaluator: Evaluator
    output_dir: Path
    several: bool  # whether there are several rows, which get a picture of all of them
    shown: list = field(default_factory=list)  # indices of the images in the picture of all rows, by the first one
    sides: dict = field(default_factory=dict)  # those images, and by row their reconstructions, (N, 3, S, S) in [0, 1]


def both_sides(m: Measurement, reconstruct: Callable, index: torch.Tensor) -> tuple:
    """Images of the source, (N, 3, S, S) in [0, 1], and their 8-bit reconstructions."""
    dataset = EvalImages(m.source, m.size)
    images = torch.stack([dataset[i]["pixels"] for i in index.tolist()]).to(m.accelerator.device).float() / 255
    parts = [quantize(reconstruct(images[i : i + 1], index[i : i + 1])) for i in range(len(index))]
    return images, torch.cat(parts)


def write_side_by_side(m: Measurement) -> None:
    """comparison.png of several rows: the same images as each of them reconstructs them, under the row's name."""
    path = m.output_dir / "comparison.png"
    with writing(path):
        Image.fromarray(named_rows(m.sides).numpy()).save(path)


def measure(m: Measurement, model: Autoencoder, noise: float, picture: str) -> dict:
    """One row of the results, with its files."""
    name = row_name(model.name, noise)
    writer = ReconstructionWriter(m.config, m.output_dir / name, m.chosen, m.size, m.accelerator)
    reconstruct = reconstruction_of(model, noise, m.config.seed, m.accelerator)
    with data_errors_end_this_process(m.accelerator):
        evaluation = m.evaluator(reconstruct, writer.add, name)
    if evaluation.values["psnr"].isnan().any():
        bad = evaluation.index[evaluation.values["psnr"].isnan()].tolist()
        raise RunError(f"{name}: {len(bad)} reconstructions are not finite, the first is of {m.source.name(bad[0])}")
    writer.finish(evaluation.index)
    about = {"model": model.name, "loaded": model.loaded, "kind": model.kind}
    row = {**about, "latent_noise": noise, **evaluation.summary()}
    if m.accelerator.is_main_process:
        psnr = evaluation.values["psnr"]
        worst = psnr.argsort(stable=True)[:WORST_IMAGES].tolist()
        row["worst"] = [{"name": m.source.name(evaluation.index[i].item()), "psnr": psnr[i].item()} for i in worst]
        row["comparison"] = str(m.output_dir / picture)
        order = psnr.argsort(stable=True).tolist()
        index = evaluation.index[evenly_spread(order, GRID_IMAGES, with_last=True)]
        images, reconstructions = both_sides(m, reconstruct, index)
        labels = [f"{psnr[evaluation.index == i].item():.2f} dB" for i in index]
        with writing(m.output_dir / picture):
            Image.fromarray(comparison_grid(images, reconstructions, labels).numpy()).save(m.output_dir / picture)
        if m.several and not m.sides:
            m.shown, m.sides["images"], m.sides[name] = index, images.cpu(), reconstructions.cpu()
        elif m.several:
            m.sides[name] = both_sides(m, reconstruct, m.shown)[1].cpu()
    return row


def report(m: Measurement, rows: list) -> None:
    """Print the table and write results.json."""
    config = m.config
    names = [name for name in METRICS if name in rows[0]]
    results = {
        **{name: rows[0][name] for name in ("num_samples", *names)},  # of the first model and noise
        "rows": rows,
        "fid_mode": {name: mode for name, mode in FID_MODES.items() if name in names},
        "quantize": config.quantize,
        "split": m.source.split,
        "image_size": m.size,
        "crop": "ADM centre crop",
        "reference": config.reference or "the same images, through the same crop",
        "mixed_precision": m.accelerator.mixed_precision,
        "num_processes": m.accelerator.num_processes,
        "config": config_dict(config),
    }
    save_results(m.output_dir / "results.json", results)
    print(table(rows, names))
    print(f"images    {config.data.path}, split: {m.source.split}")
    for name, mode in results["fid_mode"].items():
        print(f"{name}: Inception, {mode}; 8-bit by {config.quantize}; reference: {results['reference']}")
    if "rfdd" in names:
        print(f"rfdd: Frechet distance on mean patch tokens of the encoder of {rows[0]['model']}")
    print("worst PSNR:", ", ".join(f"{case['name']} {case['psnr']:.2f} dB" for case in rows[0]["worst"][:3]))
    print(f"results   {m.output_dir / 'results.json'}\npicture   {m.output_dir / 'comparison.png'}")


def main() -> None:
    config = parse(EvalRFIDConfig, "eval_rfid.py", "Measure the reconstructions of autoencoders.", check=check)
    quiet_transformers()
    accelerator = measuring_accelerator(config.mixed_precision)
    source = load_eval_images(config.data, config.seed)
    output_dir = results_folder(config.output_dir, f"evaluations/{row_name(config.model[0], 0)}", "output_dir")
    cache = make_folder(config.reference_cache, "reference_cache") if config.reference_cache else DEFAULT_CACHE
    note_training_images(config)
    models, size = load_models(config)
    distances = inception_distances(config, accelerator)
    with error_names_setting("vgg_path"):
        perceptual = None
        if "lpips" in config.metrics:
            perceptual = build_lpips(config.vgg_weights, config.vgg_path, "vgg_path").to(accelerator.device)
    distances += encoder_distances(config, models[0].to(accelerator.device), accelerator)
    if config.reference is not None:
        references = read_references(config.reference, distances, accelerator, config.batch_size, "reference")
    else:
        references = cached_references(distances, source, config.num_samples, size, accelerator, cache)
    loader = eval_loader(
        source,
        size,
        config.batch_size,
        config.data.num_workers,
        accelerator.process_index,
        accelerator.num_processes,
        config.num_samples,
    )
    evaluator = Evaluator(
        loader,
        accelerator,
        ["psnr", *(name for name in IMAGE_METRICS if name in config.metrics and name != "psnr")],
        perceptual,
        distances,
        references,
        UnreadableLog(config.data.max_unreadable).add,
        config.quantize,
    )
    chosen = chosen_images(source, config.num_samples)
    several = len(models) * len(config.latent_noise) > 1
    measurement = Measurement(config, accelerator, source, chosen, size, evaluator, output_dir, several)
    make_folder(str(output_dir), "output_dir")
    rows = []
    for model in models:
        model.to(accelerator.device)
        for noise in config.latent_noise:
            picture = f"comparison-{row_name(model.name, noise)}.png" if several else "comparison.png"
            rows.append(measure(measurement, model, noise, picture))
        if model is not models[0]:  # which may be the feature network
            model.cpu()
    if accelerator.is_main_process:
        if several:
            write_side_by_side(measurement)
        report(measurement, rows)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
