"""Representation Autoencoder (RAE): a frozen pretrained vision encoder and a ViT decoder that inverts it.

The only file that downstream code needs; it imports torch and transformers alone and travels with the weights:

    from transformers import AutoModel
    rae = AutoModel.from_pretrained("user/my-rae", trust_remote_code=True)
    z = rae.encode(pixels).latent      # (B, 3, S, S) in [0, 1]  ->  (B, C, h, w)
    x = rae.decode(z).sample           # (B, C, h, w)  ->  (B, 3, H, W), about [0, 1], not clamped

Sources: Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690), whose published decoder uses the
same parameter names as the one here; the decoder's architecture and position table are MAE's (arXiv 2111.06377);
latents from several blocks are RAEv2's (arXiv 2605.18324).
"""

import inspect
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional, Union

import torch
import transformers
from torch import nn
from torch.nn import functional as F

if int(transformers.__version__.split(".")[0]) < 5:  # before imports that it does not have
    raise ImportError(
        f"this RAE needs transformers 5.0 or newer, found {transformers.__version__}: pip install -U transformers"
    )
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, cached_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LATENT_VAR_EPS = 1e-5  # added to the variance, as the published code does
# of a config.json; a damaged one asks for a billion blocks, which would be built for hours
MAX_BLOCKS = 1000
MAX_WIDTH = 1_000_000  # of hidden sizes, pixels of images and patches, and every other number of a network
HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download")  # of from_pretrained: for the encoder too
BLOCK_OUTPUTS_LOCK = threading.Lock()  # of the module: a model with a lock of its own cannot be copied or pickled


# --------------------------------------------------------------------------------------------------------------------
# Encoders
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderFamily:
    """What the RAE must know about one transformers vision architecture.

    Attributes:
        final_norm: name of the LayerNorm, or RMSNorm, after the last block; its affine part is dropped. "none": there
            is none.
        prefix_tokens: number of tokens before the patch tokens (CLS, registers), from the encoder's config.
        call_kwargs: extra arguments of the forward call, from (normalised pixels, number of patches). Where forward
            takes `interpolate_pos_encoding`, it is always set.
        config_overrides: settings of the encoder's config that the RAE needs.
        file_prefix: level above the encoder's modules in files, as on the Hub, that some transformers releases' classes
            do not have: written in any case, so that every release reads it.
        norm_in_forward: whether the patch tokens in `last_hidden_state` have gone through `final_norm`; where not, the
            RAE normalises them, so that latents are normalised tokens whatever the family.
        any_grid: whether forward takes images of any grid, rectangles too, without `interpolate_pos_encoding`: it
            always interpolates its positions, or computes them (RoPE).
    """

    final_norm: str
    prefix_tokens: Callable[[PreTrainedConfig], int]
    call_kwargs: Callable[[torch.Tensor, int], dict] = lambda pixels, num_patches: {}
    config_overrides: tuple = ()
    file_prefix: str = ""
    norm_in_forward: bool = True
    any_grid: bool = False


def _mae_kwargs(pixels: torch.Tensor, num_patches: int) -> dict:
    # MAE sorts the patches by this vector: an increasing one keeps their order
    order = torch.arange(num_patches, device=pixels.device, dtype=torch.float32)
    return {"noise": order.expand(pixels.shape[0], -1)}


# A new family is one entry here, under the `model_type` of its transformers config.
ENCODER_FAMILIES = {
    "aimv2_vision_model": EncoderFamily(
        "rms_norm",
        lambda config: 0,
        config_overrides=(("use_head", False),),  # the pooling head is not used: not built, not saved
    ),
    "clip_vision_model": EncoderFamily(
        "post_layernorm",
        lambda config: 1,
        file_prefix="vision_model.",
        norm_in_forward=False,  # CLIP itself gives only the pooled CLS token to it
    ),
    "dinov2": EncoderFamily("layernorm", lambda config: 1, any_grid=True),
    "dinov2_with_registers": EncoderFamily("layernorm", lambda config: 1 + config.num_register_tokens, any_grid=True),
    "dinov3_vit": EncoderFamily("norm", lambda config: 1 + config.num_register_tokens, any_grid=True),
    "ijepa": EncoderFamily("layernorm", lambda config: 0),
    "siglip_vision_model": EncoderFamily(
        "post_layernorm",
        lambda config: 0,
        config_overrides=(("vision_use_head", False),),  # the pooling head is not used: not built, not saved
        file_prefix="vision_model.",
    ),
    "vit": EncoderFamily("layernorm", lambda config: 1),
    "vit_mae": EncoderFamily("layernorm", lambda config: 1, _mae_kwargs, config_overrides=(("mask_ratio", 0.0),)),
}


def encoder_family(
    encoder_config: PreTrainedConfig, prefix_tokens: Optional[int] = None, final_norm: Optional[str] = None
) -> EncoderFamily:
    """What is known about the encoder: the registry's entry under its `model_type`, in which the two settings, where
    given, win. Raises ValueError for a `model_type` without an entry unless both are given."""
    family = ENCODER_FAMILIES.get(encoder_config.model_type)
    if family is None:
        if prefix_tokens is None or final_norm is None:
            raise ValueError(
                f"encoder model_type '{encoder_config.model_type}' is not supported without encoder_prefix_tokens (how "
                "many tokens come before the patch tokens) and encoder_final_norm (the name of its last LayerNorm, or "
                f"none); known: {', '.join(sorted(ENCODER_FAMILIES))} (a new one is one entry in ENCODER_FAMILIES)"
            )
        family = EncoderFamily(final_norm, lambda config: prefix_tokens, norm_in_forward=False)
    if prefix_tokens is not None:
        family = replace(family, prefix_tokens=lambda config: prefix_tokens)
    if final_norm is not None:  # whether forward applies it to the tokens is not known; twice does not hurt
        family = replace(family, final_norm=final_norm, norm_in_forward=False)
    return family


def _leaves(name: str, value: object) -> Iterator[tuple]:
    """(name, value) of all values in nested settings. Items of a list, and attention of parts of a model, have the name
    of the whole."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(name if "attn_implementation" in name else str(key), item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(name, item)
    else:
        yield name, value


def check_config_dict(settings: dict) -> None:
    """Check what a config.json holds, before transformers makes something of it.

    Raises:
        ValueError: a number that is not finite, or that asks for a million of something; attention that is not among
            transformers' own: it would be code that is fetched from the Hub and run.
    """
    known = ("eager", *ALL_ATTENTION_FUNCTIONS)
    for name, value in _leaves("", settings):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, expected a finite number")
        if "attn_implementation" in name and isinstance(value, str) and value not in known:
            raise ValueError(f"{name} is '{value}', expected one of {', '.join(sorted(known))}")
    labels = [("num_labels", value) for name, value in _leaves("", settings) if name == "num_labels"]
    vision = settings.get("vision_config") or settings  # a text part has millions of positions, and is not built
    for name, value in (*labels, *_leaves("", vision)):
        most = MAX_BLOCKS if name == "num_hidden_layers" else MAX_WIDTH
        if isinstance(value, int) and value > most:
            raise ValueError(f"{name} is {value}, expected at most {most}")


def read_config(source: str, **arguments) -> PreTrainedConfig:
    """The config of a network that transformers has, from a folder or the Hub; code beside it is never run.

    Args:
        source: Hub id or folder.
        arguments: further ones of from_pretrained: revision, HUB_ARGUMENTS, values that replace those of the file.

    Raises:
        OSError: there is no config.json.
        ValueError: a file of weights alone, a model type that transformers lacks, and what check_config_dict refuses.
    """
    if Path(source).is_file():
        raise ValueError(
            f"{source} is a file, expected a Hub id, or a folder with config.json, preprocessor_config.json and "
            "model.safetensors as transformers writes it: a .pth or .pt file of weights says neither which network nor "
            "which pixels they are for (Meta's are on the Hub, as facebook/dinov2-base and the like)"
        )
    check_config_dict(PreTrainedConfig.get_config_dict(source, **arguments)[0])
    return AutoConfig.from_pretrained(source, trust_remote_code=False, **arguments)


def vision_config(config: Union[PreTrainedConfig, dict]) -> PreTrainedConfig:
    """The vision part of an encoder's config (CLIP's and SigLIP's have a text part too), set up as the RAE uses it."""
    if not isinstance(config, PreTrainedConfig):
        if not isinstance(config, dict) or "model_type" not in config:
            found = sorted(config) if isinstance(config, dict) else config
            raise ValueError(f"encoder_config: expected an encoder's settings with its model_type, got {found}")
        settings = dict(config)
        kind = settings.pop("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise ValueError(f"encoder model_type {kind!r} is none that transformers {transformers.__version__} knows")
        check_config_dict(settings)
        config = AutoConfig.for_model(kind, **settings)
    config = getattr(config, "vision_config", config)
    family = ENCODER_FAMILIES.get(config.model_type)
    for name, value in () if family is None else family.config_overrides:
        setattr(config, name, value)
    return config


def _encoder_options(config: PreTrainedConfig) -> dict:
    """Arguments of the encoder's class beside its config. A pooling layer is not used: not built, not saved, and not
    missed in a checkpoint that has none."""
    model_class = MODEL_MAPPING.get(type(config), None)  # where there is none, AutoModel says so
    arguments = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in arguments else {}


class LayerNormWithoutAffine(nn.Module):
    """LayerNorm over the last dimension, no weight and bias. Not an nn.LayerNorm: some transformers releases initialise
    the weights of every nn.LayerNorm that they meet, without asking whether there are any."""

    def __init__(self, normalized_shape: tuple, eps: float):
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, eps=self.eps)


class RMSNormWithoutAffine(nn.Module):
    """RMSNorm over the last dimension, no weight; computed in float32, as transformers' are."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or an RMSNorm; of the latter, many transformers models have a class."""
    return isinstance(module, nn.LayerNorm) or (type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight"))


def _without_affine(norm: nn.Module) -> nn.Module:
    """The same norm without weight and bias."""
    if isinstance(norm, nn.LayerNorm):
        return LayerNormWithoutAffine(norm.normalized_shape, norm.eps)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return RMSNormWithoutAffine(torch.finfo(torch.float32).eps if eps is None else eps)


def _final_norm(encoder: PreTrainedModel, name: str, keep_affine: bool) -> nn.Module:
    """The encoder's final LayerNorm or RMSNorm, the one module whose path ends in `name`. Unless `keep_affine`, one
    without weight and bias takes its place first (RAE paper, appendix on encoders)."""
    if name == "none":
        return LayerNormWithoutAffine((encoder.config.hidden_size,), eps=1e-6)
    paths = [path for path, _ in encoder.named_modules() if f".{path}".endswith(f".{name}")]
    paths = [name] if name in paths else paths  # AIMv2 has an embeddings.rms_norm beside its last one
    norm = encoder.get_submodule(paths[0]) if len(paths) == 1 else None
    if norm is None or not _is_norm(norm):
        norms = (path for path, module in encoder.named_modules() if _is_norm(module))
        outside = [path for path in norms if not any(part.isdigit() for part in path.split("."))]  # of the blocks
        raise ValueError(
            f"encoder_final_norm: expected the LayerNorm or RMSNorm after the last block of {type(encoder).__name__}, "
            f"one of {outside}, or none, got '{name}'"
        )
    if keep_affine:
        return norm
    parent, _, attribute = paths[0].rpartition(".")
    plain = _without_affine(norm)
    setattr(encoder.get_submodule(parent), attribute, plain)
    return plain


def _encoder_blocks(encoder: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks, found by their number: transformers releases and families call them differently."""
    number = encoder.config.num_hidden_layers
    found = [m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    if len(found) != 1:
        raise ValueError(
            f"encoder_layers: {type(encoder).__name__} has {len(found)} lists of {number} blocks, expected one"
        )
    return found[0]


# --------------------------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------------------------


class RAEConfig(PreTrainedConfig):
    """Settings of an RAE.

    Args:
        encoder_config: transformers config of the vision encoder (object or dict with `model_type`).
        encoder_id: Hub id or folder that the encoder came from; None for an encoder that was never published.
        encoder_revision: revision of `encoder_id`.
        encoder_bundled: whether the encoder's weights lie in the same safetensors file as the decoder's.
        encoder_input_size: side in pixels that images are resized to before the encoder.
        encoder_layers: blocks (0-based, ascending) whose outputs, each after the final LayerNorm, are averaged into the
            latent (RAEv2); blocks after the last of them are not built. None: the last block's output alone.
        encoder_add_spatial_mean: whether the mean over positions of the last chosen block's tokens is added to every
            token (RAEv2: with several blocks of DINOv3 or SigLIP2; neither for DINOv2 nor for the last block alone).
        encoder_keep_final_affine: whether the final LayerNorm keeps its weight and bias (RAEv2: for SigLIP2, whose
            pixels it also normalises with IMAGENET_MEAN and IMAGENET_STD; RAE: never).
        encoder_prefix_tokens, encoder_final_norm: number of tokens before the patch tokens, and name of the last
            LayerNorm ("none": there is none), of an encoder that ENCODER_FAMILIES does not know. None: as it says.
        image_mean, image_std: per-channel normalisation of pixels in [0, 1]; `from_encoder` takes them from the
            encoder's image processor.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size:
            the decoder's width, blocks, heads and MLP width. Defaults: ViT-XL.
        decoder_patch_size: side in pixels of the patch that each latent token becomes.
        decoder_layer_norm_eps, decoder_hidden_act: the decoder's LayerNorm epsilon and activation.
        denormalize_output: whether the decoder's output is multiplied by image_std and image_mean is added to it (RAE:
            yes, RAEv2: no).
        noise_tau: strength of the latent noise in training mode.
        noise_distribution: how its sigma is drawn for each sample: "uniform" is `noise_tau * U[0, 1]`, as the published
            code does, "half_normal" is `|N(0, noise_tau**2)|`, as the paper says.
        train_position_embedding: whether the decoder's position table learns (it starts as MAE's sin-cos table).
        use_latent_stats: whether the model holds a mean and a variance of its latents and normalises with them.
        latent_stats_have_mean: whether these statistics have a mean. The published ones of DINOv2-B have none: then
            nothing is subtracted, and latents are only divided by their standard deviation.
        scaling_factor: factor on latents that diffusion code expects; 1.0, normalisation is done by the statistics.

    Raises:
        ValueError: an encoder that is not supported, blocks that it does not have, and sizes that do not fit each
            other; the message has both numbers.
    """

    model_type = "rae"
    sub_configs = {"encoder_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config: Union[PreTrainedConfig, dict, None] = None,
        encoder_id: Optional[str] = None,
        encoder_revision: Optional[str] = None,
        encoder_bundled: bool = True,
        encoder_input_size: int = 224,
        encoder_layers: Optional[tuple] = None,
        encoder_add_spatial_mean: bool = False,
        encoder_keep_final_affine: bool = False,
        encoder_prefix_tokens: Optional[int] = None,
        encoder_final_norm: Optional[str] = None,
        image_mean: tuple = IMAGENET_MEAN,
        image_std: tuple = IMAGENET_STD,
        decoder_hidden_size: int = 1152,
        decoder_num_hidden_layers: int = 28,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 4096,
        decoder_patch_size: int = 16,
        decoder_layer_norm_eps: float = 1e-12,
        decoder_hidden_act: str = "gelu",
        denormalize_output: bool = True,
        noise_tau: float = 0.0,
        noise_distribution: str = "uniform",
        train_position_embedding: bool = False,
        use_latent_stats: bool = False,
        latent_stats_have_mean: bool = True,
        scaling_factor: float = 1.0,
        **kwargs,
    ):
        if encoder_config is None:
            encoder_config = {"model_type": "dinov2_with_registers"}
        self.encoder_config = vision_config(encoder_config)
        self.encoder_id = encoder_id
        self.encoder_revision = encoder_revision
        self.encoder_bundled = encoder_bundled
        self.encoder_input_size = encoder_input_size
        self.encoder_layers = encoder_layers
        self.encoder_add_spatial_mean = encoder_add_spatial_mean
        self.encoder_keep_final_affine = encoder_keep_final_affine
        self.encoder_prefix_tokens = encoder_prefix_tokens
        self.encoder_final_norm = encoder_final_norm
        self.image_mean = image_mean
        self.image_std = image_std
        self.decoder_hidden_size = decoder_hidden_size
        self.decoder_num_hidden_layers = decoder_num_hidden_layers
        self.decoder_num_attention_heads = decoder_num_attention_heads
        self.decoder_intermediate_size = decoder_intermediate_size
        self.decoder_patch_size = decoder_patch_size
        self.decoder_layer_norm_eps = decoder_layer_norm_eps
        self.decoder_hidden_act = decoder_hidden_act
        self.denormalize_output = denormalize_output
        self.noise_tau = noise_tau
        self.noise_distribution = noise_distribution
        self.train_position_embedding = train_position_embedding
        self.use_latent_stats = use_latent_stats
        self.latent_stats_have_mean = latent_stats_have_mean
        self.scaling_factor = scaling_factor
        self._check_values()
        self.encoder_layers = None if encoder_layers is None else list(encoder_layers)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self._check_encoder()
        self._check_sizes()
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "RAEConfig":
        """As in transformers, but raises ValueError when the config is another model's, and as check_config_dict."""
        if config_dict.get("model_type") != cls.model_type:
            raise ValueError(f"expected a config of model_type {cls.model_type}, got {config_dict.get('model_type')}")
        check_config_dict(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_encoder(
        cls,
        encoder_id: str,
        revision: Optional[str] = None,
        image_mean: Optional[tuple] = None,
        image_std: Optional[tuple] = None,
        **config,
    ) -> "RAEConfig":
        """The config of an RAE around a published encoder, from that encoder's own config and image processor.

        Args:
            encoder_id: Hub id or local folder with `config.json` and `preprocessor_config.json`.
            revision: Hub revision.
            image_mean, image_std: three numbers each, in place of those of `preprocessor_config.json`, which is not
                needed where both are given.
            config: further fields of RAEConfig.

        Raises:
            OSError: a file cannot be had.
            ValueError: unknown family, sizes that do not fit, or a processor without mean and std.
        """
        encoder_config = read_config(encoder_id, revision=revision)
        if image_mean is None or image_std is None:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(encoder_id, revision=revision)
            if not {"image_mean", "image_std"} <= processor.keys():
                raise ValueError(f"{encoder_id}: its preprocessor_config.json has no image_mean and image_std")
            image_mean = processor["image_mean"] if image_mean is None else image_mean
            image_std = processor["image_std"] if image_std is None else image_std
        return cls(
            encoder_config=encoder_config,
            encoder_id=encoder_id,
            encoder_revision=revision,
            image_mean=image_mean,
            image_std=image_std,
            **config,
        )

    def _check_values(self) -> None:
        """Raise ValueError, with the field's name, for what may stand in a damaged config.json."""

        def numbers(values: Union[list, tuple], count: int, least: float) -> bool:
            given = isinstance(values, (list, tuple)) and len(values) == count
            real = given and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
            return real and all(v > least and math.isfinite(v) for v in values)

        for names, condition, expected in (
            (
                "encoder_input_size decoder_hidden_size decoder_num_attention_heads decoder_intermediate_size "
                "decoder_patch_size",
                lambda value: type(value) is int and 0 < value <= MAX_WIDTH,
                f"an integer from 1 to {MAX_WIDTH}",
            ),
            (
                "decoder_num_hidden_layers",
                lambda value: type(value) is int and 0 < value <= MAX_BLOCKS,
                f"an integer from 1 to {MAX_BLOCKS}",
            ),
            (
                "encoder_bundled encoder_add_spatial_mean encoder_keep_final_affine denormalize_output "
                "train_position_embedding use_latent_stats latent_stats_have_mean",
                lambda value: isinstance(value, bool),
                "true or false",
            ),
            (
                "encoder_id encoder_revision encoder_final_norm",
                lambda value: value is None or isinstance(value, str),
                "a text or nothing",
            ),
            (
                "encoder_prefix_tokens",
                lambda value: value is None or type(value) is int and value >= 0,
                "a number of tokens",
            ),
            ("scaling_factor decoder_layer_norm_eps", lambda value: numbers([value], 1, 0), "a positive number"),
            ("noise_tau", lambda value: numbers([value], 1, -1e-9), "a number of at least 0"),
            (
                "noise_distribution",
                lambda value: isinstance(value, str) and value in ("uniform", "half_normal"),
                "uniform or half_normal",
            ),
            ("image_mean", lambda value: numbers(value, 3, -math.inf), "three numbers"),
            ("image_std", lambda value: numbers(value, 3, 0), "three positive numbers"),
            (
                "encoder_layers",
                lambda value: value is None or isinstance(value, (list, tuple)) and all(type(i) is int for i in value),
                "indices of blocks",
            ),
            (
                "decoder_hidden_act",
                lambda value: isinstance(value, str) and value in ACT2FN,
                f"one of {', '.join(sorted(ACT2FN))}",
            ),
        ):
            for name in names.split():
                if not condition(getattr(self, name)):
                    raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _check_encoder(self) -> None:
        encoder, layers = self.encoder_config, self.encoder_layers
        self.encoder_family()
        if self.encoder_keep_final_affine and self.encoder_final_norm is not None:
            raise ValueError(
                "encoder_keep_final_affine: expected false with encoder_final_norm, got true: whether the encoder "
                "applies that norm itself is not known, and a weight and bias that are applied twice count twice"
            )
        for name in (
            ("hidden_size", "patch_size") if layers is None else ("hidden_size", "patch_size", "num_hidden_layers")
        ):
            if not hasattr(encoder, name):
                raise ValueError(f"encoder model_type '{encoder.model_type}' has no {name}, expected a ViT")
        if layers is not None and (not layers or layers != sorted({*layers} & {*range(encoder.num_hidden_layers)})):
            raise ValueError(
                f"encoder_layers: expected ascending indices, each once, of the encoder's {encoder.num_hidden_layers} "
                f"blocks (0 to {encoder.num_hidden_layers - 1}), got {layers}"
            )

    def _check_sizes(self) -> None:
        def divides(small_name: str, small: int, big_name: str, big: int) -> None:
            if small <= 0 or big % small:
                raise ValueError(f"{big_name} ({big}) must be a multiple of {small_name} ({small})")

        divides("the encoder's patch size", self.encoder_patch_size, "encoder_input_size", self.encoder_input_size)
        heads = self.decoder_num_attention_heads
        divides("decoder_num_attention_heads", heads, "decoder_hidden_size", self.decoder_hidden_size)
        divides("4, for the 2-D sin-cos table", 4, "decoder_hidden_size", self.decoder_hidden_size)

    def encoder_family(self) -> EncoderFamily:
        """What is known about the encoder's architecture. Raises ValueError when nothing is."""
        return encoder_family(self.encoder_config, self.encoder_prefix_tokens, self.encoder_final_norm)

    @property
    def encoder_patch_size(self) -> int:
        patch = self.encoder_config.patch_size
        return patch if isinstance(patch, int) else patch[0]

    @property
    def latent_channels(self) -> int:
        """Channels C of a latent (C, h, w)."""
        return self.encoder_config.hidden_size

    @property
    def latent_size(self) -> int:
        """Side h = w of a latent (C, h, w)."""
        return self.encoder_input_size // self.encoder_patch_size

    @property
    def image_size(self) -> int:
        """Side in pixels of a reconstruction."""
        return self.latent_size * self.decoder_patch_size


# --------------------------------------------------------------------------------------------------------------------
# Decoder
# --------------------------------------------------------------------------------------------------------------------


def sincos_position_table(width: int, grid_size: int) -> torch.Tensor:
    """MAE's fixed 2-D table (arXiv 2111.06377), computed in float64.

    Returns (1, 1 + grid_size**2, width) float32: zeros for the CLS token; then, tokens in row-major order, the first
    half of the channels from the column index, the second half from the row index, each half sines then cosines.
    """
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))  # (width/4,)
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequency  # (grid, width/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width/2)
    column = axis[None, :, :].expand(grid_size, -1, -1)  # (grid, grid, width/2)
    row = axis[:, None, :].expand(-1, grid_size, -1)  # (grid, grid, width/2)
    table = torch.cat([column, row], dim=2).reshape(grid_size**2, width)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])[None].float()


def unpatchify(patches: torch.Tensor, patch_size: int, grid: Optional[tuple] = None) -> torch.Tensor:
    """(B, N, p*p*3), values ordered (row, column, channel), to (B, 3, H, W). `grid`: (h, w) with h * w = N; none: N is
    a square."""
    height, width = grid or (math.isqrt(patches.shape[1]),) * 2
    x = patches.reshape(-1, height, width, patch_size, patch_size, 3)  # (B, h, w, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, height * patch_size, width * patch_size)  # (B, 3, h*p, w*p)


def eager_attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    """Attention in plain operations, (B, heads, N, d) each, for attn_implementation='eager'."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights  # (B, N, heads, d)


class RAESelfAttention(nn.Module):
    def __init__(self, config: RAEConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.decoder_hidden_size // config.decoder_num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.query = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)
        self.key = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)
        self.value = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            proj(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # (B, heads, N, d)
            for proj in (self.query, self.key, self.value)
        )
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        out, _ = attend(self, q, k, v, None, scaling=self.scaling, dropout=0.0)  # (B, N, heads, d)
        return out.reshape(batch, tokens, width)


class RAEDense(nn.Module):
    """A Linear called `dense`: the published checkpoints nest it so."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x)


class RAEAttention(nn.Module):
    def __init__(self, config: RAEConfig):
        super().__init__()
        self.attention = RAESelfAttention(config)
        self.output = RAEDense(config.decoder_hidden_size, config.decoder_hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.attention(x))


class RAEDecoderLayer(GradientCheckpointingLayer):
    """Pre-LayerNorm transformer block, (B, N, D) to (B, N, D)."""

    def __init__(self, config: RAEConfig):
        super().__init__()
        width, eps = config.decoder_hidden_size, config.decoder_layer_norm_eps
        self.attention = RAEAttention(config)
        self.intermediate = RAEDense(width, config.decoder_intermediate_size)
        self.output = RAEDense(config.decoder_intermediate_size, width)
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.layernorm_after = nn.LayerNorm(width, eps=eps)
        self.activation = ACT2FN[config.decoder_hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(self.activation(self.intermediate(self.layernorm_after(x))))


class RAEDecoder(nn.Module):
    """ViT decoder with the published parameter names.

    `forward`: latents without normalisation (B, C, h, w) to the last LayerNorm's output (B, 1 + N, D), CLS first.
    Tokens of another grid than the model's are resized to it, or keep their grid (`keep_grid`);
    `decoder_pred` maps that to patch values (B, 1 + N, p*p*3). They are apart because the adaptive weight of the
    GAN loss needs both sides of the last layer.
    """

    def __init__(self, config: RAEConfig):
        super().__init__()
        self.config = config
        width, patch = config.decoder_hidden_size, config.decoder_patch_size
        self.decoder_embed = nn.Linear(config.latent_channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + config.latent_size**2, width))
        self.decoder_layers = nn.ModuleList(RAEDecoderLayer(config) for _ in range(config.decoder_num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(width, eps=config.decoder_layer_norm_eps)
        self.decoder_pred = nn.Linear(width, patch * patch * 3)

    def forward(self, latent: torch.Tensor, keep_grid: bool = False) -> torch.Tensor:
        x = self.decoder_embed(latent.flatten(2).transpose(1, 2))  # (B, C, h, w) -> (B, N, D)
        grid, positions = self.config.latent_size, self.decoder_pos_embed
        if latent.shape[2:] != (grid, grid) and keep_grid:
            positions = self._positions(latent.shape[2:])
        elif latent.shape[2:] != (grid, grid):
            x = x.transpose(1, 2).unflatten(2, latent.shape[2:])  # (B, D, h, w)
            x = F.interpolate(x, size=(grid, grid), mode="bilinear", align_corners=False)
            x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        cls = self.trainable_cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat([cls, x], dim=1) + positions  # (B, 1 + N, D)
        for layer in self.decoder_layers:
            x = layer(x)
        return self.decoder_norm(x)

    def _positions(self, grid: torch.Size) -> torch.Tensor:
        """The position table (1, 1 + h*w, D) of another grid, interpolated bicubically as vision encoders do: no
        position is outside of those that the decoder has learned with."""
        side, table = self.config.latent_size, self.decoder_pos_embed
        patches = table[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()  # (1, D, g, g)
        patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


# --------------------------------------------------------------------------------------------------------------------
# The autoencoder
# --------------------------------------------------------------------------------------------------------------------


def expand_statistics(value: torch.Tensor, shape: tuple, name: str) -> torch.Tensor:
    """A latent mean or variance as (C, h, w), which is `shape`, from a shape that broadcasts to it, such as (C, 1, 1),
    (1, C, h, w) or (). Raises ValueError, about `name`, for others. (C,) is among them: torch would repeat it along the
    width."""
    found = tuple(value.shape)
    while value.ndim > len(shape) and len(value) == 1:
        value = value[0]
    fits = value.ndim <= len(shape) and all(n in (1, m) for n, m in zip(value.shape[::-1], shape[::-1], strict=False))
    if not fits or (value.ndim == 1 and len(value) > 1):
        raise ValueError(f"{name} has shape {found}, the latents {shape}; one value a channel is ({shape[0]}, 1, 1)")
    return value.expand(shape)


@contextmanager
def _damaged_files_named(source: str, place: dict) -> Iterator[None]:
    """Turn an error of loading the model `source` into a ValueError that names the damaged weights file, where there is
    one; `place`: further arguments of transformers' cached_file."""
    try:
        yield
    except Exception as error:  # of any class: a bad index ends in AttributeError, KeyError, ...
        with suppress(OSError):  # no such model, or it is not in the cache
            config = cached_file(source, "config.json", **{**place, "local_files_only": True, "force_download": False})
            for file in sorted(Path(config).parent.glob("model*.safetensors*")):
                if reason := _damage(file):
                    raise ValueError(f"{file} is damaged or incomplete: {reason}") from error
        raise


def _damage(file: Path) -> Optional[str]:
    """What is wrong with a safetensors file or an index of such files; None: nothing."""
    from safetensors import SafetensorError, safe_open  # transformers needs it too

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # compares the header with the file's size
                return None
        json.loads(file.read_text())["weight_map"].values()  # an error for anything that is no index
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{type(error).__name__} {error}"
    return None


@dataclass
class RAEEncoderOutput(ModelOutput):
    """`latent`: (B, C, h, w), normalised when the model has statistics."""

    latent: Optional[torch.Tensor] = None


@dataclass
class RAEDecoderOutput(ModelOutput):
    """`sample`: (B, 3, H, W), about [0, 1], not clamped. With `return_last_layer=True` also the last layer's input
    `last_hidden_state` (B, 1 + N, D) and output `patches` (B, 1 + N, p*p*3)."""

    sample: Optional[torch.Tensor] = None
    last_hidden_state: Optional[torch.Tensor] = None
    patches: Optional[torch.Tensor] = None


class RAEPreTrainedModel(PreTrainedModel):
    config_class = RAEConfig
    base_model_prefix = "rae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RAEDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"latent_mean", "latent_var"}  # by from_pretrained, in 16 bits; see RAEModel._apply

    @torch.no_grad()
    def _init_weights(self, module):
        """MAE's: Xavier uniform for linear layers, LayerNorms 1 and 0, the sin-cos table, CLS token and statistics
        neutral. The encoder initialises itself."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RAEDecoder):
            config = module.config
            table = sincos_position_table(config.decoder_hidden_size, config.latent_size)
            init.copy_(module.decoder_pos_embed, table)
            init.zeros_(module.trainable_cls_token)
        elif isinstance(module, RAEModel) and module.config.use_latent_stats:
            if module.latent_mean is not None:
                init.zeros_(module.latent_mean)
            init.ones_(module.latent_var)


class RAEModel(RAEPreTrainedModel):
    """Frozen encoder and trainable decoder (arXiv 2510.11690). In training mode the encoder stays in eval mode, and
    `encode` adds noise to the latents, see `config.noise_tau`. In 16 bits, whether loaded or cast so, the latent
    statistics stay in float32."""

    def __init__(self, config: RAEConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(
            config.encoder_config,
            dtype=torch.get_default_dtype(),  # not the one that the encoder was published in: the decoder's
            trust_remote_code=False,
            **_encoder_options(config.encoder_config),
        )
        # Hooks of the model's own, set once: what output_hidden_states gives differs between transformers releases and
        # keeps every block's output; hooks that came and went with each call would be missed by a compiled encoder.
        # Bound methods, so that a deep copy of the model fills its own list.
        self._block_outputs = []
        for index in (config.encoder_layers or [])[:-1]:  # the last one's output is the encoder's
            _encoder_blocks(self.encoder)[index].register_forward_hook(self._keep_block_output)
        # in a tuple: as a module of its own, one that keeps its weight and bias would be saved twice
        self._encoder_norm = (self._prepare_encoder(self.encoder),)
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(type(self.encoder).forward).parameters
        self._no_split_modules = {*self._no_split_modules, *(self.encoder._no_split_modules or ())}
        self.decoder = RAEDecoder(config)
        self._image_statistics = {}
        if config.use_latent_stats:
            shape = (config.latent_channels, config.latent_size, config.latent_size)
            self.register_buffer("latent_mean", torch.zeros(shape) if config.latent_stats_have_mean else None)
            self.register_buffer("latent_var", torch.ones(shape))
        if not config.encoder_bundled:
            self._keys_to_ignore_on_load_missing = [r"^encoder\."]  # from_pretrained fetches them from encoder_id
        self.post_init()
        self._freeze()

    def _freeze(self) -> None:
        self.encoder.requires_grad_(False).eval()
        self.decoder.decoder_pos_embed.requires_grad_(self.config.train_position_embedding)

    def _prepare_encoder(self, encoder: PreTrainedModel) -> nn.Module:
        """Take out of the encoder what the RAE does not use: the affine part of the final LayerNorm, unless it is kept,
        and the blocks after the last one that `encoder_layers` names. Returns that LayerNorm."""
        norm = _final_norm(encoder, self.config.encoder_family().final_norm, self.config.encoder_keep_final_affine)
        if self.config.encoder_layers is not None:
            del _encoder_blocks(encoder)[self.config.encoder_layers[-1] + 1 :]
        return norm

    @property
    def encoder_norm(self) -> nn.Module:
        """The LayerNorm, over the last dimension, that every chosen block's tokens go through."""
        return self._encoder_norm[0]

    # ----------------------------------------------------------------------------------------------- construction

    @classmethod
    def from_encoder(cls, encoder_id: str, revision: Optional[str] = None, **config) -> "RAEModel":
        """A new RAE around a published encoder, with an untrained decoder. Arguments as RAEConfig.from_encoder's.

        Raises:
            OSError: the encoder, or its preprocessor config, cannot be had.
            ValueError: unknown family, sizes that do not fit, missing or misshapen encoder weights.
        """
        model = cls(RAEConfig.from_encoder(encoder_id, revision, **config))
        model.load_encoder()
        return model

    def load_encoder(self, **hub) -> None:
        """Load the encoder's weights from `config.encoder_id`; `hub`: from_pretrained's HUB_ARGUMENTS. Raises OSError
        when it cannot be had and ValueError when weights are missing, a file is damaged, or the model is offloaded."""
        config = self.config
        if config.encoder_id is None:
            raise ValueError("encoder_id: expected the place that the encoder is loaded from, got None")
        if any(parameter.is_meta for parameter in self.encoder.parameters()):
            raise ValueError(
                f"the weights of the encoder {config.encoder_id} have no place to be loaded to: they are offloaded or "
                "on the meta device; load the RAE onto a device, or save it with the encoder in its file"
            )
        source = {"revision": config.encoder_revision, **hub}
        try:
            with _damaged_files_named(config.encoder_id, source):
                encoder_config = vision_config(read_config(config.encoder_id, **source))
                encoder, info = AutoModel.from_pretrained(
                    config.encoder_id,
                    config=encoder_config,
                    dtype=self.dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are reported, and refused below
                    trust_remote_code=False,
                    **source,
                    **_encoder_options(encoder_config),
                )
        except OSError as error:
            access = "ask for access on its page and run `hf auth login`, or " if "gated" in str(error) else ""
            raise OSError(
                f"the encoder {config.encoder_id} cannot be had ({str(error).strip().splitlines()[0]}); "
                f"{access}set encoder_id in config.json to a local copy"
            ) from error
        for name, *shapes in sorted(info["mismatched_keys"]):
            raise ValueError(
                f"encoder {config.encoder_id}: '{name}' has shape {shapes[0]}, its config says {shapes[1]}"
            )
        if info["missing_keys"]:
            raise ValueError(
                f"encoder {config.encoder_id}: {len(info['missing_keys'])} weights of {type(encoder).__name__} are "
                f"missing from its file, the first is '{sorted(info['missing_keys'])[0]}'"
            )
        self._prepare_encoder(encoder)
        self.encoder.load_state_dict(encoder.state_dict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but strict: a missing or unexpected key, and a damaged file, raise ValueError. A folder
        without the encoder (`encoder_bundled` false in its config) fetches it from the recorded id and revision, with
        the same HUB_ARGUMENTS."""
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        place = {**hub, **{name: kwargs[name] for name in ("revision", "subfolder") if kwargs.get(name)}}
        with _damaged_files_named(pretrained_model_name_or_path, place):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                **{**kwargs, "use_safetensors": True, "ignore_mismatched_sizes": True},  # those are refused below
            )
        for name, *shapes in sorted(info["mismatched_keys"]):
            found, expected = map(tuple, shapes)
            raise ValueError(
                f"{pretrained_model_name_or_path}: '{name}' has shape {found}, its config.json says {expected}"
            )
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                first = sorted(info[kind])[0]
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {len(info[kind])} {kind.replace('_', ' ')}, "
                    f"the first is '{first}'; this is not the RAE that its config.json describes"
                )
        if not model.config.encoder_bundled:
            model.load_encoder(**hub)
        model._freeze()  # some transformers releases load into new, trainable parameters
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, include_encoder: bool = True, **kwargs):
        """As in transformers. `include_encoder=False` leaves the encoder's weights out; they are then fetched from
        `config.encoder_id` on loading, of which a folder is written with its whole path. Raises ValueError when there
        is no such id."""
        if not include_encoder and self.config.encoder_id is None:
            raise ValueError("include_encoder=False needs config.encoder_id, the place to load the encoder from")
        prefix = self.config.encoder_family().file_prefix
        if prefix or not include_encoder:
            state = {}
            for name, tensor in (kwargs.pop("state_dict", None) or self.state_dict()).items():
                if not name.startswith("encoder."):
                    state[name] = tensor
                elif include_encoder:
                    state[f"encoder.{prefix}{name.removeprefix('encoder.').removeprefix(prefix)}"] = tensor
            kwargs["state_dict"] = state
        before = self.config.encoder_bundled, self.config.encoder_id
        self.config.encoder_bundled = include_encoder
        if not include_encoder and Path(before[1]).is_dir():
            self.config.encoder_id = str(Path(before[1]).absolute())
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.encoder_bundled, self.config.encoder_id = before

    def _apply(self, fn: Callable, recurse: bool = True) -> "RAEModel":
        """What casts and moves the model, `.to()` among others. Its own tensors, which are the statistics and not those
        of encoder and decoder, are moved alone: rounded to 16 bits they would be off for good."""

        def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            kept = not moved.is_floating_point() or torch.finfo(moved.dtype).bits >= 32
            return moved if kept else tensor.to(moved.device, torch.float32)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(at_least_float32, recurse=False)

    def train(self, mode: bool = True) -> "RAEModel":
        super().train(mode)
        self.encoder.eval()
        return self

    # ------------------------------------------------------------------------------------------------- statistics

    def set_latent_stats(self, mean: Optional[torch.Tensor], var: torch.Tensor) -> None:
        """Store the data set's latent mean and population variance, of shapes that broadcast to (C, h, w). Without a
        mean (None), nothing will be subtracted. Raises ValueError on other shapes or when the model was built without
        `use_latent_stats`."""
        if not self.config.use_latent_stats:
            raise ValueError("the model was built with use_latent_stats=False: it has no place for statistics")
        shape = tuple(self.latent_var.shape)
        mean = None if mean is None else expand_statistics(mean, shape, "latent mean")
        self.latent_var.copy_(expand_statistics(var, shape, "latent var"))
        self.latent_mean = None if mean is None else torch.empty_like(self.latent_var).copy_(mean)
        self.config.latent_stats_have_mean = mean is not None

    def _latent_mean_and_std(self, latent: torch.Tensor) -> tuple:
        """(C, h, w) float32 each, for a latent of that shape: on its device, which is another than the buffers' when a
        device map spreads the model; for another grid than the model's, resized to it. The mean is 0.0 where there is
        none."""

        def fitting(statistic: torch.Tensor) -> torch.Tensor:
            statistic = statistic.to(latent.device, torch.float32)
            if statistic.shape[1:] == latent.shape[2:]:
                return statistic
            return F.interpolate(statistic[None], size=latent.shape[2:], mode="bilinear", align_corners=False)[0]

        std = (fitting(self.latent_var) + LATENT_VAR_EPS).sqrt()
        return 0.0 if self.latent_mean is None else fitting(self.latent_mean), std

    def _image_mean_and_std(self, like: torch.Tensor) -> tuple:
        key = (like.device, like.dtype)
        if key not in self._image_statistics:  # kept: making them is a CPU-GPU sync point
            values = (self.config.image_mean, self.config.image_std)
            with torch.inference_mode(False):  # training may use what an evaluation made
                self._image_statistics[key] = tuple(like.new_tensor(v).view(1, 3, 1, 1) for v in values)
        return self._image_statistics[key]

    # ------------------------------------------------------------------------------------------------- the method

    def encode(
        self,
        pixel_values: torch.Tensor,
        generator: Optional[torch.Generator] = None,
        add_noise: Optional[bool] = None,
        normalize: bool = True,
    ) -> RAEEncoderOutput:
        """Pixels to latents.

        Args:
            pixel_values: (B, 3, S, S) in [0, 1], resized to `encoder_input_size` when S is another; or rectangles
                (B, 3, H, W) with sides that `decoder_patch_size` divides, each patch of which becomes one token.
            generator: source of the training noise, on the pixels' device.
            add_noise: whether to add latent noise; None means in training mode only.
            normalize: whether to apply the latent statistics, when the model has some; noise is for normalised latents.

        Returns:
            RAEEncoderOutput with `latent` (B, C, h, w).

        Raises:
            ValueError: other shapes, rectangles where the encoder takes squares alone, or the encoder returns another
                number of tokens than its config says.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must be (B, 3, S, S), got {tuple(pixel_values.shape)}")
        config = self.config
        grid = self._grid(*pixel_values.shape[2:])
        size = tuple(side * config.encoder_patch_size for side in grid)
        if pixel_values.shape[2:] != size:
            # bicubic, not antialiased: what the published encoders were given
            pixel_values = F.interpolate(pixel_values, size=size, mode="bicubic", align_corners=False)
        mean, std = self._image_mean_and_std(pixel_values)
        pixel_values = (pixel_values - mean) / std
        tokens = self._patch_tokens(pixel_values)  # (B, N, C)
        latent = tokens.transpose(1, 2).contiguous()  # (B, C, N)
        latent = latent.unflatten(2, grid)  # (B, C, h, w)
        if normalize:
            latent = self.normalize(latent)
        if self.training if add_noise is None else add_noise:
            latent = self.add_noise(latent, generator)
        return RAEEncoderOutput(latent=latent)

    def normalize(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w), as `encode(..., normalize=False)` gives them, normalised with the latent statistics; as
        they are when the model has none."""
        if not self.config.use_latent_stats:
            return latent
        mean, std = self._latent_mean_and_std(latent)
        return ((latent.float() - mean) / std).to(latent.dtype)

    @property
    def takes_rectangles(self) -> bool:
        """Whether the encoder has positions for another grid than its own: it interpolates them, or computes them."""
        return self._interpolates or self.config.encoder_family().any_grid

    def _grid(self, height: int, width: int) -> tuple:
        """(h, w) of the latent of an image. Raises ValueError for rectangles that cannot be encoded."""
        patch, side = self.config.decoder_patch_size, self.config.latent_size
        if height == width:
            return side, side
        if height % patch or width % patch or not self.takes_rectangles:
            rectangles = f", or sides that {patch} divides" if self.takes_rectangles else " for this encoder"
            raise ValueError(f"pixel_values must be (B, 3, S, S){rectangles}, got {height} x {width} pixels")
        return height // patch, width // patch

    def _patch_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, H, W) to the encoder's patch tokens (B, N, C): the last block's, or the mean over
        `encoder_layers` (RAEv2), after the final LayerNorm, without affine unless `encoder_keep_final_affine`."""
        config, family = self.config, self.config.encoder_family()
        height, width = (side // config.encoder_patch_size for side in pixel_values.shape[2:])
        prefix, patches = family.prefix_tokens(config.encoder_config), height * width
        options = {"interpolate_pos_encoding": True} if self._interpolates else {}
        options |= family.call_kwargs(pixel_values, patches)
        pixel_values = pixel_values.to(self.encoder.dtype)  # most encoders do so themselves, not all
        shared = len(config.encoder_layers or ()) > 1 and not torch.compiler.is_compiling()
        with BLOCK_OUTPUTS_LOCK if shared else nullcontext():  # threads share the list
            self._block_outputs.clear()
            last = self.encoder(pixel_values, **options).last_hidden_state
            outputs = list(self._block_outputs)
            self._block_outputs.clear()
        if last.shape[1:] != (prefix + patches, config.latent_channels):
            raise ValueError(
                f"{type(self.encoder).__name__} returned {tuple(last.shape)}, expected (B, {prefix + patches}, "
                f"{config.latent_channels}): {prefix} prefix tokens (encoder_prefix_tokens) and {patches} patches"
            )
        chosen = [self.encoder_norm(hidden.to(last.device)) for hidden in outputs]  # (B, prefix + N, C)
        chosen.append(last if family.norm_in_forward else self.encoder_norm(last))
        tokens = torch.stack([hidden[:, prefix:] for hidden in chosen])  # (K, B, N, C)
        mean = tokens.mean(dim=0)
        return mean + tokens[-1].mean(dim=1, keepdim=True) if config.encoder_add_spatial_mean else mean

    def _keep_block_output(self, block: nn.Module, args: tuple, output: Union[torch.Tensor, tuple]) -> None:
        self._block_outputs.append(output[0] if isinstance(output, tuple) else output)

    def add_noise(self, latent: torch.Tensor, generator: Optional[torch.Generator] = None) -> torch.Tensor:
        """Training noise (RAE paper, section on noise-augmented decoding): sigma * N(0, 1) on the encoder's tokens,
        here in the units of `latent` (B, C, h, w), so divided by the statistics' standard deviation. sigma is drawn for
        each sample: noise_tau * U[0, 1] as in the published code, or |N(0, noise_tau**2)| as in the paper
        (`config.noise_distribution`). `generator` lives on the latents' device."""
        if self.config.noise_tau == 0:
            return latent
        options = {"generator": generator, "device": latent.device, "dtype": torch.float32}
        draw = torch.rand if self.config.noise_distribution == "uniform" else torch.randn
        sigma = self.config.noise_tau * draw(latent.shape[0], 1, 1, 1, **options).abs()
        noise = sigma * torch.randn(latent.shape, **options)
        if self.config.use_latent_stats:
            noise = noise / self._latent_mean_and_std(latent)[1]
        return latent + noise.to(latent.dtype)

    def decode(
        self, latent: torch.Tensor, return_last_layer: bool = False, other_grid: str = "refuse"
    ) -> RAEDecoderOutput:
        """Latents to pixels. With float32 latents a 16-bit decoder gives float32 pixels, whose range is not rounded.

        Args:
            latent: (B, C, h, w).
            return_last_layer: see RAEDecoderOutput.
            other_grid: what to do where h x w is not the model's grid. "refuse"; "keep": decode it as it is, as is
                right for latents of rectangles; "resize": to the model's grid, bilinearly after the first Linear, as
                the published code does: the picture is then distorted, or of another resolution.

        Returns:
            RAEDecoderOutput with `sample` (B, 3, H, W), about [0, 1], not clamped.

        Raises:
            ValueError: another number of channels; another grid, unless it is asked for; "resize" where the model has
                statistics, which are per position.
        """
        config, grid = self.config, tuple(latent.shape[2:])
        own = (config.latent_size, config.latent_size)
        if other_grid not in ("refuse", "keep", "resize"):
            raise ValueError(f"other_grid: expected refuse, keep or resize, got {other_grid!r}")
        if latent.ndim != 4 or latent.shape[1] != config.latent_channels:
            raise ValueError(f"latent must be (B, {config.latent_channels}, h, w), got {tuple(latent.shape)}")
        if grid != own and other_grid == "refuse":
            raise ValueError(
                f"latent grid {grid} differs from the model's, {own}; other_grid='keep' decodes it as it is, 'resize' "
                "as the published code"
            )
        if config.use_latent_stats:
            if grid != own and other_grid == "resize":
                raise ValueError(f"latent grid {grid} differs from the grid {own} of the model's statistics")
            mean, std = self._latent_mean_and_std(latent)
            latent = (latent.float() * std + mean).to(latent.dtype)
        weight, precise = self.decoder.decoder_embed.weight, latent.dtype == torch.float32
        latent = latent.to(weight.dtype) if precise and weight.dtype.itemsize == 2 else latent
        keep = grid != own and other_grid == "keep"
        hidden = self.decoder(latent, keep_grid=True) if keep else self.decoder(latent)
        patches = self.decoder.decoder_pred(hidden)  # (B, 1 + N, D) -> (B, 1 + N, p*p*3)
        sample = self.patches_to_pixels(patches.float() if precise else patches, grid if keep else own)
        return RAEDecoderOutput(sample, hidden, patches) if return_last_layer else RAEDecoderOutput(sample)

    def patches_to_pixels(self, patches: torch.Tensor, grid: Optional[tuple] = None) -> torch.Tensor:
        """Output of the decoder's last Linear, (B, 1 + N, p*p*3), CLS first, to pixels (B, 3, H, W), about [0, 1]. They
        are float32 under autocast too: bfloat16 has steps of a whole grey level above 0.5. `grid`: see unpatchify."""
        device = patches.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            patches = patches.float()
        pixels = unpatchify(patches[:, 1:], self.config.decoder_patch_size, grid)
        if not self.config.denormalize_output:
            return pixels
        mean, std = self._image_mean_and_std(pixels)
        return pixels * std + mean

    def forward(
        self,
        pixel_values: Optional[torch.Tensor] = None,
        latent: Optional[torch.Tensor] = None,
        generator: Optional[torch.Generator] = None,
        return_last_layer: bool = False,
    ) -> RAEDecoderOutput:
        """Reconstruct pixels (B, 3, S, S) or (B, 3, H, W) in [0, 1], or decode latents (B, C, h, w): give exactly one
        of them. See `encode` and `decode`."""
        if (pixel_values is None) == (latent is None):
            raise ValueError("give exactly one of pixel_values and latent")
        if latent is None:
            latent = self.encode(pixel_values, generator).latent
            return self.decode(latent, return_last_layer, other_grid="keep")
        return self.decode(latent, return_last_layer)


# save_pretrained then copies this file beside the weights and records it in config.json's auto_map
RAEConfig.register_for_auto_class()
RAEModel.register_for_auto_class("AutoModel")
