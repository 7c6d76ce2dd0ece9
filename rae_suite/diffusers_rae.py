"""diffusers' AutoencoderRAE as an RAE, and an RAE as an AutoencoderRAE."""

import copy
import inspect
import json
import re
from pathlib import Path
from typing import Optional

import torch
import transformers
from safetensors.torch import save_file
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig

from modeling_rae import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LATENT_VAR_EPS,
    RAEConfig,
    RAEModel,
    check_config_dict,
    encoder_family,
    expand_statistics,
)
from rae_suite.autoencoders import DiffusersRAE
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.files import read_tensors
from rae_suite.model_sources import ModelSource
from rae_suite.position_tables import TABLE_TOLERANCE, diffusers_table, largest_difference, table_kind
from rae_suite.rae_networks import empty_decoder
from rae_suite.state_dicts import check_loading_info, check_names, check_shapes

# how this suite and the published code name the attention of a decoder block, and how diffusers does
ATTENTION_NAMES = (
    ("attention.attention.query", "attention.to_q"),
    ("attention.attention.key", "attention.to_k"),
    ("attention.attention.value", "attention.to_v"),
    ("attention.output.dense", "attention.to_out.0"),
)
# diffusers' encoder_type: transformers' model_type, and the image_size that diffusers always gives its config
DIFFUSERS_ENCODERS = {
    "dinov2": ("dinov2_with_registers", 518),
    "siglip2": ("siglip_vision_model", 256),
    "mae": ("vit_mae", 224),
}
DIFFUSERS_BUFFERS = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
# Latents are divided by (std + this). diffusers' own conversion of published statistics stores sqrt(var + 1e-5) as std,
# so its latents are smaller than the published ones: by 1e-5 of themselves at a variance of 1, by 1.4e-4 at 0.005. Here
# std is what gives the same divisor.
DIFFUSERS_STD_EPS = 1e-5
POOLING_HEAD = re.compile(r"(vision_model\.)?head\.")  # SigLIP's, which plays no part in an RAE
# what AutoencoderRAE's config does not say about an encoder: fields that shape its weights, and fields that do not
SHAPE_FIELDS = ("image_size", "intermediate_size", "mlp_ratio", "num_register_tokens", "use_swiglu_ffn", "qkv_bias")
OTHER_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps")


# ----------------------------------------------------------------------------------------------------------------------
# Reading. `key` is the setting that names the folder; errors are ConfigError about it.


def read_diffusers(folder: Path, held: dict, key: str) -> ModelSource:
    """The AutoencoderRAE in `folder`, whose config.json is `held`, with what runs it where the installed diffusers can
    build it with the installed transformers."""
    with error_names_setting(key, str(folder)):
        check_config_dict(held)
    source = diffusers_source(folder, held, key)
    reason = why_not_built(encoder_type_of(source.model.config))
    if reason:
        source.notes.append(f"{reason}: compared tensor by tensor")
    else:
        source.autoencoder = DiffusersRAE(str(folder), load_diffusers(folder, source.model, key))
    return source


def diffusers_source(folder: Path, held: dict, key: str) -> ModelSource:
    """The AutoencoderRAE in `folder`, whose config.json is `held`, as an RAE; nothing runs it by diffusers' code. Its
    weights are read without building it: diffusers cannot build every encoder with every transformers release, nor load
    every one's names of the encoder's modules."""
    settings, tensors = diffusers_settings(held, key), read_shards(folder, key)
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    encoder = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
    rest = tensors.keys() - decoder.keys() - {f"encoder.{name}" for name in encoder}
    check_names(rest, set(DIFFUSERS_BUFFERS), str(folder), key)
    config = diffusers_rae_config(settings, tensors, key)
    expected = {diffusers_name(name): tensor for name, tensor in empty_decoder(config).items()}
    computed = diffusers_table(config.decoder_hidden_size, config.latent_size)
    table = decoder.setdefault("decoder.decoder_pos_embed", computed)
    check_names(set(decoder), set(expected), str(folder), key)
    check_shapes(decoder, expected, str(folder), key)
    config.train_position_embedding = table_kind(table) == "learnt"

    source = ModelSource(RAEModel(config).eval(), None)
    if largest_difference(table, computed) > TABLE_TOLERANCE:
        difference = (
            f"the position table in {folder} differs by up to {largest_difference(table, computed):.2g} from the one "
            "that diffusers computes and uses instead; it is kept, so reconstructions are not those of diffusers"
        )
        source.differences.append(("reconstructions", difference))
    source.model.decoder.load_state_dict({our_name(name): tensor for name, tensor in decoder.items()})
    source.model.encoder.load_state_dict(current_encoder_names(encoder, source.model, f"the encoder in {folder}", key))
    if config.use_latent_stats:
        source.model.set_latent_stats(**diffusers_stats(settings, tensors, config, key))
    if settings["scaling_factor"] != 1:
        source.notes.append(f"scaling_factor {settings['scaling_factor']} is now a part of the latent statistics")
    if settings["use_encoder_loss"]:
        source.notes.append("use_encoder_loss is left out: it is for training code, the model does not use it")
    return source


def diffusers_settings(held: dict, key: str) -> dict:
    """The arguments of AutoencoderRAE that `held`, its config.json, stands for. Raises ConfigError for a setting that
    the installed diffusers does not know or that an RAE cannot have."""
    from diffusers import AutoencoderRAE  # seconds: only when needed

    defaults = {name: p.default for name, p in inspect.signature(AutoencoderRAE.__init__).parameters.items()}
    del defaults["self"]
    given = {name: value for name, value in held.items() if not name.startswith("_")}
    for name in sorted(given.keys() - defaults.keys()):
        raise ConfigError(f"{key}: config.json has '{name}', which the installed diffusers does not know")
    settings = {**defaults, **given}
    for name, default in defaults.items():
        value = settings[name]
        if type(default) is int and (type(value) is not int or value <= 0):
            raise ConfigError(f"{key}: {name} in config.json: expected a positive number, got {value!r}")
    for name, expected in (
        ("encoder_type", tuple(DIFFUSERS_ENCODERS)),
        ("num_channels", (3,)),
        ("reshape_to_2d", (True,)),  # an RAE's latents are always (B, C, h, w)
    ):
        if settings[name] not in expected:
            expected = " or ".join(map(str, expected))
            raise ConfigError(f"{key}: {name} in config.json: expected {expected}, got {settings[name]!r}")
    return settings


def read_shards(folder: Path, key: str) -> dict:
    """All tensors of a diffusers folder, in one file or several."""
    shards = sorted(folder.glob("diffusion_pytorch_model-*-of-*.safetensors"))
    tensors = {}
    for file in shards or [folder / "diffusion_pytorch_model.safetensors"]:
        try:
            tensors.update(read_tensors(file, key))
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error
    return tensors


def diffusers_rae_config(settings: dict, tensors: dict, key: str) -> RAEConfig:
    """What AutoencoderRAE's settings and buffers mean for an RAE."""
    pixel_stats = ("encoder_mean", "encoder_std")
    empty = dict.fromkeys(pixel_stats, torch.empty(1, 3, 1, 1))
    check_shapes({name: tensors[name] for name in pixel_stats}, empty, "the file", key)
    with error_names_setting(key):
        config = RAEConfig(
            encoder_config=diffusers_encoder_config(
                settings["encoder_type"],
                settings["encoder_hidden_size"],
                settings["encoder_patch_size"],
                settings["encoder_num_hidden_layers"],
                key,
            ),
            encoder_input_size=settings["encoder_input_size"],
            image_mean=decimals(settings["encoder_norm_mean"] or IMAGENET_MEAN, tensors["encoder_mean"]),
            image_std=decimals(settings["encoder_norm_std"] or IMAGENET_STD, tensors["encoder_std"]),
            decoder_hidden_size=settings["decoder_hidden_size"],
            decoder_num_hidden_layers=settings["decoder_num_hidden_layers"],
            decoder_num_attention_heads=settings["decoder_num_attention_heads"],
            decoder_intermediate_size=settings["decoder_intermediate_size"],
            decoder_patch_size=settings["patch_size"],
            noise_tau=settings["noise_tau"],
            use_latent_stats=not (no_mean(tensors) and no_std(tensors)) or settings["scaling_factor"] != 1,
        )
    if settings["image_size"] not in (None, config.image_size):
        raise ConfigError(
            f"{key}: image_size in config.json is {settings['image_size']}, its grid and patch_size give "
            f"{config.image_size}"
        )
    return config


def no_mean(tensors: dict) -> bool:
    """Whether the mean is what AutoencoderRAE has without one: a single 0."""
    return tensors["_latents_mean"].flatten().tolist() == [0.0]


def no_std(tensors: dict) -> bool:
    """Whether the std is what AutoencoderRAE has without one: a single 1."""
    return tensors["_latents_std"].flatten().tolist() == [1.0]


def diffusers_encoder_config(encoder_type: str, width: int, patch_size: int, blocks: int, key: str) -> PreTrainedConfig:
    """The transformers config that diffusers gives an encoder. Raises ConfigError for a width under one head."""
    if width < 64:
        raise ConfigError(f"{key}: encoder_hidden_size: expected at least 64, the width of a head, got {width}")
    model_type, image_size = DIFFUSERS_ENCODERS[encoder_type]
    return AutoConfig.for_model(
        model_type,
        hidden_size=width,
        patch_size=patch_size,
        image_size=image_size,
        num_attention_heads=width // 64,
        num_hidden_layers=blocks,
    )


def decimals(configured: list, buffer: torch.Tensor) -> list:
    """The image mean or std that diffusers uses, its `buffer`, with the config's decimals where they are the same."""
    values = buffer.flatten().float()
    return list(configured) if torch.equal(torch.tensor(configured), values) else values.tolist()


def diffusers_stats(settings: dict, tensors: dict, config: RAEConfig, key: str) -> dict:
    """Mean (None where there is none) and variance (C, h, w) with which an RAE's latents are AutoencoderRAE's. That
    divides by (std + 1e-5) and multiplies by scaling_factor, an RAE divides by sqrt(var + 1e-5)."""
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    with error_names_setting(key):
        mean, std = (
            expand_statistics(tensors[name].double(), shape, f"{key}: {name}")
            for name in ("_latents_mean", "_latents_std")
        )
    var = ((std + DIFFUSERS_STD_EPS) / settings["scaling_factor"]) ** 2 - LATENT_VAR_EPS
    if var.min() < -1e-9:  # further from zero than rounding takes it
        raise ConfigError(
            f"{key}: _latents_std goes down to {std.min():.3g}; an RAE's latents are divided by "
            f"sqrt(variance + {LATENT_VAR_EPS}), which is at least {LATENT_VAR_EPS**0.5:.3g}"
        )
    return {"mean": None if no_mean(tensors) else mean.float(), "var": var.clamp(min=0).float()}


def current_encoder_names(tensors: dict, model: RAEModel, what: str, key: str) -> dict:
    """The encoder's tensors under the installed transformers' names, through its own renaming of older ones. Raises
    ConfigError, about `what`, for missing and unexpected names and for other shapes."""
    tensors = {name: t for name, t in tensors.items() if not POOLING_HEAD.match(name)}
    encoder, info = type(model.encoder).from_pretrained(
        None,
        config=copy.deepcopy(model.config.encoder_config),
        state_dict=tensors,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused below
    )
    state, expected = encoder.state_dict(), model.encoder.state_dict().keys()
    # the final LayerNorm's weight and bias are in the new encoder, but not in an RAE's: nothing misses them
    check_loading_info({**info, "missing_keys": expected & info["missing_keys"]}, what, key)
    return {name: state[name] for name in expected}


def our_name(name: str) -> str:
    """A parameter of diffusers' decoder, as `decoder.` and so on, under the published code's name."""
    for ours, theirs in ATTENTION_NAMES:
        name = name.replace(theirs, ours)
    return name.removeprefix("decoder.")


def diffusers_name(name: str) -> str:
    """The reverse of `our_name`."""
    for ours, theirs in ATTENTION_NAMES:
        name = name.replace(ours, theirs)
    return f"decoder.{name}"


def encoder_type_of(config: RAEConfig) -> Optional[str]:
    """The encoder_type of AutoencoderRAE; None for a family that it does not have."""
    known = {model_type: encoder_type for encoder_type, (model_type, _) in DIFFUSERS_ENCODERS.items()}
    return known.get(config.encoder_config.model_type)


def why_not_built(encoder_type: str) -> str:
    """Why the installed diffusers cannot build such an encoder with the installed transformers; "" when it can."""
    import diffusers

    sizes = dict(encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=16, encoder_input_size=16)
    sizes |= dict(decoder_hidden_size=4, decoder_num_hidden_layers=0, decoder_num_attention_heads=1, patch_size=1)
    try:
        diffusers.AutoencoderRAE(encoder_type=encoder_type, **sizes)
    except AttributeError as error:  # it reaches into the encoder, whose modules differ between releases
        versions = f"diffusers {diffusers.__version__} with transformers {transformers.__version__}"
        return f"{versions} cannot build a {encoder_type} encoder ({error})"
    return ""


def load_diffusers(folder: Path, model: RAEModel, key: str) -> torch.nn.Module:
    """The AutoencoderRAE that `model` was read from, by diffusers' own loader, which knows the installed transformers'
    names of the encoder's modules only."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # it would list the names that it does not know
    try:
        twin, info = diffusers.AutoencoderRAE.from_pretrained(
            folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{key}: diffusers cannot load {folder}: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:  # of the encoder: all others were checked already
        twin.encoder.load_state_dict(model.encoder.state_dict())
    return twin


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def diffusers_differences(model: RAEModel, key: str) -> list:
    """What an AutoencoderRAE would do otherwise than `model`, as in ModelSource. Raises ConfigError, about the setting
    `key`, when none can hold its encoder."""
    config, encoder = model.config, model.config.encoder_config
    check_encoder_fits(config, key)
    standard, family = encoder_family(encoder), config.encoder_family()
    table = model.decoder.decoder_pos_embed
    distance = largest_difference(table, diffusers_table(config.decoder_hidden_size, config.latent_size))
    layers = config.encoder_layers or []
    eps, activation, factor = config.decoder_layer_norm_eps, config.decoder_hidden_act, config.scaling_factor
    in_latents = (
        (len(layers) > 1, f"latents are the mean of blocks {layers}, diffusers takes the last of them"),
        (config.encoder_add_spatial_mean, "the spatial mean is added to the latents, not so in diffusers"),
        (family.final_norm != standard.final_norm, f"the final LayerNorm is {family.final_norm}"),
        (family.prefix_tokens(encoder) != standard.prefix_tokens(encoder), "encoder_prefix_tokens is set"),
    )
    in_reconstructions = (
        (not config.denormalize_output, "the output is not denormalised, diffusers always does it"),
        (eps != 1e-12, f"decoder_layer_norm_eps is {eps}, in diffusers 1e-12"),
        (activation != "gelu", f"decoder_hidden_act is {activation}, in diffusers gelu"),
        (
            distance > TABLE_TOLERANCE,
            f"the position table ({table_kind(table)}) differs by up to {distance:.2g} from the one that diffusers "
            f"computes for {config.latent_size}x{config.latent_size} tokens; diffusers does not load one",
        ),
    )
    reason = why_not_built(encoder_type_of(config))
    unseen = ((factor != 1, f"scaling_factor is {factor}, which diffusers' encode would apply"), (reason, reason))
    return [
        *(("latents", text) for text in unlike_diffusers(config, OTHER_FIELDS, key)),
        *(("latents", text) for holds, text in in_latents if holds),
        *(("reconstructions", text) for holds, text in in_reconstructions if holds),
        *(("", text) for holds, text in unseen if holds),
    ]


def check_encoder_fits(config: RAEConfig, key: str) -> None:
    """Raise ConfigError, about the setting `key`, unless AutoencoderRAE has a place for all weights of the encoder."""
    encoder = config.encoder_config
    if encoder_type_of(config) is None:
        known = ", ".join(model_type for model_type, _ in DIFFUSERS_ENCODERS.values())
        raise ConfigError(f"{key}: AutoencoderRAE knows the encoders {known}, not {encoder.model_type}")
    if encoder.hidden_size < 64:
        raise ConfigError(f"{key}: the encoder's width {encoder.hidden_size} is under 64, one head of diffusers")
    lost = unlike_diffusers(config, SHAPE_FIELDS, key)
    if config.encoder_keep_final_affine:
        lost.append("the final LayerNorm has weight and bias (encoder_keep_final_affine), in diffusers it has none")
    if lost:
        raise ConfigError(f"{key}: no AutoencoderRAE holds such weights: {'; '.join(lost)}")


def unlike_diffusers(config: RAEConfig, names: tuple, key: str) -> list:
    """The encoder's fields, of `names`, that are not as diffusers builds it, in words."""
    encoder = config.encoder_config
    sizes = encoder.hidden_size, config.encoder_patch_size, encoder.num_hidden_layers
    built = diffusers_encoder_config(encoder_type_of(config), *sizes, key)
    values = [(name, getattr(encoder, name, None), getattr(built, name, None)) for name in names]
    return [f"the encoder's {name} is {ours}, in diffusers {theirs}" for name, ours, theirs in values if ours != theirs]


def diffusers_notes(model: RAEModel) -> list:
    """What an AutoencoderRAE says in another way than `model`, as in ModelSource."""
    notes = []
    if model.config.use_latent_stats and model.latent_mean is None:
        notes.append("the latent statistics have no mean: AutoencoderRAE has zeros in its place, latents are the same")
    if model.config.noise_tau > 0 and model.config.noise_distribution != "uniform":
        notes.append(
            f"noise_distribution {model.config.noise_distribution} is left out: training noise is uniform there"
        )
    return notes


def write_diffusers(model: RAEModel, folder: Path) -> None:
    """The folder of an AutoencoderRAE. It also holds the position table, which diffusers passes over, so that the way
    back is exact."""
    import diffusers

    config, encoder = model.config, model.config.encoder_config
    state = {diffusers_name(name): tensor for name, tensor in model.decoder.state_dict().items()}
    state |= diffusers_encoder_tensors(model)
    state["encoder_mean"] = torch.tensor(config.image_mean).view(1, 3, 1, 1)
    state["encoder_std"] = torch.tensor(config.image_std).view(1, 3, 1, 1)
    stats = written_stats(model)
    # what diffusers has in place of statistics that are not there
    state |= {"_latents_mean": torch.zeros(1), "_latents_std": torch.ones(1)}
    state |= {f"_{name}": tensor for name, tensor in stats.items()}
    settings = {
        "_class_name": "AutoencoderRAE",
        "_diffusers_version": diffusers.__version__,
        "encoder_type": encoder_type_of(config),
        "encoder_hidden_size": encoder.hidden_size,
        "encoder_patch_size": config.encoder_patch_size,
        "encoder_num_hidden_layers": (config.encoder_layers or [encoder.num_hidden_layers - 1])[-1] + 1,
        "encoder_input_size": config.encoder_input_size,
        "encoder_norm_mean": config.image_mean,
        "encoder_norm_std": config.image_std,
        "decoder_hidden_size": config.decoder_hidden_size,
        "decoder_num_hidden_layers": config.decoder_num_hidden_layers,
        "decoder_num_attention_heads": config.decoder_num_attention_heads,
        "decoder_intermediate_size": config.decoder_intermediate_size,
        "patch_size": config.decoder_patch_size,
        "image_size": config.image_size,
        "num_channels": 3,
        "noise_tau": config.noise_tau,
        "reshape_to_2d": True,
        "use_encoder_loss": False,
        "scaling_factor": 1.0,
        # diffusers makes room for the statistics by the shape of these
        "latents_mean": stats["latents_mean"].tolist() if "latents_mean" in stats else None,
        "latents_std": stats["latents_std"].tolist() if "latents_std" in stats else None,
    }
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def written_stats(model: RAEModel) -> dict:
    """`latents_mean` and `latents_std` of an AutoencoderRAE, as far as `model` has them: with them it divides by what
    `model` divides by, up to the rounding of float32."""
    if not model.config.use_latent_stats:
        return {}
    std = ((model.latent_var.double() + LATENT_VAR_EPS).sqrt() - DIFFUSERS_STD_EPS).float()
    return {"latents_std": std, **({} if model.latent_mean is None else {"latents_mean": model.latent_mean})}


def diffusers_encoder_tensors(model: RAEModel) -> dict:
    """The encoder's tensors under the names of AutoencoderRAE: those of the installed transformers. SigLIP2 is built by
    diffusers with older releases only, which nest it in `vision_model` and build a pooling head, which is not used."""
    state = model.encoder.state_dict()
    if encoder_type_of(model.config) == "siglip2":
        config = copy.deepcopy(model.config.encoder_config)
        config.vision_use_head = True
        with torch.device("meta"):
            head = MODEL_MAPPING[type(config)](config).state_dict()
        state |= {name: torch.zeros(t.shape) for name, t in head.items() if POOLING_HEAD.match(name)}
        state = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in state.items()}
    return {f"encoder.{name}": tensor for name, tensor in state.items()}
