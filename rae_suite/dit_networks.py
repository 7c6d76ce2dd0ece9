"""The networks of stage 2, built as the settings describe them: the autoencoder with its latents' statistics, and the
diffusion transformer."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Optional, Union

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_dit import RAEDiTBlock, RAEDiTModel, RAEDiTTokenBlock
from modeling_rae import RAEModel
from rae_suite.checkpoints import checkpoints
from rae_suite.digests import encoder_settings_digest, weights_digest
from rae_suite.dit_folders import LABEL_TABLES, load_pipeline_parts
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.files import replacing, write_folder
from rae_suite.flow import default_shift
from rae_suite.labels import Classes
from rae_suite.latent_stats import LatentReader
from rae_suite.launch import say
from rae_suite.model_loading import load_rae
from rae_suite.output import print_once
from rae_suite.published_dit import read_published_start
from rae_suite.rae_networks import compiled, give_latent_stats, read_latent_stats, save_rae
from rae_suite.run_models import is_checkpoint, is_run_folder
from rae_suite.settings_dit import DiTModelConfig, FlowConfig, LatentsConfig
from rae_suite.sharding import check_same_shapes
from rae_suite.stored_latents import StoredStats

LATENT_STATS = "latent_stats.safetensors"  # in the run folder, of statistics that were computed


def open_rae(model: DiTModelConfig, latents: LatentsConfig, run_dir: Optional[Path] = None) -> RAEModel:
    """The frozen autoencoder, with the statistics of a file if one is named. Where `model.rae` is a run or a
    checkpoint, a run in `run_dir` that goes on takes the one that it keeps: a training's newest checkpoint is another
    by then. Raises ConfigError where there is none, and for latents without statistics that were not asked for."""
    source = model.rae
    changes = is_run_folder(Path(source)) or is_checkpoint(Path(source))
    if changes and run_dir is not None and checkpoints(run_dir):
        source = str(run_dir / "rae")
    rae = load_rae(source, "model.rae")
    if latents.stats is None and not rae.config.use_latent_stats:
        raise ConfigError(
            f"latents.stats: {model.rae} has no statistics of its latents, and training on latents that are not "
            "normalised fails; expected compute, a file of mean and var, or unnormalized if this is meant"
        )
    if latents.stats not in (None, "compute", "unnormalized"):
        with error_names_setting("latents.stats"):
            give_latent_stats(rae, **read_latent_stats(Path(latents.stats), rae.config, "latents.stats"))
    if latents.stats == "unnormalized" and rae.config.use_latent_stats:
        raise ConfigError(f"latents.stats: unnormalized, but {model.rae} has statistics and normalises with them")
    return rae


def compute_latent_stats(
    rae: RAEModel, reader: Union[LatentReader, StoredStats], run_dir: Path, fork_from: Optional[str]
) -> None:
    """Normalise with statistics of the training images: those of an earlier start, of the run that this one is a fork
    of, or new ones. The run folder then keeps them. Every process calls this."""
    accelerator, file, digest = reader.accelerator, run_dir / LATENT_STATS, partial(reader.digest, rae)
    [kept] = broadcast_object_list([find_latent_stats(run_dir, fork_from, digest)])
    if kept is None:
        stats, num_images = reader.stats(rae)
        say(accelerator, f"statistics of the latents computed over {num_images} training images, kept in {file}")
    else:
        stats = read_latent_stats(kept, rae.config, str(kept))
    give_latent_stats(rae, **stats)
    if kept != file and accelerator.is_main_process:
        with replacing(file) as beside:
            save_file(stats, beside, {"digest": digest()})
    accelerator.wait_for_everyone()


def find_latent_stats(run_dir: Path, fork_from: Optional[str], digest: Callable[[], str]) -> Optional[Path]:
    """The statistics that a run begins or goes on with, None where it has to compute them. Those of a run with
    checkpoints, or of a fork's, are compared with what the checkpoint was trained with; those of a start that came to
    no checkpoint must be of the same encoder and images (`digest`)."""
    own = run_dir / LATENT_STATS
    if checkpoints(run_dir):
        return own if own.exists() else None
    with suppress(OSError, SafetensorError), safe_open(own, "pt") as file:  # a damaged file is as good as none
        if (file.metadata() or {}).get("digest") == digest():
            return own
    of_fork = None if fork_from is None else Path(fork_from).parent.parent / LATENT_STATS
    return of_fork if of_fork is not None and of_fork.exists() else None


def model_settings(model: DiTModelConfig, rae: RAEModel, classes: Classes) -> dict:
    """Arguments of RAEDiTModel."""
    known = inspect.signature(RAEDiTModel.__init__).parameters
    return {
        **{item.name: getattr(model, item.name) for item in fields(model) if item.name in known},
        "sample_size": rae.config.latent_size,
        "in_channels": rae.config.latent_channels,
        "num_classes": classes.num,
    }


def plan_dit(settings: dict) -> RAEDiTModel:
    """The transformer without weights. Raises ConfigError for sizes that do not fit each other."""
    with error_names_setting("model"), torch.device("meta"):
        return RAEDiTModel(**settings)


def build_dit(model: DiTModelConfig, settings: dict, start: dict, seed: int) -> RAEDiTModel:
    """The transformer with the weights it starts from: those of `start`, by name, and new ones."""
    set_seed(seed)
    dit = RAEDiTModel(**settings)
    dit.load_state_dict({**dit.state_dict(), **start})
    if model.gradient_checkpointing:
        dit.enable_gradient_checkpointing()
    return dit


def read_start_weights(source: Optional[str], planned: RAEDiTModel, classes: Classes, run_dir: Path) -> dict:
    """Weights, by name, of the model or published file that a new run starts from (`model.init_from`); its label table
    only where it is of the same classes. Nothing for a run that goes on from a checkpoint of its own. Raises
    ConfigError for a model of another architecture than the `planned` one."""
    if source is None or checkpoints(run_dir):
        return {}
    if Path(source).is_file():
        start, class_names = read_published_start(Path(source), planned, "model.init_from"), {}
    else:
        start, _, found = load_pipeline_parts(source, "model.init_from")
        class_names = found.class_names or {}
    what = f"{source} is of another architecture"
    for name in ("prediction", "num_attention_heads", "head_num_attention_heads", "base_num_layers"):
        if start.config[name] != planned.config[name]:
            raise ConfigError(
                f"model.init_from: {what}: its {name} is {start.config[name]}, the run's is {planned.config[name]}"
            )
    weights, expected = start.state_dict(), planned.state_dict()
    (table,) = LABEL_TABLES & expected.keys()
    names = tuple(class_names[index] for index in sorted(class_names))
    others = bool(names and classes.names and names != classes.names)
    if table in weights and (others or weights[table].shape != expected[table].shape):
        print_once(f"note: model.init_from: {source} is of other classes, the label table is new")
        del weights[table], expected[table]
    with error_names_setting("model.init_from", source):
        check_same_shapes(expected, weights, what)
    return weights


def frozen_digests(rae: RAEModel) -> dict:
    """Of what decides the latents that a run learns, by the setting that names it; None: not normalised."""
    stats = weights_digest(rae, ("decoder.", "encoder.")) if rae.config.use_latent_stats else None
    return {
        "model.rae": weights_digest(rae, ("decoder.", "latent_")),
        "model.rae (settings of its encoder)": encoder_settings_digest(rae),
        "latents.stats": stats,
    }


def time_shift(flow: FlowConfig, rae: RAEModel) -> float:
    """Factor of flow.shift_times: as set, or from the size of the latents."""
    dim = rae.config.latent_channels * rae.config.latent_size**2
    return default_shift(dim, flow.shift_base) if flow.shift is None else flow.shift


def compile_networks(dit: RAEDiTModel, encoder: nn.Module) -> None:
    """Compile what a step spends its time in, in place: the blocks of the transformer and of the encoder."""
    for module in (*dit.modules(), *encoder.modules()):
        if isinstance(module, (RAEDiTBlock, RAEDiTTokenBlock, GradientCheckpointingLayer)):
            module.forward = compiled(module.forward)


def keep_rae(rae: RAEModel, run_dir: Path, accelerator: Accelerator) -> None:
    """Put the autoencoder, with the statistics that the run trains with, into the run folder, so that a checkpoint of
    the run can be loaded even after model.rae has moved or changed. One that a start left which came to no checkpoint
    may be another: it is replaced."""
    main = accelerator.is_main_process
    [kept] = broadcast_object_list([bool(checkpoints(run_dir)) and (run_dir / "rae" / "config.json").exists()])
    if not kept:
        write_folder(
            run_dir / "rae",
            lambda beside: save_rae(rae, rae.state_dict(), beside) if main else None,
            main,
            accelerator.wait_for_everyone,
        )
