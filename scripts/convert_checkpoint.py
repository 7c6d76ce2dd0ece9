"""Convert checkpoints of representation autoencoders between the published code, diffusers and this suite, with proof.

    python scripts/convert_checkpoint.py --from published --to rae --input model.pt --stats stat.pt \\
            --encoder facebook/dinov2-with-registers-base --output rae_dinov2_b
        A published decoder, and its latent statistics, around a pretrained encoder. The decoder's sizes follow from its
        tensors, its number of heads from the known sizes (ViT-B, L, XL) or from --decoder_num_attention_heads.

    python scripts/convert_checkpoint.py --from training --to rae --input ep-0000016.pt --weights ema \\
            --encoder facebook/dinov2-with-registers-base --output rae_dinov2_b
        A training checkpoint of the published code, its averaged (ema) or raw weights.

    python scripts/convert_checkpoint.py --from diffusers --to rae --input my_autoencoder_rae --output my_rae
    python scripts/convert_checkpoint.py --from rae --to diffusers --input runs/dinov2_b/final --output my_diffusers
        What AutoencoderRAE cannot hold (a latent grid other than 16 x 16, a learnt position table, latents from several
        blocks, ...) is named and stops the conversion; --force converts the rest.

    python scripts/convert_checkpoint.py --from rae --to published --input runs/dinov2_b/final --output published
        Writes model.pt and, for a model with latent statistics, stat.pt. What the published code fixes otherwise (the
        decoder's activation, ...) is named and stops the conversion, as above.

Any two different sides can be combined. Weights are written in float32. The result is written beside --output, loaded
from there and compared with the source: tensor by tensor, and on two photographs and a noise image where both sides can
run (this suite's decoder stands for the published one). Only when nothing differs by more than 1e-4 is it put in its
place; else the exit code is 1 and nothing is left. With --force, differences that were named beforehand are printed
and stop nothing. Bad input ends with one line and exit code 2. A CPU is enough: two
minutes and 7 GB of memory for a ViT-XL decoder.
"""

import argparse
import copy
import inspect
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import IMAGE_PROCESSOR_NAME

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root
from modeling_rae import (
    ENCODER_FAMILIES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LATENT_VAR_EPS,
    RAEConfig,
    RAEDecoder,
    RAEModel,
    encoder_family,
    sincos_position_table,
)
from rae_suite.autoencoders import RAE, Autoencoder, DiffusersRAE, load_autoencoder
from rae_suite.errors import ConfigError, OneLineParser, RunError, error_names_setting
from rae_suite.files import check_output_file, read_saved, read_tensors, write_folder
from rae_suite.images import center_crop
from rae_suite.launch import quiet_transformers, run_main
from rae_suite.rae_networks import image_processor_json, read_latent_stats

TOLERANCE = 1e-4  # largest difference of a conversion that counts as right
TABLE_TOLERANCE = 1e-5  # position tables that are closer are the same one: a step of training moves a table further
SIDES = {
    "published": "a decoder of the published code (a file such as model.pt)",
    "training": "a training checkpoint of the published code (a file such as ep-0000016.pt)",
    "diffusers": "a folder of diffusers' AutoencoderRAE",
    "rae": "a folder of this suite's RAE, such as runs/<name>/final",
}
# (width, blocks, MLP width) of the published decoders, and their heads, which weights do not show
KNOWN_HEADS = {(768, 12, 3072): 12, (1024, 24, 4096): 16, (1152, 28, 4096): 16}

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
DIFFUSERS_STD_EPS = 1e-5  # latents are divided by (std + this)
POOLING_HEAD = re.compile(r"(vision_model\.)?head\.")  # SigLIP's, which plays no part in an RAE
# what AutoencoderRAE's config does not say about an encoder: fields that shape its weights, and fields that do not
SHAPE_FIELDS = ("image_size", "intermediate_size", "mlp_ratio", "num_register_tokens", "use_swiglu_ffn", "qkv_bias")
OTHER_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps")


@dataclass
class Source:
    """What was read, as an RAE in float32, and what runs it: its own side's code where that can, else None.
    `differences` are what the conversion changes and in which part ("latents" and with them all, "reconstructions", or
    "" for nothing that can be seen); they need --force. `notes` are what it leaves out."""

    model: RAEModel
    autoencoder: Optional[Autoencoder]
    differences: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def main(argv: Optional[list] = None) -> None:
    args = parse_arguments(argv)
    check_arguments(args)
    quiet_transformers()
    source = READERS[args.source](args)
    if args.target == "diffusers":
        source.differences += diffusers_differences(source.model)
    if args.target == "published":
        source.differences += published_differences(source.model)
    if source.differences and not args.force:
        reasons = "; ".join(text for _, text in source.differences)
        raise ConfigError(f"--to {args.target}: {reasons}; --force converts nevertheless")
    place = {"prefix": ".convert-", "dir": existing_parent(args.output), "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**place) as beside:
        folder = Path(beside) / "model"
        folder.mkdir()
        WRITERS[args.target](source.model, folder)
        report = {**describe(args, source), **compare(source, folder, args.target)}
        print_report(report)
        check_proof(report)
        write_folder(args.output, lambda partial: folder.rename(partial), True, lambda: None)
    print(f"{args.output} is written")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments(argv: Optional[list]) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, choices=list(SIDES), help="what --input is")
    parser.add_argument("--to", dest="target", required=True, choices=list(WRITERS), help="what to write")
    parser.add_argument("--input", type=Path, required=True, help="file or folder to convert")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--overwrite", action="store_true", help="replace a converted model that is in --output")
    parser.add_argument("--force", action="store_true", help="convert also what the other side cannot hold entirely")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report here")
    published = parser.add_argument_group("published decoders and training checkpoints, which have no config")
    published.add_argument("--weights", choices=["ema", "raw"], help="which of a training checkpoint (default: ema)")
    published.add_argument("--stats", type=Path, metavar="FILE", help="stat.pt: latent mean and variance, (C, h, w)")
    published.add_argument("--encoder", help="Hub id or folder of the encoder")
    published.add_argument("--encoder_revision", help="revision of the encoder on the Hub")
    published.add_argument("--encoder_input_size", type=int, help="pixels of the encoder's input (default: 224)")
    published.add_argument(
        "--encoder_layers", type=int, nargs="+", help="blocks (0-based) whose mean is the latent (default: the last)"
    )
    published.add_argument(
        "--encoder_add_spatial_mean", action="store_true", help="add the tokens' mean to each token (RAEv2)"
    )
    published.add_argument(
        "--no_denormalize_output", action="store_true", help="the decoder's output is in [0, 1] already (RAEv2)"
    )
    published.add_argument("--decoder_num_attention_heads", type=int, help="of decoders other than ViT-B, L and XL")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for a command line that no conversion can use."""
    published = args.source in ("published", "training")
    for name in (
        "weights stats encoder encoder_revision encoder_input_size encoder_layers encoder_add_spatial_mean "
        "no_denormalize_output decoder_num_attention_heads"
    ).split():
        used = args.source == "training" if name == "weights" else published
        if not used and getattr(args, name) not in (None, False):
            raise ConfigError(f"--{name}: expected nothing with --from {args.source}, got {getattr(args, name)}")
    if args.source == args.target:
        raise ConfigError(f"--to: expected another side than --from, got {args.target} twice")
    if published and args.encoder is None:
        raise ConfigError(f"--encoder: expected a Hub id or folder with --from {args.source}, whose files have none")
    for name in ("encoder_input_size", "decoder_num_attention_heads"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name}: expected a positive number, got {value}")
    check_output(args)
    check_output_file(args.json, "--json")


def check_output(args: argparse.Namespace) -> None:
    """Raise ConfigError unless --output is free, or --overwrite was given and may replace it."""
    output = args.output
    if above := next((path for path in output.absolute().parents if path.exists() and not path.is_dir()), None):
        raise ConfigError(f"--output: {above} is a file, expected a folder")
    if not os.access(existing_parent(output), os.W_OK):
        raise ConfigError(f"--output: {existing_parent(output)} cannot be written to")
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return
    if not output.is_dir() or not args.overwrite:
        raise ConfigError(f"--output: {output} exists, expected a new or empty folder (or --overwrite)")
    if not (output / "config.json").is_file() and not (output / "model.pt").is_file():
        raise ConfigError(f"--output: {output} is no converted model, --overwrite replaces nothing else")
    if output.resolve() in (args.input.resolve(), *args.input.resolve().parents):
        raise ConfigError(f"--output: {output} holds --input {args.input}, expected another folder")


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there: what fails in it leaves no empty folders behind."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


# ----------------------------------------------------------------------------------------------------------------------
# What --input is


def open_input(args: argparse.Namespace) -> dict:
    """What --input holds: a checkpoint's dictionary, or a folder's config.json. Raises ConfigError when it is not of
    the kind that --from says."""
    path = args.input
    if not path.exists():
        raise ConfigError(f"--input: {path} does not exist, expected {SIDES[args.source]}")
    try:
        held = read_json(path / "config.json") if path.is_dir() else read_saved(path, "--input")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}; expected {SIDES[args.source]}") from error
    side = side_of(held, path.is_dir())
    if side is None:
        raise ConfigError(f"--input: {path} is no checkpoint that is known here, expected {SIDES[args.source]}")
    if side != args.source:
        raise ConfigError(f"--input: {path} is {SIDES[side]}, expected {SIDES[args.source]}: use --from {side}")
    return held


def side_of(held: Any, is_folder: bool) -> Optional[str]:
    """The key of SIDES that a checkpoint's dictionary or a folder's config is of, or None."""
    if not isinstance(held, dict):
        return None
    if is_folder:
        kind = held.get("_class_name", held.get("model_type"))
        return {"AutoencoderRAE": "diffusers", "rae": "rae"}.get(kind)
    if any(isinstance(held.get(name), dict) for name in ("model", "ema")):
        return "training"
    return "published" if any(str(name).startswith("decoder_") for name in held) else None


def read_json(file: Path) -> Any:
    if not file.is_file():
        raise OSError(f"--input: {file.parent} has no {file.name}")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"--input: {file} is no JSON file ({error})") from error


def check_names(found: set, expected: set, what: str) -> None:
    """Raise ConfigError, about `what` in --input, unless it has exactly the expected names."""
    for kind, names in (("lacks", expected - found), ("has unexpected", found - expected)):
        if names:
            raise ConfigError(f"--input: {what} {kind} {len(names)} keys, the first is '{min(names)}'")


def check_shapes(tensors: dict, expected: dict, what: str) -> None:
    """Raise ConfigError unless all tensors have the expected shapes and are numbers with a fraction."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ConfigError(f"--input: '{name}' of {what} is no tensor of floating-point numbers")
        if tensor.shape != expected[name].shape:
            shapes = tuple(tensor.shape), tuple(expected[name].shape)
            raise ConfigError(f"--input: '{name}' of {what} has shape {shapes[0]}, expected {shapes[1]}")


# ----------------------------------------------------------------------------------------------------------------------
# Readers


def read_rae(args: argparse.Namespace) -> Source:
    open_input(args)
    autoencoder = load_autoencoder(str(args.input), "--input")
    return Source(autoencoder.model, autoencoder)


def read_published(args: argparse.Namespace) -> Source:
    """A decoder of the published code around the encoder that the command line names."""
    held = open_input(args)
    encoder = {}
    if args.source == "training":
        held = training_weights(held, args)
        encoder = {name: tensor for name, tensor in held.items() if name.startswith("encoder.")}
        held = {name.removeprefix("decoder."): held[name] for name in held if name.startswith("decoder.")}
    config = published_config(held, args)
    with error_names_setting("--stats"):
        stats = None if args.stats is None else read_latent_stats(args.stats, config, "--stats")
    with error_names_setting("--encoder", args.encoder):
        model = RAEModel(config)
        model.load_encoder()
    model.decoder.load_state_dict(held)
    if stats is not None:
        model.set_latent_stats(**stats)
    notes = check_encoder(encoder, model, args.encoder) if args.source == "training" else []
    return Source(model.eval(), RAE(str(args.input), model), notes=notes)


def training_weights(held: dict, args: argparse.Namespace) -> dict:
    """State dict of the whole autoencoder in a training checkpoint, without the prefixes of wrappers."""
    part = {"ema": "ema", "raw": "model"}[args.weights or "ema"]
    if not isinstance(held.get(part), dict):
        raise ConfigError(f"--weights: {args.input} has no '{part}', it has {', '.join(sorted(map(str, held)))}")
    for name in held[part]:
        if not isinstance(name, str):
            raise ConfigError(f"--input: '{part}' of {args.input} has the key {name!r}, expected names of tensors")
    return {name.removeprefix("module.").replace("_orig_mod.", ""): tensor for name, tensor in held[part].items()}


def check_encoder(tensors: dict, model: RAEModel, encoder: str) -> list:
    """Raise ConfigError when the training checkpoint's own copy of the encoder is another one, in the checkpoint's
    precision. transformers releases differ in the names of some tensors: those with the same name are compared. Returns
    a note when there are none."""
    known = model.encoder.state_dict()
    # below `encoder.` comes the published wrapper's name for the transformers model
    named = {name.split(".", 2)[-1]: tensor for name, tensor in tensors.items()}
    common = sorted(named.keys() & known.keys())
    for name in common:
        if not isinstance(named[name], torch.Tensor):
            raise ConfigError(f"--input: '{name}' of the checkpoint's encoder is no tensor")
        if not torch.equal(named[name], known[name].to(named[name].dtype)):
            raise ConfigError(f"--encoder: '{name}' of {encoder} differs from the encoder's in the checkpoint")
    return [] if common else ["the checkpoint's copy of the encoder has other names: it was not compared"]


def published_config(tensors: dict, args: argparse.Namespace) -> RAEConfig:
    """The config of an RAE with this decoder (published names) and the command line's encoder. Raises ConfigError for
    missing and unexpected names, for shapes that do not fit each other, and for a decoder that does not fit."""
    what = f"the decoder in {args.input}"
    numbers = {int(found[1]) for name in tensors if (found := re.match(r"decoder_layers\.(\d+)\.", str(name)))}
    sizes = {"decoder_num_hidden_layers": max(len(numbers), 1)}
    check_names({*map(str, tensors)}, set(empty_decoder(RAEConfig(**sizes))), what)
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}
    try:
        sizes["decoder_hidden_size"], channels = shapes["decoder_embed.weight"]
        sizes["decoder_intermediate_size"], _ = shapes["decoder_layers.0.intermediate.dense.weight"]
        _, positions, _ = shapes["decoder_pos_embed"]
        pixels, _ = shapes["decoder_pred.weight"]
    except ValueError as error:
        raise ConfigError(f"--input: {what} has tensors of other ranks than a ViT decoder ({error})") from error
    sizes["decoder_patch_size"], grid = math.isqrt(pixels // 3), math.isqrt(max(positions - 1, 0))
    if 3 * sizes["decoder_patch_size"] ** 2 != pixels or grid**2 != positions - 1:
        raise ConfigError(
            f"--input: {what} makes {pixels} values of each of {positions - 1} tokens, expected 3*p*p of h*h"
        )
    sizes["decoder_num_attention_heads"] = number_of_heads(sizes, args)
    with error_names_setting("--encoder", args.encoder):
        config = RAEConfig.from_encoder(
            args.encoder,
            args.encoder_revision,
            encoder_input_size=args.encoder_input_size or 224,
            encoder_layers=args.encoder_layers,
            encoder_add_spatial_mean=args.encoder_add_spatial_mean,
            denormalize_output=not args.no_denormalize_output,
            use_latent_stats=args.stats is not None,
            **sizes,
        )
    if channels != config.latent_channels:
        raise ConfigError(f"--encoder: {args.encoder} gives {config.latent_channels} channels, {what} takes {channels}")
    if grid != config.latent_size:
        raise ConfigError(
            f"--encoder_input_size: {config.encoder_input_size} px in patches of {config.encoder_patch_size} px are a "
            f"grid of {config.latent_size}x{config.latent_size} tokens, {what} has positions for {grid}x{grid} "
            f"({grid * config.encoder_patch_size} px would give them)"
        )
    check_shapes(tensors, empty_decoder(config), what)
    config.train_position_embedding = table_kind(tensors["decoder_pos_embed"]) == "learnt"
    return config


def number_of_heads(sizes: dict, args: argparse.Namespace) -> int:
    size = tuple(sizes[f"decoder_{name}"] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    heads = args.decoder_num_attention_heads or KNOWN_HEADS.get(size)
    if heads is None:
        raise ConfigError(
            "--decoder_num_attention_heads: expected a number for a decoder of width {}, {} blocks and MLP width {}, "
            "which is none of the published sizes".format(*size)
        )
    if size[0] % heads:
        raise ConfigError(f"--decoder_num_attention_heads: expected a divisor of the width {size[0]}, got {heads}")
    return heads


def empty_decoder(config: RAEConfig) -> dict:
    """Names and tensors without data of the decoder that `config` describes."""
    with torch.device("meta"):
        return RAEDecoder(config).state_dict()


def read_diffusers(args: argparse.Namespace) -> Source:
    """An AutoencoderRAE. Its weights are read without building it: diffusers cannot build every encoder with every
    transformers release, nor load every one's names of the encoder's modules."""
    source = diffusers_source(args.input, open_input(args))
    reason = why_not_built(diffusers_type(source.model.config))
    if reason:
        source.notes.append(f"{reason}: compared tensor by tensor")
    else:
        source.autoencoder = DiffusersRAE(str(args.input), load_diffusers(args.input, source.model))
    return source


def diffusers_source(folder: Path, held: dict) -> Source:
    """The AutoencoderRAE in `folder`, whose config.json is `held`, as an RAE; nothing runs it by diffusers' code."""
    settings, tensors = diffusers_settings(held), read_shards(folder)
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    encoder = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
    rest = tensors.keys() - decoder.keys() - {f"encoder.{name}" for name in encoder}
    check_names(rest, set(DIFFUSERS_BUFFERS), str(folder))
    config = diffusers_rae_config(settings, tensors)
    expected = {diffusers_name(name): tensor for name, tensor in empty_decoder(config).items()}
    computed = diffusers_table(config.decoder_hidden_size, config.latent_size)
    table = decoder.setdefault("decoder.decoder_pos_embed", computed)
    check_names(set(decoder), set(expected), str(folder))
    check_shapes(decoder, expected, str(folder))
    config.train_position_embedding = table_kind(table) == "learnt"

    source = Source(RAEModel(config).eval(), None)
    if largest_difference(table, computed) > TABLE_TOLERANCE:
        difference = (
            f"the position table in {folder} differs by up to {largest_difference(table, computed):.2g} from the one "
            "that diffusers computes and uses instead; it is kept, so reconstructions are not those of diffusers"
        )
        source.differences.append(("reconstructions", difference))
    source.model.decoder.load_state_dict({our_name(name): tensor for name, tensor in decoder.items()})
    source.model.encoder.load_state_dict(current_encoder_names(encoder, source.model, folder))
    if config.use_latent_stats:
        source.model.set_latent_stats(**diffusers_stats(settings, tensors, config))
    if settings["scaling_factor"] != 1:
        source.notes.append(f"scaling_factor {settings['scaling_factor']} is now a part of the latent statistics")
    if settings["use_encoder_loss"]:
        source.notes.append("use_encoder_loss is left out: it is for training code, the model does not use it")
    return source


def diffusers_settings(held: dict) -> dict:
    """The arguments of AutoencoderRAE that `held`, its config.json, stands for. Raises ConfigError for a setting that
    the installed diffusers does not know or that an RAE cannot have."""
    from diffusers import AutoencoderRAE  # seconds: only when needed

    defaults = {name: p.default for name, p in inspect.signature(AutoencoderRAE.__init__).parameters.items()}
    del defaults["self"]
    given = {name: value for name, value in held.items() if not name.startswith("_")}
    for name in sorted(given.keys() - defaults.keys()):
        raise ConfigError(f"--input: config.json has '{name}', which the installed diffusers does not know")
    settings = {**defaults, **given}
    for name, default in defaults.items():
        value = settings[name]
        if type(default) is int and (type(value) is not int or value <= 0):
            raise ConfigError(f"--input: {name} in config.json: expected a positive number, got {value!r}")
    for name, expected in (
        ("encoder_type", tuple(DIFFUSERS_ENCODERS)),
        ("num_channels", (3,)),
        ("reshape_to_2d", (True,)),  # an RAE's latents are always (B, C, h, w)
    ):
        if settings[name] not in expected:
            expected = " or ".join(map(str, expected))
            raise ConfigError(f"--input: {name} in config.json: expected {expected}, got {settings[name]!r}")
    return settings


def read_shards(folder: Path) -> dict:
    """All tensors of a diffusers folder, in one file or several."""
    shards = sorted(folder.glob("diffusion_pytorch_model-*-of-*.safetensors"))
    tensors = {}
    for file in shards or [folder / "diffusion_pytorch_model.safetensors"]:
        try:
            tensors.update(read_tensors(file, "--input"))
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error
    return tensors


def diffusers_rae_config(settings: dict, tensors: dict) -> RAEConfig:
    """What AutoencoderRAE's settings and buffers mean for an RAE."""
    pixel_stats = ("encoder_mean", "encoder_std")
    check_shapes({n: tensors[n] for n in pixel_stats}, dict.fromkeys(pixel_stats, torch.empty(1, 3, 1, 1)), "the file")
    stats = [tensors["_latents_mean"].flatten().tolist(), tensors["_latents_std"].flatten().tolist()]
    with error_names_setting("--input"):
        config = RAEConfig(
            encoder_config=diffusers_encoder_config(
                settings["encoder_type"],
                settings["encoder_hidden_size"],
                settings["encoder_patch_size"],
                settings["encoder_num_hidden_layers"],
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
            # (1,) zeros and ones are what diffusers has without statistics
            use_latent_stats=stats != [[0.0], [1.0]] or settings["scaling_factor"] != 1,
        )
    if settings["image_size"] not in (None, config.image_size):
        raise ConfigError(
            f"--input: image_size in config.json is {settings['image_size']}, its grid and patch_size give "
            f"{config.image_size}"
        )
    return config


def diffusers_encoder_config(encoder_type: str, width: int, patch_size: int, blocks: int) -> PreTrainedConfig:
    """The transformers config that diffusers gives an encoder. Raises ConfigError for a width under one head."""
    if width < 64:
        raise ConfigError(f"--input: encoder_hidden_size: expected at least 64, the width of a head, got {width}")
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


def diffusers_stats(settings: dict, tensors: dict, config: RAEConfig) -> dict:
    """Mean and variance (C, h, w) with which an RAE's latents are AutoencoderRAE's. That divides by (std + 1e-5) and
    multiplies by scaling_factor, an RAE divides by sqrt(var + 1e-5)."""
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    stats = {}
    for name in ("mean", "std"):
        tensor = tensors[f"_latents_{name}"]
        tensor = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
        try:
            stats[name] = tensor.double().broadcast_to(shape)
        except RuntimeError as error:
            found = tuple(tensors[f"_latents_{name}"].shape)
            raise ConfigError(f"--input: _latents_{name} has shape {found}, the latents {shape}") from error
    std = (stats["std"] + DIFFUSERS_STD_EPS) / settings["scaling_factor"]
    var = std**2 - LATENT_VAR_EPS
    if var.min() < -1e-9:  # further from zero than rounding takes it
        raise ConfigError(
            f"--input: _latents_std goes down to {stats['std'].min():.3g}; an RAE's latents are divided by "
            f"sqrt(variance + {LATENT_VAR_EPS}), which is at least {LATENT_VAR_EPS**0.5:.3g}"
        )
    return {"mean": stats["mean"].float(), "var": var.clamp(min=0).float()}


def current_encoder_names(tensors: dict, model: RAEModel, folder: Path) -> dict:
    """The encoder's tensors under the installed transformers' names, through its own renaming of older ones. Raises
    ConfigError for missing and unexpected names and for other shapes."""
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
    what = f"the encoder in {folder}"
    for name, *shapes in sorted(info["mismatched_keys"]):
        raise ConfigError(f"--input: '{name}' of {what} has shape {tuple(shapes[0])}, expected {tuple(shapes[1])}")
    # the final LayerNorm's weight and bias are in the new encoder, but not in an RAE's: nothing misses them
    check_names((expected - info["missing_keys"]) | info["unexpected_keys"], set(expected), what)
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


def diffusers_type(config: RAEConfig) -> str:
    """The encoder_type of AutoencoderRAE. Raises ConfigError for a family that it does not have."""
    for encoder_type, (model_type, _) in DIFFUSERS_ENCODERS.items():
        if model_type == config.encoder_config.model_type:
            return encoder_type
    known = ", ".join(model_type for model_type, _ in DIFFUSERS_ENCODERS.values())
    raise ConfigError(
        f"--to diffusers: AutoencoderRAE knows the encoders {known}, not {config.encoder_config.model_type}"
    )


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


def load_diffusers(folder: Path, model: RAEModel) -> torch.nn.Module:
    """The AutoencoderRAE that `model` was read from, by diffusers' own loader, which knows the installed transformers'
    names of the encoder's modules only."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # it would list the names that it does not know
    try:
        twin, info = diffusers.AutoencoderRAE.from_pretrained(
            folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--input: diffusers cannot load {folder}: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:  # of the encoder: all others were checked already
        twin.encoder.load_state_dict(model.encoder.state_dict())
    return twin


# ----------------------------------------------------------------------------------------------------------------------
# Position tables


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def diffusers_table(width: int, grid: int) -> torch.Tensor:
    """The table (1, 1 + grid**2, width) that AutoencoderRAE computes. It is MAE's on a 16 x 16 grid only: positions of
    other grids are scaled to that one."""
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder as DiffusersDecoder

    sizes = dict(hidden_size=1, patch_size=1, decoder_num_attention_heads=1, decoder_num_hidden_layers=0)
    return DiffusersDecoder(decoder_hidden_size=width, num_patches=grid**2, **sizes).decoder_pos_embed


def table_kind(table: torch.Tensor) -> str:
    """What a table (1, 1 + h*w, D) is: "sin-cos" (MAE's), "diffusers' sin-cos", or "learnt"."""
    width, grid = table.shape[2], math.isqrt(table.shape[1] - 1)
    for kind, compute in (("sin-cos", sincos_position_table), ("diffusers' sin-cos", diffusers_table)):
        if largest_difference(table, compute(width, grid)) <= TABLE_TOLERANCE:
            return kind
    return "learnt"


# ----------------------------------------------------------------------------------------------------------------------
# Writers


def write_rae(model: RAEModel, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / IMAGE_PROCESSOR_NAME).write_text(image_processor_json(model.config.image_size))


def published_differences(model: RAEModel) -> list:
    """What the published code would do otherwise than `model`, as in Source: settings that neither its files nor
    `reading_flags` hold. The comparison does not see them: it runs `model` with the written weights."""
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
    torch.save({name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}, folder / "model.pt")
    if model.config.use_latent_stats:
        torch.save({"mean": model.latent_mean.clone(), "var": model.latent_var.clone()}, folder / "stat.pt")


def diffusers_differences(model: RAEModel) -> list:
    """What an AutoencoderRAE would do otherwise than `model`, as in Source. Raises ConfigError when none can hold its
    encoder."""
    config, encoder = model.config, model.config.encoder_config
    encoder_type = diffusers_type(config)
    if encoder.hidden_size < 64:
        raise ConfigError(
            f"--to diffusers: the encoder's width {encoder.hidden_size} is under 64, one head of diffusers"
        )
    built = diffusers_encoder_config(
        encoder_type, encoder.hidden_size, config.encoder_patch_size, encoder.num_hidden_layers
    )

    def unlike(names: tuple) -> list:
        values = [(name, getattr(encoder, name, None), getattr(built, name, None)) for name in names]
        return [
            f"the encoder's {name} is {ours}, in diffusers {theirs}" for name, ours, theirs in values if ours != theirs
        ]

    if unlike(SHAPE_FIELDS):
        raise ConfigError(f"--to diffusers: no AutoencoderRAE holds such weights: {'; '.join(unlike(SHAPE_FIELDS))}")
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
    reason = why_not_built(encoder_type)
    unseen = ((factor != 1, f"scaling_factor is {factor}, which diffusers' encode would apply"), (reason, reason))
    return [
        *(("latents", text) for text in unlike(OTHER_FIELDS)),
        *(("latents", text) for holds, text in in_latents if holds),
        *(("reconstructions", text) for holds, text in in_reconstructions if holds),
        *(("", text) for holds, text in unseen if holds),
    ]


def write_diffusers(model: RAEModel, folder: Path) -> None:
    """The folder of an AutoencoderRAE. It also holds the position table, which diffusers passes over, so that the way
    back is exact."""
    import diffusers

    config, encoder = model.config, model.config.encoder_config
    state = {diffusers_name(name): tensor for name, tensor in model.decoder.state_dict().items()}
    state |= diffusers_encoder_tensors(model)
    state["encoder_mean"] = torch.tensor(config.image_mean).view(1, 3, 1, 1)
    state["encoder_std"] = torch.tensor(config.image_std).view(1, 3, 1, 1)
    state["_latents_mean"], state["_latents_std"] = torch.zeros(1), torch.ones(1)
    if config.use_latent_stats:
        state["_latents_mean"] = model.latent_mean
        state["_latents_std"] = ((model.latent_var.double() + LATENT_VAR_EPS).sqrt() - DIFFUSERS_STD_EPS).float()
    settings = {
        "_class_name": "AutoencoderRAE",
        "_diffusers_version": diffusers.__version__,
        "encoder_type": diffusers_type(config),
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
        "latents_mean": state["_latents_mean"].tolist() if config.use_latent_stats else None,
        "latents_std": state["_latents_std"].tolist() if config.use_latent_stats else None,
    }
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def diffusers_encoder_tensors(model: RAEModel) -> dict:
    """The encoder's tensors under the names of AutoencoderRAE: those of the installed transformers. SigLIP2 is built by
    diffusers with older releases only, which nest it in `vision_model` and build a pooling head, which is not used."""
    state = model.encoder.state_dict()
    if diffusers_type(model.config) == "siglip2":
        config = copy.deepcopy(model.config.encoder_config)
        config.vision_use_head = True
        with torch.device("meta"):
            head = MODEL_MAPPING[type(config)](config).state_dict()
        state |= {name: torch.zeros(t.shape) for name, t in head.items() if POOLING_HEAD.match(name)}
        state = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in state.items()}
    return {f"encoder.{name}": tensor for name, tensor in state.items()}


READERS = {"published": read_published, "training": read_published, "diffusers": read_diffusers, "rae": read_rae}
WRITERS = {"rae": write_rae, "diffusers": write_diffusers, "published": write_published}


# ----------------------------------------------------------------------------------------------------------------------
# Proof


def compare(source: Source, folder: Path, target: str) -> dict:
    """What was written in `folder`, loaded afresh, beside the source: all tensors, and images where both can run."""
    try:
        model, autoencoder = load_written(source.model, folder, target)
    except ConfigError as error:
        raise RunError(f"the converted {target} model cannot be loaded, nothing was written: {error}") from error
    report = {"tensors": compare_tensors(source.model, model), "images": None}
    if source.autoencoder is not None and autoencoder is not None:
        report["images"] = compare_images(source.autoencoder, autoencoder, source.model.config.image_size)
    return report


def load_written(model: RAEModel, folder: Path, target: str) -> tuple:
    """The written model as an RAE, and what runs it by its own side's code (None where nothing here can)."""
    if target == "published":  # has no encoder and no config
        twin = copy.deepcopy(model)
        twin.decoder.load_state_dict(read_saved(folder / "model.pt", "--output"))
        if model.config.use_latent_stats:
            twin.set_latent_stats(**read_latent_stats(folder / "stat.pt", model.config, "--stats"))
        return twin, RAE(str(folder), twin)
    if target == "rae":
        autoencoder = load_autoencoder(str(folder), "--output")
        return autoencoder.model, autoencoder
    twin = diffusers_source(folder, read_json(folder / "config.json")).model
    reason = why_not_built(diffusers_type(model.config))
    return twin, None if reason else load_autoencoder(str(folder), "--output")


def compare_tensors(expected: RAEModel, found: RAEModel) -> dict:
    """How many tensors are equal bit for bit. The variance may be off by rounding: diffusers keeps its square root."""
    expected, found = expected.state_dict(), found.state_dict()
    different = []
    for name in sorted(expected.keys() | found.keys()):
        both = name in expected and name in found and expected[name].shape == found[name].shape
        if not both or not torch.equal(expected[name], found[name]):
            rounding = both and torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-9)
            different.append({"name": name, "rounding": name == "latent_var" and rounding})
    return {"number": len(expected), "different": different}


@torch.no_grad()
def compare_images(expected: Autoencoder, found: Autoencoder, size: int) -> dict:
    """Largest differences of latents and of reconstructions, each side decoding its own latents."""
    pixels = sample_images(size)
    latents = expected.encode(pixels), found.encode(pixels)
    samples = expected.decode(latents[0]), found.decode(latents[1])
    report = {"number": len(pixels)}
    for name, (a, b) in (("latents", latents), ("reconstructions", samples)):
        difference = largest_difference(a, b) if a.shape == b.shape else math.inf
        report[name] = {"largest_difference": difference, "largest_value": a.abs().max().item()}
    return report


def sample_images(size: int) -> torch.Tensor:
    """Two photographs that come with scikit-learn, and seeded noise: (3, 3, size, size) in [0, 1]."""
    from sklearn.datasets import load_sample_images  # slow to import

    photographs = [np.asarray(center_crop(Image.fromarray(image), size)) for image in load_sample_images().images]
    pixels = torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2).float() / 255  # (2, 3, S, S)
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return torch.cat([pixels, noise])


def check_proof(report: dict) -> None:
    """Raise RunError when the written model is not the source, beyond the differences that --force accepted. Images may
    differ by TOLERANCE, of the largest value where that is over 1: without statistics diffusers divides latents, which
    go up to the square root of their number of channels, by 1.00001."""
    wrong = [item["name"] for item in report["tensors"]["different"] if not item["rounding"]]
    if wrong:
        raise RunError(f"{len(wrong)} tensors changed, the first is '{wrong[0]}': nothing was written")
    accepted = {item["in"] for item in report["differences"]}
    for name in ("latents", "reconstructions"):
        if report["images"] is None or accepted & {"latents", name}:
            continue
        difference, value = (report["images"][name][f"largest_{kind}"] for kind in ("difference", "value"))
        if not difference <= TOLERANCE * max(1, value):  # nan included
            raise RunError(
                f"{name} differ by {difference:.3g} (largest value {value:.3g}), more than {TOLERANCE}: nothing was "
                "written"
            )


def describe(args: argparse.Namespace, source: Source) -> dict:
    """The report's first part: what is converted to what."""
    config, encoder = source.model.config, source.model.config.encoder_config
    notes = list(source.notes)
    if args.target == "published":
        notes.append(f"to read it back: {' '.join(reading_flags(config))}")
    return {
        "from": args.source,
        "weights": (args.weights or "ema") if args.source == "training" else None,
        "to": args.target,
        "input": str(args.input),
        "output": str(args.output),
        "encoder": {
            "model_type": encoder.model_type,
            "hidden_size": encoder.hidden_size,
            "num_hidden_layers": encoder.num_hidden_layers,
            "patch_size": config.encoder_patch_size,
            "input_size": config.encoder_input_size,
        },
        "decoder": {
            "hidden_size": config.decoder_hidden_size,
            "num_hidden_layers": config.decoder_num_hidden_layers,
            "num_attention_heads": config.decoder_num_attention_heads,
            "intermediate_size": config.decoder_intermediate_size,
            "patch_size": config.decoder_patch_size,
            "image_size": config.image_size,
        },
        "position_table": table_kind(source.model.decoder.decoder_pos_embed),
        "latent_stats": config.use_latent_stats,
        "differences": [{"in": part, "what": text} for part, text in source.differences],
        "notes": notes,
    }


def reading_flags(config: RAEConfig) -> list:
    """The flags with which this script reads the published form of an RAE: what its files do not hold."""
    flags = ["--encoder", config.encoder_id or "ENCODER", "--encoder_input_size", str(config.encoder_input_size)]
    if config.encoder_revision is not None:
        flags += ["--encoder_revision", config.encoder_revision]
    flags += ["--decoder_num_attention_heads", str(config.decoder_num_attention_heads)]
    if config.encoder_layers is not None:
        flags += ["--encoder_layers", *map(str, config.encoder_layers)]
    if config.encoder_add_spatial_mean:
        flags.append("--encoder_add_spatial_mean")
    if not config.denormalize_output:
        flags.append("--no_denormalize_output")
    return flags + (["--stats", "stat.pt"] if config.use_latent_stats else [])


def print_report(report: dict) -> None:
    encoder, decoder, tensors, images = (report[name] for name in ("encoder", "decoder", "tensors", "images"))
    rows = [
        ("from", f"{report['from']} {report['input']}" + (f", {report['weights']}" if report["weights"] else "")),
        ("to", report["to"]),
        (
            "encoder",
            "{model_type}, width {hidden_size}, {num_hidden_layers} blocks, {input_size} px in patches of "
            "{patch_size}".format(**encoder),
        ),
        (
            "decoder",
            "width {hidden_size}, {num_hidden_layers} blocks, {num_attention_heads} heads, MLP {intermediate_size}, "
            "patches of {patch_size}, {image_size} px".format(**decoder),
        ),
        ("position table", report["position_table"]),
        ("latent statistics", "mean and variance" if report["latent_stats"] else "none"),
        ("tensors", f"{tensors['number'] - len(tensors['different'])} of {tensors['number']} equal bit for bit"),
    ]
    for item in tensors["different"][:3]:
        rows.append(("", f"{item['name']} {'differs by rounding' if item['rounding'] else 'DIFFERS'}"))
    for name in ("latents", "reconstructions"):
        text = "not compared on images"
        if images is not None:
            text = "largest difference {largest_difference:.3g}, largest value {largest_value:.3g}, {number} images"
            text = text.format(number=images["number"], **images[name])
        rows.append((name, text))
    rows += [("differs", item["what"]) for item in report["differences"]]
    rows += [("note", text) for text in report["notes"]]
    for name, text in rows:
        print(f"{name:<18}{text}")


if __name__ == "__main__":
    run_main(main)
