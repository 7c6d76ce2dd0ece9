"""The dinov2_b preset at full size: two optimisation steps with every loss on.

    python benchmarks/real_size.py                 (make real-size; CPU: float32, 2 images, about 5 minutes, 20 GB disk)
    python benchmarks/real_size.py --batch_size 64 --mixed_precision bf16                                    (one GPU)
    python benchmarks/real_size.py --batch_size 512 --mixed_precision bf16 --launch "--config_file FILE"       (8 GPUs,
                                                   FILE of accelerate_configs/, such as fsdp2_8gpu.yaml)

DINOv2-B, the discriminator's ViT-S/8 and VGG16 have random weights, saved locally in the formats of the published
ones, so that everything is loaded as in a real run; the images are synthetic. The run itself is train_rae.py with
configs/dinov2_b.yaml. Prints a table of times, losses and peak memory; `--json FILE` writes it for machines.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig, ViTImageProcessor, ViTModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rae_suite.lpips_vgg16 import random_vgg16_state  # noqa: E402


def save_networks(folder: Path) -> dict:
    """Random networks of the published sizes, as settings of train_rae.py."""
    encoder = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=518, patch_size=14
        )
    )
    encoder.save_pretrained(folder / "dinov2_b")
    ViTImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]).save_pretrained(
        folder / "dinov2_b"
    )
    dino = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, patch_size=8)
    ViTModel(dino).save_pretrained(folder / "dino_s8")
    torch.save(random_vgg16_state(), folder / "vgg16.pth")
    return {
        "model.encoder": folder / "dinov2_b",
        "gan.backbone": folder / "dino_s8",
        "perceptual.vgg_path": folder / "vgg16.pth",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=2, help="images of one step")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--config", default="configs/dinov2_b.yaml", help="preset, of a DINOv2-B encoder")
    parser.add_argument("--launch", metavar="ARGUMENTS", help="start with accelerate launch and these arguments")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = {
            **save_networks(folder),
            "data.path": folder / "images",
            "data.eval_split": "validation",
            "data.num_workers": 1,
            "train.output_dir": folder / "run",
            "train.global_batch_size": args.batch_size,
            "train.gradient_accumulation_steps": 1,
            "train.max_steps": args.steps,
            "train.mixed_precision": args.mixed_precision,
            "gan.update_start_step": 0,
            "gan.start_step": 0,
            "lr_schedule.warmup_steps": 1,
            "gan.lr_schedule.warmup_steps": 1,
            "eval.num_samples": 2,
            "eval.batch_size": 2,
            "logging.every_steps": 1,
            "logging.num_samples": 2,
            "logging.report_to": "[]",
            "logging.progress_bar": "false",
        }
        num_images = args.batch_size * args.steps + 2
        share = 2 / num_images
        subprocess.run(
            [sys.executable, "scripts/prepare_data.py", "dummy", "--output", folder / "images", "--num_images",
             str(num_images), "--num_classes", "1", "--size", "400", "--splits",
             f"train:{1 - share},validation:{share}"],
            cwd=ROOT, check=True,
        )  # fmt: skip
        flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        start = time.perf_counter()
        launcher = [] if args.launch is None else ["-m", "accelerate.commands.launch", *shlex.split(args.launch)]
        command = [sys.executable, *launcher, "train_rae.py", "--config", args.config, *flags]
        subprocess.run(command, cwd=ROOT, check=True)
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]

    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == args.steps
    assert all(line["gan"] != 0 and line["lpips"] > 0 and line["disc_loss"] is not None for line in steps)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    print(f"\n{'step':>4}{'loss':>10}{'recon':>10}{'lpips':>10}{'gan':>10}{'weight':>10}{'disc':>10}{'s/step':>10}")
    for line in steps:
        values = [line[k] for k in ("loss", "recon", "lpips", "gan", "adaptive_weight", "disc_loss")]
        rate = args.batch_size / line["images_per_second"]
        print(f"{line['step']:>4}" + "".join(f"{v:>10.4f}" for v in values) + f"{rate:>10.2f}")
    print(f"whole command {seconds:.0f} s, peak resident memory of the largest process {peak:.1f} GiB")
    if args.json:
        result = {"steps": steps, "seconds": seconds, "peak_rss_gib": peak, "torch": torch.__version__, **vars(args)}
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
