"""Stage 2 at full size: two optimisation steps of a DiT-DH on the latents of DINOv2-B.

    python benchmarks/real_size_dit.py              (make real-size-dit; CPU: DiT-DH-S, float32, 2 images, 7 GB memory)
    python benchmarks/real_size_dit.py --size XL --batch_size 128 --mixed_precision bf16 --steps 10          (one GPU)

The encoder and a ViT-B decoder have random weights, saved as an autoencoder's folder, so that everything is loaded as
in a real run; the images are synthetic. The run itself is train_dit.py with its defaults, which are DiT-DH's published
settings. Prints a table of losses, times and peak memory; `--json FILE` writes it for machines. Further flags are
settings of train_dit.py.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modeling_dit import PUBLISHED_HEAD, SIZES  # noqa: E402
from modeling_rae import RAEConfig, RAEModel  # noqa: E402


def save_rae(folder: Path) -> None:
    """DINOv2-B and a ViT-B decoder, random."""
    encoder = {"model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12}
    config = RAEConfig(
        encoder_config={**encoder, "num_attention_heads": 12, "image_size": 518, "patch_size": 14},
        decoder_hidden_size=768,
        decoder_num_hidden_layers=12,
        decoder_num_attention_heads=12,
        decoder_intermediate_size=3072,
    )
    RAEModel(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="S", choices=SIZES, help="the DiT-DH's backbone")
    parser.add_argument("--batch_size", type=int, default=2, help="images of one step")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args, extra = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_rae(folder / "rae")
        num_images = args.batch_size * args.steps + 2
        share = 2 / num_images
        subprocess.run(
            [sys.executable, "scripts/prepare_data.py", "dummy", "--output", folder / "images", "--num_images",
             str(num_images), "--num_classes", "1", "--size", "256", "--splits",
             f"train:{1 - share},validation:{share}"],
            cwd=ROOT, check=True,
        )  # fmt: skip
        settings = {
            **{f"model.{name}": value for name, value in {**SIZES[args.size], **PUBLISHED_HEAD}.items()},
            "model.rae": folder / "rae",
            "latents.stats": "compute",
            "data.path": folder / "images",
            "data.num_workers": 1,
            "train.output_dir": folder / "run",
            "train.global_batch_size": args.batch_size,
            "train.max_steps": args.steps,
            "train.mixed_precision": args.mixed_precision,
            "sampling.num_inference_steps": 2,
            "eval.metrics": "[loss]",
            "eval.num_samples": 2,
            "eval.batch_size": 2,
            "logging.every_steps": 1,
            "logging.num_samples": 1,
            "logging.report_to": "[]",
            "logging.progress_bar": "false",
        }
        flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        start = time.perf_counter()
        subprocess.run([sys.executable, "train_dit.py", *flags, *extra], cwd=ROOT, check=True)
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]

    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == args.steps
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    print(f"\n{'step':>4}{'loss':>10}{'grad_norm':>11}{'s/step':>10}")
    for line in steps:
        rate = args.batch_size / line["images_per_second"]
        print(f"{line['step']:>4}{line['loss']:>10.4f}{line['grad_norm']:>11.4f}{rate:>10.2f}")
    print(f"whole command {seconds:.0f} s, peak resident memory of the largest process {peak:.1f} GiB")
    if args.json:
        result = {"steps": steps, "seconds": seconds, "peak_rss_gib": peak, "torch": torch.__version__, **vars(args)}
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
