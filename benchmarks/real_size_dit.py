"""Stage 2 at full size: optimisation steps of a DiT-DH on the latents of DINOv2-B.

    python benchmarks/real_size_dit.py             (make real-size-dit; CPU: DiT-DH-XL, float32, 2 images, 20 GB memory)
    python benchmarks/real_size_dit.py --size S                                                         (6 GB memory)
    python benchmarks/real_size_dit.py --batch_size 128 --mixed_precision bf16 --compile --steps 10       (one GPU)

The networks, the encoding of the images and the steps are train_dit.py's own; no images are read, no checkpoint is
written, and nothing is evaluated. All weights are random, and the autoencoder's decoder, which plays no part in a step,
is as small as one can be. Prints losses, times and peak memory, and compares the number of parameters with the
published one; `--json FILE` writes the figures for machines.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_dit  # noqa: E402
from benchmarks.sampling import build_rae  # noqa: E402
from modeling_dit import PUBLISHED_HEAD, SIZES  # noqa: E402
from rae_suite.labels import Classes  # noqa: E402
from rae_suite.launch import build_accelerator  # noqa: E402
from rae_suite.settings_dit import parse_config  # noqa: E402

CLASSES, IMAGE_SIZE, STEPS_PER_EPOCH = 1000, 256, 1251  # of ImageNet-1k
PARAMETERS = {"XL": 838_675_796}  # published, with 1,000 classes and the null label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="XL", choices=SIZES, help="the DiT-DH's backbone")
    parser.add_argument("--batch_size", type=int, default=2, help="images of one step")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()

    settings = {
        **{f"model.{name}": value for name, value in {**SIZES[args.size], **PUBLISHED_HEAD}.items()},
        "model.rae": "random",
        "train.global_batch_size": args.batch_size,
        "train.mixed_precision": args.mixed_precision,
        "train.compile": str(args.compile).lower(),
    }
    config = parse_config([str(part) for key, value in settings.items() for part in (f"--{key}", value)])
    accelerator = build_accelerator(config.train, ())
    torch.manual_seed(0)
    run = train_dit.build_run(
        config, accelerator, build_rae(12, 16, 1, 1), Classes(CLASSES, None), STEPS_PER_EPOCH, {}, None
    )
    parameters = sum(p.numel() for p in run.dit.parameters())
    print(f"DiT-DH-{args.size}: {parameters:,} parameters")
    assert parameters == PARAMETERS.get(args.size, parameters)

    device, rows = accelerator.device, []
    print(f"{'step':>4}{'loss':>10}{'grad_norm':>11}{'s/step':>10}{'images/s':>10}")
    for step in range(args.steps):
        pixels = torch.rand(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        labels = torch.randint(CLASSES, (args.batch_size,))
        start = time.perf_counter()
        record = train_dit.train_step(run, train_dit.prepare(run, [(pixels, labels)], step), step).read()
        seconds = time.perf_counter() - start  # the record's numbers are there: the device has ended the step
        rows.append({**record, "seconds": seconds})
        print(f"{step + 1:>4}{record['loss']:>10.4f}{record['grad_norm']:>11.4f}{seconds:>10.2f}", end="")
        print(f"{args.batch_size / seconds:>10.2f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    memory = {"peak_rss_gib": peak}
    if device.type == "cuda":
        memory["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(", ".join(f"{name} {value:.2f}" for name, value in memory.items()))
    if args.json:
        result = {"parameters": parameters, "steps": rows, **memory, "torch": torch.__version__, **vars(args)}
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
