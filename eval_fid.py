"""Measure generated images: FID, sFID, Inception Score, precision and recall, as ADM's evaluator defines them.

    python eval_fid.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    accelerate launch --num_processes 8 eval_fid.py --samples samples/ --reference VIRTUAL_imagenet256_labeled.npz
    python eval_fid.py --samples samples.npz --reference ref.npz --features encoder --encoder runs/dinov2_b/final
    python eval_fid.py --reference_data.path /data/my_images --save_reference my_images.npz --image_size 256

Samples are an .npz file of images arr_0 (N, H, W, 3), a folder of PNG, or the folder of sample_dit.py, whose
results.json says how they were drawn. Published figures compare 50,000 samples with ADM's reference: a DiT-DH-XL of
800 epochs on DINOv2-B has FID 1.51, IS 242.9, precision 0.79, recall 0.63 without guidance (RAE paper, as public notes
quote it). To check an installation: ADM's own samples admnet_guided_upsampled_imagenet256 have FID 3.94, sFID 6.14, IS
215.84, precision 0.83, recall 0.53 (README of ADM's evaluator).

All numbers are of the Inception network of 2015 that clean-fid fetches for `legacy_tensorflow`; no TensorFlow is
needed. --features encoder gives the distance (FDD), precision and recall on a frozen encoder's mean patch tokens,
without that network. What decides whether two figures compare is printed and stands in --output_dir/results.json; what
could not be known is called unknown.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Optional

from accelerate import Accelerator

from rae_suite.autoencoders import DEFAULT_IMAGE_SIZE, Autoencoder
from rae_suite.cli import AT_LEAST_0, DISTINCT, POSITIVE, config_dict, flat, parse, require, setting
from rae_suite.comparability import differences, read_sampling, what_decides
from rae_suite.errors import ConfigError, renamed_settings
from rae_suite.files import check_output_file, make_folder
from rae_suite.generation_metrics import (
    SCORE_CHUNK,
    GenerationReference,
    ImageStatistics,
    build_spaces,
    check_encoder_takes,
    generation_metrics,
    measure_images,
    warn_of_few,
)
from rae_suite.generation_reference import (
    ReferencePlace,
    check_count,
    open_reference,
    read_reference,
    reference_of_data,
)
from rae_suite.image_sets import CroppedImages, ImageSet, open_images
from rae_suite.launch import measuring_accelerator, quiet_transformers, run_main
from rae_suite.metric_names import DRAWN_METRICS
from rae_suite.model_loading import load_autoencoder
from rae_suite.precision_recall import NEIGHBOURS
from rae_suite.results import results_folder, save_results
from rae_suite.settings import FEW_TASKS, ImagesConfig
from rae_suite.splits import load_eval_images
from rae_suite.values import PathText


@dataclass
class ReferenceDataConfig(ImagesConfig):
    """The images of a data set. See rae_suite/splits.py."""

    path: PathText = ""
    """Folder of images, of class folders or of split folders, a `datasets` folder, or a Hub data set id; empty: no data
    set, and none of the settings beside it."""


@dataclass
class EvalFIDConfig:
    """Settings of eval_fid.py."""

    samples: Optional[PathText] = None
    """The generated images, all of one size: an .npz file with uint8 arr_0 (N, H, W, 3), a folder of image files, or
    the folder of sample_dit.py. Files are taken in the natural order of their paths, 2.png before 10.png. None: only
    `save_reference` is made."""
    num_samples: Optional[int] = setting(None, POSITIVE)
    """The first samples, in their order, that are measured; none: all."""
    reference: Optional[PathText] = None
    """What they are compared with: ADM's .npz file, one that `save_reference` made, an .npz file of images arr_0, or a
    folder of images of one size, which are neither cropped nor resized."""
    reference_data: ReferenceDataConfig = field(default_factory=ReferenceDataConfig)
    """A data set to compare with instead, through ADM's centre crop; its `eval_split` is the one that is read."""
    save_reference: Optional[PathText] = None
    """.npz file to write the statistics of reference_data and 10,000 of its images into, in ADM's names."""
    image_size: Optional[int] = setting(None, POSITIVE)
    """Side in pixels to which reference_data is cropped; none: that of the samples, or 256."""
    features: tuple[Literal["inception", "encoder"], ...] = setting(("inception",), DISTINCT)
    """Features that images are compared on; the encoder's metrics are called fdd, precision_encoder, recall_encoder."""
    metrics: Optional[tuple[Literal[tuple(DRAWN_METRICS)], ...]] = setting(None, DISTINCT)
    """What is measured; none: all that `features` and the reference have."""
    encoder: Optional[PathText] = None
    """Folder or Hub id of the RAE whose frozen encoder `features` encoder means."""
    inception_path: Optional[PathText] = None
    """Local copy of inception-2015-12-05.pt; none: torch.hub's folder (TORCH_HOME), else downloaded."""
    distances: Literal["float32", "float16"] = "float32"
    """Precision of the distances between images for precision and recall; float16 rounds as ADM's evaluator does, which
    moves both by up to 0.003."""
    is_order: Literal["file", "shuffled"] = "file"
    """Order in which the Inception Score cuts the samples into chunks of 5,000: that of the files, as ADM's evaluator,
    or torch-fidelity's permutation, for files that are sorted by class."""
    batch_size: int = setting(64, POSITIVE)
    """Images of one batch in each process."""
    num_workers: int = setting(4, AT_LEAST_0, FEW_TASKS)
    """Processes that read image files, for each process; reference_data has its own."""
    output_dir: Optional[PathText] = None
    """Folder of the results; none: evaluations/<the last two parts of samples>-fid."""
    seed: int = setting(0, AT_LEAST_0)
    """Seed of reference_data.holdout_fraction."""


def check(config: EvalFIDConfig) -> None:
    """Raise ConfigError for what can be seen without loading anything."""
    data, named = config.reference_data.path, config.metrics or ()
    require(config.samples or config.save_reference, "samples", "an .npz file or a folder of images", config.samples)
    require(not (config.reference and data), "reference_data.path", "nothing beside reference", data)
    needed = not config.metrics or any(DRAWN_METRICS[name].needs for name in named)
    require(not needed or config.reference or data, "reference", "an .npz file or a folder to compare with", None)
    for key, value, used, condition in (
        ("save_reference", config.save_reference, bool(data), "reference_data.path is given"),
        ("image_size", config.image_size, data and not config.samples, "reference_data is read without samples"),
        ("encoder", config.encoder, "encoder" in config.features, "features has encoder"),
        ("inception_path", config.inception_path, "inception" in config.features, "features has inception"),
        ("num_samples", config.num_samples, config.samples is not None, "samples are given"),
        ("metrics", config.metrics, not config.save_reference, "save_reference is none, which needs all of them"),
    ):
        require(value is None or used, key, f"nothing unless {condition}", value)
    given, default = flat(asdict(config)), flat(asdict(EvalFIDConfig()))
    for key in ["seed", *(key for key in given if key.startswith("reference_data."))]:
        expected = "nothing unless reference_data.path is given"
        require(data or given[key] == default[key], key, expected, given[key])
    require(config.encoder or "encoder" not in config.features, "encoder", "an RAE's folder or Hub id", config.encoder)
    kinds = {DRAWN_METRICS[name].features for name in named}
    require(
        not named or kinds == set(config.features), "metrics", f"some of each of {list(config.features)}", list(named)
    )
    measured = wanted_metrics(config) if config.samples else ()
    coverage = any(DRAWN_METRICS[name].needs == "images" for name in measured)
    used = config.distances == "float32" or coverage
    require(used, "distances", "float32 unless precision or recall is measured", config.distances)
    used = config.is_order == "file" or "is" in measured
    require(used, "is_order", "file unless the Inception Score is measured", config.is_order)
    if config.save_reference is not None:
        file = config.save_reference
        require(file.endswith(".npz"), "save_reference", "a file whose name ends in .npz", file)
        check_output_file(str(Path(file)), "save_reference")


# --------------------------------------------------------------------------------------------------------------------
# What is measured, and with what
# --------------------------------------------------------------------------------------------------------------------


def open_samples(config: EvalFIDConfig, sampled_in: Optional[Path]) -> ImageSet:
    """The samples. Of a folder of sample_dit.py these are samples.npz, else its folder images, else all files in it."""
    place = Path(config.samples).absolute()
    inside = [place / name for name in ("samples.npz", "images") if place == sampled_in and (place / name).exists()]
    path = str(inside[0]) if inside else config.samples
    return open_images(path, "samples", config.num_samples, config.num_workers)


def wanted_metrics(config: EvalFIDConfig) -> Sequence:
    """The metrics that were asked for, by name or by their features."""
    return config.metrics or [name for name, metric in DRAWN_METRICS.items() if metric.features in config.features]


def chosen_metrics(config: EvalFIDConfig, place: Optional[ReferencePlace]) -> tuple:
    """(metrics to measure, {metric that the reference lacks something for: what}). Raises ConfigError for a metric that
    was asked for by name and cannot be measured."""
    names = wanted_metrics(config)
    if place is not None and config.metrics:
        place.check_has(names)
    lacking = {name: place.lacks(name) for name in names if place is not None and place.lacks(name)}
    measured = [name for name in names if name not in lacking]
    if not measured:
        raise ConfigError(f"reference: {config.reference} does for no metric of features {', '.join(config.features)}")
    return measured, lacking


def open_data(config: EvalFIDConfig, samples: Optional[ImageSet]) -> CroppedImages:
    """The images of reference_data, cropped to the samples' size."""
    data = config.reference_data
    with renamed_settings("data.", "reference_data."):
        source = load_eval_images(data, config.seed)
    if samples is not None and samples.height != samples.width:
        raise ConfigError(f"samples: expected square images, as reference_data is cropped to, got {size_of(samples)}")
    size = config.image_size or (DEFAULT_IMAGE_SIZE if samples is None else samples.height)
    name = f"{len(source)} images of {data.path}, centre crop {size}"
    return CroppedImages(source, name, "reference_data", size, data)


def load_encoder(config: EvalFIDConfig, images: list) -> Optional[Autoencoder]:
    """The RAE whose encoder is asked for. Raises ConfigError for images that it does not take."""
    if "encoder" not in config.features:
        return None
    model = load_autoencoder(config.encoder, "encoder")
    require(model.image_size is not None, "encoder", "an RAE, which has a frozen encoder", config.encoder)
    for part in filter(None, images):
        check_encoder_takes(model, part)
    return model


def size_of(images: ImageSet) -> str:
    return f"{images.width} x {images.height} pixels"


# --------------------------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------------------------


def report(config: EvalFIDConfig, values: dict, decides: dict, lacking: dict, folder: Path, rest: dict) -> None:
    """Print the table and write results.json."""
    lines = differences(decides, list(values))
    results = {**values, **rest, "num_samples": decides["num_samples"], "comparability": decides}
    results.update(not_as_published=lines, left_out=lacking, config=config_dict(config))
    save_results(folder / "results.json", results)
    for name, value in values.items():
        metric = DRAWN_METRICS[name]
        print(f"{metric.title:<22}{value:>12.4f}   {'higher' if metric.higher_is_better else 'lower'} is better")
    print("what decides whether these figures compare with others:")
    parts = flat(decides)
    unknown = [key for key, value in parts.items() if value == "unknown"]
    for key in [key for key in parts if key not in unknown]:
        print(f"  {key:<38}{parts[key]}")
    if unknown:
        print("  unknown:", ", ".join(unknown))
    for name, reason in lacking.items():
        print(f"left out: {name}, because of the reference: {reason}")
    for line in lines:
        print(f"not as published: {line}")
    print(f"results   {folder / 'results.json'}")


def output_folder(config: EvalFIDConfig, sampled_in: Optional[Path]) -> Path:
    """The folder of the results, not made yet. Raises ConfigError for the one whose results.json says how samples were
    drawn."""
    parts = Path(config.samples).absolute().with_suffix("").parts[-2:]
    folder = results_folder(config.output_dir, f"evaluations/{'-'.join(parts).strip('/.')}-fid", "output_dir")
    if sampled_in is not None and folder.resolve() == sampled_in.resolve():
        raise ConfigError(f"output_dir: expected another folder than {folder}, whose results.json would be lost")
    return folder


def measure(
    config: EvalFIDConfig,
    samples: ImageSet,
    names: list,
    spaces: list,
    reference: Optional[GenerationReference],
    accelerator: Accelerator,
) -> dict:
    """The metrics of the samples by name."""
    shuffled = config.is_order == "shuffled"
    sets = [ImageStatistics(names, space, samples.count, accelerator.device, None, shuffled) for space in spaces]
    measure_images(samples, sets, accelerator, config.batch_size, "samples")
    if accelerator.is_main_process:
        warn_of_few(names, spaces, samples.count)
    values = {}
    for part in sets:
        values.update(generation_metrics(part, reference, accelerator, config.distances == "float16"))
    return values


def main() -> None:
    config = parse(EvalFIDConfig, "eval_fid.py", "Measure generated images.", check=check)
    quiet_transformers()
    accelerator = measuring_accelerator()
    samples = None
    if config.samples is not None:
        sampling, sampled_in = read_sampling(config.samples)
        samples = open_samples(config, sampled_in)
    place = None if config.reference is None else open_reference(config.reference, "reference", config.num_workers)
    data = open_data(config, samples) if config.reference_data.path else None
    names, lacking = chosen_metrics(config, place)
    if samples is not None:
        check_count(samples.count, names, f"{samples.name} holds", "samples")
        output_dir = output_folder(config, sampled_in)
    encoder = load_encoder(config, [samples, data, place and place.images])
    spaces = build_spaces(names, config.inception_path, "inception_path", encoder, accelerator)
    reference = None
    if place is not None:
        reference = read_reference(place, names, spaces, accelerator, config.batch_size)
    elif data is not None:
        file = config.save_reference and Path(config.save_reference)
        reference = reference_of_data(data, names, spaces, accelerator, config.batch_size, "reference_data.path", file)
        if file and accelerator.is_main_process:
            print(f"reference {file}, made from {data.name}")
    if samples is not None:
        make_folder(str(output_dir), "output_dir")
        values = measure(config, samples, names, spaces, reference, accelerator)
        if accelerator.is_main_process:
            measuring = {
                "precision_recall": {"neighbours": NEIGHBOURS, "distances": config.distances},
                "inception_score": {"order": config.is_order, "chunk": SCORE_CHUNK},
            }
            networks = {space.kind: space.network for space in spaces}
            decides = what_decides(samples, reference, sampling, networks, measuring)
            rest = {"samples": samples.name, "sampling": sampling, "num_processes": accelerator.num_processes}
            report(config, values, decides, lacking, output_dir, rest)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
