"""Draw images with a stage-2 model: a set for FID, or some of named classes.

    python sample_dit.py --model runs/ditdh_xl/final --classes "golden retriever" 88 --num_samples 16
    accelerate launch --num_processes 8 sample_dit.py --model runs/ditdh_xl/final --num_samples 50000 --npz
    accelerate launch sample_dit.py --model runs/ditdh_xl --num_samples 50000 --npz --guidance_scale 1.42 \
            --guide runs/ditdh_s/checkpoints/step-00017514

The model is a pipeline folder, a run folder (its final/, else its newest checkpoint), a checkpoint (--weights raw for
the weights that are not averaged), a Hub id, or a transformer alone with its --rae. The settings of --sampling may be
given without that word: --guidance_scale, --guidance_interval, --guide, --num_inference_steps, --end, --solver.

The defaults are those of the published figures: labels balanced and permuted by the seed, 50 points in time (which are
49 passes), no guidance, pixels truncated to 8 bit. The noise of an image is a function of the seed and its number, and
batches are the same ones for every number of processes: so are the files. What makes two sets comparable stands in the
results.

In --output_dir: images/000000.png and so on, samples.npz (arr_0) with --npz, labels.csv, grid.png and results.json. The
same command continues a set that was interrupted.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Optional

import torch
from accelerate import Accelerator
from tqdm import tqdm

from modeling_dit import RAEDiTModel, check_parts_fit
from modeling_rae import RAEModel
from rae_suite.autoencoders import RAE
from rae_suite.class_labels import balanced_labels, indices_of_classes, random_labels
from rae_suite.cli import POSITIVE, config_dict, parse, require, setting
from rae_suite.digests import weights_digest
from rae_suite.dit_card import guidance_words, sampling_words
from rae_suite.dit_evaluation import measure_set, open_comparison
from rae_suite.dit_folders import PartsSettings, latents_key, load_guide, load_pipeline_parts
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.files import make_folder, write_text
from rae_suite.flow import guidance_kind
from rae_suite.generation import count_passes, draw_images
from rae_suite.image_sets import open_images
from rae_suite.launch import measuring_accelerator, quiet_transformers, run_main, say, set_tf32
from rae_suite.metric_names import DRAWN_METRICS
from rae_suite.model_loading import load_rae
from rae_suite.results import save_results
from rae_suite.run_models import name_of_run
from rae_suite.sample_files import (
    GRID,
    NPZ,
    RESULTS,
    SETTINGS,
    check_same_settings,
    is_whole_npz,
    missing_images,
    pack,
    prepare_images,
    write_grid,
    write_images,
    write_labels,
)
from rae_suite.settings import SEED, check_used
from rae_suite.settings_dit import DrawnEvalConfig, SamplingConfig, check_sampling
from rae_suite.values import PathText

LABELS = {"balanced": balanced_labels, "random": random_labels}


@dataclass
class SampleDiTConfig:
    """Settings of sample_dit.py."""

    model: PathText
    """Pipeline folder, run folder, checkpoint, transformer folder or Hub id of a stage-2 model."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights of a run's checkpoint: the moving average, or those that are trained."""
    rae: Optional[PathText] = None
    """Folder, checkpoint or Hub id of the RAE that decodes, with the model's latent space; none: the one that the model
    names."""
    num_samples: int = setting(64, POSITIVE)
    """Images that are drawn."""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced draws each class equally often, in an order that the seed decides; random draws classes too."""
    classes: tuple[str, ...] = ()
    """Names or indices of the classes that are drawn; none: all."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How images are drawn."""
    batch_size: int = setting(64, POSITIVE)
    """Images of one batch in each process."""
    seed: int = setting(0, SEED)
    """Seed of noise and labels."""
    quantize: Literal["truncate", "round"] = "truncate"
    """How pixels become 8-bit; the published figures are of truncated ones."""
    png: bool = True
    """Whether the PNG files stay. Without them, they are deleted when samples.npz is written."""
    npz: bool = False
    """Whether samples.npz is written."""
    eval: DrawnEvalConfig = field(default_factory=DrawnEvalConfig)
    """Whether the images are measured at once."""
    output_dir: Optional[PathText] = None
    """Folder of the images; none: samples/<run>-<folder> of the model. Several nodes need a common file system."""
    mixed_precision: Optional[Literal["no", "fp16", "bf16"]] = None
    """Autocast precision; none: what `accelerate launch` was told. FID is lowest in float32 (no)."""
    tf32: bool = False
    """Whether a GPU may round the factors of float32 products to TF32, as the published figures were drawn."""


def check(config: SampleDiTConfig) -> None:
    """Raise ConfigError for what can be seen without loading anything."""
    check_sampling(config.sampling)
    require(config.png or config.npz, "png", "true unless npz is", config.png)
    needed = any(DRAWN_METRICS[name].needs for name in config.eval.metrics)
    require(not needed or config.eval.reference, "eval.reference", "what eval.metrics compare with", None)
    check_used("eval.reference", config.eval.reference, needed, "eval.metrics name a metric that compares")
    inception = any(DRAWN_METRICS[name].features == "inception" for name in config.eval.metrics)
    check_used("eval.inception_path", config.eval.inception_path, inception, "eval.metrics name one of Inception")


def without_group(argv: list) -> list:
    """The command line with the names of the settings of `sampling` in full: --guide is --sampling.guide."""
    short = {f"--{item.name}": f"--sampling.{item.name}" for item in fields(SamplingConfig)}
    words = [word.partition("=") for word in argv]
    return [f"{short.get(name, name)}{equals}{value}" for name, equals, value in words]


@dataclass
class Models:
    """The networks of a run, and what goes with the transformer."""

    transformer: RAEDiTModel
    rae: RAEModel
    guide: Optional[RAEDiTModel]
    settings: PartsSettings


def load_models(config: SampleDiTConfig) -> Models:
    """The networks, on the CPU. Raises ConfigError for those that do not fit each other, before anything is drawn."""
    transformer, rae, settings = load_pipeline_parts(config.model, "model", config.weights)
    if config.rae is not None:
        own, rae = rae, load_rae(config.rae, "rae")
        if own is not None and latents_key(own) != latents_key(rae):
            raise ConfigError(f"rae: {config.rae} is of another latent space than the RAE of {config.model}")
    require(rae is not None, "rae", f"the RAE of {config.model}, which is a transformer alone", config.rae)
    with error_names_setting("rae", config.rae or config.model):
        check_parts_fit(transformer, rae, None)
    guide = None
    if config.sampling.guidance_scale != 1:
        guide = load_guide(config.sampling.guide, settings.guide, transformer, rae, "sampling.guide")
        if guide is None and (config.sampling.guide == "off" or not transformer.has_base_head):
            with error_names_setting("sampling.guidance_scale", config.model):
                transformer.null_label  # noqa: B018
    return Models(transformer, rae, guide, settings)


def what_decides_pixels(config: SampleDiTConfig, models: Models, accelerator: Accelerator) -> dict:
    """All that the images are a function of, up to the order of sums. Paths are not: weights are."""
    left_out = ("model", "weights", "rae", "batch_size", "png", "npz", "output_dir", "eval")
    settings = {name: value for name, value in config_dict(config).items() if name not in left_out}
    networks = {"transformer": models.transformer, "rae": models.rae, "guide": models.guide}
    digests = {name: None if network is None else weights_digest(network) for name, network in networks.items()}
    off = settings["sampling"].pop("guide") == "off"
    if models.transformer.has_base_head:
        settings["internal_guidance"] = models.guide is None and not off
    return {**settings, "mixed_precision": accelerator.mixed_precision, "shift": models.settings.shift, **digests}


def take_folder(
    config: SampleDiTConfig, decides: dict, labels: torch.Tensor, class_names: dict, accelerator: Accelerator
) -> Path:
    """The output folder, new or of the same images. Raises ConfigError for one of other images."""
    folder = make_folder(config.output_dir or f"samples/{'-'.join(name_of_run(config.model))}", "output_dir")
    check_same_settings(folder, decides, "output_dir")
    accelerator.wait_for_everyone()  # all have looked
    if accelerator.is_main_process:
        write_text(folder / SETTINGS, json.dumps(decides, indent=1))
        write_labels(folder, labels, class_names)
    accelerator.wait_for_everyone()
    return folder


# --------------------------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------------------------


def npz_suffices(config: SampleDiTConfig, models: Models, folder: Path) -> bool:
    """Whether samples.npz has all images and no PNG files were asked for: none are drawn, and those that are there may
    be some of them only."""
    return not config.png and is_whole_npz(folder, config.num_samples, models.rae.config.image_size)


def missing_batches(config: SampleDiTConfig, folder: Path) -> list:
    """The batches, as ranges of indices, that have an image to be drawn. Such a batch is drawn whole: its images have
    the same bits as in a run that was not interrupted."""
    missing = {index // config.batch_size for index in missing_images(folder, config.num_samples)}
    starts = (number * config.batch_size for number in sorted(missing))
    return [range(start, min(start + config.batch_size, config.num_samples)) for start in starts]


def progress(batches: list, total: int, accelerator: Accelerator) -> Iterator[range]:
    """This process's share of the batches. The main process shows images/s of all processes and the time left: a bar on
    a terminal, elsewhere a line after the first batch and then every minute."""
    rank, world, count = accelerator.process_index, accelerator.num_processes, sum(map(len, batches))
    bar = tqdm(total=count, unit=" images", disable=None if accelerator.is_main_process else True, leave=False)
    start = said = time.monotonic()
    for number in range(rank, len(batches), world):
        yield batches[number]
        done = sum(map(len, batches[: number + world]))  # the other processes are at their batches of this turn
        bar.update(done - bar.n)
        now = time.monotonic()
        if accelerator.is_main_process and bar.disable and (number == 0 or now - said > 60 or done == count):
            speed, said = done / (now - start), now
            left = tqdm.format_interval((count - done) / speed)
            print(f"{total - count + done} of {total} images, {speed:.2f} images/s, {left} left", flush=True)
    bar.close()


def draw(
    config: SampleDiTConfig, models: Models, labels: torch.Tensor, folder: Path, accelerator: Accelerator
) -> tuple[int, float]:
    """Draw the images that are missing. Returns their number and the seconds."""
    if npz_suffices(config, models, folder):
        return 0, 0.0
    batches = missing_batches(config, folder)
    if accelerator.is_main_process:
        prepare_images(folder)
    accelerator.wait_for_everyone()  # all have looked, and the folder is there
    count, start = sum(map(len, batches)), time.monotonic()
    say(accelerator, f"{models.settings.found}: {config.num_samples} images, {config.num_samples - count} are there")
    for network in (models.transformer, models.rae, models.guide):
        if network is not None:
            network.to(accelerator.device)
    for indices in progress(batches, config.num_samples, accelerator):
        images = draw_images(
            models.transformer,
            models.rae,
            labels[indices.start : indices.stop],
            indices,
            config.seed,
            config.sampling,
            models.settings.shift,
            models.guide,
            config.quantize,
            accelerator.autocast,
        )
        write_images(folder, indices, images)
    accelerator.wait_for_everyone()
    return count, time.monotonic() - start


def report(config: SampleDiTConfig, models: Models, decides: dict, accelerator: Accelerator) -> dict:
    """What results.json says beside the speed."""
    sampling, settings, has_guide = config.sampling, models.settings, models.guide is not None
    precision = {"no": "float32 with TF32" if config.tf32 else "float32"}
    precision = precision.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} autocast")
    has_base_head, off = models.transformer.has_base_head, "off" if sampling.guide == "off" else None
    drawn = {**config_dict(sampling), "guide": has_guide or off}
    words, kind = sampling_words(drawn, has_base_head), guidance_kind(has_base_head, has_guide, not off)
    return {
        "num_samples": config.num_samples,
        "model": config.model,
        "loaded": settings.found,
        "how": f"{words}, {config.labels} labels, 8 bit by {config.quantize}, {precision}",
        "labels": config.labels,
        "classes": list(config.classes) or "all",
        "quantize": config.quantize,
        "precision": precision,
        "sampler": sampling.solver,
        "points": sampling.num_inference_steps,
        "end": sampling.end,
        "shift": settings.shift,
        "guidance": guidance_words(drawn, has_base_head),
        "guide": (sampling.guide or str(settings.guide)) if has_guide else None,
        "passes_per_image": count_passes(sampling, settings.shift, kind),
        "weights": settings.weights,
        "decoder": models.rae.name_or_path,
        "image_size": models.rae.config.image_size,
        "seed": config.seed,
        "num_processes": accelerator.num_processes,
        "networks": {name: decides[name] for name in ("transformer", "rae", "guide")},
        "config": config_dict(config),
    }


def finish(
    config: SampleDiTConfig, models: Models, labels: torch.Tensor, folder: Path, results: dict, done: tuple
) -> None:
    """On the main process: what there is beside the images, unless all of it is of these images already. `done`: the
    number of images that were drawn now, and the seconds."""
    drawn, seconds = done
    size, speed = models.rae.config.image_size, drawn / seconds if drawn else None
    if config.npz and (drawn or not is_whole_npz(folder, config.num_samples, size)):
        print(f"packing {folder / NPZ}", flush=True)
        pack(folder, config.num_samples, size)
    if drawn or not (folder / GRID).is_file() and not missing_images(folder, config.num_samples):
        write_grid(folder, labels, models.settings.class_names)
    if drawn or "metrics" in results or not (folder / RESULTS).is_file():
        save_results(folder / RESULTS, {**results, "drawn": drawn, "seconds": seconds, "images_per_second": speed})
    if not config.png:
        shutil.rmtree(folder / "images", ignore_errors=True)
    print(f"{results['how']}" + (f"; {speed:.2f} images/s" if drawn else "; nothing was left to draw"))
    for name, value in results.get("metrics", {}).items():
        print(f"{DRAWN_METRICS[name].title:<28}{value:>12.4f}")
    grid = (folder / GRID).is_file() and GRID  # one that was lost is made of PNG files only
    places = {"images": config.png and "images", "npz": config.npz and NPZ, "picture": grid, "results": RESULTS}
    for what, place in places.items():
        if place:
            print(f"{what:<10}{folder / place}")


def main() -> None:
    description = "Draw images with a stage-2 model."
    config = parse(SampleDiTConfig, "sample_dit.py", description, without_group(sys.argv[1:]), check=check)
    quiet_transformers()
    accelerator = measuring_accelerator(config.mixed_precision)
    set_tf32(config.tf32, accelerator, "tf32")
    models = load_models(config)
    class_names = models.settings.class_names
    classes = indices_of_classes(config.classes, class_names, models.transformer.config.num_classes, "classes")
    count = (config.num_samples, "num_samples")
    named_rae = RAE(models.rae.name_or_path, models.rae)
    comparison = open_comparison(config.eval, count, config.batch_size, 0, named_rae, accelerator)
    labels = LABELS[config.labels](config.num_samples, classes, config.seed)
    decides = what_decides_pixels(config, models, accelerator)
    folder = take_folder(config, decides, labels, class_names, accelerator)
    done = draw(config, models, labels, folder, accelerator)
    results = report(config, models, decides, accelerator)
    if comparison.metrics:
        files = folder / (NPZ if npz_suffices(config, models, folder) else "images")
        images = open_images(str(files), "output_dir", config.num_samples)
        results["metrics"] = measure_set(comparison, images, accelerator, config.batch_size)
        results["reference"] = comparison.reference and comparison.reference.facts
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(config, models, labels, folder, results, done)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
