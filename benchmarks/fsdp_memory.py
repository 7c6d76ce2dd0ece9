"""Memory of one process with DDP and with FSDP2: a few steps of train_rae.py on several CPU processes.

    python benchmarks/fsdp_memory.py          (2 processes, 57M parameters: 4 GB memory, 2 minutes on 2 cores)

digits_tiny's random encoder with a decoder of ViT-B's width, L1 alone, 32 px images, so that weights, gradients, Adam's
state and the moving average are nearly all of it. Prints each process's peak resident memory; `--json FILE` writes it
for machines. The first process's peak is that of writing checkpoints, for which it gathers whole tensors.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = {"DDP": ("--multi_gpu",), "FSDP2": ("--config_file", "accelerate_configs/fsdp2_8gpu.yaml")}


def peak_memory(command: list) -> list:
    """Peak resident memory in GiB of each training process that `command`, an accelerate launch, starts, by rank.
    Raises CalledProcessError."""
    peaks = {}
    # glibc keeps what was freed, up to blocks of 32 MB, unless the threshold is set: peaks would be of fragmentation
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "MALLOC_MMAP_THRESHOLD_": "65536"}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment)
    while launcher.poll() is None:
        for child in psutil.Process(launcher.pid).children():
            with suppress(psutil.Error, OSError, KeyError):  # it has just begun, or ended
                rank = int(child.environ()["RANK"])
                if peak := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text()):
                    peaks[rank] = int(peak[1]) / 2**20  # from KiB
        time.sleep(0.1)
    if launcher.returncode:
        raise subprocess.CalledProcessError(launcher.returncode, command)
    return [peaks[rank] for rank in sorted(peaks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=8, help="of the decoder, 7.1M parameters each")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()

    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = {
            "data.path": folder / "images",
            "train.global_batch_size": args.processes,
            "train.max_steps": 3,
            "model.decoder_hidden_size": 768,
            "model.decoder_num_hidden_layers": args.blocks,
            "model.decoder_num_attention_heads": 12,
            "model.decoder_intermediate_size": 3072,
            "perceptual.weight": 0,
            "gan.weight": 0,
            "eval.metrics": "[psnr]",
            "data.num_workers": 0,
            "logging.report_to": "[]",
            "logging.progress_bar": "false",
        }
        subprocess.run(
            [sys.executable, "scripts/prepare_data.py", "dummy", "--output", folder / "images", "--num_images", "32",
             "--num_classes", "4", "--size", "40", "--splits", "train:0.75,validation:0.25"],
            cwd=ROOT, check=True,
        )  # fmt: skip
        for name, how in DISTRIBUTION.items():
            flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
            launch = ["-m", "accelerate.commands.launch", *how, "--num_processes", str(args.processes),
                      "--mixed_precision", "no", "--main_process_port", "0"]  # fmt: skip
            run = ["train_rae.py", "--config", "configs/digits_tiny.yaml", "--train.output_dir", str(folder / name)]
            results[name] = peak_memory([sys.executable, *launch, *run, *flags])
    print("peak resident memory in GiB, by process")
    for name, peaks in results.items():
        print(f"{name:<8}" + "".join(f"{peak:>8.2f}" for peak in peaks))
    if args.json:
        Path(args.json).write_text(json.dumps({"peak_rss_gib": results, **vars(args)}, indent=1))


if __name__ == "__main__":
    main()
