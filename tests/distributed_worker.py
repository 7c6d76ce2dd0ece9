"""Three training steps with every loss on, through the functions of train_rae.py; each rank writes its weights.

accelerate launch ... tests/distributed_worker.py OUTPUT_DIR [flags of train_rae.py]
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import parse_config  # noqa: E402
from data import TrainBatches, load_splits, train_loader  # noqa: E402
from train_rae import build_accelerator, build_rae_config, build_run, micro_batch_size, train_step  # noqa: E402

output, argv = Path(sys.argv[1]), sys.argv[2:]
config = parse_config(argv)
accelerator = build_accelerator(config)
source, _ = load_splits(config.data, config.train.seed)
rank, world = accelerator.process_index, accelerator.num_processes
size = micro_batch_size(config, world)
steps = 3
batches = TrainBatches(len(source), config.train.global_batch_size, size, rank, world, config.train.seed, 0, steps)
run = build_run(config, accelerator, build_rae_config(config), batches.steps_per_epoch)
loader = iter(train_loader(source, batches, config.model.image_size))
seen = []
for step in range(steps):
    step_batches = [next(loader) for _ in range(config.train.gradient_accumulation_steps)]
    seen += [batch["index"] for batch in step_batches]
    record = train_step(run, [batch["pixels"].float() / 255 for batch in step_batches], step)
    assert record["nonfinite"] is None
tensors = {f"decoder.{n}": p for n, p in run.model.decoder.named_parameters()}
tensors |= {f"ema.{n}": p for n, p in run.ema.shadow.items()}
if run.discriminator is not None:
    heads = accelerator.unwrap_model(run.discriminator).heads.state_dict()
    tensors |= {f"heads.{n}": t for n, t in heads.items()}
tensors["seen"] = torch.cat(seen)
output.mkdir(parents=True, exist_ok=True)
save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, output / f"rank{rank}.safetensors")
accelerator.end_training()
