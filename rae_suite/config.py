"""Every setting of training: the dataclasses are the schema of the YAML files and of the command line.

    python train_rae.py --config configs/dinov2_b.yaml --config mine.yaml --gan.weight 0.5

Later files win over earlier ones, flags over files. An unknown key or a wrong type stops with the key's name.
Start points are given in epochs, as published, or in steps, which win where both are given.
"""

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Optional, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from rae_suite.errors import ConfigError, fail
from rae_suite.yaml_file import read_yaml

set_parsing_settings(docstring_parse_attribute_docstrings=True)

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "digits_tiny.yaml"  # when no --config is given
Metric = Literal["psnr", "ssim", "lpips", "rfid", "rfid_clean", "rfdd"]


@dataclass
class ModelConfig:
    """The autoencoder. See RAEConfig in modeling_rae.py."""

    encoder: str = "facebook/dinov2-with-registers-base"
    """Hub id or folder of the frozen encoder; with `encoder_weights: random` a transformers model_type."""
    encoder_revision: Optional[str] = None
    """Revision of the encoder on the Hub."""
    encoder_weights: Literal["pretrained", "random"] = "pretrained"
    """"random" builds an untrained encoder from `encoder_config`: only for tests and demonstrations."""
    encoder_config: dict[str, Any] = field(default_factory=dict)
    """Fields of the encoder's transformers config, for random weights only."""
    encoder_input_size: int = 224
    """Side in pixels that images are resized to before the encoder."""
    encoder_layers: Optional[tuple[int, ...]] = None
    """Blocks of the encoder (0-based, ascending) whose normalised outputs are averaged into the latent (RAEv2); none:
    the last block's output alone."""
    encoder_add_spatial_mean: bool = False
    """Whether the mean over positions of the last chosen block's tokens is added to every token (RAEv2: for DINOv3 and
    SigLIP2)."""
    encoder_prefix_tokens: Optional[int] = None
    """Tokens before the patch tokens, for an encoder that ENCODER_FAMILIES in modeling_rae.py does not know."""
    encoder_final_norm: Optional[str] = None
    """Name of such an encoder's last LayerNorm, or "none" where it has none."""
    image_size: int = 256
    """Side in pixels of training images and reconstructions: (encoder_input_size / encoder patch) * decoder patch."""
    decoder_hidden_size: int = 1152
    """Width of the decoder."""
    decoder_num_hidden_layers: int = 28
    """Blocks of the decoder."""
    decoder_num_attention_heads: int = 16
    """Attention heads of the decoder."""
    decoder_intermediate_size: int = 4096
    """Width of the decoder's MLPs."""
    decoder_patch_size: int = 16
    """Side in pixels of the patch that each latent token becomes."""
    denormalize_output: bool = True
    """Whether the decoder's output is multiplied by the encoder's image std and its mean is added (RAEv2: not)."""
    noise_tau: float = 0.8
    """Strength of the latent noise in training: sigma = noise_tau * U[0, 1] per sample."""
    latent_stats: Optional[str] = None
    """File with `mean` and `var` of the latents, (C, h, w) each (.pt or .safetensors); none: latents as they are."""
    train_position_embedding: bool = False
    """Whether the decoder's position table learns."""
    gradient_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass: less memory, about a third more compute."""
    attn_implementation: str = "sdpa"
    """Attention of encoder, decoder and discriminator, as in transformers (sdpa, eager, flash_attention_2)."""
    init_from: Optional[str] = None
    """Folder or Hub id of an RAE whose decoder training starts from; none: a new decoder."""


@dataclass
class ImagesConfig:
    """Where the images come from. See data.py."""

    path: str = ""
    """Folder of images, of class folders or of split folders, a `datasets` folder, or a Hub data set id; needed."""
    config_name: Optional[str] = None
    """Configuration of a Hub data set."""
    train_split: str = "train"
    """Name of the split to train on."""
    eval_split: str = "validation"
    """Name of the split to evaluate on; the name of the training split evaluates on training images."""
    holdout_fraction: float = 0.0
    """Share of the training images held out for evaluation (seeded) when there is no evaluation split; in [0, 1)."""
    image_column: Optional[str] = None
    """Column of the images in a `datasets` data set; none: found by its type."""
    label_column: Optional[str] = None
    """Column of the labels; none: found by its type."""
    max_unreadable: int = 10
    """Distinct unreadable images that a process skips before the run stops."""
    num_workers: int = 4
    """Data loading processes for each process; at most 16 for each of the machine's cores."""


@dataclass
class DataConfig(ImagesConfig):
    """Where the images come from, and how they are cropped for training. See data.py."""

    path: str = "data/digits"
    """Folder of images, of class folders or of split folders, a `datasets` folder, or a Hub data set id."""
    resize_size: Optional[int] = None
    """Shorter side in pixels before the random crop; none: 384 for 256 px images, else 1.5 times the image size."""
    streaming: bool = False
    """Whether training images are streamed from parquet files or tar shards (WebDataset) and never kept on disk. `path`
    is then a folder or Hub data set of shards, a shard, a glob, a range such as `train-{0000..0127}.tar`, each a local
    path or a URL, or a .txt file that lists such ones, one a line. See streams.py."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Several sources to stream from, {path as above: weight}, instead of `path`: each image is of a source drawn by
    weight. Needs `steps_per_epoch` and `eval_path`."""
    eval_path: Optional[str] = None
    """Where the evaluation images of a streaming run come from: a folder of images, a saved data set, or shards, whose
    first eval.num_samples images are held in memory; none: `eval_split` of `path`."""
    steps_per_epoch: Optional[int] = None
    """Steps that count as one epoch of a stream. Needed where the number of images is not known beforehand (tar shards,
    a mixture); none: images / global batch."""
    shuffle_buffer: int = 1000
    """Undecoded images that each lane of a stream holds, and mixes, in memory."""
    stream_lanes: Optional[int] = None
    """Independent readers, over all processes, that a stream is split into; a multiple of processes x workers and a
    divisor of the global batch. The order of the images depends on it, so a continued run keeps it. None: processes x
    workers of the run's first start."""
    shard_retries: int = 3
    """Repetitions of opening or reading a shard that failed, after 1, 4, 16, then 60 seconds."""
    max_unreadable_shards: int = 10
    """Distinct shards of a stream, or rests of them, that a process skips before the run stops."""


@dataclass
class TrainConfig:
    """The run."""

    output_dir: str = "runs/rae"
    """The run's folder. A run that finds its own checkpoints there goes on from the newest."""
    epochs: float = 16
    """Length of training in epochs."""
    max_steps: Optional[int] = None
    """Length of training in steps; wins over `epochs`."""
    global_batch_size: int = 512
    """Images for one optimisation step, over all processes and accumulated micro-batches."""
    gradient_accumulation_steps: int = 1
    """Micro-batches that each process accumulates for one step."""
    mixed_precision: Optional[Literal["no", "fp16", "bf16"]] = None
    """Autocast precision; none: what `accelerate launch` was told."""
    cpu_threads: Optional[int] = None
    """Threads of each process on a CPU, at most 16 for each of the machine's cores; none: the cores shared out among
    its processes. (accelerate launch leaves one thread.)"""
    compile: bool = False
    """Whether torch.compile makes faster code of encoder, decoder, discriminator and LPIPS, each when a step first uses
    it (minutes); evaluation stays as it is."""
    tf32: bool = False
    """Whether a GPU may round the factors of float32 products and convolutions to TF32: faster, about 3 digits."""
    clip_grad_norm: Optional[float] = None
    """Largest L2 norm of the decoder's gradient; none: not clipped."""
    max_nonfinite_steps: int = 0
    """Steps, in a row, that are skipped because a loss or a gradient is not finite, before the run stops; all that were
    skipped are counted in metrics.jsonl. A skipped update changes no weight, moment or average. The two networks are
    judged one after the other: the decoder keeps an update that was good when the discriminator's is skipped."""
    deterministic: bool = False
    """Whether a GPU computes the same bits each time, with the same hardware, versions and number of processes. It
    costs speed: cuDNN and attention take slower algorithms, new memory is filled. A CPU does so without it."""
    timeout_minutes: float = 30.0
    """Minutes that a process waits for the others before it ends with an error. A process that dies is noticed at
    once; this is for one that hangs, and longer than the main process needs to write a checkpoint or a model. At most
    a year."""
    seed: int = 0
    """Seed of initialisation, data order, crops, noise and augmentation."""
    save_every_steps: Optional[int] = None
    """Steps between checkpoints; wins over `save_every_epochs`. The end and SIGTERM or SIGUSR1 save too."""
    save_every_epochs: float = 1.0
    """Epochs between checkpoints."""
    keep_last: int = 2
    """Checkpoints that are kept."""


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: float = 1e-8
    """Term added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""


@dataclass
class LRScheduleConfig:
    """Learning rate over time: warm-up, then cosine or linear decay to `final_lr`, then constant."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay."""
    warmup_epochs: float = 1.0
    """Length of the warm-up in epochs."""
    warmup_steps: Optional[int] = None
    """Length of the warm-up in steps."""
    warmup_from_zero: bool = True
    """Whether the warm-up rises from zero: lr * (step + 1) / warmup_steps. If not, it stays at the peak."""
    decay_end_epoch: float = 16.0
    """Epoch at which `final_lr` is reached."""
    decay_end_step: Optional[int] = None
    """Step at which `final_lr` is reached."""
    final_lr: float = 2e-5
    """Learning rate at the end of the decay."""


@dataclass
class PerceptualConfig:
    """LPIPS."""

    weight: float = 1.0
    """Factor of LPIPS; 0 switches it off."""
    start_epoch: float = 0.0
    """Epoch at which LPIPS is switched on."""
    start_step: Optional[int] = None
    """The same in steps."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """"random" uses an untrained VGG16: only for tests and demonstrations."""
    vgg_path: Optional[str] = None
    """Local copy of torchvision's vgg16-397923af.pth; none: torch.hub's folder (TORCH_HOME), else downloaded."""


@dataclass
class GANConfig:
    """Discriminator and adversarial loss. See discriminator.py."""

    weight: float = 0.75
    """Factor of the adversarial loss, beside the adaptive weight; 0 switches the discriminator off."""
    start_epoch: float = 8.0
    """Epoch at which the decoder begins to see the adversarial loss."""
    start_step: Optional[int] = None
    """The same in steps."""
    update_start_epoch: float = 6.0
    """Epoch at which the discriminator begins to learn."""
    update_start_step: Optional[int] = None
    """The same in steps."""
    updates_per_step: int = 1
    """Discriminator updates for each decoder update."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """The discriminator's loss."""
    disc_input: Literal["fresh", "reuse"] = "fresh"
    """The discriminator learns from new reconstructions of clean latents by the updated decoder, as published
    ("fresh"), or from those of the decoder's own step, of noisy latents: one decoder pass less ("reuse")."""
    max_adaptive_weight: float = 1e4
    """Upper bound of the adaptive weight."""
    backbone: str = "facebook/dino-vits8"
    """Frozen ViT: Hub id, folder, or a .pth/.safetensors file with timm's names (dino_vit_small_patch8_224.pth)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """"random" builds an untrained backbone from `backbone_config`: only for tests and demonstrations."""
    backbone_config: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' ViTConfig, for random weights only; activation and epsilon are always DINO's."""
    key_depths: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks (0-based) whose features are judged, beside the last one's."""
    kernel_size: int = 9
    """Width of the heads' residual convolution."""
    norm: Literal["per_sample", "group"] = "per_sample"
    """Normalisation in the heads."""
    norm_eps: float = 1e-6
    """Epsilon of that normalisation."""
    spectral_norm: bool = True
    """Whether the heads' convolutions are spectrally normalised."""
    augment_prob: float = 1.0
    """Probability of each of DiffAug's transforms; 0 switches it off."""
    augment_cutout: float = 0.0
    """Side of DiffAug's zeroed square as a share of the image's side."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The discriminator's optimizer."""
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    """The discriminator's learning rate, counted in its own updates."""


@dataclass
class EMAConfig:
    """Moving average of the decoder, ema = decay * ema + (1 - decay) * weights, from the first step on."""

    decay: float = 0.9978
    """Decay for each step."""


@dataclass
class EvalConfig:
    """Evaluation during training, at step 0 and at the end too."""

    every_steps: Optional[int] = None
    """Steps between evaluations; wins over `every_epochs`."""
    every_epochs: float = 1.0
    """Epochs between evaluations."""
    metrics: tuple[Metric, ...] = ("psnr", "ssim", "lpips")
    """What is measured, on images rounded to 8 bit. rfid compares with published figures, rfid_clean resizes for
    Inception with antialiasing, rfdd is the Frechet distance on the frozen encoder's features."""
    inception_path: Optional[str] = None
    """Local copy of inception-2015-12-05.pt for rfid; none: torch.hub's folder (TORCH_HOME), else downloaded."""
    num_samples: Optional[int] = None
    """Images that are evaluated; none: the whole split."""
    batch_size: int = 32
    """Images of one evaluation batch in each process."""
    save_pairs: int = 0
    """Images that are written with their reconstructions, as PNG, at each evaluation."""
    raw: bool = False
    """Whether the weights without moving average are evaluated too."""
    best_metric: Metric = "psnr"
    """Metric of the EMA model that decides what is copied to `best/`."""


@dataclass
class LoggingConfig:
    """What is written while training."""

    every_steps: int = 50
    """Steps between lines of metrics.jsonl and of the trackers."""
    samples_every_steps: Optional[int] = None
    """Steps between sample grids; none: at each evaluation."""
    num_samples: int = 8
    """Images in a sample grid."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Trackers, as accelerate names them: tensorboard, wandb, mlflow, ..."""
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
    every_steps: Optional[int] = None
    """Steps between uploads while training goes on; none: at the end only. One is left out while the one before is
    still on its way."""
    include_encoder: bool = True
    """Whether the encoder's weights go up too; without them, they are fetched from model.encoder on loading."""
    license: str = "apache-2.0"
    """License of the decoder, as the Hub names it."""
    retries: int = 5
    """Repetitions of an upload that failed, after 1, 4, 16, then 60 seconds."""


@dataclass
class Config:
    """Settings of train_rae.py."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    hub: HubConfig = field(default_factory=HubConfig)


def parse(
    schema: type,
    prog: str,
    description: str,
    argv: Optional[list] = None,
    default_config: Optional[Path] = None,
    check: Optional[Callable] = None,
) -> Any:
    """Read a command line into the dataclass `schema`. Bad input exits with code 2 and one line that names the key.

    Args:
        argv: the command line; none: sys.argv.
        default_config: YAML file that is read when the command line names none.
        check: called with the result; raises ConfigError for values that cannot be used.
    """
    parser = build_parser(schema, prog, description, default_config)
    try:
        argv = join_lists(schema, sys.argv[1:] if argv is None else argv)
        argv = files_first(argv, default_config)
        check_digits(named_values(argv))
        for file in config_files(argv):
            if os.path.isfile(file):  # the parser says what else it may be: a pipe, nothing
                check_digits(flat(read_yaml(Path(file))).items())
        parsed = parser.parse_args(argv)
        check_groups(schema, parsed)
        parsed = parser.instantiate_classes(parsed)
        config = schema(**{item.name: getattr(parsed, item.name) for item in fields(schema)})
        check_rules(config, RULES)
        if check is not None:
            check(config)
    except ArgumentError as error:
        fail(in_plain_words(str(error)))
    except (ValueError, OSError) as error:
        fail(error)
    return config


TYPES_IN_WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "dict": "a mapping"}


def in_plain_words(message: str) -> str:
    """What the parser says of a value, said as by the other errors: key, what is expected, what was found."""
    text = " ".join(message.split())
    none = "<class 'NoneType'>"  # every union of the schemas is of something and nothing
    union = rf"Does not validate against .*? Subtypes: \[(.+?), {none}\] Errors: .* Given value: "
    text = re.sub(union, r"Expected a \1 or nothing. Got value: ", text)
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"a <class '(\w+)'>", lambda found: TYPES_IN_WORDS.get(found[1], found[0]), text)
    group = r"\1: expected a YAML file of these settings, got \2; a single one is given as --\1.NAME"
    text = re.sub(r'^Parser key "(\w+)": Unable to load config .* "(.*)"$', group, text)
    text = re.sub(r'^Parser key "([\w.]+)": Expected (.*?)\. Got value: ', r"\1: expected \2, got ", text)
    return re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", text)


@functools.cache  # a tenth of a second, for those who read many configs
def build_parser(schema: type, prog: str, description: str, default_config: Optional[Path]) -> ArgumentParser:
    """The parser of YAML files and flags for the dataclass `schema`."""
    # a flag is written out: `--conf` for `--config` would be read by the parser and by nobody else
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=description, allow_abbrev=False)
    default = "" if default_config is None else f"; none: configs/{default_config.name}, over the defaults below"
    parser.add_argument("--config", action="config", help=f"YAML file; repeatable, later ones win{default}")
    parser.add_class_arguments(schema, nested_key=None, as_group=False)
    return parser


def parse_config(argv: Optional[list] = None) -> Config:
    """The settings of train_rae.py from the command line. Bad input exits with code 2."""
    config = parse(
        Config, "train_rae.py", "Train a representation autoencoder.", argv, DEFAULT_CONFIG, check=check_config
    )
    if not config_files(sys.argv[1:] if argv is None else argv) and os.environ.get("RANK", "0") == "0":
        print(f"no --config: the settings are those of the demo, configs/{DEFAULT_CONFIG.name}, and of the flags")
    return config


def files_first(argv: list, default_config: Optional[Path] = None) -> list:
    """The command line with its --config options in front, so that flags win wherever they stand; without any, the
    default file."""
    files, flags, i = [], [], 0
    while i < len(argv):
        length = 2 if argv[i] == "--config" else 1
        (files if argv[i].split("=")[0] == "--config" else flags).extend(argv[i : i + length])
        i += length
    if not files and default_config is not None and not {"--help", "-h"} & set(flags):
        files = ["--config", str(default_config)]
    return [*files, *flags]


def named_values(argv: list) -> list:
    """Every value in a command line, with its flag."""
    name, pairs = "", []
    for word in argv:
        if word.startswith("--"):
            name, _, word = word.partition("=")
        pairs.append((name, word))
    return pairs


def config_files(argv: list) -> list:
    """The values of --config in a command line."""
    return [value for name, value in named_values(argv) if name == "--config" and value]


def check_digits(values: Iterable) -> None:
    """Raise ConfigError for an integer, in pairs of key and value, that no float can hold: the parser would try."""
    for key, value in values:
        found = re.search(r"\d[\da-fA-FxX_:]{200,}", str(value))  # YAML's integers: decimal, 0xf, 0b1, 1_000, 1:30
        require(found is None, key, AT_MOST_LARGEST, found and f"{found[0][:9]}... of {len(found[0])} digits")


def keys_where(schema: type, wanted: Callable[[Any], bool], prefix: str = "") -> set:
    """The flags of `schema` whose type is `wanted`."""
    keys = set()
    for item in fields(schema):
        if wanted(item.type):
            keys.add(f"--{prefix}{item.name}")
        if is_dataclass(item.default_factory):
            keys |= keys_where(item.default_factory, wanted, f"{prefix}{item.name}.")
    return keys


def takes_several(kind: Any) -> bool:
    """Whether a type, or what an Optional holds, is a list or tuple."""
    return any(get_origin(part) in (list, tuple) for part in (kind, *get_args(kind)))


def join_lists(schema: type, argv: list) -> list:
    """The command line with `--key a b c` as `--key [a,b,c]` for keys that take several values, and with `--key` as
    `--key true` for keys that are true or false."""
    keys, switches = keys_where(schema, takes_several), keys_where(schema, lambda kind: kind is bool)
    texts = keys_where(schema, lambda kind: takes_several(kind) and str in get_args(kind))  # a file may be called 3
    argv = [part for word in argv for part in (word.split("=", 1) if word.split("=")[0] in keys else [word])]
    for key in keys:
        require(argv.count(key) < 2, key, "it once, with all its values", f"it {argv.count(key)} times")
    joined, i = [], 0
    while i < len(argv):
        end = i + 1
        while argv[i] in keys and end < len(argv) and not argv[end].startswith("--"):
            end += 1
        values = argv[i + 1 : end]
        joined.append(argv[i])
        if values:
            quoted = [argv[i] in texts or not re.fullmatch(r"[\w./+-]+", v) for v in values]
            plain = [json.dumps(v, ensure_ascii=False) if q else v for v, q in zip(values, quoted, strict=True)]
            whole = len(values) == 1 and values[0].startswith("[") and values[0].endswith("]")
            joined.append(values[0] if whole else f"[{','.join(plain)}]")
        elif argv[i] in switches and (end == len(argv) or argv[end].startswith("--")):
            joined.append("true")
        i = end
    return joined


def check_groups(schema: type, values: Any, prefix: str = "") -> None:
    """Raise ConfigError where a YAML file gives something else than a mapping for a group of settings, or nothing for a
    setting that needs a value: the parser takes null for any type."""
    for item in fields(schema):
        group, value = item.default_factory, values.get(item.name)
        if is_dataclass(group):
            if not isinstance(value, Namespace):
                raise ConfigError(f"{prefix}{item.name}: expected a mapping of settings, got {value!r}")
            check_groups(group, value, f"{prefix}{item.name}.")
        else:
            require(value is not None or type(None) in get_args(item.type), f"{prefix}{item.name}", "a value", value)


# No number is larger, of either sign: times the steps of an epoch it still counts something, and float32 holds it.
LARGEST = 10**12
AT_MOST_LARGEST = f"a number of at most {LARGEST:.0e}"
MOST_TASKS = 16 * (os.cpu_count() or 1)  # more processes or threads would wait for each other, if they start at all

# What every value must be, beyond its type: keys, condition, and the words for it. Values of None are left alone.
RULES = (
    (
        "optimizer.lr gan.optimizer.lr optimizer.eps gan.optimizer.eps gan.norm_eps train.epochs train.max_steps "
        "train.global_batch_size train.gradient_accumulation_steps train.cpu_threads train.clip_grad_norm "
        "train.save_every_steps train.save_every_epochs train.keep_last gan.updates_per_step gan.max_adaptive_weight "
        "train.timeout_minutes "
        "eval.every_steps eval.every_epochs eval.num_samples eval.batch_size logging.every_steps hub.every_steps "
        "logging.samples_every_steps logging.num_samples data.resize_size data.steps_per_epoch data.shuffle_buffer "
        "data.stream_lanes model.encoder_input_size model.image_size "
        "model.decoder_hidden_size model.decoder_num_hidden_layers model.decoder_num_attention_heads "
        "model.decoder_intermediate_size model.decoder_patch_size gan.kernel_size",
        lambda value: value > 0,
        "a positive number",
    ),
    (
        "optimizer.weight_decay gan.optimizer.weight_decay lr_schedule.final_lr gan.lr_schedule.final_lr "
        "lr_schedule.warmup_epochs lr_schedule.warmup_steps lr_schedule.decay_end_epoch lr_schedule.decay_end_step "
        "gan.lr_schedule.warmup_epochs gan.lr_schedule.warmup_steps gan.lr_schedule.decay_end_epoch "
        "gan.lr_schedule.decay_end_step model.noise_tau data.num_workers data.max_unreadable train.max_nonfinite_steps "
        "eval.save_pairs model.encoder_prefix_tokens hub.retries data.shard_retries data.max_unreadable_shards "
        "perceptual.weight perceptual.start_epoch perceptual.start_step gan.weight gan.start_epoch gan.start_step "
        "gan.update_start_epoch gan.update_start_step",
        lambda value: value >= 0,
        "a number of at least 0",
    ),
    (
        "data.holdout_fraction ema.decay gan.augment_cutout",
        lambda value: 0 <= value < 1,
        "a number in [0, 1)",
    ),
    (
        "model.encoder_layers",
        lambda layers: len(layers) > 0 and layers[0] >= 0 and list(layers) == sorted(set(layers)),
        "ascending indices of blocks, each once",
    ),
    ("gan.augment_prob", lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    ("train.seed", lambda value: 0 <= value < 2**32, "a number in [0, 2**32)"),
    (
        "optimizer.betas gan.optimizer.betas",
        lambda betas: all(0 <= beta < 1 for beta in betas),
        "two numbers in [0, 1)",
    ),
    (
        "train.cpu_threads data.num_workers",
        lambda value: value <= MOST_TASKS,
        f"at most {MOST_TASKS}, 16 for each of this machine's cores",
    ),
    ("train.timeout_minutes", lambda value: value <= 366 * 24 * 60, f"at most {366 * 24 * 60}, a year"),
)


def require(condition: bool, key: str, expected: str, value: Any) -> None:
    """Raise ConfigError, about the setting `key`, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {value!r}")


def check_rules(config: Any, rules: tuple) -> None:
    """Raise ConfigError where a value breaks one of `rules` (see RULES) about a key that the config has."""
    settings = flat(config_dict(config))
    for key, value in settings.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str):
                require("\0" not in part, key, "text without zero bytes", part)
            elif isinstance(part, (int, float)):
                require(math.isfinite(part), key, "a finite number", value)
                require(abs(part) <= LARGEST, key, AT_MOST_LARGEST, value)
    for keys, condition, expected in rules:
        for key in keys.split():
            if settings.get(key) is not None:
                require(condition(settings[key]), key, expected, settings[key])


def check_config(config: Config) -> None:
    """Raise ConfigError for values that no run can use and that can be seen without loading anything."""
    settings = flat(config_dict(config))
    best, metrics = config.eval.best_metric, config.eval.metrics
    require(best in metrics, "eval.best_metric", f"one of eval.metrics {list(metrics)}", best)
    # a setting that would be ignored is a mistake
    for key, used, needed in (
        ("model.encoder_config", config.model.encoder_weights == "random", "model.encoder_weights is random"),
        ("gan.backbone_config", config.gan.weights == "random", "gan.weights is random"),
        ("perceptual.vgg_path", config.perceptual.weights == "pretrained", "perceptual.weights is pretrained"),
        ("eval.inception_path", {"rfid", "rfid_clean"} & set(metrics), "eval.metrics has rfid or rfid_clean"),
        *((f"hub.{name}", config.hub.push, "hub.push is true") for name in ("repo_id", "every_steps", "private")),
    ):
        require(used or not settings[key], key, f"nothing unless {needed}", settings[key])
    data, default = config.data, DataConfig()
    for name in ("mixture", "eval_path", "steps_per_epoch", "shuffle_buffer", "stream_lanes", "shard_retries",
                 "max_unreadable_shards"):  # fmt: skip
        value = getattr(data, name)
        used = data.streaming or value == getattr(default, name)
        require(used, f"data.{name}", "nothing unless data.streaming is true", value)
    for path, weight in data.mixture.items():
        require(0 < weight < math.inf, "data.mixture", f"a positive weight for {path}", weight)
    if data.mixture:
        require(len(data.mixture) > 1, "data.mixture", "several sources, or data.path for one", data.mixture)
        for name in ("steps_per_epoch", "eval_path"):
            require(getattr(data, name), f"data.{name}", "a value, which a data.mixture needs", None)


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested settings as {"group.name": value}; the free-form `*_config` dictionaries stay whole."""
    leaves = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and not str(key).endswith("_config")
        leaves.update(flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return leaves


def config_dict(config: Any) -> dict:
    """The config as plain YAML types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(config))


def config_yaml(config: Config) -> str:
    """The resolved config as YAML text, itself a valid `--config`."""
    return yaml.dump(config_dict(config), Dumper=ConfigDumper, sort_keys=False)


class ConfigDumper(yaml.SafeDumper):
    """Quotes text that reads as a number: jsonargparse takes 1e3 for one, PyYAML alone would leave it bare."""


def _quote_numbers(dumper: ConfigDumper, text: str) -> yaml.Node:
    try:
        float(text)
        style = "'"
    except ValueError:
        style = None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


ConfigDumper.add_representer(str, _quote_numbers)


# What may differ between a run and its continuation: how far, how fast and how visibly it goes. Accumulation is among
# them, so that a run can move to fewer devices: with micro-batches of the same size it has the same noise there.
RESUMABLE_KEYS = (
    "data.num_workers",
    "data.max_unreadable",
    "data.shard_retries",
    "eval.",
    "hub.",
    "logging.",
    "model.gradient_checkpointing",
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


def check_same_config(config: Config, saved: Path) -> None:
    """Raise ConfigError when `saved`, the config.yaml of a run folder, is of another run than `config`. The number of
    lanes, where `config` leaves it open, becomes what the run began with."""

    try:
        old = flat(read_yaml(saved))
    except ConfigError as error:
        raise ConfigError(f"{saved} is damaged, choose another train.output_dir ({error})") from error
    if config.data.stream_lanes is None:
        config.data.stream_lanes = old.get("data.stream_lanes")
    new = flat(config_dict(config))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(RESUMABLE_KEYS):
            raise ConfigError(
                f"{saved} is of another run: {key} is {old.get(key)!r} there and {new.get(key)!r} now; "
                "choose another train.output_dir or the same settings"
            )
