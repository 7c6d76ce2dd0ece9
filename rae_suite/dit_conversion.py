"""The conversion of stage-2 models, for scripts/convert_checkpoint.py: what --input is, which options fit, reading it,
and the report with its proof. The files themselves are published_dit.py's and dit_folders.py's.

`args` are the script's arguments, whose names errors have.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Optional

from modeling_dit import check_parts_fit
from modeling_rae import RAEModel
from rae_suite.cli import read_yaml
from rae_suite.errors import ConfigError, RunError, error_names_setting
from rae_suite.files import read_saved
from rae_suite.model_loading import load_rae
from rae_suite.published_dit import (
    DiTSource,
    PublishedDiTOptions,
    published_dit_differences,
    read_own_dit,
    read_published_dit,
    side_of_dit,
)
from rae_suite.rae_networks import give_latent_stats, read_latent_stats

DIT_FILES = ("model_index.json", "config.json")  # one of which a stage-2 model's folder has
DIT_OPTIONS = tuple(field.name for field in fields(PublishedDiTOptions))
STAGE_2 = "dit"  # the side of this suite's stage-2 models, as --from or --to


def is_stage_2(args: argparse.Namespace) -> bool:
    """Whether a conversion is of stage 2."""
    return STAGE_2 in (args.source, args.target)


def side_of_stage_2(path: Path) -> Optional[str]:
    """What a stage-2 model's file or folder is: "published", "training" or STAGE_2; None for anything else."""
    if path.is_file():
        try:
            return side_of_dit(read_saved(path, "--input"))
        except (OSError, ValueError):  # whoever reads it says so
            return None
    run = next((folder for folder in (path, path.parent.parent) if (folder / "config.yaml").is_file()), None)
    if run is not None and not (path / "config.json").is_file():
        return STAGE_2 if "rae" in (read_yaml(run / "config.yaml").get("model") or {}) else None
    try:
        names = [json.loads(file.read_text())["_class_name"] for file in path.glob("*.json") if file.name in DIT_FILES]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return STAGE_2 if any("RAEDiT" in str(name) for name in names) else None


def check_dit_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for a conversion between the stages, and for options of stage 2 that would be ignored."""
    other = args.target if args.source == STAGE_2 else args.source
    if is_stage_2(args) and args.source is None:
        raise ConfigError(f"--input: {args.input} is no stage-2 model that is known here, expected one with --to dit")
    if is_stage_2(args) and args.source != args.target:
        sides = ("published",) if args.source == STAGE_2 else ("published", "training")
        flag = "--to" if args.source == STAGE_2 else "--from"
        if other not in sides:
            raise ConfigError(f"{flag}: expected {' or '.join(sides)} with a stage-2 model, got {other}")
    for name in ("rae", *DIT_OPTIONS):
        value = getattr(args, name)
        if value is not None and args.target != STAGE_2:
            raise ConfigError(f"--{name}: expected nothing unless --to {STAGE_2}, got {value}")
        if isinstance(value, int) and value <= 0:
            raise ConfigError(f"--{name}: expected a positive number, got {value}")
    if is_stage_2(args) and args.stats is not None and args.rae is None:
        raise ConfigError(f"--stats: expected nothing without --rae, whose latents they are of, got {args.stats}")


def read_dit(args: argparse.Namespace) -> tuple:
    """The stage-2 model that --input holds, and its RAE with the statistics of --stats, or None."""
    if args.source == STAGE_2:
        return read_own_dit(args.input, args.weights or "ema", "--input")
    if args.source == "published" and args.weights is not None:
        raise ConfigError(f"--weights: expected nothing with --from published, which has one set, got {args.weights}")
    options = PublishedDiTOptions(**{name: getattr(args, name) for name in DIT_OPTIONS})
    source = read_published_dit(args.input, args.source, args.weights or "ema", options, "--input", "--")
    if args.rae is None:
        return source, None
    rae = load_rae(args.rae, "--rae")
    if args.stats is not None:
        with error_names_setting("--stats"):
            give_latent_stats(rae, **read_latent_stats(args.stats, rae.config, "--stats"))
    with error_names_setting("--rae", args.rae):
        check_parts_fit(source.model, rae, None)
    return source, rae


def dit_differences(args: argparse.Namespace, source: DiTSource, rae: Optional[RAEModel]) -> list:
    """In words, what the other side cannot hold, or what makes it draw something else."""
    if args.target == "published":
        return [f"--to published: {text}" for text in published_dit_differences(source.model)]
    if rae is not None and not rae.config.use_latent_stats:
        return [
            f"--rae: {args.rae} has no statistics of its latents, and published models draw normalised ones; expected "
            "--stats with the published file"
        ]
    return []


def describe_dit(args: argparse.Namespace, source: DiTSource, rae: Optional[RAEModel], differences: list) -> dict:
    """The report's first part: what is converted to what."""
    config = {name: value for name, value in source.model.config.items() if not name.startswith("_")}
    has_stats = rae is not None and rae.config.use_latent_stats
    return {
        "from": args.source,
        "to": args.target,
        "input": str(args.input),
        "output": str(args.output),
        "loaded": source.kind,
        "model": config,
        "parameters": sum(tensor.numel() for tensor in source.model.parameters()),
        "rae": args.rae,
        "latent_stats": has_stats,
        "latent_mean": has_stats and rae.config.latent_stats_have_mean,
        "differences": differences,
        "notes": source.notes,
    }


def dit_rows(report: dict) -> list:
    """The lines of the report, (name, text)."""
    config, tensors = report["model"], report["tensors"]

    def part(prefix: str) -> str:
        names = ("hidden_size", "num_layers", "num_attention_heads")
        return "width {}, {} blocks, {} heads".format(*(config[prefix + name] for name in names))

    statistics = "mean and variance" if report["latent_mean"] else "variance, no mean"
    rows = [
        ("from", f"{report['input']}: {report['loaded']}"),
        ("to", report["to"]),
        ("backbone", part("")),
        ("head", "none" if config["head_hidden_size"] is None else part("head_")),
        ("base head", "none" if (base := config["base_num_layers"]) is None else f"after {base} blocks"),
        ("parameters", f"{report['parameters']:,}"),
        ("latents", "{in_channels} x {sample_size} x {sample_size}".format(**config)),
        ("classes", str(config["num_classes"])),
        ("latent statistics", statistics if report["latent_stats"] else "none"),
        ("tensors", f"{tensors['number'] - len(tensors['different'])} of {tensors['number']} equal bit for bit"),
    ]
    if "velocity" in report:
        text = "largest difference {largest_difference:.3g}, largest value {largest_value:.3g}"
        rows.append(("velocity", text.format(**report["velocity"])))
    return rows + [("differs", text) for text in report["differences"]] + [("note", text) for text in report["notes"]]


def check_dit_proof(report: dict) -> None:
    """Raise RunError unless the written model has the source's tensors and velocities."""
    different, velocity = report["tensors"]["different"], report.get("velocity", {})
    if different:
        raise RunError(f"{len(different)} tensors changed, the first is '{different[0]}': nothing was written")
    difference, value = velocity.get("largest_difference", float("nan")), velocity.get("largest_value", 0.0)
    if not difference <= 1e-6 * max(1, value):  # nan included
        raise RunError(f"velocities differ by {difference:.3g} (largest value {value:.3g}): nothing was written")
