"""The networks of stage 1, built as the settings describe them, and the files that go with an RAE."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedConfig, ViTConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import IMAGE_PROCESSOR_NAME

from modeling_rae import (
    ENCODER_FAMILIES,
    RAEConfig,
    RAEDecoder,
    RAEModel,
    encoder_family,
    expand_statistics,
    vision_config,
)
from rae_suite.cli import LARGEST
from rae_suite.digests import weights_digest
from rae_suite.discriminator import BACKBONE_SETTINGS, DinoDiscriminator, load_backbone
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.files import read_tensors
from rae_suite.settings_rae import GANConfig, ModelConfig


def build_rae_config(m: ModelConfig) -> RAEConfig:
    """The autoencoder's config as the settings describe it. Checks all that can be known without the weights of the
    encoder: sizes and statistics."""
    if m.attn_implementation not in ("eager", *ALL_ATTENTION_FUNCTIONS):
        known = ", ".join(sorted(["eager", *ALL_ATTENTION_FUNCTIONS]))
        raise ConfigError(f"model.attn_implementation: expected one of {known}, got '{m.attn_implementation}'")
    settings = {
        "encoder_input_size": m.encoder_input_size,
        "encoder_layers": m.encoder_layers,
        "encoder_add_spatial_mean": m.encoder_add_spatial_mean,
        "encoder_keep_final_affine": m.encoder_keep_final_affine,
        "encoder_prefix_tokens": m.encoder_prefix_tokens,
        "encoder_final_norm": m.encoder_final_norm,
        "decoder_hidden_size": m.decoder_hidden_size,
        "decoder_num_hidden_layers": m.decoder_num_hidden_layers,
        "decoder_num_attention_heads": m.decoder_num_attention_heads,
        "decoder_intermediate_size": m.decoder_intermediate_size,
        "decoder_patch_size": m.decoder_patch_size,
        "denormalize_output": m.denormalize_output,
        "noise_tau": m.noise_tau,
        "noise_distribution": m.noise_distribution,
        "train_position_embedding": m.train_position_embedding,
        "use_latent_stats": m.latent_stats is not None,
        "attn_implementation": m.attn_implementation,
    }
    pixel_stats = {"image_mean": m.image_mean, "image_std": m.image_std}
    settings |= {name: values for name, values in pixel_stats.items() if values is not None}
    with error_names_setting("model.encoder", m.encoder):
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
        with error_names_setting("model.latent_stats"):
            stats = read_latent_stats(m.latent_stats, rae_config, "model.latent_stats")
        rae_config.latent_stats_have_mean = stats["mean"] is not None
    return rae_config


def check_network_config(settings: dict, known: PreTrainedConfig, fixed: dict, key: str) -> None:
    """Raise ConfigError, about `key`, for fields of an untrained network that its config `known` lacks: transformers'
    configs take any name, and a typo must not end in a default. Also refused: fields common to all configs, because
    they are not of the architecture; values that contradict `fixed`; numbers outside of 0 to LARGEST."""
    for name, value in settings.items():
        if not hasattr(known, name) or hasattr(PreTrainedConfig(), name):
            raise ConfigError(f"{key}: {type(known).__name__} has no setting '{name}' of its architecture")
        if value != fixed.get(name, value):
            raise ConfigError(f"{key}: {name} is {value!r}, expected {fixed[name]!r}, as the network always has it")
        if isinstance(value, (int, float)) and not 0 <= value <= LARGEST:
            raise ConfigError(f"{key}: {name} is {value!r}, expected a number from 0 to {LARGEST:.0e}")


def encoder_source(model: ModelConfig) -> tuple:
    """The setting that decides the encoder's network, and its value."""
    random = model.encoder_weights == "random"
    return ("model.encoder_config", str(model.encoder_config)) if random else ("model.encoder", model.encoder)


def build_rae(m: ModelConfig, seed: int, rae_config: RAEConfig) -> RAEModel:
    """The autoencoder with its encoder's weights, statistics and a new decoder."""
    set_seed(seed)  # the same initial weights, whichever other networks the run has
    with error_names_setting(*encoder_source(m)):
        rae = RAEModel(rae_config)
        if m.encoder_weights == "pretrained":
            rae.load_encoder()
    if m.latent_stats is not None:
        rae.set_latent_stats(**read_latent_stats(m.latent_stats, rae_config, "model.latent_stats"))
    if m.gradient_checkpointing:
        rae.gradient_checkpointing_enable()
    return rae


def frozen_digests(rae: RAEModel) -> dict:
    """Digests of what does not learn in an RAE, by the setting that names it: checkpoints keep them."""
    digests = {"model.encoder": weights_digest(rae, ("decoder.", "latent_"))}
    if rae.config.use_latent_stats:
        digests["model.latent_stats"] = weights_digest(rae, ("decoder.", "encoder."))
    return digests


def empty_decoder(config: RAEConfig) -> dict:
    """Names and tensors without data of the decoder that `config` describes."""
    with torch.device("meta"):
        return RAEDecoder(config).state_dict()


def backbone_source(gan: GANConfig) -> tuple:
    """The setting that decides the network of the discriminator's backbone, and its value."""
    random = gan.weights == "random"
    return ("gan.backbone_config", str(gan.backbone_config)) if random else ("gan.backbone", gan.backbone)


def build_discriminator(gan: GANConfig, attn_implementation: str, seed: int) -> DinoDiscriminator:
    check_network_config(gan.backbone_config, ViTConfig(), BACKBONE_SETTINGS, "gan.backbone_config")
    set_seed(seed)
    with error_names_setting(*backbone_source(gan)):
        vit = load_backbone(gan.backbone, gan.weights, gan.backbone_config)
        vit.set_attn_implementation(attn_implementation)
        return DinoDiscriminator(vit, gan.key_depths, gan.kernel_size, gan.norm, gan.norm_eps, gan.spectral_norm)


def compile_networks(rae: RAEModel, discriminator: Optional[DinoDiscriminator], lpips: Optional[nn.Module]) -> None:
    """Compile what a step spends its time in, in place, so that names of weights stay as they are. Transformer blocks
    one by one: those of a network share one compiled function, and processes exchange gradients while the backward pass
    goes on. A graph break is an error; every shape and mode of use has a graph of its own."""
    modules = [*rae.modules(), *([] if discriminator is None else discriminator.backbone.modules())]
    for part in modules:
        if isinstance(part, GradientCheckpointingLayer):
            part.forward = compiled(part.forward)
    if lpips is not None:
        lpips.forward = compiled(lpips.forward)
    if discriminator is not None:
        discriminator.judge = compiled(discriminator.judge)


COMPILE_OPTIONS = {"max_autotune_pointwise": True}  # of inductor


def compiled(function: Callable) -> Callable:
    """The function, compiled when it is first called."""
    torch._dynamo.config.optimize_ddp = False  # it would cut the heads' graph, whose buffers two batches change in turn
    torch._dynamo.config.recompile_limit = 64  # graphs of a function: transformers gives all networks' blocks the same
    return torch.compile(function, fullgraph=True, dynamic=False, options=COMPILE_OPTIONS)


def read_latent_stats(path: Path, rae_config: Any, setting: str) -> dict:
    """`mean` and `var` of a statistics file, (C, h, w) each as `rae_config` has them. As in the published code, shapes
    that broadcast to it are expanded, and the mean may be absent or None, as in the published file of DINOv2-B: it is
    None here, and nothing is subtracted. Raises as `read_tensors`, and ValueError when the variance is missing, when
    shapes do not fit, or when they are no mean and variance."""
    found = read_tensors(path, setting, may_be_none=("mean",))
    if "var" not in found:
        raise ValueError(f"{setting}: {path} holds {sorted(found)}, expected 'mean' and 'var', or 'var' without a mean")
    shape = (rae_config.latent_channels, rae_config.latent_size, rae_config.latent_size)
    stats = {"mean": None}
    for name in ("mean", "var"):
        if name not in found:
            continue
        what = f"{setting}: '{name}' in {path}"
        stats[name] = expand_statistics(found[name], shape, what).contiguous()
        if not stats[name].is_floating_point():
            raise ValueError(f"{what} is {stats[name].dtype}, expected floating-point numbers")
        if not stats[name].float().isfinite().all():
            raise ValueError(f"{what} has values that are not finite")
    least = stats["var"].double().min()
    if least < 0:
        raise ValueError(f"{setting}: 'var' in {path} goes down to {least:.3g}, expected at least 0")
    return stats


def give_latent_stats(rae: RAEModel, mean: Optional[torch.Tensor], var: torch.Tensor) -> None:
    """Have a model normalise its latents with a mean (None: nothing is subtracted) and a variance, (C, h, w) each, also
    one that was built without a place for them. They are float32, whatever its weights are."""
    rae.config.use_latent_stats, rae.config.latent_stats_have_mean = True, mean is not None
    for name, value in (("latent_mean", mean), ("latent_var", var)):
        rae.register_buffer(name, None if value is None else value.to(rae.device, torch.float32))


def image_processor_json(image_size: int) -> str:
    """Text of a preprocessor_config.json with which AutoImageProcessor gives what `encode` takes: pixels (B, 3, S, S)
    in [0, 1], S = image_size.

    A stock processor, as near to images.center_crop as those get: shorter side to image_size (bicubic, antialiased),
    the middle cut out. Of a square image the pixels are the same, up to 2 levels of 255 with torchvision's resize and
    exactly with Pillow's. Else the crop may lie up to a pixel beside (the longer side is rounded down, not to the
    nearest), and an image of at least twice the size is not halved with a box filter first.
    """
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,  # the model does
    }
    return json.dumps(processor, indent=2) + "\n"


def save_rae(rae: RAEModel, state: dict, folder: Path) -> None:
    """Write a from_pretrained folder with the weights `state` of the model, which may be sharded itself."""
    with torch.device("meta"):  # for its class and config: those of a sharded model are not what is to be saved
        unsharded = RAEModel(rae.config)
    unsharded.save_pretrained(folder, state_dict=state)
    (folder / IMAGE_PROCESSOR_NAME).write_text(image_processor_json(rae.config.image_size))
