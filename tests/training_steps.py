"""A few training steps through the functions of train_rae.py; each rank writes its weights. Started by ranks.py.

training_steps.py FILE [flags of train_rae.py]

Takes train.max_steps steps, in float64 when FILE's name ends in it. What rank r has goes to FILE.rank<r>.safetensors.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from rae_suite.images import TrainingView
from rae_suite.launch import build_accelerator, micro_batch_size
from rae_suite.loaders import TrainBatches, train_loader
from rae_suite.rae_networks import build_rae_config
from rae_suite.settings_rae import parse_config
from rae_suite.splits import load_splits
from train_rae import build_run, train_step


def main() -> None:
    output, argv = Path(sys.argv[1]), sys.argv[2:]
    dtype = torch.float64 if output.name.endswith("float64") else torch.float32
    torch.set_default_dtype(dtype)
    config = parse_config(argv)
    accelerator = build_accelerator(config.train, config.logging.report_to)
    source, _ = load_splits(config.data, config.train.seed)
    rank, world = accelerator.process_index, accelerator.num_processes
    size = micro_batch_size(config.train, world)
    steps = config.train.max_steps
    batches = TrainBatches(len(source), config.train.global_batch_size, size, rank, world, config.train.seed, 0, steps)
    run = build_run(config, accelerator, build_rae_config(config.model), batches.steps_per_epoch)
    loader = iter(train_loader(source, batches, TrainingView(config.model.image_size, config.data.resize_size)))
    seen = []
    for step in range(steps):
        step_batches = [next(loader) for _ in range(config.train.gradient_accumulation_steps)]
        seen += [batch["index"] for batch in step_batches]
        record = train_step(run, [batch["pixels"].to(dtype) / 255 for batch in step_batches], step).read()
        assert record["nonfinite"] is None
    tensors = {f"decoder.{n}": p for n, p in run.model.decoder.named_parameters()}
    tensors |= {f"ema.{n}": p for n, p in run.ema.shadow.items()}
    if run.discriminator is not None:
        heads = accelerator.unwrap_model(run.discriminator).heads.state_dict()
        tensors |= {f"heads.{n}": t for n, t in heads.items()}
    tensors["seen"] = torch.cat(seen)
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, f"{output}.rank{rank}.safetensors")
    accelerator.end_training()
