"""Train and evaluate a linear classifier on the frozen latents of an autoencoder.

    python linear_probe.py --model runs/dinov2_b/final --data.path /data/imagenet_hf
    accelerate launch --num_processes 8 linear_probe.py --model runs/dinov2_b/final --data.path /data/imagenet_hf
    python linear_probe.py --eval_only --head runs/linear_probe/head --data.path /data/imagenet_hf

The evaluation images are the split `validation`, or what --data.eval_split says (`val` for most image folders).
Models are RAE folders or Hub ids, run folders and checkpoints, diffusers' AutoencoderRAE and AutoencoderKL, decoder
files of the published code (with --published.encoder), or a vision encoder alone, such as facebook/dinov2-base.
Published top-1 on ImageNet-1k (RAE paper): DINOv2-B 84.5, SigLIP2-B 79.1, MAE-B 68.0, SD-VAE 8.0.
configs/linear_probe.yaml, the default --config, has the protocol and what it gives on the handwritten digits.

 1. Features of all images, centre-cropped as in every evaluation, are extracted once, by all processes, and cached.
 2. A grid of learning rates and weight decays is trained at once on a part of the training images, each head with its
    own, and the best on the other part, held out, is chosen. The evaluation images have no say in it.
 3. The chosen settings are trained again on all training images: that head is evaluated, once, and saved.

Steps 2 and 3 are the main process's alone, because they take minutes on a GPU; the other processes end after step 1.
Results do not depend on the number of processes. In --output_dir: results.json, confusion.png and head/.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import torch
from accelerate import Accelerator
from huggingface_hub.constants import HF_HOME

from rae_suite.autoencoders import DEFAULT_IMAGE_SIZE, Autoencoder, is_encoder, load_encoder
from rae_suite.cli import POSITIVE, config_dict, parse, require, setting
from rae_suite.digests import latents_digest
from rae_suite.errors import ConfigError
from rae_suite.features import Extractor, FeaturesConfig, cached_features
from rae_suite.files import make_folder
from rae_suite.labels import number_labels, read_labels
from rae_suite.launch import measuring_accelerator, quiet_transformers, run_main
from rae_suite.linear_heads import HeadTrainingConfig, LinearHead, evaluate_head, fit, hold_out, training_set
from rae_suite.loaders import chosen_images
from rae_suite.model_loading import load_autoencoder
from rae_suite.probe_figures import (
    SHOWN_CLASSES,
    class_table,
    draw_confusion,
    most_confused,
    percent,
    short,
    sweep_table,
)
from rae_suite.published_rae import PublishedOptions, check_options_used
from rae_suite.results import results_folder, save_results
from rae_suite.settings import ImagesConfig
from rae_suite.sources import ImageSource, SubsetSource
from rae_suite.splits import load_eval_images, load_splits
from rae_suite.values import PathText

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "linear_probe.yaml"  # when no --config is given


# --------------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class LinearProbeConfig:
    """Settings of linear_probe.py."""

    model: Optional[PathText] = None
    """Folder, checkpoint or Hub id of the autoencoder, or of a vision encoder alone; with eval_only none: the one that
    the head was trained on."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights of a run's checkpoint: the moving average, or those that are trained."""
    published: PublishedOptions = field(default_factory=PublishedOptions)
    """What a decoder file of the published code, as a model, does not hold."""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    """The images. With eval_only, data without a split level is taken whole, unless eval_split names another split than
    the default."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    train: HeadTrainingConfig = field(default_factory=HeadTrainingConfig)
    num_samples: Optional[int] = setting(None, POSITIVE)
    """Images of each split that are used, spread evenly over it; none: all."""
    eval_only: bool = False
    """Evaluate a saved head instead of training one."""
    head: Optional[PathText] = None
    """Folder of the head that eval_only evaluates."""
    allow_absent_classes: bool = False
    """Whether the evaluation images may lack some classes of the training images."""
    output_dir: Optional[PathText] = None
    """Folder of the results; none: runs/linear_probe, or with eval_only runs/linear_probe_eval, with -2, -3, ... after
    earlier ones."""


def check(config: LinearProbeConfig) -> None:
    """Raise ConfigError for what can be seen without loading anything."""
    if not config.eval_only or config.model is not None:
        check_options_used(config.published, [config.model])
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


def limited(images: ImageSource, config: LinearProbeConfig) -> ImageSource:
    """The images that num_samples leaves."""
    if config.num_samples is None or config.num_samples >= len(images):
        return images
    chosen = SubsetSource(images, chosen_images(images, config.num_samples))
    chosen.split = f"{config.num_samples} of {len(images)} images of {images.split}"
    return chosen


def load_images(config: LinearProbeConfig, head: Optional[LinearHead]) -> tuple:
    """(training images, evaluation images, classes of the head, those of them that the evaluation images lack). With a
    trained head the training images are None, and need not be there unless evaluation images are held out of them."""
    train = None
    if head is None:
        train_source, source = (limited(images, config) for images in load_splits(config.data, config.train.seed))
        labels, names = read_labels(train_source, "data.train_split")
        classes, trained_on = list(names.values()), "the training split"
        require(len(classes) > 1, "data.train_split", "images of at least 2 classes", classes)
        train = LabelledImages(train_source, number_labels(labels, names, classes))
        if len(config.train.lrs) * len(config.train.weight_decays) > 1:
            hold_out(train.labels, config.train.selection_fraction, config.train.seed)  # raises when nothing is left
    else:
        source = limited(load_eval_images(config.data, config.train.seed), config)
        classes, trained_on = head.config["classes"], f"the head {config.head}"
    labels, names = read_labels(source, "data.eval_split")
    absent = check_classes(list(names.values()), classes, trained_on, config.allow_absent_classes)
    return train, LabelledImages(source, number_labels(labels, names, classes)), classes, absent


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


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


def load_model(config: LinearProbeConfig, head: Optional[LinearHead]) -> Autoencoder:
    """The autoencoder, or the vision encoder alone."""
    source = config.model or head.config["model"]
    if not is_encoder(source):
        return load_autoencoder(source, "model", config.weights, config.published)
    size = config.features.image_size
    return load_encoder(source, size if size is not None or head is None else head.config["image_size"])


def build_extractor(
    config: LinearProbeConfig, model: Autoencoder, head: Optional[LinearHead], accelerator: Accelerator
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


# --------------------------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------------------------


def report(results: dict, output_dir: Path) -> None:
    """Print the tables."""
    sweep = results["sweep"]
    if sweep is not None:
        print(sweep_table(sweep, results["chosen"]))
        lrs = {line["lr"] for line in sweep}
        if len(lrs) > 1 and results["lr"] in (min(lrs), max(lrs)):
            print(f"note: {results['lr']:g} is at the edge of all learning rates that were tried, others may be better")
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
    model = load_model(config, head)
    extractor = build_extractor(config, model, head, accelerator)
    default_dir = "runs/linear_probe_eval" if config.eval_only else "runs/linear_probe"
    output_dir = results_folder(config.output_dir, default_dir, "output_dir")
    cache_dir = make_folder(config.features.cache_dir or f"{HF_HOME}/rae_features", "features.cache_dir")
    if accelerator.is_main_process:
        print(describe(extractor, classes, train_images, eval_images, head), flush=True)
    make_folder(str(output_dir), "output_dir")

    # features, by all processes
    clock, train_features = time.monotonic(), None
    if head is None:
        train_features = cached_features(
            extractor, train_images.source, config.features, config.data, cache_dir, "training features"
        )
    eval_features = cached_features(
        extractor, eval_images.source, config.features, config.data, cache_dir, "evaluation features"
    )
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
        "loaded": extractor.model.loaded,
        "weights": extractor.weights,
        "features": extractor.kind,
        "feature_width": extractor.width,
        "image_size": extractor.image_size,
        "precision": extractor.accelerator.mixed_precision,
    }


if __name__ == "__main__":
    run_main(main)
