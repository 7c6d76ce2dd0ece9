"""Settings of train_rae.py: the dataclasses are the schema of its YAML files and of its command line.

    python train_rae.py --config configs/dinov2_b.yaml --config mine.yaml --gan.weight 0.5

Later files win over earlier ones, flags over files. An unknown key or a wrong type stops with the key's name.
Start points are given in epochs, as published, or in steps, which win where both are given.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from rae_suite.cli import (
    ALL_POSITIVE,
    AT_LEAST_0,
    POSITIVE,
    PROBABILITY,
    SHARE,
    THREE,
    Limit,
    names_config,
    parse,
    require,
    setting,
)
from rae_suite.metric_names import FID_MODES, METRICS, too_small_for
from rae_suite.settings import (
    DataConfig,
    EMAConfig,
    HubConfig,
    LoggingConfig,
    LRScheduleConfig,
    OptimizerConfig,
    TrainConfig,
    check_data_settings,
    check_hub_settings,
    check_used,
)
from rae_suite.values import PathText

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "digits_tiny.yaml"  # when no --config is given

MetricName = Literal[tuple(METRICS)]


BLOCKS = Limit(
    lambda layers: len(layers) > 0 and layers[0] >= 0 and list(layers) == sorted(set(layers)),
    "ascending indices of blocks, each once",
)


@dataclass
class ModelConfig:
    """The autoencoder. See RAEConfig in modeling_rae.py."""

    encoder: PathText = "facebook/dinov2-with-registers-base"
    """Hub id or folder of the frozen encoder; with `encoder_weights: random` a transformers model_type."""
    encoder_revision: Optional[str] = None
    """Revision of the encoder on the Hub."""
    encoder_weights: Literal["pretrained", "random"] = "pretrained"
    """"random" builds an untrained encoder from `encoder_config`: only for tests and demonstrations."""
    encoder_config: dict[str, Any] = field(default_factory=dict)
    """Fields of the encoder's transformers config, for random weights only."""
    encoder_input_size: int = setting(224, POSITIVE)
    """Side in pixels that images are resized to before the encoder."""
    encoder_layers: Optional[tuple[int, ...]] = setting(None, BLOCKS)
    """Blocks of the encoder (0-based, ascending) whose normalised outputs are averaged into the latent (RAEv2); none:
    the last block's output alone."""
    encoder_add_spatial_mean: bool = False
    """Whether the mean over positions of the last chosen block's tokens is added to every token (RAEv2: with several
    blocks of DINOv3 or SigLIP2; neither for DINOv2 nor for the last block alone)."""
    encoder_keep_final_affine: bool = False
    """Whether the encoder's final LayerNorm keeps its weight and bias (RAEv2: for SigLIP2, with ImageNet's `image_mean`
    0.485 0.456 0.406 and `image_std` 0.229 0.224 0.225; RAE: never)."""
    encoder_prefix_tokens: Optional[int] = setting(None, AT_LEAST_0)
    """Tokens before the patch tokens, for an encoder that ENCODER_FAMILIES in modeling_rae.py does not know."""
    encoder_final_norm: Optional[str] = None
    """Name of such an encoder's last LayerNorm, or "none" where it has none."""
    image_mean: Optional[tuple[float, ...]] = setting(None, THREE)
    """Mean of the pixels' red, green and blue, in [0, 1], with which they are normalised; none: that of the encoder's
    image processor."""
    image_std: Optional[tuple[float, ...]] = setting(None, THREE, ALL_POSITIVE)
    """Standard deviation of the same."""
    image_size: int = setting(256, POSITIVE)
    """Side in pixels of training images and reconstructions: (encoder_input_size / encoder patch) * decoder patch."""
    decoder_hidden_size: int = setting(1152, POSITIVE)
    """Width of the decoder."""
    decoder_num_hidden_layers: int = setting(28, POSITIVE)
    """Blocks of the decoder."""
    decoder_num_attention_heads: int = setting(16, POSITIVE)
    """Attention heads of the decoder."""
    decoder_intermediate_size: int = setting(4096, POSITIVE)
    """Width of the decoder's MLPs."""
    decoder_patch_size: int = setting(16, POSITIVE)
    """Side in pixels of the patch that each latent token becomes."""
    denormalize_output: bool = True
    """Whether the decoder's output is multiplied by the encoder's image std and its mean is added (RAEv2: not)."""
    noise_tau: float = setting(0.8, AT_LEAST_0)
    """Strength of the latent noise in training, whose sigma is drawn for each sample."""
    noise_distribution: Literal["uniform", "half_normal"] = "uniform"
    """How sigma is drawn: uniform is noise_tau * U[0, 1], as the published code does; half_normal is
    |N(0, noise_tau**2)|, as the paper says."""
    latent_stats: Optional[PathText] = None
    """File with `mean` and `var` of the latents (.pt or .safetensors), of shapes that broadcast to (C, h, w); without a
    mean, nothing is subtracted. None: latents as they are."""
    train_position_embedding: bool = False
    """Whether the decoder's position table learns: in the published loop it does, though the paper calls it fixed."""
    gradient_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass: less memory, about a third more compute."""
    attn_implementation: str = "sdpa"
    """Attention of encoder, decoder and discriminator, as in transformers (sdpa, eager, flash_attention_2)."""
    init_from: Optional[PathText] = None
    """Model whose decoder training starts from: an RAE's folder or Hub id, a run folder, a checkpoint (averaged
    weights), diffusers' AutoencoderRAE, or a decoder file of the published code; of another grid, its position table is
    interpolated. None: a new decoder."""


@dataclass
class PerceptualConfig:
    """LPIPS."""

    weight: float = setting(1.0, AT_LEAST_0)
    """Factor of LPIPS; 0 switches it off."""
    start_epoch: float = setting(0.0, AT_LEAST_0)
    """Epoch at which LPIPS is switched on."""
    start_step: Optional[int] = setting(None, AT_LEAST_0)
    """The same in steps."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """"random" uses an untrained VGG16: only for tests and demonstrations."""
    vgg_path: Optional[PathText] = None
    """Local copy of torchvision's vgg16-397923af.pth; none: torch.hub's folder (TORCH_HOME), else downloaded."""


@dataclass
class GANConfig:
    """Discriminator and adversarial loss. See rae_suite/discriminator.py."""

    weight: float = setting(0.75, AT_LEAST_0)
    """Factor of the adversarial loss, beside the adaptive weight; 0 switches the discriminator off."""
    start_epoch: float = setting(8.0, AT_LEAST_0)
    """Epoch at which the decoder begins to see the adversarial loss."""
    start_step: Optional[int] = setting(None, AT_LEAST_0)
    """The same in steps."""
    update_start_epoch: float = setting(6.0, AT_LEAST_0)
    """Epoch at which the discriminator begins to learn."""
    update_start_step: Optional[int] = setting(None, AT_LEAST_0)
    """The same in steps."""
    updates_per_step: int = setting(1, POSITIVE)
    """Discriminator updates for each decoder update."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """The discriminator's loss."""
    disc_input: Literal["fresh", "reuse"] = "fresh"
    """The discriminator learns from new reconstructions of clean latents by the updated decoder, as published
    ("fresh"), or from those of the decoder's own step, of noisy latents: one decoder pass less ("reuse")."""
    max_adaptive_weight: float = setting(1e4, POSITIVE)
    """Upper bound of the adaptive weight."""
    backbone: PathText = "facebook/dino-vits8"
    """Frozen ViT: Hub id, folder, or a .pth/.safetensors file with timm's names (dino_vit_small_patch8_224.pth)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """"random" builds an untrained backbone from `backbone_config`: only for tests and demonstrations."""
    backbone_config: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' ViTConfig, for random weights only; activation and epsilon are always DINO's."""
    key_depths: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks (0-based) whose features are judged, beside the last one's."""
    kernel_size: int = setting(9, Limit(lambda size: size > 0 and size % 2 == 1, "an odd number"))
    """Width of the heads' residual convolution."""
    norm: Literal["per_sample", "group"] = "per_sample"
    """Normalisation in the heads."""
    norm_eps: float = setting(1e-6, POSITIVE)
    """Epsilon of that normalisation."""
    init_from: Optional[PathText] = None
    """Checkpoint of train_rae.py, or run folder for its newest one, whose discriminator training starts from; none: a
    new one."""
    spectral_norm: bool = True
    """Whether the heads' convolutions are spectrally normalised."""
    augment_prob: float = setting(1.0, PROBABILITY)
    """Probability of each of DiffAug's transforms; 0 switches it off."""
    augment_cutout: float = setting(0.0, SHARE)
    """Side of DiffAug's zeroed square as a share of the image's side."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The discriminator's optimizer."""
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    """The discriminator's learning rate, counted in its own updates."""


@dataclass
class EvalConfig:
    """Evaluation during training, at step 0 and at the end too."""

    every_steps: Optional[int] = setting(None, POSITIVE)
    """Steps between evaluations; wins over `every_epochs`."""
    every_epochs: float = setting(1.0, POSITIVE)
    """Epochs between evaluations."""
    metrics: tuple[MetricName, ...] = ("psnr", "ssim", "lpips")
    """What is measured, on images rounded to 8 bit. rfid compares with published figures, rfid_clean resizes for
    Inception with antialiasing, rfdd is the Frechet distance on the frozen encoder's features, ms_ssim needs images of
    176 pixels or more."""
    inception_path: Optional[PathText] = None
    """Local copy of inception-2015-12-05.pt for rfid; none: torch.hub's folder (TORCH_HOME), else downloaded."""
    num_samples: Optional[int] = setting(None, POSITIVE)
    """Images that are evaluated; none: the whole split."""
    batch_size: int = setting(32, POSITIVE)
    """Images of one evaluation batch in each process."""
    save_pairs: int = setting(0, AT_LEAST_0)
    """Images that are written with their reconstructions, as PNG, at each evaluation."""
    raw: bool = False
    """Whether the weights without moving average are evaluated too."""
    best_metric: str = "psnr"
    """Metric of the EMA model that decides what is copied to `best/`; of a set, faces/psnr."""
    sets: dict[str, PathText] = field(default_factory=dict)
    """Further images that are evaluated beside those of `data`, {name: path}, a path as data.path without streaming:
    data with splits is measured on data.eval_split, other data as a whole. Their metrics are faces/psnr and so on."""


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


def measured_names(settings: EvalConfig) -> list:
    """Names of all that is measured: the metrics, and those of each set."""
    return [*settings.metrics, *(f"{name}/{metric}" for name in settings.sets for metric in settings.metrics)]


def parse_config(argv: Optional[list] = None) -> Config:
    """The settings of train_rae.py from the command line. Bad input exits with code 2."""
    config = parse(
        Config, "train_rae.py", "Train a representation autoencoder.", argv, DEFAULT_CONFIG, check=check_config
    )
    if not names_config(sys.argv[1:] if argv is None else argv) and os.environ.get("RANK", "0") == "0":
        print(f"no --config: the settings are those of the demo, configs/{DEFAULT_CONFIG.name}, and of the flags")
    return config


def check_config(config: Config) -> None:
    """Raise ConfigError for values that no run can use and that can be seen without loading anything."""
    best, metrics = config.eval.best_metric, config.eval.metrics
    for name in config.eval.sets:
        plain = name.replace("_", "").replace("-", "").isalnum()
        require(plain, "eval.sets", "names of letters, digits, - and _", name)
    known = measured_names(config.eval)
    require(best in known, "eval.best_metric", f"one of eval.metrics {known}", best)
    for key, value, used, needed in (
        ("model.encoder_config", config.model.encoder_config, config.model.encoder_weights == "random",
         "model.encoder_weights is random"),
        ("gan.backbone_config", config.gan.backbone_config, config.gan.weights == "random", "gan.weights is random"),
        ("gan.init_from", config.gan.init_from, config.gan.weight > 0, "gan.weight is above 0"),
        ("perceptual.vgg_path", config.perceptual.vgg_path, config.perceptual.weights == "pretrained",
         "perceptual.weights is pretrained"),
        ("eval.inception_path", config.eval.inception_path, FID_MODES.keys() & set(metrics),
         f"eval.metrics has {' or '.join(FID_MODES)}"),
    ):  # fmt: skip
        check_used(key, value, used, needed)
    small = too_small_for(metrics, config.model.image_size)
    require(not small, "eval.metrics", f"metrics for images of {config.model.image_size} pixels", small)
    check_hub_settings(config.hub)
    check_data_settings(config.data)
