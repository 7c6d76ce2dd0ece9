"""The linear probe's training at the scale of ImageNet-1k: time and memory.

    python benchmarks/linear_probe.py                         (1.28M x 768 features, 1000 classes, 8 heads, 10 epochs)
    nice -n 19 python benchmarks/linear_probe.py --epochs 1   (the same, shorter: 12 minutes on one CPU core, 3.4 GB)
    python benchmarks/linear_probe.py --num_images 50000 --epochs 2                          (a minute on 2 CPU cores)

Features are synthetic, a centre for each class and noise around it, and written block by block in the format of the
cache (2.0 GB of disk at full size), so that memory is what a real run needs. Everything after the extraction is timed:
statistics, the sweep with its selection and the final head on all images, evaluation on 50,000 more. A GPU is used if
there is one. Prints a table and the peak resident memory, which counts the mapped features that were read and must be
under 8 GB; `--json FILE` writes it for machines.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, which has a file of the same name

from rae_suite.features import Features, FeatureWriter  # noqa: E402
from rae_suite.linear_heads import HeadTrainingConfig, LinearHead, evaluate_head, fit, training_set  # noqa: E402

BLOCK = 8192  # features that are made at a time
MAX_RSS_GB = 8.0


def write_features(folder: Path, count: int, centres: torch.Tensor, noise: float, seed: int) -> tuple:
    """(features, labels) of `count` synthetic images; nothing but a block and the writer's shard is in memory."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(centres), (count,), generator=generator)
    writer = FeatureWriter(folder, centres.shape[1])
    for rows in torch.arange(count).split(BLOCK):
        values = centres[labels[rows]]
        values += noise * torch.randn(values.shape, generator=generator)
        writer.add(values.half(), rows)
    writer.close([], {})
    return Features(folder), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_images", type=int, default=1_281_167, help="training images")
    parser.add_argument("--num_eval_images", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=768, help="features of an image")
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--weight_decays", type=float, nargs="+", default=[1e-5, 1e-4])
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument(
        "--noise", type=float, default=5.0, help="standard deviation around class centres of variance 1"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = HeadTrainingConfig(
        lrs=tuple(args.lrs), weight_decays=tuple(args.weight_decays), epochs=args.epochs, min_steps=1,
        batch_size=args.batch_size,
    )  # fmt: skip

    seconds, clock = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()

    with tempfile.TemporaryDirectory() as temporary:
        centres = torch.randn(args.num_classes, args.width, generator=torch.Generator().manual_seed(0))
        features, labels = write_features(Path(temporary) / "train", args.num_images, centres, args.noise, 1)
        held_out, held_out_labels = write_features(
            Path(temporary) / "eval", args.num_eval_images, centres, args.noise, 2
        )
        lap("writing synthetic features")
        data = training_set(features, labels, args.num_classes, device)
        lap("statistics")
        weights, sweep, best = fit(data, training)
        lap("sweep, selection and final head")
        classes = [str(i) for i in range(args.num_classes)]
        head = LinearHead(weights[:-1].T, weights[-1], data.mean, data.std, {"classes": classes}).to(device)
        figures, _ = evaluate_head(held_out, held_out_labels, head)
        lap("evaluation")

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB on Linux
    heads = len(args.lrs) * len(args.weight_decays)
    print(f"\n{args.num_images} x {args.width} features, {args.num_classes} classes, {heads} heads")
    print(f"{args.epochs:g} epochs of batches of {args.batch_size}, {device}, {torch.get_num_threads()} CPU threads")
    for name, value in seconds.items():
        print(f"{name:<34}{value:>9.1f} s")
    print(f"chosen: lr {sweep[best]['lr']:g}, weight decay {sweep[best]['weight_decay']:g}, "
          f"top-1 {100 * figures['top1']:.2f} % of {args.num_eval_images}")  # fmt: skip
    print(f"peak resident memory {peak:.2f} GB (at most {MAX_RSS_GB:g})")
    if args.json:
        result = {
            "seconds": seconds,
            "peak_rss_gb": peak,
            "sweep": sweep,
            "top1": figures["top1"],
            "device": str(device),
        }
        Path(args.json).write_text(json.dumps({**result, "torch": torch.__version__, **vars(args)}, indent=1))
    if peak >= MAX_RSS_GB:
        sys.exit(f"error: peak resident memory {peak:.2f} GB, expected less than {MAX_RSS_GB:g}")


if __name__ == "__main__":
    main()
