"""Files and folders that an RAE can be read from: checkpoints of the published code, diffusers' AutoencoderRAE, and
folders of this suite."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from modeling_rae import RAEModel
from rae_suite.autoencoders import Autoencoder
from rae_suite.errors import ConfigError
from rae_suite.files import read_saved

SIDES = {
    "published": "a decoder of the published code (a file such as model.pt)",
    "training": "a training checkpoint of the published code (a file such as ep-0000016.pt)",
    "diffusers": "a folder of diffusers' AutoencoderRAE",
    "rae": "a folder of this suite's RAE, such as runs/<name>/final",
}


@dataclass
class ModelSource:
    """What was read, as an RAE in float32, and what runs it: its own side's code where that can, else None.
    `differences` are what the conversion changes and in which part ("latents" and with them all, "reconstructions", or
    "" for nothing that can be seen). `notes` are what it leaves out."""

    model: RAEModel
    autoencoder: Optional[Autoencoder]
    differences: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def read_checkpoint_or_config(path: Path, key: str) -> tuple[Any, Optional[str]]:
    """What `path` holds, a checkpoint's dictionary or a folder's config.json, and the key of SIDES that it is of (None:
    of none). Raises ConfigError, about the setting `key`, when it cannot be read."""
    try:
        held = read_json(path / "config.json", key) if path.is_dir() else read_saved(path, key)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return held, side_of(held, path.is_dir())


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


def read_json(file: Path, key: str) -> Any:
    """What a JSON file holds. Raises ConfigError, about the setting `key`, when there is none."""
    if not file.is_file():
        raise ConfigError(f"{key}: {file.parent} has no {file.name}")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{key}: {file} is no JSON file ({error})") from error
