"""Weights that a new run of stage 1 starts from: another model's decoder, the discriminator of a checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch import nn

from modeling_rae import RAEConfig, RAEModel
from rae_suite.checkpoints import checkpoints
from rae_suite.cli import read_group
from rae_suite.diffusers_rae import diffusers_source
from rae_suite.digests import weights_digest
from rae_suite.discriminator import DinoDiscriminator
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.model_loading import PARTS, FoundModel, find_model, folder_of
from rae_suite.output import print_once
from rae_suite.position_tables import interpolated_table
from rae_suite.published_rae import decoder_sizes, training_weights
from rae_suite.rae_networks import empty_decoder
from rae_suite.run_models import is_checkpoint, is_run_folder, model_of_run, read_weights
from rae_suite.settings_rae import Config, ModelConfig
from rae_suite.state_dicts import check_names, check_shapes

DECODER, DISCRIMINATOR = "model.init_from", "gan.init_from"


@dataclass(frozen=True)
class StartWeights:
    """State dicts of the decoder and of the discriminator's heads, None for new ones; `backbone`: digest of the network
    that the heads were trained on."""

    decoder: Optional[dict] = None
    heads: Optional[dict] = None
    backbone: Optional[str] = None

    def fill(self, decoder: nn.Module, discriminator: Optional[DinoDiscriminator]) -> None:
        """Put the weights into new networks. Raises ConfigError for a discriminator that they do not fit."""
        if self.decoder is not None:
            decoder.load_state_dict(self.decoder)
        if self.heads is None or discriminator is None:
            return
        if weights_digest(discriminator.backbone) != self.backbone:
            raise ConfigError(f"{DISCRIMINATOR}: expected a discriminator on this run's gan.backbone, it is on another")
        expected, what = discriminator.heads.state_dict(), "the discriminator of this checkpoint"
        check_names(set(self.heads), set(expected), what, DISCRIMINATOR)
        check_shapes(self.heads, expected, what, DISCRIMINATOR)
        discriminator.heads.load_state_dict(self.heads)


NEW_WEIGHTS = StartWeights()


def read_start_weights(config: Config, rae_config: RAEConfig, run_dir: Path) -> StartWeights:
    """What `model.init_from` and `gan.init_from` name; nothing for a run that goes on from a checkpoint of its own.
    Raises ConfigError where they are of another architecture."""
    if checkpoints(run_dir):
        return NEW_WEIGHTS
    decoder = heads = backbone = None
    if config.model.init_from is not None:
        decoder = read_decoder_start(config.model.init_from, rae_config)
    if config.gan.init_from is not None:
        heads, backbone = read_discriminator_start(config.gan.init_from)
    return StartWeights(decoder, heads, backbone)


def read_decoder_start(source: str, config: RAEConfig) -> dict:
    """State dict of the decoder in `source` for an RAE of this config; a position table of another grid is
    interpolated, which is said. Raises ConfigError for a decoder of another architecture."""
    found = find_model(source, DECODER)
    with error_names_setting(DECODER, source):
        tensors, known = _decoder_of(found)
    what = f"the decoder of {found.words}"
    sizes, channels, grid = decoder_sizes(tensors, what, DECODER)
    for name, value in {"latent_channels": channels, **sizes, **known}.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{DECODER}: {source} is of another architecture: its {name} is {value}, this run's is "
                f"{getattr(config, name)}"
            )
    if grid != config.latent_size:
        tensors = {**tensors, "decoder_pos_embed": interpolated_table(tensors["decoder_pos_embed"], config.latent_size)}
        print_once(
            f"note: the position table of {source} is interpolated from {grid} x {grid} to {config.latent_size} x "
            f"{config.latent_size} tokens"
        )
    check_shapes(tensors, empty_decoder(config), what, DECODER)
    return tensors


def _decoder_of(found: FoundModel) -> tuple[dict, dict]:
    """(a decoder's tensors, what is known of it that these do not show)."""
    path = Path(found.place)
    if found.side == "kl":
        raise ConfigError(f"{DECODER}: {found.name} is an AutoencoderKL, expected an RAE")
    if found.side == "published":
        return found.held, {}
    if found.side == "training":
        tensors = training_weights(found.held, path, found.weights, DECODER)
        return {name.removeprefix("decoder."): t for name, t in tensors.items() if name.startswith("decoder.")}, {}
    if found.side == "checkpoint":  # without its encoder, which may be gone
        settings = read_group(ModelConfig, path.parent.parent / "config.yaml", "model")
        tensors = read_weights(path, PARTS[found.weights], DECODER)
    elif found.side == "diffusers":
        model = diffusers_source(folder_of(found, DECODER), found.held, DECODER).model
        tensors, settings = model.decoder.state_dict(), model.config
    else:
        model = RAEModel.from_pretrained(found.place, dtype=torch.float32)
        tensors, settings = model.decoder.state_dict(), model.config
    return tensors, {name: getattr(settings, name) for name in ("decoder_num_attention_heads", "denormalize_output")}


def read_discriminator_start(source: str) -> tuple[dict, Optional[str]]:
    """(state dict of the discriminator's heads in a checkpoint of train_rae.py, or in a run's newest; digest of the
    backbone that they were trained on). Raises ConfigError where there is none."""
    folder = Path(source)
    if is_run_folder(folder):
        folder = model_of_run(folder, DISCRIMINATOR, "raw", lambda final: False)
        print_once(f"{DISCRIMINATOR} {source}: checkpoint {folder}")
    if not is_checkpoint(folder):
        raise ConfigError(f"{DISCRIMINATOR}: {source} is no checkpoint or run folder of train_rae.py")
    if (folder / "decoder.safetensors").is_file() and not (folder / "discriminator.safetensors").is_file():
        raise ConfigError(f"{DISCRIMINATOR}: {folder} has no discriminator: gan.weight was 0 in its run")
    heads = read_weights(folder, "discriminator", DISCRIMINATOR)
    with error_names_setting(DISCRIMINATOR, source):
        return heads, json.loads((folder / "state.json").read_text())["frozen"].get("gan.backbone")
