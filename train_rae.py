"""Train a representation autoencoder (stage 1): a ViT decoder for a frozen vision encoder, with L1 + LPIPS + GAN.

    accelerate launch train_rae.py --config configs/dinov2_b.yaml --data.path /data/imagenet

Any setting of rae_suite/config.py can be given as a flag; `--help` lists them. The same command continues a run that
was stopped.
The method is that of arXiv 2510.11690. `--config configs/digits_tiny.yaml`, which is also read where there is no
--config, trains on handwritten digits (`python scripts/prepare_data.py digits --output data/digits`) in about three
minutes on two CPU cores and ends at 30 dB PSNR on held-out digits; configs/ has the published settings.
"""

# ruff: noqa: E402
import sys

from rae_suite.config import parse_config

if __name__ == "__main__" and not {"-h", "--help"}.isdisjoint(sys.argv):
    parse_config()  # prints the help and ends the process: the imports below take seconds

import json
import logging
import math
import os
import shutil
import socket
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Optional, TextIO, Union, get_args

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, ViTConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import IMAGE_PROCESSOR_NAME

from modeling_rae import ENCODER_FAMILIES, RAEConfig, RAEModel, encoder_family, vision_config
from rae_suite.autoencoders import weights_digest
from rae_suite.checkpointing import (
    MetricsFile,
    StopSignal,
    by_step,
    checkpoint_step,
    checkpoints,
    fill,
    fill_optimizer,
    is_whole_model,
    last_checkpoint,
    lock_run_folder,
    newest_checkpoint,
    read_checkpoint,
    read_latent_stats,
    restore_folders,
    save_checkpoint,
    whole,
    write_folder,
    write_text,
)
from rae_suite.config import (
    LARGEST,
    Config,
    GANConfig,
    LRScheduleConfig,
    ModelConfig,
    check_same_config,
    config_dict,
    config_yaml,
)
from rae_suite.data import (
    DataError,
    EvalImages,
    ImageSource,
    TrainBatches,
    UnreadableLog,
    chosen_images,
    eval_loader,
    evenly_spread,
    load_splits,
    train_loader,
    training_resize_size,
)
from rae_suite.discriminator import BACKBONE_SETTINGS, DiffAug, DinoDiscriminator, load_backbone
from rae_suite.ema import EMA
from rae_suite.frechet import FID_MODES, FrechetMetric, encoder_metric, inception_metrics, use_cache
from rae_suite.hub import (
    Publisher,
    check_access,
    check_encoder_left_out,
    check_target,
    image_processor_json,
    push_command,
)
from rae_suite.losses import DISCRIMINATOR_LOSSES, build_lpips, generator_gradient, to_discriminator_range
from rae_suite.metrics import HIGHER_IS_BETTER, IMAGE_METRICS, evaluate_reconstructions, quantize
from rae_suite.pictures import plot_curves, progress_strip, reconstruction_grid, save_pairs
from rae_suite.runtime import (
    INTERRUPTED,
    ConfigError,
    RunError,
    WriteError,
    alone,
    blame,
    check_precision,
    compute_deterministically,
    quiet_transformers,
    run_main,
    seeded_generator,
    share_cores,
    to_device,
    writing,
)
from rae_suite.sharding import check_launch, check_processes, fsdp_is_asked_for, plain_accelerator, shard
from rae_suite.streams import Stream, StreamLoader, load_stream_eval_images, open_stream

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------------------
# What a run is made of
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The networks, optimizers and resolved numbers that a training step needs."""

    config: Config
    accelerator: Accelerator
    rae: nn.Module  # prepared: the forward pass with gradients goes through it
    discriminator: Optional[nn.Module]  # prepared; None when the GAN is off
    optimizer: Any
    disc_optimizer: Any
    perceptual: Optional[nn.Module]
    augment: DiffAug
    ema: EMA
    steps_per_epoch: int
    lpips_start: int
    gan_start: int
    disc_start: int  # step of the discriminator's first update
    frozen: dict  # digests of the networks that do not learn, by the setting that names them

    @property
    def model(self) -> RAEModel:
        return self.accelerator.unwrap_model(self.rae)

    @property
    def sharded(self) -> bool:
        return isinstance(self.rae, FSDPModule)


@dataclass
class RunState:
    """What a checkpoint holds beside networks and optimizers. Plain values."""

    step: int = 0
    num_images: Optional[int] = 0  # of the training split; None where a stream's number is not known
    frozen: dict = field(default_factory=dict)  # Run.frozen
    best: Optional[float] = None
    best_of: str = ""  # what `best` is comparable with: metric and number of images
    nonfinite_in_a_row: int = 0
    skipped_steps: int = 0  # because of something not finite, over the whole run
    stream: Optional[dict] = None  # of a streaming run: fingerprint of the shards, states of all lanes


def build_accelerator(config: Config) -> Accelerator:
    output = config.train.output_dir
    for name in config.logging.report_to:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"logging.report_to: expected trackers among {', '.join(LOGGER_TYPE_TO_CLASS)}, got {name!r}"
            )
    check_launch()
    # a microsecond more: Accelerate takes ten minutes for its default and would not pass them on
    timeout = timedelta(minutes=config.train.timeout_minutes, microseconds=1)
    # Accelerate knows no other name for it that all supported releases of torch have
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    with blame("train.mixed_precision"), plain_accelerator():
        accelerator = Accelerator(
            mixed_precision=config.train.mixed_precision,
            # the step divides by the micro-batches itself; an environment variable would have it done twice
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(config.logging.report_to) or None,
            project_config=ProjectConfiguration(project_dir=output, logging_dir=f"{output}/logs"),
            # buffers are the same on all processes by construction; a broadcast would change the discriminator's
            # spectral-norm vectors between its two forward passes
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timeout),
            ],
        )
        check_precision(accelerator)
    check_processes(accelerator)
    check_skipping(config.train.max_nonfinite_steps, accelerator.device)
    set_tf32(config.train.tf32, accelerator)
    share_cores(accelerator, config.train.cpu_threads)
    missing = set(config.logging.report_to) - {str(tracker) for tracker in accelerator.log_with}
    if missing:
        raise ConfigError(f"logging.report_to: the package of tracker '{sorted(missing)[0]}' is not installed")
    config.train.mixed_precision = accelerator.mixed_precision  # what the launcher decided is a part of the run
    return accelerator


def check_skipping(max_nonfinite_steps: int, device: torch.device) -> None:
    """Raise ConfigError where steps that are not finite cannot be skipped."""
    if max_nonfinite_steps and device.type == "mps":
        raise ConfigError(
            f"train.max_nonfinite_steps: expected 0, got {max_nonfinite_steps}: the fused AdamW of Apple's GPUs takes "
            "its step whatever the gradients are"
        )


def set_tf32(allowed: bool, accelerator: Accelerator) -> None:
    """Let float32 products and convolutions use TF32, or not: torch's own default is the one for convolutions alone.
    Raises ConfigError where there is none."""
    on_gpu = accelerator.device.type == "cuda"
    if allowed and not on_gpu:
        raise ConfigError(
            f"train.tf32: expected false, TF32 is a GPU's and this process computes on {accelerator.device}"
        )
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def micro_batch_size(config: Config, num_processes: int) -> int:
    """Images of one forward pass in one process. Raises ConfigError when the global batch does not divide."""
    accumulation = config.train.gradient_accumulation_steps
    size, rest = divmod(config.train.global_batch_size, num_processes * accumulation)
    if rest or size == 0:
        raise ConfigError(
            f"train.global_batch_size: {config.train.global_batch_size} is not a multiple of {num_processes} processes "
            f"x {accumulation} train.gradient_accumulation_steps"
        )
    return size


def build_rae_config(config: Config) -> RAEConfig:
    """The autoencoder's config as `config.model` describes it. Checks all that can be known without the weights of the
    encoder: sizes, statistics, and the architecture of the model to start from."""
    m = config.model
    if m.attn_implementation not in ("eager", *ALL_ATTENTION_FUNCTIONS):
        known = ", ".join(sorted(["eager", *ALL_ATTENTION_FUNCTIONS]))
        raise ConfigError(f"model.attn_implementation: expected one of {known}, got '{m.attn_implementation}'")
    settings = {
        "encoder_input_size": m.encoder_input_size,
        "encoder_layers": m.encoder_layers,
        "encoder_add_spatial_mean": m.encoder_add_spatial_mean,
        "encoder_prefix_tokens": m.encoder_prefix_tokens,
        "encoder_final_norm": m.encoder_final_norm,
        "decoder_hidden_size": m.decoder_hidden_size,
        "decoder_num_hidden_layers": m.decoder_num_hidden_layers,
        "decoder_num_attention_heads": m.decoder_num_attention_heads,
        "decoder_intermediate_size": m.decoder_intermediate_size,
        "decoder_patch_size": m.decoder_patch_size,
        "denormalize_output": m.denormalize_output,
        "noise_tau": m.noise_tau,
        "train_position_embedding": m.train_position_embedding,
        "use_latent_stats": m.latent_stats is not None,
        "attn_implementation": m.attn_implementation,
    }
    with blame("model.encoder", m.encoder):
        if m.encoder_weights == "random":
            known = vision_config({"model_type": m.encoder})
            encoder_family(known, m.encoder_prefix_tokens, m.encoder_final_norm)
            fixed = dict(ENCODER_FAMILIES[m.encoder].config_overrides) if m.encoder in ENCODER_FAMILIES else {}
            check_network_config(m.encoder_config, known, fixed, "model.encoder_config")
            rae_config = RAEConfig(encoder_config={"model_type": m.encoder, **m.encoder_config}, **settings)
        else:
            rae_config = RAEConfig.from_encoder(m.encoder, m.encoder_revision, **settings)
    if rae_config.image_size != m.image_size:
        raise ConfigError(
            f"model.image_size: {m.image_size}, but encoder_input_size {m.encoder_input_size} / encoder patch "
            f"{rae_config.encoder_patch_size} x decoder_patch_size {m.decoder_patch_size} = {rae_config.image_size}"
        )
    if m.latent_stats is not None:
        with blame("model.latent_stats"):
            read_latent_stats(m.latent_stats, rae_config, "model.latent_stats")
    if m.init_from is not None:
        check_architecture(m.init_from, rae_config)
    return rae_config


def check_network_config(settings: dict, known: PreTrainedConfig, fixed: dict, key: str) -> None:
    """Raise ConfigError, about `key`, for fields of an untrained network that its config `known` lacks: transformers'
    configs take any name, and a typo must not end in a default. So do what all configs have, as it is not the
    architecture, other values than the `fixed` ones, and numbers that nothing can be."""
    for name, value in settings.items():
        if not hasattr(known, name) or hasattr(PreTrainedConfig(), name):
            raise ConfigError(f"{key}: {type(known).__name__} has no setting '{name}' of its architecture")
        if value != fixed.get(name, value):
            raise ConfigError(f"{key}: {name} is {value!r}, expected {fixed[name]!r}, as the network always has it")
        if isinstance(value, (int, float)) and not 0 <= value <= LARGEST:
            raise ConfigError(f"{key}: {name} is {value!r}, expected a number from 0 to {LARGEST:.0e}")


def check_architecture(source: str, expected: RAEConfig) -> None:
    """Raise ConfigError unless the RAE `source`, whose decoder training starts from, has the expected architecture."""
    with blame("model.init_from", source):
        found = RAEConfig.from_pretrained(source)
    architecture = ("latent_channels", "latent_size", "decoder_hidden_size", "decoder_num_hidden_layers",
                    "decoder_num_attention_heads", "decoder_intermediate_size", "decoder_patch_size",
                    "denormalize_output")  # fmt: skip
    for name in architecture:
        if getattr(found, name) != getattr(expected, name):
            raise ConfigError(
                f"model.init_from: {source} is of another architecture: its {name} is {getattr(found, name)}, "
                f"this run's is {getattr(expected, name)}"
            )


def check_hub(config: Config, rae_config: RAEConfig) -> None:
    """Raise ConfigError where nothing can be uploaded at the end, as far as it is known without a connection."""
    if config.hub.push:
        check_target(config.hub.repo_id, "hub.repo_id")
        check_access(config.hub.repo_id, "hub.push")
        if not config.hub.include_encoder:
            check_encoder_left_out(rae_config.encoder_id, "hub.include_encoder")


def encoder_source(model: ModelConfig) -> tuple:
    """The setting that decides the encoder's network, and its value."""
    random = model.encoder_weights == "random"
    return ("model.encoder_config", str(model.encoder_config)) if random else ("model.encoder", model.encoder)


def build_rae(config: Config, rae_config: RAEConfig) -> RAEModel:
    """The autoencoder with its encoder's weights, statistics and the decoder it starts from."""
    m = config.model
    set_seed(config.train.seed)  # the same initial weights, whichever other networks the run has
    with blame(*encoder_source(m)):
        rae = RAEModel(rae_config)
        if m.encoder_weights == "pretrained":
            rae.load_encoder()
    if m.latent_stats is not None:
        rae.set_latent_stats(**read_latent_stats(m.latent_stats, rae_config, "model.latent_stats"))
    if m.init_from is not None:
        with blame("model.init_from", m.init_from):
            start = RAEModel.from_pretrained(m.init_from, dtype=torch.float32)
        rae.decoder.load_state_dict(start.decoder.state_dict())
    if m.gradient_checkpointing:
        rae.gradient_checkpointing_enable()
    return rae


def backbone_source(gan: GANConfig) -> tuple:
    """The same for the discriminator's backbone."""
    random = gan.weights == "random"
    return ("gan.backbone_config", str(gan.backbone_config)) if random else ("gan.backbone", gan.backbone)


def build_discriminator(config: Config) -> DinoDiscriminator:
    gan = config.gan
    check_network_config(gan.backbone_config, ViTConfig(), BACKBONE_SETTINGS, "gan.backbone_config")
    set_seed(config.train.seed)
    with blame(*backbone_source(gan)):
        vit = load_backbone(gan.backbone, gan.weights, gan.backbone_config)
        vit.set_attn_implementation(config.model.attn_implementation)
        return DinoDiscriminator(vit, gan.key_depths, gan.kernel_size, gan.norm, gan.norm_eps, gan.spectral_norm)


def compile_networks(rae: RAEModel, discriminator: Optional[DinoDiscriminator], lpips: Optional[nn.Module]) -> None:
    """Compile what a step spends its time in, in place, so that names of weights stay as they are. Transformer blocks
    one by one: those of a network share one compiled function, and processes exchange gradients while the backward pass
    goes on. A graph break is an error; every shape and mode of use has a graph of its own."""
    torch._dynamo.config.optimize_ddp = False  # it would cut the heads' graph, whose buffers two batches change in turn
    torch._dynamo.config.recompile_limit = 64  # graphs of a function: transformers gives all networks' blocks the same
    faster = partial(torch.compile, fullgraph=True, dynamic=False, options={"max_autotune_pointwise": True})
    modules = [*rae.modules(), *([] if discriminator is None else discriminator.backbone.modules())]
    for part in modules:
        if isinstance(part, GradientCheckpointingLayer):
            part.forward = faster(part.forward)
    if lpips is not None:
        lpips.forward = faster(lpips.forward)
    if discriminator is not None:
        discriminator.judge = faster(discriminator.judge)


def build_run(config: Config, accelerator: Accelerator, rae_config: RAEConfig, steps_per_epoch: int) -> Run:
    """Build all networks and optimizers and prepare them for the devices at hand."""

    def start(step: Optional[int], epoch: float) -> int:
        return round(epoch * steps_per_epoch) if step is None else step

    def adamw(parameters: Iterator, settings: Any) -> torch.optim.Optimizer:
        trained = [p for p in parameters if p.requires_grad]
        return torch.optim.AdamW(trained, **asdict(settings), fused=True)

    gan, perceptual = config.gan, config.perceptual
    needs_lpips = perceptual.weight > 0 or "lpips" in config.eval.metrics
    with blame("perceptual.vgg_path"):
        lpips = build_lpips(perceptual.weights, perceptual.vgg_path) if needs_lpips else None
    if lpips is not None:
        on_gpu = accelerator.device.type == "cuda"  # its convolutions in half precision want channels-last tensors
        lpips.to(accelerator.device, memory_format=torch.channels_last if on_gpu else torch.preserve_format)
    discriminator = build_discriminator(config) if gan.weight > 0 else None
    rae = build_rae(config, rae_config)
    frozen = {"model.encoder": weights_digest(rae, ("decoder.", "latent_"))}
    if rae_config.use_latent_stats:
        frozen["model.latent_stats"] = weights_digest(rae, ("decoder.", "encoder."))
    if discriminator is not None:
        frozen["gan.backbone"] = weights_digest(discriminator.backbone)
    if perceptual.weight > 0:
        frozen["perceptual.vgg_path"] = weights_digest(lpips)
    sharded = fsdp_is_asked_for() and accelerator.use_distributed  # one process has nothing to share out
    rae = shard(rae, accelerator) if sharded else accelerator.prepare(rae)
    decoder = accelerator.unwrap_model(rae).decoder
    optimizer = accelerator.prepare(adamw(decoder.parameters(), config.optimizer))  # of the sharded parameters
    with blame(*encoder_source(config.model)), torch.no_grad(), accelerator.autocast():
        blank = torch.zeros(1, 3, rae_config.image_size, rae_config.image_size, device=accelerator.device)
        accelerator.unwrap_model(rae).encode(blank, add_noise=False)  # whether the encoder gives the tokens it should
    disc_optimizer = None
    if discriminator is not None:
        disc_optimizer = adamw(discriminator.parameters(), gan.optimizer)
        discriminator, disc_optimizer = accelerator.prepare(discriminator, disc_optimizer)
        with blame(*backbone_source(gan)), torch.no_grad(), accelerator.autocast():
            accelerator.unwrap_model(discriminator).eval()(blank)  # whether the backbone takes images
    if config.train.compile:
        compile_networks(
            accelerator.unwrap_model(rae),
            None if discriminator is None else accelerator.unwrap_model(discriminator),
            lpips,
        )
    return Run(
        config=config,
        accelerator=accelerator,
        rae=rae,
        discriminator=discriminator,
        optimizer=optimizer,
        disc_optimizer=disc_optimizer,
        perceptual=lpips,
        augment=DiffAug(gan.augment_prob, gan.augment_cutout),
        ema=EMA(decoder, config.ema.decay),
        steps_per_epoch=steps_per_epoch,
        lpips_start=start(perceptual.start_step, perceptual.start_epoch),
        gan_start=start(gan.start_step, gan.start_epoch),
        disc_start=start(gan.update_start_step, gan.update_start_epoch),
        frozen=frozen,
    )


# --------------------------------------------------------------------------------------------------------------------
# One training step
# --------------------------------------------------------------------------------------------------------------------


DISC_TERMS = ("disc_loss", "logits_real", "logits_fake", "accuracy", "disc_grad_norm")


def learning_rate(step: int, peak: float, schedule: LRScheduleConfig, steps_per_epoch: int) -> float:
    """Learning rate of the 0-based `step`: a function of the step alone, so there is no scheduler to save."""
    warmup, end = schedule.warmup_steps, schedule.decay_end_step
    warmup = int(schedule.warmup_epochs * steps_per_epoch) if warmup is None else warmup
    end = max(warmup, int(schedule.decay_end_epoch * steps_per_epoch) if end is None else end)
    if step < warmup:
        return peak * ((step + 1) / warmup if schedule.warmup_from_zero else 1.0)
    if schedule.type == "constant":
        return peak
    final = schedule.final_lr / peak
    if step >= end:
        return peak * final
    progress = (step - warmup) / (end - warmup)
    if schedule.type == "linear":
        return peak * (1 - (1 - final) * progress)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def step_generator(run: Run, step: int, micro_batch: int) -> torch.Generator:
    """Source of noise and augmentation: a function of seed, step and the micro-batch's place in the global batch, so a
    resumed run repeats it, also with micro-batches of this size on other processes."""
    a = run.accelerator
    if run.config.data.streaming:  # a process has the images of neighbouring lanes
        place = a.process_index * run.config.train.gradient_accumulation_steps + micro_batch
    else:  # as TrainBatches shares them out
        place = micro_batch * a.num_processes + a.process_index
    return seeded_generator(run.config.train.seed, step, place, device=a.device)


def no_sync_except_last(run: Run, network: nn.Module, i: int, count: int) -> Any:
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(i == count - 1)
        return nullcontext()
    return nullcontext() if i == count - 1 else run.accelerator.no_sync(network)


def gradient_norm(parameters: Iterable) -> torch.Tensor:
    """Norm of all gradients together; of sharded ones the whole norm, on every process."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def mean_over_processes(run: Run, values: list) -> torch.Tensor:
    """Mean of scalar tensors over all processes, in one vector on the device; nan and inf reach every process."""
    return run.accelerator.reduce(torch.stack([v.float() for v in values]), "mean")


@dataclass
class Update:
    """What an update of a network came to. All tensors are on the device: nothing here waits for them."""

    names: tuple
    values: torch.Tensor  # (len(names),), means over micro-batches and processes
    watched: tuple  # those of the names that must be finite
    finite: torch.Tensor  # (len(watched),) bool
    failed: torch.Tensor  # () bool, the same on all processes: something here or in an update before is not finite
    rate: dict  # name and value of the learning rate


class StepRecord:
    """The numbers of a step, on their way from the device to the host, which goes on meanwhile."""

    def __init__(self, step: int, updates: list):
        self.step = step
        self.layout = [(update.names, update.watched, update.rate) for update in updates]
        values = torch.cat([part for update in updates for part in (update.values, update.finite)])
        # from a CUDA GPU into pinned memory; from others, whose copies could not be waited for, at once
        self.values = values.to("cpu", non_blocking=values.is_cuda)
        self.arrived = torch.cuda.Event() if values.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> dict:
        """Wait for the numbers.

        Returns:
            dict of floats, means over micro-batches and processes: loss, recon, lpips, gan, adaptive_weight,
            grad_norm, lr; disc_loss, logits_real, logits_fake, accuracy, disc_grad_norm, lr_disc (None where the
            discriminator does not train yet, or was left alone because the decoder's update failed);
            `step`, 1-based; `stop`, whether some process was asked to stop; and `nonfinite`: the name of a term that
            is nan or inf, or None.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers = iter(self.values.tolist())
        record = {"step": self.step}
        for names, watched, rate in self.layout:
            record |= {**{name: next(numbers) for name in names}, **rate}
            finite = {name: next(numbers) for name in watched}
            record["nonfinite"] = next((name for name in watched if not finite[name]), None)
            if record["nonfinite"] is not None:
                break  # the updates after it changed nothing
        record["stop"] = record["stop"] > 0
        for name in (*DISC_TERMS, "lr_disc"):
            record.setdefault(name)
        return record


def train_step(run: Run, batches: list, step: int, stop: bool = False) -> StepRecord:
    """One whole step of the method: decoder update, moving average, discriminator updates. The host does not wait for
    the device anywhere in it.

    An update with a term that is nan or inf is not made, and those after it neither, which is decided on the device: a
    term of the decoder leaves everything as it was; one of the discriminator comes after the decoder's update, which
    stands. Gradients that overflow in fp16 only keep their own optimizer from its step.

    Args:
        batches: this process's micro-batches of pixels, each (B, 3, S, S) in [0, 1] on the device.
        step: 0-based; decides learning rates, which losses are on, and the noise.
        stop: whether this process was asked to stop; the record's answer is the same on all processes.
    """
    generators = [step_generator(run, step, i) for i in range(len(batches))]
    with torch.no_grad(), run.accelerator.autocast():
        latents = [run.model.encode(pixels, add_noise=False).latent for pixels in batches]
    update, reconstructions = decoder_step(run, batches, latents, generators, step, stop)
    run.ema.update(unless=update.failed)
    updates = [update]
    if run.discriminator is not None and step >= run.disc_start:
        count = (step - run.disc_start) * run.config.gan.updates_per_step  # the discriminator's own step counter
        for i in range(run.config.gan.updates_per_step):
            failed = updates[-1].failed
            update = discriminator_step(run, batches, latents, reconstructions, generators, count + i, failed)
            updates.append(update)
    return StepRecord(step + 1, updates)


def apply_update(
    run: Run,
    optimizer: Any,
    names: tuple,
    values: torch.Tensor,
    terms: tuple,
    rate: dict,
    failed: Union[bool, torch.Tensor] = False,
) -> Update:
    """Take the optimizer's step unless one of the loss `terms`, the gradient norm (the last of the `values`) or an
    update before, which `failed`, is not finite. Arguments as in Update."""
    scaler, watched = run.accelerator.scaler, (*terms, names[-1])
    named = dict(zip(names, values.unbind(), strict=True))
    finite = torch.stack([named[name] for name in watched]).isfinite()
    # The fused kernel leaves parameters, moments and step counts alone where found_inf is 1. Of a GradScaler's step it
    # would get no more than what the scaler has found in the gradients, and the norm says that too.
    fused = optimizer.optimizer
    fused.found_inf = (failed | ~finite.all()).float()
    fused.step()
    fused.found_inf = None
    if scaler is not None:
        # an overflow in fp16 is the loss scaler's business, it halves its scale: until that is under 1
        finite[-1] |= scaler.scale(torch.ones_like(values[-1])) >= 1
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return Update(names, values, watched, finite, failed | ~finite.all(), rate)


def decoder_step(run: Run, batches: list, latents: list, generators: list, step: int, stop: bool) -> tuple:
    """Update the decoder. Arguments as in `train_step`; latents are clean. Returns the Update and, where the
    discriminator takes them, the reconstructions of each micro-batch, from noisy latents and before the update."""
    config, accelerator, model = run.config, run.accelerator, run.model
    lr = learning_rate(step, config.optimizer.lr, config.lr_schedule, run.steps_per_epoch)
    set_learning_rate(run.optimizer, lr)
    perceptual = run.perceptual if config.perceptual.weight > 0 and step >= run.lpips_start else None
    use_gan = run.discriminator is not None and step >= run.gan_start
    if use_gan:
        discriminator = accelerator.unwrap_model(run.discriminator).eval()

    def judge(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return discriminator(run.augment(images, generator))

    scale_loss = (lambda loss: loss) if accelerator.scaler is None else accelerator.scaler.scale
    model.train()
    sums = torch.zeros(5, device=accelerator.device)
    reconstructions = []
    for i, (pixels, latent, generator) in enumerate(zip(batches, latents, generators, strict=True)):
        with no_sync_except_last(run, run.rae, i, len(batches)):
            noisy = model.add_noise(latent, generator)
            out = run.rae(latent=noisy, return_last_layer=True)
            with accelerator.autocast():
                gradient, terms = generator_gradient(
                    out.patches,
                    out.last_hidden_state,
                    model.patches_to_pixels,
                    pixels,
                    perceptual,
                    config.perceptual.weight,
                    partial(judge, generator=generator) if use_gan else None,
                    config.gan.weight,
                    config.gan.max_adaptive_weight,
                    scale_loss,
                )
            out.patches.backward(gradient / len(batches))
            if config.gan.disc_input == "reuse":
                reconstructions.append(out.sample.detach())
            sums += torch.stack([t.float() for t in vars(terms).values()])
    accelerator.unscale_gradients(run.optimizer)
    parameters = [p for p in model.decoder.parameters() if p.requires_grad]
    grad_norm = gradient_norm(parameters)
    if config.train.clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, config.train.clip_grad_norm, grad_norm)
    asked = torch.full((), float(stop), device=accelerator.device)
    names = (*vars(terms), "stop", "grad_norm")
    values = mean_over_processes(run, [*(sums / len(batches)), asked, grad_norm])
    watched = ("recon", "lpips", "gan") if accelerator.scaler else ("recon", "lpips", "gan", "adaptive_weight")
    return apply_update(run, run.optimizer, names, values, watched, {"lr": lr}), reconstructions


def discriminator_step(
    run: Run,
    batches: list,
    latents: list,
    reconstructions: list,
    generators: list,
    count: int,
    failed: torch.Tensor,
) -> Update:
    """Update the discriminator on images and on reconstructions of clean latents with the updated decoder, or on the
    given `reconstructions` (gan.disc_input). `count`: updates of the discriminator so far. `failed`: whether an update
    of this step before it failed."""
    config, accelerator = run.config, run.accelerator
    lr = learning_rate(count, config.gan.optimizer.lr, config.gan.lr_schedule, run.steps_per_epoch)
    set_learning_rate(run.disc_optimizer, lr)
    heads = accelerator.unwrap_model(run.discriminator).train().heads
    spectral_vectors = {name: buffer.clone() for name, buffer in heads.named_buffers()}  # each forward pass moves them
    loss_function = DISCRIMINATOR_LOSSES[config.gan.loss]
    sums = torch.zeros(4, device=accelerator.device)
    for i, (pixels, latent, generator) in enumerate(zip(batches, latents, generators, strict=True)):
        with no_sync_except_last(run, run.discriminator, i, len(batches)):
            with torch.no_grad(), accelerator.autocast():
                fresh = config.gan.disc_input == "fresh"
                fake = run.rae(latent=latent).sample if fresh else reconstructions[i]
                fake = run.augment(to_discriminator_range(fake.to(pixels.dtype)), generator)
                real = run.augment(2 * pixels - 1, generator)
            fake_logits, real_logits = run.discriminator(fake, real)
            loss = loss_function(real_logits.float(), fake_logits.float())
            accelerator.backward(loss / len(batches))
            accuracy = (real_logits > fake_logits).float().mean()
            sums += torch.stack([loss.detach(), real_logits.detach().mean(), fake_logits.detach().mean(), accuracy])
    accelerator.unscale_gradients(run.disc_optimizer)
    grad_norm = gradient_norm(heads.parameters())
    values = mean_over_processes(run, [*(sums / len(batches)), grad_norm])
    update = apply_update(run, run.disc_optimizer, DISC_TERMS, values, ("disc_loss",), {"lr_disc": lr}, failed)
    for name, buffer in heads.named_buffers():
        torch.where(update.failed, spectral_vectors[name], buffer, out=buffer)
    return update


# --------------------------------------------------------------------------------------------------------------------
# Evaluation, pictures, logging
# --------------------------------------------------------------------------------------------------------------------


def encoder_distance(run: Run) -> FrechetMetric:
    """rfdd of the run's own encoder, in float32 as eval_rfid.py measures it (in TF32 with train.tf32)."""

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        return run.model.encode(pixels, add_noise=False, normalize=False).latent

    return encoder_metric(tokens, run.model, run.model.config.latent_channels, run.accelerator)


def reconstruct(run: Run, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, S, S) in [0, 1] to their reconstructions, without noise."""
    with torch.no_grad(), run.accelerator.autocast():
        return run.rae(latent=run.model.encode(pixels, add_noise=False).latent).sample.float()


class Reporter:
    """Everything that a run writes down: metrics.jsonl, trackers, sample grids, curves, best/ and final/."""

    def __init__(
        self,
        run: Run,
        state: RunState,
        run_dir: Path,
        eval_images: ImageSource,
        unreadable: UnreadableLog,
        distances: list,
    ):
        self.run, self.state, self.run_dir, self.unreadable = run, state, run_dir, unreadable
        accelerator, config = run.accelerator, run.config
        self.file = MetricsFile(run_dir / "metrics.jsonl", accelerator.is_main_process)
        self.chosen = chosen_images(eval_images, config.eval.num_samples)
        size = config.model.image_size
        self.distances = [*distances, encoder_distance(run)] if "rfdd" in config.eval.metrics else distances
        use_cache(self.distances, eval_images, config.eval.num_samples, size, accelerator)
        self.loader = eval_loader(
            eval_images,
            size,
            config.eval.batch_size,
            config.data.num_workers,
            accelerator.process_index,
            accelerator.num_processes,
            config.eval.num_samples,
        )
        shown = EvalImages(eval_images, size)
        stride = max(1, len(shown) // config.logging.num_samples)  # files are sorted by class: show several
        items = [shown[i] for i in range(0, len(shown), stride)][: config.logging.num_samples]
        for item in items:
            unreadable.add(item["unreadable"])
        readable = [item["pixels"] for item in items if item["pixels"] is not None]
        if not readable:
            raise DataError(f"data.eval_split: none of {len(items)} evaluation images can be read")
        self.shown = torch.stack(readable).float() / 255

    def write(self, kind: str, values: dict) -> None:
        step = self.state.step
        place = {"step": step, "epoch": round(step / self.run.steps_per_epoch, 4)}
        self.file.append({"kind": kind, **place, "time": round(time.time(), 3), **values})
        prefix = f"eval_{values['model']}" if kind == "eval" else kind
        numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        with writing(self.run_dir / "logs"):
            self.run.accelerator.log(numbers, step=step)

    def forget_after(self, step: int) -> None:
        """Drop what there is of steps after `step`: the run goes on from there and writes it again."""
        self.file.forget_after(step)
        if self.run.accelerator.is_main_process:
            for path in (*by_step(self.run_dir / "samples", r"\.png"), *by_step(self.run_dir / "pairs", "-(raw|ema)")):
                if checkpoint_step(path) > step:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.run.accelerator.wait_for_everyone()  # other processes write pictures of the same names

    def train(self, record: dict, images_per_second: float) -> None:
        values = {k: v for k, v in record.items() if k not in ("step", "stop", "nonfinite")}
        counts = {"skipped_steps": self.state.skipped_steps, "images_per_second": round(images_per_second, 3)}
        self.write("train", {**values, **counts})

    @torch.compiler.set_stance("force_eager")  # evaluation has shapes of its own: no graphs for them
    def evaluate(self) -> None:
        """Evaluate the averaged model, and the raw one if asked; the best averaged one goes to best/."""
        run, names = self.run, self.run.config.eval.metrics
        saved = set(evenly_spread(self.chosen, run.config.eval.save_pairs))
        run.model.eval()
        for model in ("raw", "ema") if run.config.eval.raw else ("ema",):
            folder = self.run_dir / "pairs" / f"step-{self.state.step:08d}-{model}"
            with run.ema.applied() if model == "ema" else nullcontext():
                evaluation = evaluate_reconstructions(
                    lambda pixels, index: reconstruct(run, pixels),
                    self.loader,
                    [name for name in names if name in IMAGE_METRICS],
                    run.accelerator,
                    run.perceptual,
                    self.unreadable.add,
                    self.distances,
                    on_batch=partial(save_pairs, folder, saved),
                    sharded=run.sharded,
                )
            values = evaluation.summary()
            self.write("eval", {"model": model, **values})
        shown = ", ".join(f"{name} {values[name]:.4f}" for name in names)
        tell(run, f"step {self.state.step}: {shown} (EMA, {values['num_samples']} images)")
        metric = run.config.eval.best_metric
        value, sign = values[metric], 1 if HIGHER_IS_BETTER[metric] else -1
        best_of = f"{metric} of {values['num_samples']} images"
        if self.state.best_of != best_of:  # a continued run may be evaluated otherwise
            self.state.best, self.state.best_of = None, best_of
        if math.isfinite(value) and (self.state.best is None or sign * value > sign * self.state.best):
            self.state.best = value
            self.export("best")

    @torch.compiler.set_stance("force_eager")
    def samples(self) -> None:
        """Write the sample grid of the averaged model, the curves and the strip; show the grid to the trackers."""
        run, path = self.run, self.run_dir / "samples" / f"step-{self.state.step:08d}.png"
        run.model.eval()
        images = self.shown.to(run.accelerator.device)
        with run.ema.applied():
            reconstructions = reconstruct(run, images)  # on all processes: a sharded model takes them all
        if run.accelerator.is_main_process:
            grid = reconstruction_grid(images, quantize(reconstructions)).numpy()
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(grid).save(path)
            plot_curves(self.file.read(), self.run_dir / "curves.png")
            progress_strip(by_step(path.parent, r"\.png"), self.run_dir / "progress.png")
            for tracker in run.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    with writing(self.run_dir / "logs"):
                        tracker.log_images({"reconstructions": grid[None]}, step=self.state.step, **options)

    def export(self, name: str) -> None:
        """Write the averaged model as a from_pretrained folder."""
        accelerator, model = self.run.accelerator, self.run.model
        with torch.device("meta"):  # for its class and config: those of a sharded model are not what is to be saved
            unsharded = RAEModel(model.config)

        def write(folder: Path) -> None:
            with self.run.ema.applied():
                state = whole(model.state_dict(), accelerator.is_main_process)
                if accelerator.is_main_process:
                    unsharded.save_pretrained(folder, state_dict=state)
            if accelerator.is_main_process:
                (folder / IMAGE_PROCESSOR_NAME).write_text(image_processor_json(model.config.image_size))

        write_folder(self.run_dir / name, write, accelerator.is_main_process, accelerator.wait_for_everyone)

    def push(self, publisher: Optional[Publisher]) -> None:
        """Start to upload the averaged model as it is now, unless an upload is on its way. `publisher`: of the main
        process."""
        [busy] = broadcast_object_list([publisher is not None and publisher.busy()])
        if busy:
            tell(self.run, f"step {self.state.step}: not uploaded, the upload before is still on its way")
            return
        name = f"hub/step-{self.state.step:08d}"
        self.export(name)
        if publisher is not None:
            publisher.push(self.run_dir / name)

    def summary(self) -> str:
        """First and last evaluation of the averaged model, and where the files are."""
        evals = [line for line in self.file.read() if line["kind"] == "eval" and line["model"] == "ema"]
        data = self.run.config.data
        images = "training images" if data.eval_split == data.train_split else "held-out images"
        rows = [f"{f'EMA model, {images}':<28}{'before':>10}{'after':>10}"]
        first, last = (evals[0], evals[-1]) if evals else ({}, {})  # the file may have been deleted
        if first.get("num_samples") != last.get("num_samples"):
            first = {}  # not comparable
        for name in self.run.config.eval.metrics:
            values = (line.get(name) for line in (first, last))
            rows.append(f"{name:<28}" + "".join(f"{'-' if v is None else f'{v:.4f}':>10}" for v in values))
        if self.state.skipped_steps:
            rows.append(f"steps skipped, not finite: {self.state.skipped_steps} of {self.state.step}")
        picture = self.run_dir / "samples" / f"step-{last.get('step', self.state.step):08d}.png"
        places = {
            "pictures": picture,
            "curves": self.run_dir / "curves.png",
            "progress": self.run_dir / "progress.png",
            "model": self.run_dir / "final",
        }
        if self.run.accelerator.device.type == "cuda":
            rows.append(f"peak GPU memory of a process: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        return "\n".join([*rows, *(f"{what:<10}{place}" for what, place in places.items())])


def tell(run: Run, message: str) -> None:
    """Print on the main process, above the progress bar."""
    if run.accelerator.is_main_process:
        tqdm.write(message)


# --------------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------------


def check_run_folder(config: Config) -> Path:
    """The run folder: a new one, or one of the same config. Raises ConfigError for anything else."""
    run_dir = Path(config.train.output_dir)
    saved = run_dir / "config.yaml"
    place = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"train.output_dir: {run_dir} cannot be made, {place} is no folder that can be written to")
    if saved.exists():
        check_same_config(config, saved)
        MetricsFile(run_dir / "metrics.jsonl", enabled=False).read()  # or names the line that is damaged
    elif run_dir.exists() and any(not path.name.startswith(".") for path in run_dir.iterdir()):
        raise ConfigError(f"train.output_dir: {run_dir} is not empty and has no config.yaml of a run")
    return run_dir


def take_run_folder(config: Config, run_dir: Path) -> TextIO:
    """Create the run folder, lock it against a second run, and write the config. Keep the result until the end."""
    with writing(run_dir / ".lock"):
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_run_folder(run_dir)
        except BlockingIOError:
            raise ConfigError(f"train.output_dir: another run is at work in {run_dir}") from None
    with writing(run_dir):
        restore_folders(run_dir)
    write_text(run_dir / "config.yaml", config_yaml(config))
    return lock


@dataclass
class TrainingData:
    """Training images, a numbered list or a stream, and evaluation images."""

    images: Union[ImageSource, Stream]
    batches: Optional[TrainBatches]  # the order in which a list is drawn; None for a stream
    eval_images: ImageSource
    num_images: Optional[int]  # None where a stream's number is not known
    steps_per_epoch: int

    @property
    def shards(self) -> Optional[str]:
        """Fingerprint of a stream's shards, None for a list."""
        return self.images.fingerprint() if self.batches is None else None


SHARDS = "shards.json"  # in the run folder: Stream.record


def read_shards(run_dir: Path) -> Optional[list]:
    """The record of a stream with which the run in this folder began, None where it is to begin. Raises ConfigError."""
    file = run_dir / SHARDS
    if not checkpoints(run_dir) or not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}); without it the shards that are there now are taken") from None


def open_data(config: Config, accelerator: Accelerator, micro_batch: int) -> TrainingData:
    """Find the images. Settles the number of a stream's lanes, which the run folder then keeps. Raises DataError."""
    if config.data.streaming:
        if config.data.stream_lanes is None:
            config.data.stream_lanes = accelerator.num_processes * max(1, config.data.num_workers)
        began = read_shards(Path(config.train.output_dir))
        stream = open_stream(config.data, config.train.global_batch_size, config.train.seed, accelerator, began)
        eval_images = load_stream_eval_images(config.data, config.eval.num_samples)
        return TrainingData(stream, None, eval_images, stream.num_images, stream.steps_per_epoch)
    images, eval_images = load_splits(config.data, config.train.seed)
    batches = TrainBatches(
        len(images),
        config.train.global_batch_size,
        micro_batch,
        accelerator.process_index,
        accelerator.num_processes,
        config.train.seed,
        start_step=0,
        total_steps=0,
    )
    return TrainingData(images, batches, eval_images, len(images), batches.steps_per_epoch)


def open_loader(run: Run, data: TrainingData, state: RunState, total_steps: int) -> Iterable:
    """This process's micro-batches from `state.step` on."""
    config, accelerator, size = run.config, run.accelerator, run.config.model.image_size
    if data.batches is None:
        return StreamLoader(
            data.images,
            config.data,
            size,
            accelerator.process_index,
            accelerator.num_processes,
            config.train.gradient_accumulation_steps,
            state.stream["lanes"],
        )
    data.batches.start_step, data.batches.total_steps = state.step, total_steps
    resize_size, max_unreadable = config.data.resize_size, config.data.max_unreadable
    return train_loader(data.images, data.batches, size, resize_size, max_unreadable, config.data.num_workers)


def check_shared_folder(run_dir: Path, lock: Optional[TextIO], patience: float = 90) -> None:
    """Raise ConfigError, on all processes, when some machine does not see the main process's run folder, from which
    all of them read checkpoints. `lock`: the main process's, what `take_run_folder` gave. `patience`: seconds; a
    network file system may remember for a minute that a file was not there."""
    token = uuid.uuid4().hex
    if lock is not None:
        lock.truncate(0)  # it was opened to append
        lock.write(token)
        lock.flush()
        os.fsync(lock.fileno())
    [token] = broadcast_object_list([token])
    file, deadline = run_dir / ".lock", time.monotonic() + patience
    while not (seen := file.exists() and file.read_text() == token) and time.monotonic() < deadline:
        time.sleep(1)
    elsewhere = sorted({host for host in gather_object([None if seen else socket.gethostname()]) if host is not None})
    if elsewhere:
        raise ConfigError(
            f"train.output_dir: {run_dir} on {', '.join(elsewhere)} is another folder than the main process's, "
            "expected one on a file system that all machines share"
        )


def checkpoint_parts(run: Run, state: RunState) -> dict:
    """All that changes while a run goes on."""
    parts = {
        "state": asdict(state),
        "decoder": run.model.decoder.state_dict(),
        "ema": run.ema.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    if run.discriminator is not None:
        parts["discriminator"] = run.accelerator.unwrap_model(run.discriminator).heads.state_dict()
        parts["disc_optimizer"] = run.disc_optimizer.state_dict()
    if run.accelerator.scaler is not None:
        parts["scaler"] = run.accelerator.scaler.state_dict()
    return parts


def find_checkpoint(accelerator: Accelerator, run_dir: Path) -> Optional[Path]:
    """The newest whole checkpoint, the same on all processes, or None. Raises RunError when all are damaged."""
    found = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = newest_checkpoint(run_dir, tqdm.write)
        except ValueError as error:
            found[1] = str(error)
    path, problem = broadcast_object_list(found)
    if problem is not None:
        raise RunError(problem)
    return path


def fill_state(state: RunState, saved: dict) -> None:
    """Take over saved values. Raises KeyError for one that is missing, and ValueError for another type."""
    for item in fields(state):
        value, kinds = saved[item.name], get_args(item.type) or (item.type,)
        if not isinstance(value, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"state.json: {item.name} is {value!r}, expected {expected}")
        setattr(state, item.name, value)


def load_checkpoint(run: Run, state: RunState, path: Path) -> None:
    """Load the complete state. Raises RunError, which names the checkpoint, when it cannot be read, and ConfigError
    when it is of other frozen networks than the run's."""
    try:
        saved = read_checkpoint(path)
        fill_state(state, saved["state"])
        fill(run.model.decoder.state_dict(), saved["decoder"], "decoder")
        run.ema.load_state_dict(saved["ema"])
        fill_optimizer(run.optimizer, saved["optimizer"])
        if run.discriminator is not None:
            heads = run.accelerator.unwrap_model(run.discriminator).heads
            fill(heads.state_dict(), saved["discriminator"], "discriminator")
            fill_optimizer(run.disc_optimizer, saved["disc_optimizer"])
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(saved["scaler"])
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"checkpoint {path} cannot be read: {type(error).__name__} {error}") from error
    for setting, digest in run.frozen.items():
        if state.frozen.get(setting) != digest:
            raise ConfigError(
                f"{setting}: its weights are not those that {path} was trained with; choose another train.output_dir "
                "or the same weights"
            )


def continue_run(run: Run, state: RunState, data: TrainingData, run_dir: Path) -> bool:
    """Load the newest whole checkpoint, if there is one; the result says so. Raises RunError when all are damaged, and
    ConfigError when the run began with other images."""
    state.num_images = data.num_images
    state.stream = None if data.batches is not None else {"shards": data.shards, "lanes": None}
    checkpoint = find_checkpoint(run.accelerator, run_dir)
    if checkpoint is None:
        return False
    load_checkpoint(run, state, checkpoint)
    tell(run, f"continuing from {checkpoint}")
    other = f"choose another train.output_dir, with model.init_from {run_dir}/best"
    if data.batches is None:
        if (state.stream or {}).get("shards") != data.shards:
            raise ConfigError(
                f"data.path: the shards, or their numbers of images, are not those that {run_dir} began with (see its "
                f"{SHARDS}); take out what was added, or {other}"
            )
    elif state.num_images != data.num_images:
        raise ConfigError(
            f"data.path: {run.config.data.path} has {data.num_images} training images, {run_dir} began with "
            f"{state.num_images}; take out what was added, put back what is missing (an empty file with the name of a "
            f"lost one will do: it is skipped), or {other}"
        )
    return True


def start_trackers(config: Config, accelerator: Accelerator, run_dir: Path, step: int) -> None:
    """Start the trackers; a run that continues at `step` goes on in the same wandb run, and tensorboard forgets what it
    has of later steps."""
    options = {"tensorboard": {"purge_step": step + 1 if step else 0}}  # step 0 is evaluated again
    if "wandb" in config.logging.report_to and accelerator.is_main_process:
        id_file = run_dir / "wandb_run_id.txt"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex[:8])
        run_id = id_file.read_text().strip()
        options["wandb"] = {"id": run_id, "resume": "allow", "name": run_dir.name, "dir": str(run_dir)}
    with writing(run_dir / "logs"):
        accelerator.init_trackers(config.logging.project, init_kwargs=options)
    # tensorboard writes in a thread, whose traceback would bury the one line that its error, raised here again, ends in
    show = threading.excepthook
    threading.excepthook = lambda failed: type(failed.thread).__name__ == "_AsyncWriterThread" or show(failed)
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # its hyperparameter table takes no nested settings
                tracker.store_init_configuration(config_dict(config))
            if not hasattr(tracker, "log_images"):
                logger.warning("tracker %s takes no images: sample grids are in %s/samples", tracker.name, run_dir)


def stop_on_nonfinite(run: Run, state: RunState, record: dict, run_dir: Path) -> None:
    """Count a step with a non-finite term; raise RunError when there were too many in a row."""
    if record["nonfinite"] is None:
        state.nonfinite_in_a_row = 0
        return
    state.nonfinite_in_a_row += 1
    limit = run.config.train.max_nonfinite_steps
    where = f"{record['nonfinite']} is {record[record['nonfinite']]} at step {record['step']}"
    if state.nonfinite_in_a_row > limit:
        raise RunError(f"{where}; {last_checkpoint(run_dir)}")
    state.skipped_steps += 1
    tell(run, f"skipped: {where} ({state.nonfinite_in_a_row} in a row of at most {limit})")


def steps_behind(device: torch.device) -> int:
    """How many steps after its own a record is read at the latest. On a GPU one, so that it has the next step to
    compute while the host waits for this one's numbers; the same on all processes, which act on them together."""
    return 1 if device.type == "cuda" else 0


@contextmanager
def resumable(run_dir: Path) -> Iterator[None]:
    """Say what the run continues from when it ends by Ctrl-C or because something cannot be written."""
    try:
        yield
    except WriteError as error:
        message = f"{error}; {last_checkpoint(run_dir)}; the same command continues"
        raise RunError(message, everywhere=True) from error
    except KeyboardInterrupt:
        raise RunError(
            f"stopped by Ctrl-C; {last_checkpoint(run_dir)}; the same command continues", INTERRUPTED
        ) from None


def train(
    run: Run,
    state: RunState,
    reporter: Reporter,
    publisher: Optional[Publisher],
    loader: Any,
    total_steps: int,
    run_dir: Path,
) -> bool:
    """The training loop. Returns whether it came to its end (and was not asked to stop)."""
    config, accelerator = run.config, run.accelerator

    def due(steps: Optional[int], epochs: float = 0) -> bool:
        every = steps or max(1, round(epochs * run.steps_per_epoch))
        return state.step % every == 0 or state.step == total_steps

    if state.step == 0:
        reporter.evaluate()
        reporter.samples()
    stop, stopping = StopSignal(), False
    on_their_way, behind = deque(), steps_behind(accelerator.device)  # records of steps, the oldest first
    micro_batches = iter(loader)
    progress = tqdm(
        total=total_steps,
        initial=state.step,
        unit="step",
        mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds: a log file is not flooded
        disable=not (config.logging.progress_bar and accelerator.is_main_process),
    )
    clock, clocked = time.perf_counter(), state.step
    while state.step < total_steps:
        batches = []
        for _ in range(config.train.gradient_accumulation_steps):
            batch = next(micro_batches)
            reporter.unreadable.add(batch["unreadable"])
            batches.append(to_device(batch["pixels"], accelerator.device).float() / 255)
        on_their_way.append(train_step(run, batches, state.step, stop.received is not None))
        state.step += 1

        logging_due = state.step == 1 or due(config.logging.every_steps)
        evaluation_due = due(config.eval.every_steps, config.eval.every_epochs)
        every = config.logging.samples_every_steps
        samples_due = evaluation_due if every is None else due(every)
        push_due = bool(config.hub.every_steps) and due(config.hub.every_steps)
        saving_due = due(config.train.save_every_steps, config.train.save_every_epochs)
        read_all = logging_due or evaluation_due or samples_due or push_due or saving_due
        # what is written down is of steps that are known to be good
        while on_their_way and (read_all or stopping or len(on_their_way) > behind):
            record = on_their_way.popleft().read()
            stop_on_nonfinite(run, state, record, run_dir)
            stopping = stopping or record["stop"]

        if logging_due:
            rate = (state.step - clocked) * config.train.global_batch_size / (time.perf_counter() - clock)
            reporter.train(record, rate)
            progress.set_postfix(loss=f"{record['loss']:.4f}", images_per_s=f"{rate:.1f}", refresh=False)
            clock, clocked = time.perf_counter(), state.step
        progress.update()

        pause = time.perf_counter()
        if evaluation_due:
            reporter.evaluate()
        if samples_due:
            reporter.samples()
        if state.step == total_steps:
            reporter.export("final")  # before the checkpoint that says the run is finished
        elif push_due:
            reporter.push(publisher)
        if stopping or saving_due:
            if state.stream is not None:
                state.stream["lanes"] = gather_object([loader.states[lane] for lane in sorted(loader.states)])
            parts = checkpoint_parts(run, state)
            save_checkpoint(accelerator, run_dir, state.step, parts, config.train.keep_last)
        clock += time.perf_counter() - pause  # images per second are those of training
        if stopping and state.step < total_steps:
            tell(run, f"stopped by {stop.received or 'another process'} after step {state.step}, saved; "
                      "the same command continues")  # fmt: skip
            break
    progress.close()
    return state.step >= total_steps


def main() -> None:
    config = parse_config()
    quiet_transformers()
    if config.train.deterministic:
        compute_deterministically()

    # everything that can be wrong is looked at before anything expensive starts
    accelerator = build_accelerator(config)
    with blame("train.output_dir"):
        run_dir = check_run_folder(config)
    micro_batch = micro_batch_size(config, accelerator.num_processes)
    rae_config = build_rae_config(config)
    check_hub(config, rae_config)
    training_resize_size(config.model.image_size, config.data.resize_size)
    data = open_data(config, accelerator, micro_batch)
    total_steps = config.train.max_steps or max(1, round(config.train.epochs * data.steps_per_epoch))
    saved = checkpoints(run_dir)
    finished = saved and checkpoint_step(saved[-1]) >= total_steps and is_whole_model(run_dir / "final")
    if broadcast_object_list([finished])[0]:  # as the main process sees it: a machine may lack the folder
        if accelerator.is_main_process:
            done = checkpoint_step(saved[-1])
            print(f"{run_dir} is finished: {done} of {total_steps} steps, model in {run_dir / 'final'}")
            if config.hub.push:
                print(f"to upload it: {push_command(config.hub, run_dir / 'final')}")
        return

    inception = [name for name in config.eval.metrics if name in FID_MODES]
    distances = inception_metrics(inception, config.eval.inception_path, "eval.inception_path", accelerator)
    publisher = Publisher(config.hub, run_dir) if config.hub.push and accelerator.is_main_process else None

    # networks, and the state of an earlier part of this run
    run = build_run(config, accelerator, rae_config, data.steps_per_epoch)
    lock = take_run_folder(config, run_dir) if accelerator.is_main_process else None
    check_shared_folder(run_dir, lock)
    state = RunState(frozen=run.frozen)
    continued = continue_run(run, state, data, run_dir)
    if data.batches is None and accelerator.is_main_process:
        write_text(run_dir / SHARDS, json.dumps(data.images.record()))
    loader = open_loader(run, data, state, total_steps)
    unreadable = UnreadableLog(config.data.max_unreadable)
    reporter = Reporter(run, state, run_dir, data.eval_images, unreadable, distances)
    reporter.forget_after(state.step if continued else -1)
    start_trackers(config, accelerator, run_dir, state.step)
    tell(run, describe(run, data, micro_batch, total_steps))

    if state.step < total_steps and accelerator.is_main_process:
        shutil.rmtree(run_dir / "final", ignore_errors=True)  # of this run when it was shorter

    with alone(accelerator), resumable(run_dir):
        finished = train(run, state, reporter, publisher, loader, total_steps, run_dir)
        # it may be damaged, or the checkpoints reach further than train.max_steps now does
        if finished and not is_whole_model(run_dir / "final"):
            reporter.export("final")
    if finished:
        tell(run, reporter.summary() if accelerator.is_main_process else "")
    accelerator.end_training()
    if finished and publisher is not None:
        publisher.finish(run_dir / "final")  # the other processes are not kept waiting
    if lock is not None:
        lock.close()


def describe(run: Run, data: TrainingData, micro_batch: int, total_steps: int) -> str:
    """What is about to happen, in a few lines."""
    c, a = run.config, run.accelerator
    decoder = sum(p.numel() for p in run.model.decoder.parameters()) / 1e6
    encoder = sum(p.numel() for p in run.model.encoder.parameters()) / 1e6
    starts = [f"LPIPS from step {run.lpips_start}" if c.perceptual.weight > 0 else "no LPIPS"]
    if run.discriminator is not None:
        starts += [f"discriminator from {run.disc_start}", f"adversarial loss from {run.gan_start}"]
    return "\n".join(
        [
            f"encoder {c.model.encoder} {encoder:.1f}M frozen, decoder {decoder:.1f}M, {c.model.image_size} px",
            f"{data.num_images or 'streamed'} training and {len(data.eval_images)} evaluation images, "
            f"{run.steps_per_epoch} steps an epoch, {total_steps} steps; {', '.join(starts)}",
            f"batch {c.train.global_batch_size} = {a.num_processes} processes x {micro_batch} images x "
            f"{c.train.gradient_accumulation_steps} accumulated, precision {a.mixed_precision}, {a.device.type}"
            + (", RAE sharded (FSDP2)" if run.sharded else ""),
        ]
    )


if __name__ == "__main__":
    run_main(main)
