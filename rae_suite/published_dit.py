"""The published code's stage-2 files, DiT-DH (its class DiTwDDTHead), plain DiT (LightningDiT) and RAEv2's model
(DiTwDDTHeadIG): reading, writing, and the proof that a written model is the one that was read.

A published file is a dictionary of tensors; a training checkpoint has one under `ema` and one under `model`. Neither
has a config: the sizes follow from the tensors' shapes, the numbers of attention heads from the rotary tables.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import yaml

from modeling_dit import PUBLISHED_HEAD, RAEV2, SIZES, RAEDiTModel, config_to_published
from modeling_rae import RAEModel
from rae_suite.dit_folders import CODE, INDEX, LABEL_TABLES, load_pipeline_parts, model_from_state, save_pipeline
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.files import read_saved
from rae_suite.published_rae import training_weights
from rae_suite.state_dicts import check_names, check_shapes

WEIGHTS, PARAMS, STATS = "stage2_model.pt", "stage2_params.yaml", "stat.pt"
KINDS = {
    "published": "a stage-2 model of the published code (a file such as stage2_model.pt)",
    "training": "a stage-2 training checkpoint of the published code (a file such as ep-0000080.pt)",
}
PUBLISHED_RATIO = 4.0  # of every published MLP
DROPOUT = 0.1  # of every published training run; no file holds it
RAEV2_SAMPLING = {
    "num_inference_steps": 100,
    "end": "zero",
    "guidance_scale": 1.78,
    "guidance_interval": (0.1, 1.0),
}  # of its code's sampling config


@dataclass
class PublishedDiTOptions:
    """What a stage-2 file does not always show. Heads follow from rotary tables and, without those, from the published
    sizes; the blocks of a head that is as wide as the backbone from nothing; the blocks before RAEv2's base head are
    the published eight unless `base_num_layers` says otherwise; a label table has a row for the null label unless it
    has exactly `num_classes` rows."""

    num_classes: Optional[int] = None
    num_attention_heads: Optional[int] = None
    head_num_layers: Optional[int] = None
    head_num_attention_heads: Optional[int] = None
    base_num_layers: Optional[int] = None


@dataclass
class DiTSource:
    """A stage-2 model in float32 and in eval mode; `kind`: what its file is, in words; `notes` on how it was read."""

    model: RAEDiTModel
    kind: str
    notes: list = field(default_factory=list)


# --------------------------------------------------------------------------------------------------------------------
# Reading
#
# In all of these `key` is the setting that names the file, and `prefix` what stands before the names of the options:
# "--" on a command line. Errors are ConfigError about one of them.


def side_of_dit(held: Any) -> Optional[str]:
    """The key of KINDS that a file's content is of, None for anything but stage 2."""
    if not isinstance(held, dict):
        return None
    if any(_is_dit(held.get(part)) for part in ("ema", "model")):
        return "training"
    return "published" if _is_dit(held) else None


def _is_dit(tensors: Any) -> bool:
    return isinstance(tensors, dict) and any(str(name).endswith("t_embedder.W") for name in tensors)


def read_published_dit(
    path: Path, side: str, weights: str, options: PublishedDiTOptions, key: str, prefix: str
) -> DiTSource:
    """The model in a published file, or the averaged ("ema") or "raw" `weights` of a training checkpoint; `side` is the
    key of KINDS that the file is expected to be of."""
    try:
        held = read_saved(path, key)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}; expected {KINDS[side]}") from error
    found = side_of_dit(held)
    if found is None:
        raise ConfigError(f"{key}: {path} is no stage-2 model that is known here, expected {KINDS[side]}")
    if found != side:
        raise ConfigError(f"{key}: {path} is {KINDS[found]}, expected {KINDS[side]}: use {prefix}from {found}")
    tensors, kind = held, KINDS[side].partition(" (")[0]
    if side == "training":
        tensors = training_weights(held, path, weights, key)
        kind += {"ema": ", averaged weights", "raw": ", raw weights"}[weights]
    what = f"the stage-2 model in {path}"
    config, notes = config_of_tensors(tensors, what, options, key, prefix)
    with error_names_setting(key, str(path)):
        model = model_from_state(config, {name: tensor.float() for name, tensor in tensors.items()})
    return DiTSource(model, kind, notes)


def read_published_start(path: Path, dit: RAEDiTModel, key: str) -> RAEDiTModel:
    """The averaged weights in a published file or training checkpoint, as what `dit`, whose numbers of heads no file
    holds, is to start from."""
    try:
        side = side_of_dit(read_saved(path, key)) or "published"
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}; expected {KINDS['published']}") from error
    names = ("num_attention_heads", "head_num_layers", "head_num_attention_heads", "base_num_layers")
    options = PublishedDiTOptions(**{name: getattr(dit.config, name) for name in names})
    return read_published_dit(path, side, "ema", options, key, "model.").model


def config_of_tensors(
    tensors: dict, what: str, options: PublishedDiTOptions, key: str, prefix: str
) -> tuple[dict, list]:
    """(arguments of RAEDiTModel that have exactly these tensors, notes). Raises ConfigError for other names or shapes
    than a model of the published code has."""
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}
    try:
        config = _sizes(shapes, options, prefix, what)
    except (LookupError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: {what} lacks a tensor of a published DiT, or its shape is another ({error})") from (
            error
        )
    with error_names_setting(key), torch.device("meta"):
        expected = RAEDiTModel(**config).state_dict()
    check_names({*map(str, tensors)}, {*expected}, what, key)
    check_shapes(tensors, expected, what, key)
    notes = []
    if not config["use_rope"]:
        notes.append("the file has no rotary tables: it is read as a model without rotary embedding")
    if config["class_dropout_prob"]:
        notes.append(
            f"the label table has {config['num_classes'] + 1} rows: {config['num_classes']} classes and the null label"
        )
    return config, notes


def _sizes(shapes: dict, options: PublishedDiTOptions, prefix: str, what: str) -> dict:
    """What the shapes show. Raises KeyError for a tensor that is missing and ValueError for one of another rank."""
    has_head = "s_embedder.proj.weight" in shapes
    tokens = _token_sizes(shapes, options, prefix, what)
    last_width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    width = shapes["s_embedder.proj.weight"][0] if has_head else last_width
    widths = [shapes[f"blocks.{i}.attn.proj.weight"][0] for i in range(_count_blocks(shapes))]
    layers, head_layers = len(widths), None
    if has_head:
        layers, head_layers = _split_blocks(widths, width, last_width, options, prefix, what)
    infix = "" if tokens else "feat_"
    ropes = (f"enc_{infix}rope", f"dec_{infix}rope") if has_head else ("feat_rope",)
    head_dims = [shapes[f"{rope}.freqs_cos"][1] if f"{rope}.freqs_cos" in shapes else None for rope in ropes]
    rows, _ = next(shapes[name] for name in LABEL_TABLES if name in shapes)
    classes = options.num_classes or rows - 1
    if classes not in (rows, rows - 1):
        raise ConfigError(f"{prefix}num_classes: the label table of {what} has {rows} rows, got {classes} classes")
    config = {
        "sample_size": patch * _grid(shapes, ropes[-1]),
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": layers,
        "num_attention_heads": _heads("num_attention_heads", width, layers, head_dims[0], options, prefix, what),
        "mlp_ratio": _mlp_ratio(shapes, {0: width, len(widths) - 1: last_width}),
        "num_classes": classes,
        "class_dropout_prob": DROPOUT if rows > classes else 0.0,
        "use_qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        "use_swiglu": "blocks.0.mlp.w3.weight" in shapes,
        "use_rms_norm": "blocks.0.norm1.weight" in shapes,
        "use_rope": head_dims[0] is not None,
        "use_pos_embed": "pos_embed" in shapes,
        **tokens,
    }
    if has_head:
        config["head_hidden_size"], config["head_num_layers"] = last_width, head_layers
        config["head_num_attention_heads"] = _heads(
            "head_num_attention_heads", last_width, head_layers, head_dims[1], options, prefix, what
        )
    return config


def _token_sizes(shapes: dict, options: PublishedDiTOptions, prefix: str, what: str) -> dict:
    """What a model with conditions as tokens, RAEv2's, has beside a DiT-DH's sizes; nothing for other models."""
    if "t_embedder.learnable_tokens" not in shapes:
        return {}
    sizes = {
        "num_time_tokens": shapes["t_embedder.learnable_tokens"][0],
        "num_class_tokens": shapes["ctx_embedder.learnable_tokens"][0],
        "prediction": "data",
    }
    if "base_final_layer.linear.weight" in shapes:
        sizes["base_num_layers"] = options.base_num_layers or RAEV2["base_num_layers"]
    elif options.base_num_layers is not None:
        raise ConfigError(f"{prefix}base_num_layers: {what} has no base head, got {options.base_num_layers}")
    return sizes


def _count_blocks(shapes: dict) -> int:
    return len({found[1] for name in shapes if (found := re.match(r"blocks\.(\d+)\.", str(name)))})


def _split_blocks(
    widths: list, width: int, last_width: int, options: PublishedDiTOptions, prefix: str, what: str
) -> tuple[int, int]:
    """(blocks of the backbone, blocks of the head), whose blocks come last."""
    if width != last_width:
        layers = widths.count(width)
        return layers, len(widths) - layers
    given = options.head_num_layers
    if given is None or not 0 < given < len(widths):
        raise ConfigError(
            f"{prefix}head_num_layers: expected how many of the {len(widths)} blocks of {what} are the head's, because "
            f"backbone and head are both {width} wide, got {given}"
        )
    return len(widths) - given, given


def _grid(shapes: dict, rope: str) -> int:
    """Tokens along a side, from the position table or a rotary table."""
    tokens = shapes["pos_embed"][1] if "pos_embed" in shapes else shapes[f"{rope}.freqs_cos"][0]
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{tokens} positions, expected a square")
    return math.isqrt(tokens)


def _heads(
    name: str, width: int, layers: int, head_dim: Optional[int], options: PublishedDiTOptions, prefix: str, what: str
) -> int:
    """Attention heads of a part: of the width that the rotary table has, as given, or of the published sizes."""
    given = getattr(options, name)
    if head_dim is not None:
        if given not in (None, width // head_dim):
            raise ConfigError(
                f"{prefix}{name}: {what} has heads of {head_dim}, {width // head_dim} of them, got {given}"
            )
        return width // head_dim
    parts = [PUBLISHED_HEAD] if name.startswith("head_") else SIZES.values()
    prefixed = "head_" if name.startswith("head_") else ""
    known = [
        part[name]
        for part in parts
        if (part[f"{prefixed}hidden_size"], part[f"{prefixed}num_layers"]) == (width, layers)
    ]
    if given is None and not known:
        raise ConfigError(
            f"{prefix}{name}: expected a number, because {what} has no rotary table and its width {width} with "
            f"{layers} blocks is none of the published sizes"
        )
    return given or known[0]


def _mlp_ratio(shapes: dict, blocks: dict) -> float:
    """A ratio that gives the hidden widths of these blocks, {number: width}: the published one where it does."""
    low, high = 0.0, math.inf
    for number, width in blocks.items():
        if f"blocks.{number}.mlp.w3.weight" in shapes:  # hidden = int(2/3 * int(width * ratio))
            hidden = shapes[f"blocks.{number}.mlp.w3.weight"][1]
            least, above = math.ceil(1.5 * hidden), math.ceil(1.5 * (hidden + 1))
        else:
            least = shapes[f"blocks.{number}.mlp.fc1.weight"][0]  # int(width * ratio)
            above = least + 1
        low, high = max(low, least / width), min(high, above / width)
    round_ones = [PUBLISHED_RATIO, *(step / 8 for step in range(math.ceil(8 * low), math.ceil(8 * high)))]
    return next((ratio for ratio in round_ones if low <= ratio < high), (low + high) / 2)


def read_own_dit(path: Path, weights: str, key: str) -> tuple[DiTSource, Optional[RAEModel]]:
    """A stage-2 model of this suite, whatever sample_dit.py takes, and its RAE, None where it has none."""
    model, rae, settings = load_pipeline_parts(str(path), key, weights)
    return DiTSource(model, settings.found), rae


# --------------------------------------------------------------------------------------------------------------------
# Writing


def write_own_dit(source: DiTSource, rae: Optional[RAEModel], folder: Path) -> None:
    """A pipeline folder with the RAE, or without one a transformer's folder, which sample_dit.py takes with --rae."""
    if rae is not None:
        save_pipeline(folder, source.model, rae, sampling=RAEV2_SAMPLING if source.model.has_base_head else {})
        return
    source.model.save_pretrained(folder)
    (folder / CODE).write_bytes(Path(__file__).parent.parent.joinpath(CODE).read_bytes())


def write_published_dit(source: DiTSource, rae: Optional[RAEModel], folder: Path) -> None:
    """The weights as the published code loads them, its parameters in YAML, and the statistics of the RAE's latents
    where it has some; a mean that is missing stays missing."""
    torch.save({name: tensor.clone() for name, tensor in source.model.state_dict().items()}, folder / WEIGHTS)
    published = config_to_published(dict(source.model.config))
    params = {"class": published.pop("kind"), "params": published}
    (folder / PARAMS).write_text(yaml.safe_dump(params, sort_keys=False))
    if rae is not None and rae.config.use_latent_stats:
        mean = None if rae.latent_mean is None else rae.latent_mean.clone()
        torch.save({"mean": mean, "var": rae.latent_var.clone()}, folder / STATS)


def published_dit_differences(model: RAEDiTModel) -> list:
    """What the published classes cannot be, in words."""
    try:
        config_to_published(dict(model.config))
    except ValueError as error:
        return [str(error)]
    return []


# --------------------------------------------------------------------------------------------------------------------
# Proof


def load_written_dit(folder: Path, target: str, model: RAEDiTModel, key: str) -> RAEDiTModel:
    """What was written to `folder`, loaded afresh; the published form with the numbers of heads and classes that its
    params say, because no tensor may show them."""
    if target == "dit":
        return load_pipeline_parts(str(folder), key)[0]
    config = model.config
    options = PublishedDiTOptions(**{name: config[name] for name in vars(PublishedDiTOptions())})
    return read_published_dit(folder / WEIGHTS, "published", "ema", options, key, "--").model


def compare_dits(expected: RAEDiTModel, found: RAEDiTModel) -> dict:
    """Both models' tensors, and their velocities for the same random noisy latents at five times, with labels of which
    one is the null label: how many tensors are equal bit for bit, the largest difference and the largest value."""
    theirs, ours = expected.state_dict(), found.state_dict()
    different = [
        name
        for name in sorted(theirs.keys() | ours.keys())
        if name not in theirs or name not in ours or not torch.equal(theirs[name], ours[name])
    ]
    report = {"tensors": {"number": len(theirs), "different": different}}
    if expected.config.sample_size == found.config.sample_size:
        a, b = (velocities(model) for model in (expected, found))
        report["velocity"] = {"largest_difference": (a - b).abs().max().item(), "largest_value": a.abs().max().item()}
    return report


@torch.no_grad()
def velocities(model: RAEDiTModel) -> torch.Tensor:
    """Predicted velocity (5, C, h, w) of seeded noise at times from data to noise."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    shape = (5, config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=generator)
    labels = torch.randint(config.num_classes, (5,), generator=generator)
    labels[-1] = config.num_classes if config.class_dropout_prob > 0 else 0
    return model(x, torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0]), labels).sample


def is_converted_dit(folder: Path) -> bool:
    """Whether a folder is one that a conversion of stage 2 wrote."""
    return any((folder / name).is_file() for name in (INDEX, WEIGHTS))
