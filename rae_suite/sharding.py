"""FSDP2: the autoencoder's weights, gradients, optimizer state and moving average shared out among the processes.

`accelerate launch` says that it is wanted (accelerate_configs/fsdp2_8gpu.yaml), and torch's fully_shard does it, on
GPUs and on CPU processes alike. Accelerate's own preparation is not used: it takes one model (here are two), wants the
input embedding as a unit inside another unit, replaces autocast by a cast of weights and activations (other numbers
than DDP's), and leaves CPU processes unsharded.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from modeling_rae import RAEModel
from rae_suite.runtime import ConfigError

# Settings of accelerate launch's fsdp_config as it hands them over, and the one value of each that is supported
FSDP_SETTINGS = {
    "fsdp_version": ("FSDP_VERSION", "2"),
    "fsdp_reshard_after_forward": ("FSDP_RESHARD_AFTER_FORWARD", "true"),
    "fsdp_auto_wrap_policy": ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),  # the units are always the blocks
    "fsdp_transformer_layer_cls_to_wrap": ("FSDP_TRANSFORMER_CLS_TO_WRAP", "none"),
    "fsdp_ignored_modules": ("FSDP_IGNORED_MODULES", "none"),
    "fsdp_offload_params": ("FSDP_OFFLOAD_PARAMS", "false"),
    "fsdp_cpu_ram_efficient_loading": ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false"),
    "fsdp_activation_checkpointing": ("FSDP_ACTIVATION_CHECKPOINTING", "false"),  # model.gradient_checkpointing is it
}
OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def fsdp_is_asked_for() -> bool:
    """Whether accelerate launch was told to use FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def check_launch() -> None:
    """Raise ConfigError when accelerate launch asks for something else than data parallelism or FSDP2 as it is here."""
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":  # it would wrap the whole model, whose weights then have other names
        raise ConfigError(f"accelerate launch: expected dynamo_backend no, got {dynamo}; train.compile: true compiles")
    for variable, engine in OTHER_ENGINES.items():
        if _is_set(variable):
            raise ConfigError(f"accelerate launch: {engine} is not supported, expected data parallelism or FSDP2")
    if fsdp_is_asked_for():
        for name, (variable, supported) in FSDP_SETTINGS.items():
            found = os.environ.get(variable, supported)
            if found.lower() != supported.lower():
                raise ConfigError(
                    f"accelerate launch: expected {name} {supported}, got {found} (a config that works is "
                    "accelerate_configs/fsdp2_8gpu.yaml)"
                )


@contextmanager
def plain_accelerator() -> Iterator[None]:
    """Within this context an Accelerator is built for data parallelism, which is what the discriminator gets: its small
    heads stay whole on every process."""
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_FSDP"] = asked


def check_processes(accelerator: Accelerator) -> None:
    """Raise ConfigError when the processes that accelerate launch started do not know of each other."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started != accelerator.num_processes:
        raise ConfigError(
            f"accelerate launch: it started {started} processes, and there is no GPU for them; to train with several "
            "processes on a CPU set ACCELERATE_USE_CPU=true"
        )


def shard(rae: RAEModel, accelerator: Accelerator) -> RAEModel:
    """Share out the parameters of `rae` among all processes, in place, and give it Accelerate's autocast.

    Units, whose parameters are gathered together and dropped again after their use, are the blocks and embeddings of
    encoder and decoder, and the rest. All processes must call `forward` and `encode` equally often; other methods find
    no weights. Parameters are then DTensors, float32 as before.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    units = [module for module in rae.modules() if type(module).__name__ in rae._no_split_modules]
    for module in [*reversed(units), rae]:  # inner ones first
        # resharded without exception, the root too: weights that are changed in place must not be there gathered
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(rae, "encode")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes them in place
    return accelerator.prepare_model(rae, device_placement=False, evaluation_mode=True)
