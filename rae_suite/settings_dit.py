"""Settings of stage 2: those that its scripts share, and those of train_dit.py.

python train_dit.py --config configs/ditdh_xl.yaml --model.rae runs/dinov2_b/final --data.path /data/imagenet
"""

import math
from dataclasses import dataclass, field
from typing import Literal, Optional

from rae_suite.cli import AT_LEAST_0, POSITIVE, PROBABILITY, SHARE, Limit, parse, require, setting
from rae_suite.errors import error_names_setting
from rae_suite.metric_names import DRAWN_METRICS, GENERATION_METRICS
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

GenerationMetricName = Literal[tuple(GENERATION_METRICS)]
TIMES = Limit(
    lambda interval: 0 <= interval[0] <= interval[1] <= 1, "two times in [0, 1], the least and the greatest, 1 is noise"
)


@dataclass
class SamplingConfig:
    """How a stage-2 model draws images from noise."""

    num_inference_steps: int = setting(50, POSITIVE)
    """Points in time as published: with `end` published there is one step fewer, 50 are 49 passes of the model."""
    end: Literal["published", "zero"] = "published"
    """Where the last step ends: published at the shifted time 0.001, as RAE's figures were measured; zero takes as many
    steps as there are points, the last one to time 0 (RAEv2)."""
    solver: Literal["euler", "heun2"] = "euler"
    """euler has one pass of the model for each step, heun2 two."""
    guidance_scale: float = 1.0
    """Factor of the guidance; 1 is off. With a `guide` autoguidance's, for a model with a base head that of internal
    guidance, else of classifier-free guidance."""
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), TIMES)
    """Least and greatest shifted time at which guidance is on, both included; 1 is noise."""
    guide: Optional[PathText] = None
    """A weaker model for autoguidance, given as the model itself is; none: the model's own guide if it is saved with
    one, or its base head (internal guidance). "off" leaves both out: the scale is then classifier-free guidance's."""


def check_sampling(sampling: SamplingConfig, prefix: str = "sampling.") -> None:
    """Raise ConfigError for settings that cannot be used together."""
    points, scale, name = sampling.num_inference_steps, sampling.guidance_scale, f"{prefix}num_inference_steps"
    require(points > 1 or sampling.end == "zero", name, f"at least 2 unless {prefix}end is zero", points)
    interval = None if sampling.guidance_interval == (0.0, 1.0) else list(sampling.guidance_interval)
    for name, value in (("guide", sampling.guide), ("guidance_interval", interval)):
        check_used(f"{prefix}{name}", value, scale != 1, f"{prefix}guidance_scale is another than 1")


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class DiTModelConfig:
    """The diffusion transformer, and the autoencoder whose latents it learns. See RAEDiTModel in modeling_dit.py."""

    rae: PathText = ""
    """The autoencoder: a model folder, such as runs/<name>/final of train_rae.py, a run folder or checkpoint,
    diffusers' AutoencoderRAE, or a Hub id; needed."""
    hidden_size: int = setting(1152, POSITIVE)
    """Width of the backbone."""
    num_layers: int = setting(28, POSITIVE)
    """Blocks of the backbone."""
    num_attention_heads: int = setting(16, POSITIVE)
    """Attention heads of the backbone."""
    head_hidden_size: Optional[int] = setting(2048, POSITIVE)
    """Width of DiT-DH's head; none, with the next two, for a plain DiT."""
    head_num_layers: Optional[int] = setting(2, POSITIVE)
    """Blocks of the head."""
    head_num_attention_heads: Optional[int] = setting(16, POSITIVE)
    """Attention heads of the head."""
    patch_size: int = setting(1, POSITIVE)
    """Side of the patch of latent positions that becomes a token; DiT-DH: 1."""
    mlp_ratio: float = setting(4.0, POSITIVE)
    """Width of the MLPs, relative to the block's."""
    use_qk_norm: bool = False
    """Whether queries and keys are normalised."""
    use_swiglu: bool = True
    """SwiGLU MLPs; if not, GELU."""
    use_rms_norm: bool = True
    """RMS norms; if not, LayerNorms."""
    use_rope: bool = True
    """Whether attention turns with the position (2-D rotary embedding)."""
    use_pos_embed: bool = True
    """Whether the backbone's tokens have a position table."""
    train_constants: bool = False
    """Whether the position table and the Fourier frequencies of the time are trained. The published loop does so,
    though its model is built with both frozen."""
    num_time_tokens: Optional[int] = setting(None, POSITIVE)
    """Tokens that tell the backbone the time (RAEv2: 4), with `num_class_tokens`; none: adaptive norms do (adaLN)."""
    num_class_tokens: Optional[int] = setting(None, POSITIVE)
    """Tokens that tell the backbone the class (RAEv2: 8)."""
    base_num_layers: Optional[int] = setting(None, POSITIVE)
    """Blocks before the base head, which internal guidance takes for the weaker model (RAEv2: 8); none: no base
    head."""
    prediction: Literal["velocity", "data"] = "velocity"
    """What the network predicts: the velocity, or the clean latent (RAEv2)."""
    num_classes: Optional[int] = setting(None, POSITIVE)
    """Classes that images are drawn of; none: as many as the training images have, one without labels."""
    class_names: Optional[tuple[str, ...]] = None
    """Names of the classes in the order of their indices; none: those of the training images. Images belong to the
    class of their label's name."""
    class_dropout_prob: float = setting(0.1, PROBABILITY)
    """Share of the labels that training replaces by the null label; classifier-free guidance needs it above 0."""
    gradient_checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass: less memory, about a third more compute."""
    init_from: Optional[PathText] = None
    """A model whose weights training starts from: whatever sample_dit.py takes. With other classes the label table is
    new. None: a new model."""


@dataclass
class LatentsConfig:
    """How images become the latents that are learnt."""

    stats: Optional[PathText] = None
    """Mean and variance that normalise the latents: none for the autoencoder's own; "compute" to find them once, from
    the training images, before the first step; a file of `mean` and `var` (.pt or .safetensors), without a mean to
    subtract nothing, as published; "unnormalized" for latents as they are, which ruins training unless they have about
    mean 0 and variance 1."""
    encoder_precision: Literal["float32", "bf16"] = "float32"
    """Precision of the frozen encoder; published: float32."""


@dataclass
class DiTDataConfig(DataConfig):
    """Where the images come from, and what is seen of them. See rae_suite/splits.py."""

    crop: Literal["random", "center"] = "center"
    """Part of an image that training sees: a random crop, or the centre crop of evaluations, as published."""
    flip: bool = True
    """Whether training sees the mirror image half of the time."""
    latents: Optional[PathText] = None
    """Folder of scripts/encode_latents.py with the latents of the training images, which training then reads in place
    of encoding the images; none: they are encoded in each step. The images are still listed, and their labels used."""


@dataclass
class FlowConfig:
    """The path from data to noise. See rae_suite/flow.py."""

    time_distribution: str = "logit-normal_0_1"
    """Times that training draws: uniform, or logit-normal_M_S with a mean M and a standard deviation S."""
    shift: Optional[float] = setting(None, Limit(lambda value: value >= 1, "a number of at least 1"))
    """Factor of the shift towards noise, in training and sampling; none: sqrt(numbers of a latent / shift_base), 1 for
    latents of fewer numbers than that."""
    shift_base: int = setting(4096, POSITIVE)
    """Numbers of a latent that is not shifted."""


@dataclass
class DiTTrainConfig(TrainConfig):
    """Length, batch, precision, checkpoints and seed of a run."""

    output_dir: PathText = "runs/dit"
    """The run's folder. A run that finds its own checkpoints there goes on from the newest."""
    epochs: float = setting(80, POSITIVE)
    """Length of training in epochs."""
    global_batch_size: int = setting(1024, POSITIVE)
    """Images for one optimisation step, over all processes and accumulated micro-batches."""
    clip_grad_norm: Optional[float] = setting(1.0, POSITIVE)
    """Largest L2 norm of the gradient; none: not clipped."""


@dataclass
class DiTOptimizerConfig(OptimizerConfig):
    """AdamW, or Muon for matrices (RAEv2) with AdamW for all else. See rae_suite/optimizers.py."""

    type: Literal["adamw", "muon"] = "adamw"
    """muon has every parameter of two dimensions; `lr` and `weight_decay` are those of both, `betas` and `eps` of
    AdamW. It does not work with FSDP2."""
    momentum: float = setting(0.95, SHARE)
    """Decay of muon's momentum."""


@dataclass
class DiTLRScheduleConfig(LRScheduleConfig):
    """Learning rate over time, as published: constant, then linear to `final_lr`, then constant."""

    type: Literal["cosine", "linear", "constant"] = "linear"
    """Shape of the decay."""
    warmup_epochs: float = setting(40.0, AT_LEAST_0)
    """Epochs before the decay."""
    warmup_from_zero: bool = False
    """Whether the rate rises from zero in these epochs: lr * (step + 1) / warmup_steps. If not, it is at the peak."""
    decay_end_epoch: float = setting(800.0, AT_LEAST_0)
    """Epoch at which `final_lr` is reached."""


@dataclass
class DiTEMAConfig(EMAConfig):
    """Moving average of the weights, ema = decay * ema + (1 - decay) * weights, from the first step on."""

    decay: float = setting(0.9995, SHARE)
    """Decay for each step."""


@dataclass
class DrawnEvalConfig:
    """Metrics of images that sample_dit.py has drawn, as eval_fid.py measures them."""

    metrics: tuple[Literal[tuple(DRAWN_METRICS)], ...] = ()
    """fid, sfid, is, precision, recall on Inception features, fdd, precision_encoder, recall_encoder on features of the
    RAE's encoder."""
    reference: Optional[PathText] = None
    """What the images are compared with, as eval_fid.py takes it; the Inception Score needs none."""
    inception_path: Optional[PathText] = None
    """Local copy of inception-2015-12-05.pt; none: torch.hub's folder (TORCH_HOME), else downloaded."""


@dataclass
class DiTEvalConfig:
    """Evaluation during training, of the averaged weights, at step 0 and at the end too."""

    every_steps: Optional[int] = setting(None, POSITIVE)
    """Steps between evaluations; wins over `every_epochs`."""
    every_epochs: float = setting(4.0, POSITIVE)
    """Epochs between evaluations."""
    metrics: tuple[GenerationMetricName, ...] = ("loss", "fdd")
    """loss: on held-out images at four fixed times and with fixed noise; of drawn images, as eval_fid.py measures them:
    fid, sfid, is, precision, recall on Inception features, fdd, precision_encoder, recall_encoder on the frozen
    encoder's."""
    reference: Optional[PathText] = None
    """What drawn images are compared with: ADM's .npz file, one of eval_fid.py --save_reference, an .npz file or a
    folder of images; none: the held-out images."""
    inception_path: Optional[PathText] = None
    """Local copy of inception-2015-12-05.pt; none: torch.hub's folder (TORCH_HOME), else downloaded."""
    num_samples: Optional[int] = setting(None, POSITIVE)
    """Held-out images that are used; none: the whole split."""
    num_generated: int = setting(1000, Limit(lambda value: value > 1, "at least 2 images"))
    """Images that are drawn for their metrics, of all classes equally many. Published figures are of 50,000."""
    batch_size: int = setting(32, POSITIVE)
    """Images of one evaluation batch in each process."""
    raw: bool = False
    """Whether the weights without moving average are evaluated too."""
    best_metric: GenerationMetricName = "loss"
    """Metric of the EMA model that decides what is copied to `best/`."""


@dataclass
class Config:
    """Settings of train_dit.py."""

    model: DiTModelConfig = field(default_factory=DiTModelConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    data: DiTDataConfig = field(default_factory=DiTDataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    train: DiTTrainConfig = field(default_factory=DiTTrainConfig)
    optimizer: DiTOptimizerConfig = field(default_factory=DiTOptimizerConfig)
    lr_schedule: DiTLRScheduleConfig = field(default_factory=DiTLRScheduleConfig)
    ema: DiTEMAConfig = field(default_factory=DiTEMAConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    eval: DiTEvalConfig = field(default_factory=DiTEvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    hub: HubConfig = field(default_factory=HubConfig)


def parse_time_distribution(name: str) -> Optional[tuple]:
    """Mean and standard deviation of "logit-normal_M_S", None for "uniform". Raises ValueError for any other text."""
    if name == "uniform":
        return None
    kind, _, numbers = name.partition("_")
    try:
        mean, std = map(float, numbers.split("_"))
        if kind == "logit-normal" and math.isfinite(mean) and 0 < std < math.inf:
            return mean, std
    except ValueError:  # no numbers, or not two
        pass
    raise ValueError(
        f"time distribution: expected uniform or logit-normal_M_S with a mean M and a standard deviation S above 0, "
        f"such as logit-normal_0_1, got {name!r}"
    )


def parse_config(argv: Optional[list] = None) -> Config:
    """The settings of train_dit.py from the command line. Bad input exits with code 2."""
    return parse(Config, "train_dit.py", "Train a diffusion transformer on RAE latents.", argv, check=check_config)


def check_used_flow_and_eval(config: Config) -> None:
    """Raise ConfigError for settings that others make useless."""
    flow, evaluation, drawn = config.flow, config.eval, [m for m in config.eval.metrics if m in DRAWN_METRICS]
    unshifted = flow.shift is None or flow.shift_base == FlowConfig().shift_base
    require(unshifted, "flow.shift_base", "nothing with flow.shift", flow.shift_base)
    check_used("eval.reference", evaluation.reference, bool(drawn), "eval.metrics has one of drawn images")
    inception = any(DRAWN_METRICS[name].features == "inception" for name in drawn)
    check_used(
        "eval.inception_path", evaluation.inception_path, inception, "eval.metrics has one of Inception features"
    )


def check_config(config: Config) -> None:
    """Raise ConfigError for values that no run can use and that can be seen without loading anything."""
    best, metrics = config.eval.best_metric, config.eval.metrics
    require(config.model.rae != "", "model.rae", "a model folder or Hub id of an RAE", config.model.rae)
    require(best in metrics, "eval.best_metric", f"one of eval.metrics {list(metrics)}", best)
    names = config.model.class_names
    if names is not None:
        require(len(set(names)) == len(names) > 0, "model.class_names", "names, each once", list(names))
        count = config.model.num_classes
        require(count in (None, len(names)), "model.num_classes", f"{len(names)}, as many as model.class_names", count)
    with error_names_setting("flow.time_distribution"):
        parse_time_distribution(config.flow.time_distribution)
    check_sampling(config.sampling)
    guide, internal = config.sampling.guide, config.model.base_num_layers is not None
    by_labels = config.sampling.guidance_scale != 1 and (guide == "off" or (guide is None and not internal))
    require(
        not by_labels or config.model.class_dropout_prob > 0,
        "model.class_dropout_prob",
        "a share above 0, because sampling.guidance_scale is another than 1",
        config.model.class_dropout_prob,
    )
    check_used_flow_and_eval(config)
    crop, resize_size = config.data.crop, config.data.resize_size
    require(crop == "random" or resize_size is None, "data.resize_size", "nothing with data.crop center", resize_size)
    if config.data.streaming:
        expected = "a file of mean and var (scripts/compute_latent_stats.py) with data.streaming"
        require(config.latents.stats != "compute", "latents.stats", expected, "compute")
    if config.data.latents is not None:
        require(not config.data.streaming, "data.latents", "nothing with data.streaming", config.data.latents)
        require(config.data.crop == "center", "data.crop", "center with data.latents", config.data.crop)
    momentum, default = config.optimizer.momentum, DiTOptimizerConfig().momentum
    used = config.optimizer.type == "muon" or momentum == default
    require(used, "optimizer.momentum", "nothing unless optimizer.type is muon", momentum)
    check_hub_settings(config.hub)
    check_data_settings(config.data)
