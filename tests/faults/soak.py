"""A long run of train_rae.py, tiny and busy: memory, open files, threads and the checkpoints' disk must stay flat.

    python tests/faults/soak.py --minutes 30 --plot docs/soak.png     (make soak)

Every loss is on, two processes load the data; evaluation, sample grids, curves and tensorboard every 20 steps, a
checkpoint every 15. The run is ended with SIGTERM, as a scheduler does. What is compared is the median of the first
and of the last quarter of the steps after WARM_UP. Exit code 1 when memory grows by more than MAX_GROWTH, open files,
threads or processes by anything, or the folders of fixed size by more than MAX_TEXT. metrics.jsonl, samples/ and logs/
are a record and may grow; how fast is printed. `--json FILE` writes all samples.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import psutil

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
WARM_UP = 0.2  # share of the steps in which caches and allocators fill
# MiB of anonymous memory, all processes together (about 3200): what the C library's allocator keeps of freed memory
# moves by some tens of MiB when steps, evaluations and pictures alternate
MAX_GROWTH = 64
MAX_TEXT = 1024  # bytes of a folder of fixed size: numbers in its texts get more digits
SETTINGS = {
    "train.max_steps": 100_000_000,
    "train.global_batch_size": 4,
    "train.cpu_threads": 1,
    "train.save_every_steps": 15,
    "data.num_workers": 2,
    "model.decoder_hidden_size": 32,
    "model.decoder_num_hidden_layers": 2,
    "model.decoder_intermediate_size": 64,
    "gan.update_start_step": 0,
    "gan.start_step": 0,
    "eval.every_steps": 20,
    "eval.raw": "true",
    "logging.every_steps": 10,
    "logging.progress_bar": "false",
}
FLAT = {"open_files": 0, "threads": 0, "processes": 0, "checkpoints": MAX_TEXT, "best": MAX_TEXT}  # beside memory
GROWING = ("metrics.jsonl", "samples", "logs")


def disk(path: Path) -> int:
    """Bytes of a file or of everything below a folder; what vanishes meanwhile is left out."""
    total = 0
    for file in [path, *path.rglob("*")]:
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def sample(run: psutil.Process, run_dir: Path) -> dict:
    """What the run's processes and its folder take now."""
    anonymous = resident = open_files = threads = processes = 0
    for process in [run, *run.children(recursive=True)]:
        try:
            with process.oneshot():
                memory = process.memory_info()
                # resident memory has pages of files (libraries) too: the kernel takes some back when memory is short,
                # which would hide a leak
                anonymous += memory.rss - memory.shared
                resident += memory.rss
                open_files += process.num_fds()
                threads += process.num_threads()
                processes += 1
        except psutil.NoSuchProcess:
            continue
    # a checkpoint that is being written, or that is about to be dropped, comes and goes
    kept = sorted((run_dir / "checkpoints").glob("step-*"))[-2:]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {
        "memory": anonymous / 2**20,
        "resident": resident / 2**20,
        "open_files": open_files,
        "threads": threads,
        "processes": processes,
        "checkpoints": sum(map(disk, kept)),
        "best": disk(run_dir / "best"),
        **{name: disk(run_dir / name) for name in GROWING},
        "step": json.loads(lines[-1])["step"],
    }


def watch(minutes: float, every: float, folder: Path) -> list:
    """Run for `minutes`, look every `every` seconds. Raises RuntimeError when the run fails."""
    prepare = ["scripts/prepare_data.py", "dummy", "--num_images", "64", "--num_classes", "4", "--size", "40"]
    splits = ["--splits", "train:0.75,validation:0.25", "--output", folder / "data"]
    subprocess.run([sys.executable, *prepare, *splits], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    run_dir = folder / "run"
    settings = {**SETTINGS, "data.path": folder / "data", "train.output_dir": run_dir}
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    with (folder / "said.txt").open("w") as said:
        command = [sys.executable, "train_rae.py", *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
    while process.poll() is None and len(list((run_dir / "checkpoints").glob("step-*"))) < 2:
        time.sleep(0.5)
    samples, start = [], time.monotonic()
    while process.poll() is None and time.monotonic() - start < 60 * minutes:
        seconds = time.monotonic() - start
        samples.append({"seconds": round(seconds, 1), **sample(psutil.Process(process.pid), run_dir)})
        time.sleep(every)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 0 or "stopped by SIGTERM" not in (folder / "said.txt").read_text():
        raise RuntimeError((folder / "said.txt").read_text()[-2000:])
    return samples


def growth(samples: list, name: str) -> tuple:
    """Median of the first and of the last quarter after the warm-up, quarters of the steps: what a busy machine makes
    of the time says nothing about the run."""
    first, last = samples[0]["step"], samples[-1]["step"]
    quarter = (1 - WARM_UP) / 4

    def median(start: float, end: float) -> float:
        low, high = (first + share * (last - first) for share in (start, end))
        return statistics.median(line[name] for line in samples if low <= line["step"] <= high)

    return median(WARM_UP, WARM_UP + quarter), median(1 - quarter, 1)


def plot(samples: list, path: Path) -> None:
    steps = [line["step"] for line in samples]
    figure, axes = plt.subplots(1, 4, figsize=(18, 3.8), layout="constrained")
    panels = [
        ("memory in MiB, all processes: anonymous, resident", ("memory", "resident"), 1),
        ("open files, threads, processes", ("open_files", "threads", "processes"), 1),
        ("disk in MB: fixed size", ("checkpoints", "best"), 1e6),
        ("disk in MB: the record", GROWING, 1e6),
    ]
    for axis, (title, names, unit) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(steps, [line[name] / unit for line in samples], label=name)
        axis.axvspan(steps[0], steps[0] + WARM_UP * (steps[-1] - steps[0]), color="0.9", zorder=0)  # warm-up
        axis.set(title=title, xlabel=f"steps, in {samples[-1]['seconds'] / 60:.0f} minutes")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=5, help="seconds between two looks")
    parser.add_argument("--plot", metavar="FILE", help="draw what was seen, as PNG")
    parser.add_argument("--json", metavar="FILE", help="write all samples and the verdict here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        samples = watch(args.minutes, args.every, Path(folder))
    rows = {name: growth(samples, name) for name in ("memory", *FLAT, *GROWING)}
    failed = [name for name, most in {"memory": MAX_GROWTH, **FLAT}.items() if rows[name][1] - rows[name][0] > most]

    steps = samples[-1]["step"] - samples[0]["step"]
    print(f"{steps} steps in {samples[-1]['seconds'] / 60:.1f} minutes, {len(samples)} samples")
    print(f"{'':<34}{'first quarter':>14}{'last quarter':>14}")
    for name in ("memory", *FLAT):
        unit = {"memory": " (anonymous, MiB)", "checkpoints": " (bytes)", "best": " (bytes)"}.get(name, "")
        verdict = "grows" if name in failed else "flat"
        print(f"{name + unit:<34}{rows[name][0]:>14.0f}{rows[name][1]:>14.0f}  {verdict}")
    for name in GROWING:
        rate = (samples[-1][name] - samples[0][name]) / max(1, steps) * 1000
        print(
            f"{name + ' (bytes)':<34}{rows[name][0]:>14.0f}{rows[name][1]:>14.0f}  {rate / 1000:.1f} kB per 1000 steps"
        )
    if args.plot:
        plot(samples, Path(args.plot))
    if args.json:
        Path(args.json).write_text(json.dumps({"failed": failed, "settings": SETTINGS, "samples": samples}, indent=1))
    if failed:
        print(f"error: {', '.join(failed)} grew", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
