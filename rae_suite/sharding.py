"""FSDP2: a model's weights, gradients, optimizer state and moving average shared out among the processes.

`accelerate launch` says that it is wanted (accelerate_configs/fsdp2_8gpu.yaml), and torch's fully_shard does it, on
GPUs and on CPU processes alike. Accelerate's own preparation is not used: it takes one model (stage 1 has two), asks
for the input embedding to be a unit of its own inside another unit, replaces autocast by a cast of weights and
activations (other numbers than DDP's), and leaves CPU processes unsharded.

A checkpoint holds whole tensors: what gathers them from the processes, and shares them out again, is here too.
"""

import warnings
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, accelerator: Accelerator, forward_methods: tuple = ()) -> nn.Module:
    """Share out the parameters of `model` among all processes, in place, and give it Accelerate's autocast.

    Units, whose parameters are gathered together and dropped again after their use, are the modules whose class the
    model names in `_no_split_modules`, and the rest. All processes must call `forward` and the methods named in
    `forward_methods` equally often; other methods find no weights. Parameters are then DTensors, float32 as before.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for module in [*reversed(units), model]:  # inner ones first
        # resharded without exception, the root too: weights that are changed in place must not be there gathered
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for name in forward_methods:
        register_fsdp_forward_method(model, name)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes them in place
    return accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)


def gather_to_cpu(state: Any, keep: bool) -> Any:
    """A nested state with its tensors on the CPU, sharded ones whole. Every process must call this; where `keep` is
    false, tensors become None."""
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(state, torch.Tensor):
        return state.cpu() if keep else None
    if isinstance(state, dict):
        return {key: gather_to_cpu(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [gather_to_cpu(value, keep) for value in state]
    return state


def sharded_as(target: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `target` is shared out among processes."""
    if not isinstance(target, DTensor):
        return tensor
    tensor = tensor.to(target.device)
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)  # all have it whole


def load_tensors_into(own: dict, saved: dict, name: str) -> None:
    """Copy saved whole tensors into those of a state dict, in place. Raises ValueError as check_same_shapes."""
    check_same_shapes(own, saved, name)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(sharded_as(tensor, saved[key]))


def check_same_shapes(own: dict, saved: dict, name: str) -> None:
    """Raise ValueError, about `name`, unless two state dicts have the same keys and shapes."""
    own_shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    if own_shapes != shapes:
        key = next(k for k in sorted(own_shapes | shapes) if own_shapes.get(k) != shapes.get(k))
        raise ValueError(f"{name}: {key} has shape {shapes.get(key)}, the model's is {own_shapes.get(key)}")


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load an AdamW's state of whole tensors, or that of AdamW and Muon. Raises ValueError when it is of other
    parameters."""
    moments_of = {True: ("momentum_buffer",), False: ("exp_avg", "exp_avg_sq")}  # by whether the group is Muon's
    parameters = [(p, moments_of["momentum" in group]) for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, entries in saved["state"].items():
        parameter, names = parameters[i]
        expected = dict.fromkeys(names, tuple(parameter.shape)) | ({"step": ()} if "exp_avg" in names else {})
        found = {key: tuple(value.shape) for key, value in entries.items()}
        if found != expected:
            raise ValueError(f"optimizer: the state of parameter {i} has shapes {found}, expected {expected}")
        state[i] = {**entries, **{name: sharded_as(parameter, entries[name]) for name in names}}
    optimizer.load_state_dict({**saved, "state": state})


def load_part(part: Any, saved: dict, name: str) -> None:
    """Load what `part.state_dict()` gave, gathered, into a module, an optimizer, or whatever loads a state itself (a
    moving average, a loss scaler). Raises ValueError, about `name`, where it does not fit."""
    if isinstance(part, nn.Module):
        load_tensors_into(part.state_dict(), saved, name)
    elif isinstance(part, torch.optim.Optimizer):
        load_optimizer_state(part, saved)
    else:
        part.load_state_dict(saved)
