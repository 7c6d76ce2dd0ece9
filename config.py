"""Every setting of training: the dataclasses are the schema of the YAML files and of the command line.

    python train_rae.py --config configs/dinov2_b.yaml --config mine.yaml --gan.weight 0.5

Later files win over earlier ones, flags over files. An unknown key or a wrong type stops with the key's name.
Start points are given in epochs, as published, or in steps, which win where both are given.
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Optional, Union

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits_tiny.yaml"  # when no --config is given
Metric = Literal["psnr", "ssim", "lpips"]


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
class DataConfig:
    """Where the images come from. See data.py."""

    path: str = "data/digits"
    """Folder of images, of class folders or of split folders, a `datasets` folder, or a Hub data set id."""
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
    resize_size: Optional[int] = None
    """Shorter side in pixels before the random crop; none: 384 for 256 px images, else 1.5 times the image size."""
    max_unreadable: int = 10
    """Number of unreadable images after which a run stops."""
    num_workers: int = 4
    """Data loading processes for each training process."""


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
    """Threads of each process on a CPU; none: the machine's cores shared out among its processes. (accelerate launch
    leaves one thread.)"""
    clip_grad_norm: Optional[float] = None
    """Largest L2 norm of the decoder's gradient; none: not clipped."""
    max_nonfinite_steps: int = 0
    """Steps with a non-finite loss that are skipped, in a row, before the run stops."""
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
    max_adaptive_weight: float = 1e4
    """Upper bound of the adaptive weight."""
    backbone: str = "facebook/dino-vits8"
    """Frozen ViT: Hub id, folder, or a .pth/.safetensors file with timm's names (dino_vit_small_patch8_224.pth)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """"random" builds an untrained backbone from `backbone_config`: only for tests and demonstrations."""
    backbone_config: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' ViTConfig, for random weights only."""
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
    """What is measured, on images rounded to 8 bit."""
    num_samples: Optional[int] = None
    """Images that are evaluated; none: the whole split."""
    batch_size: int = 32
    """Images of one evaluation batch in each process."""
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


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value and what is expected."""


def fail(message: Union[str, Exception]) -> NoReturn:
    """End the process: one line on stderr, exit code 2."""
    if os.environ.get("RANK", "0") == "0":  # every process finds the same: one line is enough
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def parse_config(argv: Optional[list] = None) -> Config:
    """Read `--config` files and flags from the command line (`argv`, default sys.argv). Bad input exits with code 2."""
    parser = ArgumentParser(prog="train_rae.py", exit_on_error=False, description="Train a representation autoencoder.")
    parser.add_argument("--config", action="config", help="YAML file; repeatable, later ones win")
    parser.add_class_arguments(Config, nested_key=None, as_group=False)
    argv = sys.argv[1:] if argv is None else argv
    if not any(arg.split("=")[0] in ("--config", "--help", "-h") for arg in argv):
        argv = ["--config", str(DEFAULT_CONFIG), *argv]
    try:
        parsed = parser.instantiate_classes(parser.parse_args(argv))
        values = {name: getattr(parsed, name) for name in Config.__dataclass_fields__}
        config = Config(**values)
        check_config(config)
    except (ArgumentError, ConfigError, ValueError, OSError) as error:
        fail(error)
    return config


def check_config(config: Config) -> None:
    """Raise ConfigError for values that no run can use and that can be seen without loading anything."""

    def require(condition: bool, key: str, expected: str) -> None:
        group, _, name = key.rpartition(".")
        value: Any = config
        for part in [*group.split("."), name]:
            value = getattr(value, part)
        if not condition:
            raise ConfigError(f"{key}: expected {expected}, got {value!r}")

    for prefix, optimizer, schedule in (
        ("", config.optimizer, config.lr_schedule),
        ("gan.", config.gan.optimizer, config.gan.lr_schedule),
    ):
        require(optimizer.lr > 0, f"{prefix}optimizer.lr", "a positive learning rate")
        require(all(0 <= beta < 1 for beta in optimizer.betas), f"{prefix}optimizer.betas", "two numbers in [0, 1)")
        require(optimizer.weight_decay >= 0, f"{prefix}optimizer.weight_decay", "a number of at least 0")
        require(schedule.final_lr >= 0, f"{prefix}lr_schedule.final_lr", "a number of at least 0")
    require(config.model.noise_tau >= 0, "model.noise_tau", "a number of at least 0")
    require(0 <= config.data.holdout_fraction < 1, "data.holdout_fraction", "a number in [0, 1)")
    require(config.data.num_workers >= 0, "data.num_workers", "a number of at least 0")
    require(config.train.cpu_threads is None or config.train.cpu_threads > 0, "train.cpu_threads", "a positive number")
    require(config.train.global_batch_size > 0, "train.global_batch_size", "a positive number")
    require(config.train.gradient_accumulation_steps > 0, "train.gradient_accumulation_steps", "a positive number")
    require(config.train.max_steps is None or config.train.max_steps > 0, "train.max_steps", "a positive number")
    require(config.train.epochs > 0, "train.epochs", "a positive number")
    require(config.train.keep_last >= 1, "train.keep_last", "at least 1")
    require(config.train.save_every_steps is None or config.train.save_every_steps > 0,
            "train.save_every_steps", "a positive number")  # fmt: skip
    require(config.train.save_every_epochs > 0, "train.save_every_epochs", "a positive number")
    require(config.train.clip_grad_norm is None or config.train.clip_grad_norm > 0,
            "train.clip_grad_norm", "a positive number or null")  # fmt: skip
    require(0 <= config.ema.decay < 1, "ema.decay", "a number in [0, 1)")
    require(config.perceptual.weight >= 0, "perceptual.weight", "a number of at least 0")
    require(config.gan.weight >= 0, "gan.weight", "a number of at least 0")
    require(config.gan.updates_per_step > 0, "gan.updates_per_step", "a positive number")
    require(0 <= config.gan.augment_prob <= 1, "gan.augment_prob", "a number in [0, 1]")
    require(0 <= config.gan.augment_cutout < 1, "gan.augment_cutout", "a number in [0, 1)")
    require(config.eval.every_steps is None or config.eval.every_steps > 0, "eval.every_steps", "a positive number")
    require(config.eval.every_epochs > 0, "eval.every_epochs", "a positive number")
    require(config.eval.best_metric in config.eval.metrics, "eval.best_metric", f"one of {config.eval.metrics}")
    require(config.eval.batch_size > 0, "eval.batch_size", "a positive number")
    require(config.logging.every_steps > 0, "logging.every_steps", "a positive number")
    require(config.logging.num_samples > 0, "logging.num_samples", "a positive number")
    require(config.model.encoder_weights == "random" or not config.model.encoder_config,
            "model.encoder_config", "nothing unless model.encoder_weights is random")  # fmt: skip
    require(config.gan.weights == "random" or not config.gan.backbone_config,
            "gan.backbone_config", "nothing unless gan.weights is random")  # fmt: skip
    require(config.perceptual.weights == "pretrained" or config.perceptual.vgg_path is None,
            "perceptual.vgg_path", "nothing when perceptual.weights is random")  # fmt: skip


def config_dict(config: Config) -> dict:
    """The config as plain YAML types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(config))


def config_yaml(config: Config) -> str:
    """The resolved config as YAML text, itself a valid `--config`."""
    return yaml.safe_dump(config_dict(config), sort_keys=False)


# What may differ between a run and its continuation: it changes how far, how fast or how visibly it goes, not what
# a step computes.
RESUMABLE_KEYS = (
    "data.num_workers",
    "data.max_unreadable",
    "eval.",
    "logging.",
    "model.gradient_checkpointing",
    "train.cpu_threads",
    "train.epochs",
    "train.gradient_accumulation_steps",
    "train.keep_last",
    "train.max_nonfinite_steps",
    "train.max_steps",
    "train.output_dir",
    "train.save_every_",
)


def check_same_config(config: Config, saved: Path) -> None:
    """Raise ConfigError when `saved`, the config.yaml of a run folder, is of another run than `config`."""

    def flat(tree: dict, prefix: str = "") -> dict:
        leaves = {}
        for key, value in tree.items():
            # the free-form dictionaries are compared as a whole
            nested = isinstance(value, dict) and not key.endswith("_config")
            leaves.update(flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
        return leaves

    old, new = flat(yaml.safe_load(saved.read_text())), flat(config_dict(config))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(RESUMABLE_KEYS):
            raise ConfigError(
                f"{saved} is of another run: {key} is {old.get(key)!r} there and {new.get(key)!r} now; "
                "choose another train.output_dir or the same settings"
            )
