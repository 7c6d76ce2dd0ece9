"""Whatever a command is given as a model: what it is, and the autoencoder in it.

    runs/x/final, user/my-rae         an RAE's folder or Hub id
    runs/x/checkpoints/step-00001000  a checkpoint of train_rae.py: its averaged weights, or the raw ones
    runs/x                            a run folder: its final/, else its newest checkpoint
    model.pt, ep-0000016.pt           a decoder or a training checkpoint of the published code; the rest is given
    folder or Hub id of diffusers     an AutoencoderRAE, or where that is enough an AutoencoderKL

No code of a folder, a file or the Hub runs: the networks are this repository's and diffusers'.
"""

import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from huggingface_hub import snapshot_download

from modeling_rae import RAEModel, check_config_dict
from rae_suite.autoencoders import RAE, Autoencoder, DiffusersKL, DiffusersRAE
from rae_suite.cli import read_group, read_yaml
from rae_suite.diffusers_rae import diffusers_source
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.files import is_whole_model, read_saved
from rae_suite.hub import fetch_file, hub_id
from rae_suite.model_sources import SIDES, side_of_file
from rae_suite.output import print_once
from rae_suite.published_rae import PublishedOptions, read_decoder, read_training
from rae_suite.rae_networks import build_rae, build_rae_config, frozen_digests
from rae_suite.run_models import WORDS, is_checkpoint, is_run_folder, model_of_run, read_weights, reading_checkpoint
from rae_suite.settings_rae import ModelConfig
from rae_suite.state_dicts import check_loading_info, check_names, check_shapes

CODE = "modeling_rae.py"  # what an RAE's folder holds beside its weights
KINDS = (
    "an RAE's folder such as runs/<name>/final, a run folder or a checkpoint of train_rae.py, a Hub id, a folder of "
    "diffusers' AutoencoderRAE or AutoencoderKL, or a decoder file of the published code"
)
PARTS = {"ema": "ema", "raw": "decoder"}  # of a checkpoint, where its weights are
DIFFUSERS = {"diffusers": "AutoencoderRAE", "kl": "AutoencoderKL"}


@dataclass(frozen=True)
class FoundModel:
    """What a setting names. `side`: its kind, a key of SIDES; `place`: the file or folder, or the Hub id; `weights`:
    "ema" or "raw" where there are both; `held`: what the file or the config.json of a folder says."""

    name: str
    side: str
    place: str
    weights: str = "ema"
    held: Any = None

    @property
    def words(self) -> str:
        """What is loaded, as results say it."""
        which = f", {WORDS[self.weights]} weights" if self.side in ("checkpoint", "training") else ""
        return f"{'checkpoint ' if which else ''}{self.place}{which}"


# --------------------------------------------------------------------------------------------------------------------
# What it is
# --------------------------------------------------------------------------------------------------------------------


def find_model(source: str, key: str, weights: str = "ema") -> FoundModel:
    """What `source` is. What a run folder or checkpoint is taken for is printed by the main process.

    Raises ConfigError, about the setting `key`, for anything else than KINDS, and for raw weights of what has one set.
    """
    place = Path(source)
    if is_run_folder(place):
        _check_stage(place, source, key)
        place = model_of_run(place, key, weights, partial(is_whole_model, code=CODE))
    if is_checkpoint(place):
        _check_stage(place.parent.parent, source, key)
        found = FoundModel(source, "checkpoint", str(place), weights)
    elif os.path.isfile(place):
        held, side = read_file(place, key)
        found = FoundModel(source, side, source, weights, held)
    else:
        found = _find_folder(source, place, key)
    if weights != "ema" and found.side not in ("checkpoint", "training"):
        dashes = "--" if key.startswith("--") else ""
        raise ConfigError(
            f"{dashes}weights: expected ema, got {weights}: {source} holds one set of weights, checkpoints "
            "have raw ones too"
        )
    if found.words != source:
        print_once(f"{key} {source}: {found.words}")
    return found


def _check_stage(run_dir: Path, source: str, key: str) -> None:
    """Raise ConfigError unless the run folder is one of stage 1."""
    with error_names_setting(key, source):
        try:
            model = read_yaml(run_dir / "config.yaml").get("model")
        except ConfigError as error:
            raise ConfigError(f"{key}: {source} is no checkpoint in a run folder ({error})") from error
    if not isinstance(model, dict) or "encoder" not in model:
        what = "of stage 2" if isinstance(model, dict) and "rae" in model else "that is not known here"
        raise ConfigError(f"{key}: {source} is of a run {what}, expected {KINDS}")


def read_file(path: Path, key: str) -> tuple[Any, str]:
    """(what a file of the published code holds, its key of SIDES). Raises ConfigError for any other file."""
    try:
        held = read_saved(path, key)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}; expected {KINDS}") from error
    side = side_of_file(held)
    if side is None:
        raise ConfigError(f"{key}: {path} is no checkpoint that is known here, expected {KINDS}")
    return held, side


def _find_folder(source: str, folder: Path, key: str) -> FoundModel:
    """What the config.json of a folder, or of a model on the Hub, says."""
    file = folder / "config.json"
    if not os.path.exists(folder):
        if "/" in source and hub_id(source) is None:
            raise ConfigError(f"{key}: {source} does not exist, expected {KINDS}")
        file = fetch_file(source, "config.json", key)
    elif not file.is_file():
        is_pipeline = (folder / "model_index.json").is_file()
        hint = f" (a pipeline; its RAE may be {folder / 'rae'})" if is_pipeline else ""
        raise ConfigError(f"{key}: {source} has no config.json{hint}, expected {KINDS}")
    try:
        config = json.loads(file.read_text())
        kind = config.get("_class_name") or config.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{key}: {file} is no model config: {error}") from error
    side = {"rae": "rae", "AutoencoderRAE": "diffusers", "AutoencoderKL": "kl"}.get(str(kind))
    if side is None:
        raise ConfigError(f"{key}: {source} is a {kind}, expected {KINDS}")
    with error_names_setting(key, str(file)):
        check_config_dict(config)
    return FoundModel(source, side, source if folder == Path(source) else str(folder), held=config)


# --------------------------------------------------------------------------------------------------------------------
# Loading it
# --------------------------------------------------------------------------------------------------------------------


def load_autoencoder(
    source: str, key: str = "model", weights: str = "ema", published: Optional[PublishedOptions] = None
) -> Autoencoder:
    """The autoencoder that `source` names, on the CPU in float32; diffusers' run by diffusers' own code.

    Args:
        source: see the top of this file.
        key: the setting that errors name.
        weights: of a checkpoint, "ema" for the moving average or "raw".
        published: what files of the published code do not hold; None: they are refused.

    Raises:
        ConfigError: there is nothing of that kind, or its weights do not fit.
    """
    found = find_model(source, key, weights)
    if found.side in DIFFUSERS:
        autoencoder = _load_diffusers(found, key)
    else:
        autoencoder = RAE(source, rae_of(found, key, published))
    autoencoder.loaded = found.words
    return autoencoder


def load_rae(source: str, key: str, weights: str = "ema", published: Optional[PublishedOptions] = None) -> RAEModel:
    """As load_autoencoder, as this suite's RAE, in eval mode; diffusers' AutoencoderRAE becomes one, other models are
    refused."""
    return rae_of(find_model(source, key, weights), key, published)


def rae_of(found: FoundModel, key: str, published: Optional[PublishedOptions] = None) -> RAEModel:
    """The RAE in what was found, on the CPU, in float32, frozen and in eval mode. Raises ConfigError, about the setting
    `key`, where there is none, or its encoder does not give the tokens that its config says."""
    if found.side == "kl":
        raise ConfigError(f"{key}: {found.name} is a {DIFFUSERS['kl']}, expected an RAE")
    if found.side == "checkpoint":
        rae = _load_checkpoint(Path(found.place), found.weights, key)
    elif found.side in ("published", "training"):
        rae = _load_published(found, key, published)
    elif found.side == "diffusers":
        rae = diffusers_source(folder_of(found, key), found.held, key).model
    else:
        with error_names_setting(key, found.place):
            rae = RAEModel.from_pretrained(found.place, dtype=torch.float32)
    rae.eval().requires_grad_(False)
    with error_names_setting(key, found.name), torch.no_grad():
        rae.encode(torch.zeros(1, 3, rae.config.image_size, rae.config.image_size))
    return rae


def folder_of(found: FoundModel, key: str) -> Path:
    """The folder of a model's files, that of the cache for a Hub id. Raises ConfigError where it cannot be had."""
    if os.path.isdir(found.place):
        return Path(found.place)
    with error_names_setting(key, found.place):
        return Path(snapshot_download(found.place, allow_patterns=["*.json", "*.safetensors"]))


def _load_diffusers(found: FoundModel, key: str) -> Autoencoder:
    import diffusers  # seconds: only when asked for

    with error_names_setting(key, found.place):
        load = getattr(diffusers, DIFFUSERS[found.side]).from_pretrained
        model, info = load(found.place, torch_dtype=torch.float32, output_loading_info=True)
    check_loading_info(info, found.place, key)
    return {"diffusers": DiffusersRAE, "kl": DiffusersKL}[found.side](found.name, model)


def _load_published(found: FoundModel, key: str, published: Optional[PublishedOptions]) -> RAEModel:
    path = Path(found.place)
    if published is None or published.encoder is None:
        given = "" if published is None else "give it with --published.encoder and the other --published.* flags, or "
        raise ConfigError(
            f"{key}: {path} is {SIDES[found.side]}, without its encoder: {given}convert it once with "
            f"python scripts/convert_checkpoint.py --to rae --input {path} --encoder <Hub id or folder> --output <new "
            "folder>"
        )
    if found.side == "training":
        source = read_training(found.held, path, found.weights, published, key, "published.")
    else:
        source = read_decoder(found.held, path, published, key, "published.")
    for note in source.notes:
        print_once(f"note: {note}")
    return source.model


def _load_checkpoint(folder: Path, weights: str, key: str) -> RAEModel:
    """The model of a checkpoint: its decoder, and the encoder and statistics that its run's config.yaml names. Raises
    ConfigError where these are no longer those that the run trains with."""
    file = folder.parent.parent / "config.yaml"
    with reading_checkpoint(folder, key, ("state.json",)):
        state = json.loads((folder / "state.json").read_text())
    try:
        settings = read_group(ModelConfig, file, "model")
        # of the run's training alone; an exported model has the same attention
        settings = replace(settings, gradient_checkpointing=False, attn_implementation="sdpa")
        rae = build_rae(settings, read_yaml(file)["train"]["seed"], build_rae_config(settings))
    except (ConfigError, LookupError, TypeError) as error:
        raise ConfigError(f"{key}: {folder} needs what {file} names: {error}") from error
    for name, digest in frozen_digests(rae).items():
        if state.get("frozen", {}).get(name) != digest:
            raise ConfigError(f"{key}: {name} of {file} has other weights than those that {folder} was trained with")
    tensors = read_weights(folder, PARTS[weights], key)
    expected, what = rae.decoder.state_dict(), f"{PARTS[weights]}.safetensors in {folder}"
    check_names(set(tensors), set(expected), what, key)
    check_shapes(tensors, expected, what, key)
    rae.decoder.load_state_dict(tensors)
    return rae
