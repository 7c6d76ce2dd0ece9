"""Stage-2 models in folders: the pipeline folder that a run ends with, and whatever else a model can be loaded from.

    model_index.json          the pipeline's parts and defaults; README.md and samples.png: its card
    modeling_dit.py           the code, here and beside the weights of transformer/ and guide/
    transformer/, guide/      RAEDiTModels; the weaker one for autoguidance is optional
    rae/                      the RAEModel; left out where model_index.json says rae_id
    scheduler/                diffusers' FlowMatchEulerDiscreteScheduler, whose shift is the time shift

No code of a folder or of the Hub runs: the networks are this repository's.
"""

import inspect
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from transformers.utils import IMAGE_PROCESSOR_NAME

from modeling_dit import RAEDiTModel, RAEDiTPipeline, RotaryEmbedding, check_parts_fit, rotary_table
from modeling_rae import RAEModel
from rae_suite.cli import read_yaml
from rae_suite.digests import DECIDES_LATENTS, weights_digest
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.files import is_whole_model
from rae_suite.flow import default_shift
from rae_suite.hub import fetch_file, hub_id
from rae_suite.model_loading import CODE as RAE_CODE
from rae_suite.model_loading import load_rae
from rae_suite.rae_networks import image_processor_json
from rae_suite.run_models import WORDS, is_checkpoint, is_run_folder, model_of_run, read_weights

INDEX, CARD, PICTURE = "model_index.json", "README.md", "samples.png"
CODE = "modeling_dit.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CHECKPOINT_PARTS = {"ema": "ema", "raw": "model"}
# of SamplingConfig, what a pipeline has as its defaults; its guidance_interval is two numbers there
PIPELINE_DEFAULTS = ("num_inference_steps", "end", "guidance_scale", "guidance_start", "guidance_end")
# weights of the model's label table, by how it is conditioned
LABEL_TABLES = {"y_embedder.embedding_table.weight", "ctx_embedder.embedding_table.weight"}
KINDS = "a pipeline folder such as runs/<name>/final, a run folder, a checkpoint of one, a transformer or a Hub id"


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def save_pipeline(
    folder: Path,
    transformer: RAEDiTModel,
    rae: RAEModel,
    *,
    state: Optional[dict] = None,
    guide: Optional[RAEDiTModel] = None,
    class_names: Optional[Sequence] = None,
    sampling: dict,
    card: Optional[str] = None,
    picture: Optional[Path] = None,
    include_rae: bool = True,
    rae_id: Optional[str] = None,
) -> None:
    """Write a pipeline folder. One process calls this.

    Args:
        state: the transformer's weights where they are not its own: an average, or gathered ones of a sharded model.
            Buffers may be missing.
        class_names: name of each class, in the order of their indices.
        sampling: defaults of the pipeline, by their names in SamplingConfig, and `shift`; all may be left out. `solver`
            and `guide` are not the pipeline's: it takes Euler steps, and has the guide that is given. Of `guide` only
            "off" counts: a base head is no guide then.
        card: text of README.md.
        picture: PNG file that the card shows as samples.png.
        include_rae: whether the RAE's weights go along. If not, `rae_id` says where they come from.

    Raises:
        ValueError: parts that do not fit each other, an unknown key of `sampling`, no `rae_id` where it is needed.
    """
    if state is not None:
        transformer = model_from_state(dict(transformer.config), state)
    sampling = dict(sampling)
    shift = sampling.pop("shift", None) or default_shift(latent_dim(transformer))
    if "guidance_interval" in sampling:
        sampling["guidance_start"], sampling["guidance_end"] = sampling.pop("guidance_interval")
    if unknown := sampling.keys() - {*PIPELINE_DEFAULTS, "solver", "guide"}:
        raise ValueError(f"sampling: expected {', '.join(PIPELINE_DEFAULTS)} or shift, got {sorted(unknown)}")
    pipeline = RAEDiTPipeline(
        transformer,
        rae,
        FlowMatchEulerDiscreteScheduler(shift=shift),
        guide,
        class_names=None if class_names is None else dict(enumerate(class_names)),
        rae_id=rae_id or hub_id(rae.name_or_path or None),
        internal_guidance=sampling.get("guide") != "off",
        **{name: sampling[name] for name in PIPELINE_DEFAULTS if name in sampling},
    )
    pipeline.save_pretrained(folder, include_rae=include_rae)
    if include_rae:
        (folder / "rae" / IMAGE_PROCESSOR_NAME).write_text(image_processor_json(rae.config.image_size))
    if card is not None:
        (folder / CARD).write_text(card)
    if picture is not None:
        shutil.copyfile(picture, folder / PICTURE)


def latent_dim(transformer: RAEDiTModel) -> int:
    """Numbers of a latent."""
    return transformer.config.in_channels * transformer.config.sample_size**2


def model_from_state(config: dict, state: dict) -> RAEDiTModel:
    """A model, in eval mode, of which `state` are the weights; rotary tables that it lacks, as an average of parameters
    does, are computed. Raises ValueError where it has other keys or shapes than the config asks for."""
    with torch.device("meta"):
        model = RAEDiTModel(**{name: value for name, value in config.items() if not name.startswith("_")})
    state = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, RotaryEmbedding):
            for which, table in zip(("cos", "sin"), rotary_table(*module.size), strict=True):
                state.setdefault(f"{name}.freqs_{which}", table)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit the model's settings: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def is_whole_pipeline(folder: Path) -> bool:
    """Whether a pipeline folder has all that its model_index.json names: settings, code, and weights of the length that
    their headers say."""
    try:
        index = json.loads((folder / INDEX).read_text())
        parts = [name for name in ("transformer", "guide", "rae") if index.get(name, [None])[0] is not None]
        json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    files = {"rae": (RAE_CODE,), "transformer": (CODE, WEIGHTS), "guide": (CODE, WEIGHTS)}
    whole = all(is_whole_model(folder / name, *files[name]) for name in parts)
    return whole and "transformer" in parts and (folder / CODE).is_file()


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class PartsSettings:
    """What goes with a stage-2 model. `found`: what was loaded, in words; `weights`: "averaged", "raw" or "unknown";
    `shift`: the time shift of its training; `class_names`: {index: name}; `guide`: folder of the weaker model that is
    saved with it. Not a pipeline's defaults: a command draws as its own settings say."""

    found: str
    weights: str
    shift: float
    class_names: dict = field(default_factory=dict)
    guide: Optional[Path] = None


def load_pipeline_parts(
    source: str, key: str, weights: str = "ema"
) -> tuple[RAEDiTModel, Optional[RAEModel], PartsSettings]:
    """The transformer, its RAE and what goes with them, on the CPU, in float32 and in eval mode.

    Args:
        source: a pipeline folder, the folder of a transformer alone (its RAE is None), a Hub id of either, a training
            checkpoint (runs/x/checkpoints/step-*), or a run folder: its final/, else its newest checkpoint.
        key: the setting that errors name.
        weights: of a checkpoint, "ema" for the moving average or "raw".

    Raises:
        ConfigError: there is nothing of that kind, or it is damaged; other things have no raw weights.
    """
    folder = Path(source)
    if is_run_folder(folder):
        folder = model_of_run(folder, key, weights, is_whole_pipeline)
        source = str(folder)
    if is_checkpoint(folder):
        return _from_checkpoint(folder, key, weights)
    if not folder.exists():
        return _from_hub(source, key, weights)
    return _from_folder(folder, source, key, weights)


def _from_hub(source: str, key: str, weights: str) -> tuple:
    if hub_id(source) is None:
        raise ConfigError(f"{key}: {source} does not exist, expected {KINDS}")
    if index := fetch_file(source, INDEX, key, missing_ok=True):
        _check_class(index, "RAEDiTPipeline", source, key)
    else:
        _check_class(fetch_file(source, "config.json", key), "RAEDiTModel", source, key)
    with error_names_setting(key, source):
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    return _from_folder(folder, source, key, weights)


def _from_folder(folder: Path, source: str, key: str, weights: str) -> tuple:
    """Parts of a pipeline folder, or of one that holds a transformer alone. `source`: its name in messages."""
    if weights != "ema":
        raise ConfigError(
            f"weights: expected ema, got {weights}: {source} holds one set of weights, checkpoints have raw ones too"
        )
    if not (folder / INDEX).is_file():
        _check_class(folder / "config.json", "RAEDiTModel", source, key)
        transformer = _load_transformer(folder, source, key)
        shift = default_shift(latent_dim(transformer))
        return transformer, None, PartsSettings(f"transformer {source}", "unknown", shift)
    index = _check_class(folder / INDEX, "RAEDiTPipeline", source, key)
    transformer = _load_transformer(folder / "transformer", source, key)
    with error_names_setting(key, source):
        shift = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.shift
        _, names = read_defaults(index)
    rae_source = str(folder / "rae") if index.get("rae", [None])[0] is not None else index.get("rae_id")
    rae = None if rae_source is None else load_rae(rae_source, key)
    guide = folder / "guide" if index.get("guide", [None])[0] is not None else None
    of_a_run = (folder.parent / "config.yaml").is_file()  # whose folders have the moving average
    which = "averaged" if of_a_run else "unknown"
    return transformer, rae, PartsSettings(f"pipeline {source}", which, float(shift), names, guide)


def read_defaults(index: dict) -> tuple[dict, dict]:
    """(the defaults by their names in SamplingConfig, the class names {index: name} by index) in a model_index.json,
    where keys are texts: 10 stands before 2."""
    sampling = {name: index[name] for name in PIPELINE_DEFAULTS if name in index}
    interval = (sampling.pop("guidance_start", 0.0), sampling.pop("guidance_end", 1.0))
    names = dict(sorted((int(number), name) for number, name in (index.get("class_names") or {}).items()))
    off = {} if index.get("internal_guidance", True) else {"guide": "off"}
    return {**sampling, **off, "guidance_interval": interval}, names


def _check_class(file: Path, expected: str, source: str, key: str) -> dict:
    """What the JSON file says. Raises ConfigError unless it is of the class `expected`."""
    try:
        content = json.loads(file.read_text())
        found = content.get("_class_name") or content.get("model_type")
    except OSError as error:
        raise ConfigError(f"{key}: {source} has no {INDEX} and no config.json, expected {KINDS}") from error
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{key}: {file} is no model's settings: {error}") from error
    if expected not in (found, found[-1] if isinstance(found, list) and found else None):
        raise ConfigError(f"{key}: {source} is a {found}, expected {KINDS}")
    return content


def _load_transformer(folder: Path, source: str, key: str) -> RAEDiTModel:
    with error_names_setting(key, source):
        return RAEDiTModel.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True).eval()


def _from_checkpoint(folder: Path, key: str, weights: str) -> tuple:
    """Parts of a run's checkpoint: weights from it, all else from the run folder around it."""
    run_dir = folder.parent.parent
    run = read_yaml(run_dir / "config.yaml")
    try:
        given = run["model"]
        if "rae" not in given:
            raise ConfigError(f"{key}: {folder} is a checkpoint of a run of stage 1, expected {KINDS}")
        rae = load_rae(str(run_dir / "rae") if (run_dir / "rae").exists() else given["rae"], key)
        names, flow = given.get("class_names"), dict(run["flow"])
    except ConfigError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}: {run_dir} is no run folder of stage 2 ({error!r})") from error
    state = read_weights(folder, CHECKPOINT_PARTS[weights], key)
    with error_names_setting(key, str(folder)):
        transformer = model_from_state(_checkpoint_config(given, rae, state), state)
    which, names = WORDS[weights], dict(enumerate(names or []))
    shift = flow["shift"] or default_shift(latent_dim(transformer), flow["shift_base"])
    return transformer, rae, PartsSettings(f"checkpoint {folder}, {which} weights", which, shift, names)


def _checkpoint_config(given: dict, rae: RAEModel, state: dict) -> dict:
    """Arguments of RAEDiTModel from a run's settings `model.*`; what follows from its RAE and its data may be missing
    there."""
    config = {name: given[name] for name in inspect.signature(RAEDiTModel.__init__).parameters if name in given}
    dropout, (table,) = config.get("class_dropout_prob", 0.1), LABEL_TABLES & state.keys()
    found = {
        "sample_size": rae.config.latent_size,
        "in_channels": rae.config.latent_channels,
        "num_classes": state[table].shape[0] - (dropout > 0),
    }
    return {**config, **{name: value for name, value in found.items() if config.get(name) is None}}


# --------------------------------------------------------------------------------------------------------------------
# The guide
# --------------------------------------------------------------------------------------------------------------------


def load_guide(
    name: Optional[str], own: Optional[Path], transformer: RAEDiTModel, rae: RAEModel, key: str
) -> Optional[RAEDiTModel]:
    """The weaker model of SamplingConfig.guide: `name` as load_pipeline_parts takes it, None for the folder `own` where
    there is one, "off" for no guide. Raises ConfigError, about the setting `key`, for one of other latents or classes
    than the transformer's."""
    if name is None and own is not None:
        return _load_transformer(own, str(own), key)
    if name in (None, "off"):
        return None
    guide, other_rae, _ = load_pipeline_parts(name, key)
    with error_names_setting(key, name):
        check_parts_fit(transformer, rae, guide)
    if other_rae is not None and latents_key(rae) != latents_key(other_rae):
        raise ConfigError(f"{key}: {name} is of another latent space: its RAE has another encoder or other statistics")
    return guide


def latents_key(rae: RAEModel) -> Any:
    """What two RAEs with the same latents have in common, whatever their decoders are."""
    names = (*DECIDES_LATENTS, "use_latent_stats", "latent_stats_have_mean")
    return [getattr(rae.config, name) for name in names], weights_digest(rae, ("decoder.",))
