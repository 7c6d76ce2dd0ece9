"""The published code's files as an RAE, and an RAE as such files: a decoder (model.pt), a training checkpoint
(ep-0000016.pt), latent statistics (stat.pt). What they do not hold is said by PublishedOptions."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional

import torch

from modeling_rae import ENCODER_FAMILIES, IMAGENET_MEAN, IMAGENET_STD, RAEConfig, RAEModel
from rae_suite.autoencoders import RAE
from rae_suite.cli import ALL_POSITIVE, POSITIVE, THREE, setting
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.model_sources import ModelSource
from rae_suite.position_tables import table_kind
from rae_suite.rae_networks import empty_decoder, read_latent_stats
from rae_suite.state_dicts import check_names, check_shapes
from rae_suite.values import PathText

# (width, blocks, MLP width) of the published decoders, and their heads, which weights do not show
KNOWN_HEADS = {(768, 12, 3072): 12, (1024, 24, 4096): 16, (1152, 28, 4096): 16}
# The published average covers the frozen encoder too, whose numbers it moves by rounding: each by at most 3.5e-6 of
# itself at the published decay 0.9978, by 1.7e-4 at 0.9999, however long the run (measured on 20,000 normal numbers).
AVERAGE_DRIFT = 2e-4


@dataclass
class PublishedOptions:
    """What a decoder of the published code does not hold, because it stands in that code's YAML files."""

    encoder: Optional[PathText] = None
    """Hub id or folder of the decoder's frozen encoder; needed for such a file, and for nothing else."""
    encoder_revision: Optional[str] = None
    """Revision of the encoder on the Hub."""
    encoder_input_size: int = setting(224, POSITIVE)
    """Side in pixels that images are resized to before the encoder."""
    encoder_layers: Optional[tuple[int, ...]] = None
    """Blocks of the encoder (0-based) whose mean is the latent (RAEv2); none: the last one alone."""
    encoder_add_spatial_mean: bool = False
    """Whether the last block's mean token is added to each token (RAEv2: several blocks of DINOv3 or SigLIP2)."""
    encoder_keep_final_affine: bool = False
    """Whether the encoder's final LayerNorm keeps its weight and bias (RAEv2: SigLIP2)."""
    image_mean: Optional[tuple[float, ...]] = setting(None, THREE)
    """Mean of pixels in [0, 1]; none: the encoder's image processor's (RAEv2's SigLIP2: 0.485 0.456 0.406)."""
    image_std: Optional[tuple[float, ...]] = setting(None, THREE, ALL_POSITIVE)
    """Standard deviation of the same (RAEv2's SigLIP2: 0.229 0.224 0.225)."""
    denormalize_output: bool = True
    """Whether the decoder's output is multiplied by the image std and the mean is added (RAEv2: not)."""
    decoder_num_attention_heads: Optional[int] = setting(None, POSITIVE)
    """Attention heads of a decoder that is no ViT-B, L or XL."""
    stats: Optional[PathText] = None
    """Its latent statistics, stat.pt; none: latents as they are."""


def check_options_used(options: PublishedOptions, models: Iterable) -> None:
    """Raise ConfigError for options that were given, as --published.*, where none of the `models` is a file."""
    given = [item.name for item in fields(options) if getattr(options, item.name) != item.default]
    if given and not any(os.path.isfile(model) for model in models if model is not None):
        raise ConfigError(f"published.{given[0]}: expected nothing unless model is a file of the published code")


# ----------------------------------------------------------------------------------------------------------------------
# Reading
#
# In all of these `key` is the setting that names the file, and `prefix` what stands before the names of the options:
# "--" on a command line. Errors are ConfigError about one of them.


def read_decoder(tensors: dict, path: Path, options: PublishedOptions, key: str, prefix: str) -> ModelSource:
    """A decoder of the published code, read from `path`, around the encoder that the options name."""
    config = published_config(tensors, path, options, key, prefix)
    stats = None
    if options.stats is not None:
        with error_names_setting(f"{prefix}stats"):
            stats = read_latent_stats(Path(options.stats), config, f"{prefix}stats")
    with error_names_setting(f"{prefix}encoder", options.encoder):
        model = RAEModel(config)
        model.load_encoder()
    model.decoder.load_state_dict(tensors)
    if stats is not None:
        model.set_latent_stats(**stats)
    return ModelSource(model.eval(), RAE(str(path), model), notes=raev2_notes(config, prefix))


def read_training(
    held: dict, path: Path, weights: str, options: PublishedOptions, key: str, prefix: str
) -> ModelSource:
    """The averaged ("ema") or "raw" `weights` of a training checkpoint, read from `path`. The encoder is the pretrained
    one that the options name: an average of what does not change is that itself, so where the checkpoint's copy differs
    by rounding, the copy is what is off. Decoder and statistics are used with that same encoder everywhere else."""
    tensors = training_weights(held, path, weights, key)
    decoder = {name.removeprefix("decoder."): tensors[name] for name in tensors if name.startswith("decoder.")}
    source = read_decoder(decoder, path, options, key, prefix)
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    source.notes += check_encoder(encoder, source.model, options.encoder, weights == "ema", key, prefix)
    return source


def training_weights(held: dict, path: Path, weights: str, key: str) -> dict:
    """State dict of the whole model, of either stage, in a training checkpoint, without the prefixes of wrappers."""
    part = {"ema": "ema", "raw": "model"}[weights]
    if not isinstance(held.get(part), dict):
        found = ", ".join(sorted(map(str, held)))
        raise ConfigError(f"{key}: {path} has no '{part}' and so no {weights} weights, it has {found}")
    for name in held[part]:
        if not isinstance(name, str):
            raise ConfigError(f"{key}: '{part}' of {path} has the key {name!r}, expected names of tensors")
    return {name.removeprefix("module.").replace("_orig_mod.", ""): tensor for name, tensor in held[part].items()}


def check_encoder(tensors: dict, model: RAEModel, encoder: str, averaged: bool, key: str, prefix: str) -> list:
    """Raise ConfigError when a training checkpoint's own copy of the encoder is another one: when a number differs from
    the pretrained one in the checkpoint's precision, or, of averaged weights, by more than an average's rounding; or
    when one of them alone has a final LayerNorm with weight and bias. transformers releases differ in the names of some
    tensors: those with the same name are compared. Returns notes of what was found."""
    family, kept = model.config.encoder_family(), model.config.encoder_keep_final_affine
    known = {name.removeprefix(family.file_prefix): tensor for name, tensor in model.encoder.state_dict().items()}
    # below `encoder.` comes the published wrapper's name for the transformers model
    named = {name.split(".", 2)[-1].removeprefix(family.file_prefix): tensor for name, tensor in tensors.items()}
    common = sorted(named.keys() & known.keys())
    if common and (f"{family.final_norm}.weight" in named) != kept:
        there, expected = ("no", "not to be given") if kept else ("a", "it, as for RAEv2's SigLIP2")
        raise ConfigError(
            f"{prefix}encoder_keep_final_affine: expected {expected}: the checkpoint's encoder has {there} weight and "
            f"bias of the final LayerNorm"
        )
    largest = 0.0
    for name in common:
        if not isinstance(named[name], torch.Tensor):
            raise ConfigError(f"{key}: '{name}' of the checkpoint's encoder is no tensor")
        both_numbers = named[name].is_floating_point() == known[name].is_floating_point()
        if both_numbers and torch.equal(named[name], known[name].to(named[name].dtype)):
            continue
        drift = relative_drift(named[name], known[name]) if averaged else math.inf
        if not drift <= AVERAGE_DRIFT:  # nan included
            raise ConfigError(f"{prefix}encoder: '{name}' of {encoder} differs from the encoder's in the checkpoint")
        largest = max(largest, drift)
    if not common:
        return ["the checkpoint's copy of the encoder has other names: it was not compared"]
    if largest == 0:
        return []
    return [
        f"the encoder has the pretrained weights of {encoder}: the checkpoint's averaged copy of them differs by "
        f"rounding, up to {largest:.2g} of a number"
    ]


def relative_drift(averaged: torch.Tensor, pretrained: torch.Tensor) -> float:
    """The largest difference of two tensors' numbers, relative to the pretrained one, beyond what the average's own
    precision rounds off; infinite for other shapes and types."""
    if averaged.shape != pretrained.shape or not averaged.is_floating_point():
        return math.inf
    precision = torch.finfo(averaged.dtype)
    difference = (averaged.double() - pretrained.double()).abs()
    size = pretrained.double().abs()
    if averaged.dtype != pretrained.dtype:
        difference -= size * precision.eps
    return (difference / size.clamp(min=precision.tiny)).max().item()


def published_config(tensors: dict, path: Path, options: PublishedOptions, key: str, prefix: str) -> RAEConfig:
    """The config of an RAE with this decoder (published names) and the options' encoder. Raises ConfigError for missing
    and unexpected names, for shapes that do not fit each other, and for a decoder that does not fit."""
    what = f"the decoder in {path}"
    sizes, channels, grid = decoder_sizes(tensors, what, key)
    sizes["decoder_num_attention_heads"] = number_of_heads(sizes, options.decoder_num_attention_heads, prefix)
    with error_names_setting(f"{prefix}encoder", options.encoder):
        config = RAEConfig.from_encoder(
            options.encoder,
            options.encoder_revision,
            image_mean=options.image_mean,
            image_std=options.image_std,
            encoder_input_size=options.encoder_input_size,
            encoder_layers=options.encoder_layers,
            encoder_add_spatial_mean=options.encoder_add_spatial_mean,
            encoder_keep_final_affine=options.encoder_keep_final_affine,
            denormalize_output=options.denormalize_output,
            use_latent_stats=options.stats is not None,
            **sizes,
        )
    if channels != config.latent_channels:
        raise ConfigError(
            f"{prefix}encoder: {options.encoder} gives {config.latent_channels} channels, {what} takes {channels}"
        )
    if grid != config.latent_size:
        raise ConfigError(
            f"{prefix}encoder_input_size: {config.encoder_input_size} px in patches of {config.encoder_patch_size} px "
            f"are a grid of {config.latent_size}x{config.latent_size} tokens, {what} has positions for {grid}x{grid} "
            f"({grid * config.encoder_patch_size} px would give them)"
        )
    check_shapes(tensors, empty_decoder(config), what, key)
    config.train_position_embedding = table_kind(tensors["decoder_pos_embed"]) == "learnt"
    return config


def decoder_sizes(tensors: dict, what: str, key: str) -> tuple[dict, int, int]:
    """The sizes of a decoder, as fields of RAEConfig, its latents' channels and its grid's side, all from the shapes of
    its tensors. Raises ConfigError for other names than a decoder's and for shapes that no decoder has."""
    numbers = {int(found[1]) for name in tensors if (found := re.match(r"decoder_layers\.(\d+)\.", str(name)))}
    sizes = {"decoder_num_hidden_layers": max(len(numbers), 1)}
    check_names({*map(str, tensors)}, set(empty_decoder(RAEConfig(**sizes))), what, key)
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}
    try:
        sizes["decoder_hidden_size"], channels = shapes["decoder_embed.weight"]
        sizes["decoder_intermediate_size"], _ = shapes["decoder_layers.0.intermediate.dense.weight"]
        _, positions, _ = shapes["decoder_pos_embed"]
        pixels, _ = shapes["decoder_pred.weight"]
    except ValueError as error:
        raise ConfigError(f"{key}: {what} has tensors of other ranks than a ViT decoder ({error})") from error
    sizes["decoder_patch_size"], grid = math.isqrt(pixels // 3), math.isqrt(max(positions - 1, 0))
    if 3 * sizes["decoder_patch_size"] ** 2 != pixels or grid**2 != positions - 1:
        raise ConfigError(
            f"{key}: {what} makes {pixels} values of each of {positions - 1} tokens, expected 3*p*p of h*h"
        )
    return sizes, channels, grid


def number_of_heads(sizes: dict, given: Optional[int], prefix: str) -> int:
    """A decoder's heads: those that were given, else those of a published decoder of the same sizes."""
    size = tuple(sizes[f"decoder_{name}"] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    heads = given or KNOWN_HEADS.get(size)
    if heads is None:
        raise ConfigError(
            f"{prefix}decoder_num_attention_heads: expected a number for a decoder of width {size[0]}, {size[1]} "
            f"blocks and MLP width {size[2]}, which is none of the published sizes"
        )
    if size[0] % heads:
        raise ConfigError(
            f"{prefix}decoder_num_attention_heads: expected a divisor of the width {size[0]}, got {heads}"
        )
    return heads


def raev2_notes(config: RAEConfig, prefix: str) -> list:
    """What may have been forgotten: a decoder without denormalised output is RAEv2's, whose SigLIP2 is not RAE's."""
    if config.denormalize_output or config.encoder_config.model_type != "siglip_vision_model":
        return []
    same = config.image_mean == list(IMAGENET_MEAN) and config.image_std == list(IMAGENET_STD)
    if config.encoder_keep_final_affine and same:
        return []
    mean, std = (" ".join(map(str, values)) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return [
        "RAEv2's SigLIP2 keeps the weight and bias of the final LayerNorm and has ImageNet's mean and std: "
        f"{prefix}encoder_keep_final_affine {prefix}image_mean {mean} {prefix}image_std {std}"
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def published_differences(model: RAEModel) -> list:
    """What the published code would do otherwise than `model`, as in ModelSource: settings that neither its files nor
    `reading_flags` hold."""
    config, encoder = model.config, model.config.encoder_config
    family, standard = config.encoder_family(), ENCODER_FAMILIES.get(encoder.model_type)
    differences = [
        f"{name} is {getattr(config, name)}, in the published code {fixed}"
        for name, fixed in (("decoder_hidden_act", "gelu"), ("decoder_layer_norm_eps", 1e-12), ("scaling_factor", 1))
        if getattr(config, name) != fixed
    ]
    if standard is None or family.final_norm != standard.final_norm:
        differences.append(f"encoder_final_norm is {family.final_norm}")
    if standard is None or family.prefix_tokens(encoder) != standard.prefix_tokens(encoder):
        differences.append(f"encoder_prefix_tokens is {family.prefix_tokens(encoder)}")
    return [("", text) for text in differences]


def write_published(model: RAEModel, folder: Path) -> None:
    """model.pt and, of a model with latent statistics, stat.pt."""
    torch.save({name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}, folder / "model.pt")
    if model.config.use_latent_stats:
        mean = None if model.latent_mean is None else model.latent_mean.clone()
        torch.save({"mean": mean, "var": model.latent_var.clone()}, folder / "stat.pt")


def reading_flags(config: RAEConfig) -> list:
    """PublishedOptions, as flags, with which the published form of an RAE is read back: what its files do not hold."""

    def words(values: Any) -> list:
        return list(map(str, values))

    flags = ["--encoder", config.encoder_id or "ENCODER", "--encoder_input_size", str(config.encoder_input_size)]
    if config.encoder_revision is not None:
        flags += ["--encoder_revision", config.encoder_revision]
    flags += ["--decoder_num_attention_heads", str(config.decoder_num_attention_heads)]
    if config.encoder_layers is not None:
        flags += ["--encoder_layers", *words(config.encoder_layers)]
    if config.encoder_add_spatial_mean:
        flags.append("--encoder_add_spatial_mean")
    if config.encoder_keep_final_affine:
        flags.append("--encoder_keep_final_affine")
    if not config.denormalize_output:
        flags.append("--no_denormalize_output")
    flags += ["--image_mean", *words(config.image_mean), "--image_std", *words(config.image_std)]
    return flags + (["--stats", "stat.pt"] if config.use_latent_stats else [])
