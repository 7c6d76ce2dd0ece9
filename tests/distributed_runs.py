"""Trainings, one after the other in the processes of one launch, sharded or not.

accelerate launch ... tests/distributed_runs.py RUNS.json

RUNS.json: a list of {"fsdp": bool, "argv": [...], "nan_steps": [...]}: the program, train_rae.py or train_dit.py, stands
at the start of argv; in the nan_steps (0-based) the last process of train_rae.py gets a pixel that is nan. Each process
writes RUNS.rank0.json, ...: for each run the "bytes" that it holds of the parameters, the moving average and the
optimizer's state, a digest of the discriminator's "heads", and how many "graphs" were compiled.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from torch.distributed import destroy_process_group
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_dit  # noqa: E402
import train_rae  # noqa: E402
from rae_suite.digests import weights_digest  # noqa: E402

file = Path(sys.argv[1])
runs = json.loads(file.read_text())
programs = {"train_rae.py": train_rae, "train_dit.py": train_dit}
held, trains, train_step = [], {name: program.train for name, program in programs.items()}, train_rae.train_step


def local_bytes(tensors) -> int:
    """Of what this process has of the tensors; single numbers, such as an optimizer's step, are left out."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors if t.ndim > 0)


def train_and_measure(run, *rest) -> bool:
    done = trains[sys.argv[0]](run, *rest)
    state = [value for entries in run.optimizer.state.values() for value in entries.values()]
    tensors = {"parameters": run.model.parameters(), "ema": run.ema.shadow.values(), "optimizer": state}
    discriminator = getattr(run, "discriminator", None)
    discriminator = discriminator and run.accelerator.unwrap_model(discriminator)
    heads = discriminator and weights_digest(discriminator.heads)
    sizes = {name: local_bytes(values) for name, values in tensors.items()}
    held.append({"bytes": sizes, "heads": heads, "graphs": len(compiled_graphs)})
    return done


def spoiled_step(run, batches, step, *rest):
    if step in nan_steps and run.accelerator.is_last_process:
        batches[0][0, 0, 0, 0] = float("nan")
    return train_step(run, batches, step, *rest)


def count_graph(graph, inputs):
    compiled_graphs.append(graph)
    return graph


def without_inductor(*args, options=None, **rest):
    """torch.compile that runs the graphs as they were captured: inductor's code takes minutes."""
    return torch_compile(*args, backend=count_graph, **rest)


compiled_graphs = []
torch_compile, torch.compile = torch.compile, without_inductor
train_rae.train = train_dit.train = train_and_measure
train_rae.train_step = spoiled_step
PartialState.destroy_process_group = lambda self, group=None: None  # a run ends it, and a second one cannot be made
for run in runs:
    os.environ["ACCELERATE_USE_FSDP"] = str(run["fsdp"]).lower()
    compiled_graphs.clear()
    torch._dynamo.reset()
    sys.argv, nan_steps = run["argv"], run["nan_steps"]
    programs[sys.argv[0]].main()
    AcceleratorState._reset_state()
destroy_process_group()
file.with_suffix(f".rank{os.environ['RANK']}.json").write_text(json.dumps(held))
