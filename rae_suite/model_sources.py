"""Files and folders that an RAE can be read from: checkpoints of the published code, diffusers' AutoencoderRAE, and
folders of this suite."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from modeling_rae import RAEModel
from rae_suite.autoencoders import Autoencoder
from rae_suite.errors import ConfigError

SIDES = {
    "published": "a decoder of the published code (a file such as model.pt)",
    "training": "a training checkpoint of the published code (a file such as ep-0000016.pt)",
    "diffusers": "a folder of diffusers' AutoencoderRAE",
    "kl": "a folder of diffusers' AutoencoderKL",
    "rae": "a folder of this suite's RAE, such as runs/<name>/final",
    "checkpoint": "a checkpoint of train_rae.py, such as runs/<name>/checkpoints/step-00001000",
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


def side_of_file(held: Any) -> Optional[str]:
    """The key of SIDES of what a file of the published code holds, or None."""
    if not isinstance(held, dict):
        return None
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
