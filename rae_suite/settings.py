"""Settings that the scripts share, and what of them may differ between a run and its continuation."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, get_args

from rae_suite.cli import (
    AT_LEAST_0,
    POSITIVE,
    SHARE,
    Limit,
    all_settings,
    change_texts,
    config_dict,
    flat,
    read_yaml,
    require,
    setting,
)
from rae_suite.errors import ConfigError, scrub
from rae_suite.values import PathText

MOST_TASKS = 16 * (os.cpu_count() or 1)  # more processes or threads would wait for each other, if they start at all
FEW_TASKS = Limit(lambda value: value <= MOST_TASKS, f"at most {MOST_TASKS}, 16 for each of this machine's cores")
AT_MOST_A_YEAR = Limit(lambda minutes: minutes <= 366 * 24 * 60, f"at most {366 * 24 * 60}, a year")
SEED = Limit(lambda value: 0 <= value < 2**32, "a number in [0, 2**32)")
BETAS = Limit(lambda betas: all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")


@dataclass
class ImagesConfig:
    """Where the images come from. See rae_suite/splits.py."""

    path: PathText = ""
    """Folder of images, of class folders or of split folders, a `datasets` folder, or a Hub data set id; needed."""
    config_name: Optional[str] = None
    """Configuration of a Hub data set."""
    train_split: str = "train"
    """Name of the split to train on."""
    eval_split: str = "validation"
    """Name of the split to evaluate on; the name of the training split evaluates on training images."""
    holdout_fraction: float = setting(0.0, SHARE)
    """Share of the training images held out for evaluation (seeded) when there is no evaluation split; in [0, 1)."""
    image_column: Optional[str] = None
    """Column of the images in a `datasets` data set; none: found by its type."""
    label_column: Optional[str] = None
    """Column of the labels; none: found by its type."""
    max_unreadable: int = setting(10, AT_LEAST_0)
    """Distinct unreadable images that a process skips before the run stops."""
    max_megapixels: float = setting(179.0, POSITIVE)
    """Millions of pixels of the largest image that is read; a larger one counts as unreadable. It is held in memory, 3
    bytes for each pixel."""
    num_workers: int = setting(4, AT_LEAST_0, FEW_TASKS)
    """Data loading processes for each process; no more are started than there are cores."""


@dataclass
class DataConfig(ImagesConfig):
    """Where the images come from, and how they are cropped for training. See rae_suite/splits.py."""

    resize_size: Optional[int] = setting(None, POSITIVE)
    """Shorter side in pixels before the random crop; none: 384 for 256 px images, else 1.5 times the image size."""
    crop: Literal["random", "center"] = "random"
    """Part of an image that training sees: a random crop, as published for stage 1, or the centre crop of evaluations,
    as published for stage 2."""
    flip: bool = False
    """Whether training sees the mirror image half of the time: published for stage 2, not for stage 1."""
    streaming: bool = False
    """Whether training images are streamed from parquet files or tar shards (WebDataset) and never kept on disk. `path`
    is then a folder or Hub data set of shards, a shard, a glob, a range such as `train-{0000..0127}.tar`, each a local
    path or a URL, or a .txt file that lists such ones, one a line. See rae_suite/streams.py."""
    mixture: dict[PathText, float] = field(default_factory=dict)
    """Several sources to stream from, {path as above: weight}, instead of `path`: each image is of a source drawn by
    weight. Needs `steps_per_epoch` and `eval_path`."""
    eval_path: Optional[PathText] = None
    """Where the evaluation images of a streaming run come from: a folder of images, a saved data set, or shards, whose
    first eval.num_samples images are held in memory; none: `eval_split` of `path`."""
    steps_per_epoch: Optional[int] = setting(None, POSITIVE)
    """Steps that count as one epoch of a stream. Needed where the number of images is not known beforehand (tar shards,
    a mixture); none: images / global batch."""
    shuffle_buffer: int = setting(1000, POSITIVE)
    """Undecoded images that each lane of a stream holds, and mixes, in memory."""
    stream_lanes: Optional[int] = setting(None, POSITIVE)
    """Independent readers, over all processes, that a stream is split into; a multiple of processes x workers and a
    divisor of the global batch. The order of the images depends on it, so a continued run keeps it. None: processes x
    workers of the run's first start."""
    shard_retries: int = setting(3, AT_LEAST_0)
    """Repetitions of opening or reading a shard that failed, after 1, 4, 16, then 60 seconds."""
    max_unreadable_shards: int = setting(10, AT_LEAST_0)
    """Distinct shards of a stream, or their unread remainders, that a process skips before the run stops."""


@dataclass
class TrainConfig:
    """Length, batch, precision, checkpoints and seed of a run."""

    output_dir: PathText = "runs/rae"
    """The run's folder. A run that finds its own checkpoints there goes on from the newest."""
    fork_from: Optional[PathText] = None
    """Checkpoint of another run, <run>/checkpoints/step-*, that a new run goes on from: with its weights, averages,
    optimizers and step, under settings of its own. Those that differ are listed."""
    epochs: float = setting(16.0, POSITIVE)
    """Length of training in epochs."""
    max_steps: Optional[int] = setting(None, POSITIVE)
    """Length of training in steps; wins over `epochs`."""
    global_batch_size: int = setting(512, POSITIVE)
    """Images for one optimisation step, over all processes and accumulated micro-batches."""
    gradient_accumulation_steps: int = setting(1, POSITIVE)
    """Micro-batches that each process accumulates for one step."""
    mixed_precision: Optional[Literal["no", "fp16", "bf16"]] = None
    """Autocast precision; none: what `accelerate launch` was told."""
    cpu_threads: Optional[int] = setting(None, POSITIVE, FEW_TASKS)
    """Threads of each process on a CPU, at most 16 for each of the machine's cores; none: the cores shared out among
    its processes. (accelerate launch leaves one thread.)"""
    compile: bool = False
    """Whether torch.compile makes faster code of a step's networks, each when a step first uses it (minutes);
    evaluation stays as it is."""
    tf32: bool = False
    """Whether a GPU may round the factors of float32 products and convolutions to TF32: faster, about 3 digits."""
    clip_grad_norm: Optional[float] = setting(None, POSITIVE)
    """Largest L2 norm of the trained model's gradient (in stage 1 the decoder's); none: not clipped."""
    max_nonfinite_steps: int = setting(0, AT_LEAST_0)
    """Steps, in a row, that are skipped because a loss or a gradient is not finite, before the run stops; all that were
    skipped are counted in metrics.jsonl. A skipped update changes no weight, moment or average. In stage 1 decoder
    and discriminator are judged one after the other: the decoder keeps an update that was good when the discriminator's
    is skipped."""
    deterministic: bool = False
    """Whether a GPU computes the same bits each time, with the same hardware, versions and number of processes. It
    costs speed: cuDNN and attention take slower algorithms, new memory is filled. A CPU does so without it."""
    timeout_minutes: float = setting(30.0, POSITIVE, AT_MOST_A_YEAR)
    """Minutes that a process waits for the others before it ends with an error. A process that dies is noticed at
    once; this is for one that hangs, and longer than the main process needs to write a checkpoint or a model. At most
    a year."""
    seed: int = setting(0, SEED)
    """Seed of initialisation, data order, crops, noise and augmentation."""
    save_every_steps: Optional[int] = setting(None, POSITIVE)
    """Steps between checkpoints; wins over `save_every_epochs`. The end and SIGTERM or SIGUSR1 save too."""
    save_every_epochs: float = setting(1.0, POSITIVE)
    """Epochs between checkpoints."""
    keep_last: int = setting(2, POSITIVE)
    """Checkpoints that are kept."""


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = setting(2e-4, POSITIVE)
    """Peak learning rate."""
    betas: tuple[float, float] = setting((0.9, 0.95), BETAS)
    """Decay of the first and second moments."""
    eps: float = setting(1e-8, POSITIVE)
    """Term added to the denominator."""
    weight_decay: float = setting(0.0, AT_LEAST_0)
    """Decoupled weight decay."""


@dataclass
class LRScheduleConfig:
    """Learning rate over time: warm-up, then cosine or linear decay to `final_lr`, then constant."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay."""
    warmup_epochs: float = setting(1.0, AT_LEAST_0)
    """Length of the warm-up in epochs."""
    warmup_steps: Optional[int] = setting(None, AT_LEAST_0)
    """Length of the warm-up in steps."""
    warmup_from_zero: bool = True
    """Whether the warm-up rises from zero: lr * (step + 1) / warmup_steps. If not, it stays at the peak."""
    decay_end_epoch: float = setting(16.0, AT_LEAST_0)
    """Epoch at which `final_lr` is reached."""
    decay_end_step: Optional[int] = setting(None, AT_LEAST_0)
    """Step at which `final_lr` is reached."""
    final_lr: float = setting(2e-5, AT_LEAST_0)
    """Learning rate at the end of the decay."""
    stretch: bool = False
    """Whether the decay ends with the run, wherever `decay_end_epoch` is: a finished run whose train.epochs is raised
    then goes on at the rate of the longer schedule, else at `final_lr`."""


@dataclass
class EMAConfig:
    """Moving average of the trained weights, ema = decay * ema + (1 - decay) * weights, from the first step on."""

    decay: float = setting(0.9978, SHARE)
    """Decay for each step. The average is over about 1 / (1 - decay) steps."""
    warmup: bool = False
    """Whether the decay rises with the steps, min(decay, (1 + step) / (10 + step)), so that the average of a short run
    does not lag behind."""


@dataclass
class LoggingConfig:
    """What is written while training."""

    every_steps: int = setting(50, POSITIVE)
    """Steps between lines of metrics.jsonl and of the trackers."""
    samples_every_steps: Optional[int] = setting(None, POSITIVE)
    """Steps between sample grids; none: at each evaluation."""
    num_samples: int = setting(8, POSITIVE)
    """Images in a sample grid; in stage 2 classes, of each of which it shows several."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Trackers, as accelerate names them (tensorboard, wandb, mlflow, trackio, comet_ml, aim, clearml, dvclive,
    swanlab), and csv: a metrics.csv beside metrics.jsonl."""
    project: str = "rae"
    """Project name for trackers."""
    progress_bar: bool = True
    """Whether the main process shows a progress bar."""


@dataclass
class HubConfig:
    """Publishing on the Hugging Face Hub, with the token of HF_TOKEN or `hf auth login`. scripts/push_to_hub.py says
    what goes up."""

    push: bool = False
    """Whether final/ is uploaded at the end. Repository and token are checked at the start; an upload that fails later
    is reported with the command that repeats it, and does not stop the run."""
    repo_id: Optional[str] = None
    """user/name of the model on the Hub; made at the start where there is none."""
    private: bool = False
    """Whether only its owners see the model."""
    every_steps: Optional[int] = setting(None, POSITIVE)
    """Steps between uploads while training goes on; none: at the end only. One is left out while the one before is
    still on its way."""
    include_encoder: bool = True
    """Whether the encoder's weights go up too; without them, they are fetched from the encoder's Hub id on loading."""
    license: str = "apache-2.0"
    """License of the model, as the Hub names it."""
    retries: int = setting(5, AT_LEAST_0)
    """Repetitions of an upload that failed, after 1, 4, 16, then 60 seconds."""


def check_used(key: str, value: Any, used: bool, needed: str) -> None:
    """Raise ConfigError for a value that would be ignored: that is a mistake."""
    require(used or not value, key, f"nothing unless {needed}", value)


def check_hub_settings(hub: HubConfig) -> None:
    for name in ("repo_id", "every_steps", "private"):
        check_used(f"hub.{name}", getattr(hub, name), hub.push, "hub.push is true")


def check_data_settings(data: DataConfig) -> None:
    """Raise ConfigError for settings of streams without streaming, and for a mixture that lacks something."""
    default = DataConfig()
    for name in ("mixture", "eval_path", "steps_per_epoch", "shuffle_buffer", "stream_lanes", "shard_retries",
                 "max_unreadable_shards"):  # fmt: skip
        value = getattr(data, name)
        used = data.streaming or value == getattr(default, name)
        require(used, f"data.{name}", "nothing unless data.streaming is true", value)
    for path, weight in data.mixture.items():
        require(0 < weight < math.inf, "data.mixture", f"a positive weight for {path}", weight)
    if data.mixture:
        apart = {scrub(path) for path in data.mixture}  # credentials are not written down
        require(len(apart) == len(data.mixture), "data.mixture", "sources of different paths", data.mixture)
        require(len(data.mixture) > 1, "data.mixture", "several sources, or data.path for one", data.mixture)
        for name in ("steps_per_epoch", "eval_path"):
            require(getattr(data, name), f"data.{name}", "a value, which a data.mixture needs", None)


# What may differ between a run and its continuation: how far, how fast and how visibly it goes. Accumulation is among
# them, so that a run can move to fewer devices: with micro-batches of the same size it has the same noise there.
RESUMABLE_KEYS = (
    "data.num_workers",
    "data.max_unreadable",
    "data.shard_retries",
    "eval.",
    "gan.lr_schedule.stretch",
    "hub.",
    "logging.",
    "lr_schedule.stretch",
    "model.gradient_checkpointing",
    "sampling.",
    "train.compile",
    "train.cpu_threads",
    "train.deterministic",
    "train.epochs",
    "train.gradient_accumulation_steps",
    "train.keep_last",
    "train.max_nonfinite_steps",
    "train.max_steps",
    "train.output_dir",
    "train.save_every_",
    "train.timeout_minutes",
)


# Where data and networks lie. They may move: what they hold is compared, see run_folder.py, but that of data.eval_path,
# which decides no step.
PLACE_KEYS = (
    "data.eval_path",
    "data.latents",
    "data.path",
    "gan.backbone",
    "latents.stats",
    "model.encoder",
    "model.encoder_revision",
    "model.latent_stats",
    "model.rae",
    "perceptual.vgg_path",
)

# Settings that no longer exist, and the value at which each did nothing: a run that began with that value continues.
REMOVED_KEYS = {}


def read_run_settings(file: Path) -> dict:
    """The settings {"group.name": value} in a run folder's config.yaml, without credentials, which earlier versions
    wrote down. Raises ConfigError for a damaged one."""
    try:
        return flat(change_texts(read_yaml(file), scrub))
    except ConfigError as error:
        raise ConfigError(f"{file} is damaged, choose another train.output_dir ({error})") from error


def check_same_config(config: Any, file: Path) -> None:
    """Raise ConfigError when `file`, the config.yaml of a run folder, is of another run than `config`: all settings
    that differ are named. A setting that the file lacks, because an older version wrote it, has its default there."""
    differences = differing_settings(config, file, comparable)
    if differences:
        raise ConfigError(
            f"{file} is of another run: {'; '.join(differences)}; choose another train.output_dir or the same settings"
        )


def differing_settings(config: Any, file: Path, chosen: Callable[[dict], dict]) -> list:
    """In words, what of the `chosen` settings is another in `file`, the config.yaml of a run, than in `config`."""
    paths = {key for key, item in all_settings(type(config)).items() if PathText in get_args(item.type) + (item.type,)}
    written = read_run_settings(file)
    for key in paths & written.keys():
        if isinstance(written[key], str):
            written[key] = os.path.expanduser(written[key])  # earlier versions wrote ~
    old, new = chosen(written), chosen(flat(config_dict(config)))
    defaults = chosen(flat(config_dict(type(config)())))
    differences = []
    for key in sorted(old.keys() | new.keys()):
        was = old.get(key, defaults.get(key))
        if key not in new:
            if key not in REMOVED_KEYS or was != REMOVED_KEYS[key]:
                differences.append(f"{key} is {was!r} there and no setting any more")
        elif was != new[key]:
            differences.append(f"{key} is {was!r} there and {new[key]!r} now")
    return differences


def comparable(settings: dict) -> dict:
    """Those of the settings that must be the same when a run continues."""
    places = {key for key in settings if key in PLACE_KEYS or key.startswith("data.mixture.")}
    if settings.get("model.encoder_weights") == "random":  # it is an architecture then, and lies nowhere
        places.discard("model.encoder")
    kept = {key: value for key, value in settings.items() if key not in places and not key.startswith(RESUMABLE_KEYS)}
    return kept | {"data.mixture": [value for key, value in settings.items() if key.startswith("data.mixture.")]}
