"""The networks of stage 2, built as the settings describe them: the autoencoder with its latents' statistics, and the
diffusion transformer."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Optional

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_dit import RAEDiTBlock, RAEDiTModel, RAEDiTTokenBlock
from modeling_rae import RAEModel
from rae_suite.checkpoints import checkpoints
from rae_suite.dit_folders import LABEL_TABLES, load_pipeline_parts
from rae_suite.errors import ConfigError, error_names_setting
from rae_suite.files import replacing, write_folder
from rae_suite.flow import default_shift
from rae_suite.labels import Classes
from rae_suite.latent_stats import LatentReader
from rae_suite.launch import say
from rae_suite.model_loading import load_rae
from rae_suite.published_dit import read_published_start
from rae_suite.rae_networks import compiled, give_latent_stats, read_latent_stats, save_rae
from rae_suite.run_models import is_checkpoint, is_run_folder
from rae_suite.settings_dit import DiTModelConfig, FlowConfig, LatentsConfig
from rae_suite.sharding import load_tensors_into

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


def compute_latent_stats(rae: RAEModel, reader: LatentReader, run_dir: Path) -> None:
    """Normalise with statistics of the training images: those that the run folder keeps from an earlier start, or new
    ones, which it then keeps. Every process calls this."""
    accelerator, file = reader.accelerator, run_dir / LATENT_STATS
    [kept] = broadcast_object_list([file.exists()])
    if kept:
        give_latent_stats(rae, **read_latent_stats(file, rae.config, str(file)))
        return
    stats, num_images = reader.stats(rae)
    say(accelerator, f"statistics of the latents computed over {num_images} training images, kept in {file}")
    give_latent_stats(rae, **stats)
    if accelerator.is_main_process:
        with replacing(file) as beside:
            save_file(stats, beside)
    accelerator.wait_for_everyone()


def model_settings(model: DiTModelConfig, rae: RAEModel, classes: Classes) -> dict:
    """Arguments of RAEDiTModel."""
    known = inspect.signature(RAEDiTModel.__init__).parameters
    return {
        **{item.name: getattr(model, item.name) for item in fields(model) if item.name in known},
        "sample_size": rae.config.latent_size,
        "in_channels": rae.config.latent_channels,
        "num_classes": classes.num,
    }


def check_settings(settings: dict) -> None:
    """Raise ConfigError for sizes that do not fit each other, before anything is built."""
    with error_names_setting("model"), torch.device("meta"):
        RAEDiTModel(**settings)


def build_dit(model: DiTModelConfig, settings: dict, classes: Classes, seed: int) -> RAEDiTModel:
    """The transformer with the weights it starts from."""
    set_seed(seed)
    dit = RAEDiTModel(**settings)
    if model.init_from is not None:
        fill_from(dit, model.init_from, classes)
    if model.gradient_checkpointing:
        dit.enable_gradient_checkpointing()
    return dit


def fill_from(dit: RAEDiTModel, source: str, classes: Classes) -> None:
    """Take the weights of another model, or of a file of the published code; its label table only where it is of the
    same classes. Raises ConfigError for a model of another architecture."""
    if Path(source).is_file():
        start, class_names = read_published_start(Path(source), dit, "model.init_from"), None
    else:
        start, _, found = load_pipeline_parts(source, "model.init_from")
        class_names = found.class_names
    state, own = start.state_dict(), dit.state_dict()
    (table,) = LABEL_TABLES & own.keys()
    names = None if class_names is None else tuple(class_names.values())
    others = bool(names and classes.names and names != classes.names)
    if table in state and (others or state[table].shape != own[table].shape):
        state[table] = own[table]
    with error_names_setting("model.init_from", source):
        load_tensors_into(own, state, f"{source} is of another architecture")


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
    """Put the autoencoder, with the statistics that the run trains with, into the run folder: its checkpoints are then
    models, wherever model.rae goes."""
    main = accelerator.is_main_process
    [kept] = broadcast_object_list([(run_dir / "rae" / "config.json").exists()])
    if not kept:
        write_folder(
            run_dir / "rae",
            lambda beside: save_rae(rae, rae.state_dict(), beside) if main else None,
            main,
            accelerator.wait_for_everyone,
        )
