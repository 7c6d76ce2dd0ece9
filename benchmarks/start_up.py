"""Time from the launch of train_rae.py to its first step, with 1.3 million image files in 1,000 class folders.

    python benchmarks/start_up.py                                                    (make start-up; 3 minutes)

The files are links to one small image for each class, in a temporary folder (`--folder`: where), so they take no space;
the model is a tiny one. The list of files is not cached the first time and is the second. Also prints the time of
`--help`. `--json FILE` writes the results for machines.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TRAIN_SCRIPT = [sys.executable, str(ROOT / "train_rae.py")]
TINY = {
    "train.max_steps": 1, "train.global_batch_size": 8, "data.num_workers": 2, "model.decoder_hidden_size": 32,
    "model.decoder_num_hidden_layers": 2, "model.decoder_intermediate_size": 64, "perceptual.weight": 0,
    "eval.metrics": "[psnr]", "eval.num_samples": 16, "logging.report_to": "[]", "logging.progress_bar": "false",
}  # fmt: skip


def link_images(folder: Path, classes: int, files: int) -> None:
    """`files` images in each of `classes` folders, and one for evaluation."""
    for number in range(classes):
        train, validation = (folder / split / f"class{number:04d}" for split in ("train", "validation"))
        train.mkdir(parents=True)
        validation.mkdir(parents=True)
        image = train / "00000.png"
        Image.new("RGB", (40, 40), (number % 256, number // 256, 128)).save(image)
        for i in range(1, files):
            os.link(image, train / f"{i:05d}.png")
        os.link(image, validation / "00000.png")


def seconds_to_first_step(images: Path, output: Path, home: Path) -> tuple[float, float]:
    """By the clock, and the processor's seconds of the whole command, which other load on the machine changes less."""
    settings = {**TINY, "data.path": images, "train.output_dir": output}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    start, used = time.time(), processor_seconds()
    environment = {**os.environ, "HF_HOME": str(home)}
    subprocess.run([*TRAIN_SCRIPT, *flags], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return next(line["time"] for line in lines if line["kind"] == "train") - start, processor_seconds() - used


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--files", type=int, default=1300, help="in each class folder")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        link_images(folder / "images", args.classes, args.files)
        for name in ("first", "second"):
            clock, processor = seconds_to_first_step(folder / "images", folder / name, folder / "home")
            result[name] = {"to_first_step": clock, "processor": processor}
            print(f"{name} launch to first step, {args.classes * args.files} files: {clock:.1f} s "
                  f"(processor, whole command: {processor:.1f} s)", flush=True)  # fmt: skip
    start = time.perf_counter()
    subprocess.run([*TRAIN_SCRIPT, "--help"], check=True, stdout=subprocess.DEVNULL)
    result["help"] = time.perf_counter() - start
    print(f"train_rae.py --help: {result['help']:.1f} s")
    if args.json:
        Path(args.json).write_text(json.dumps({**result, **vars(args)}, indent=1))


if __name__ == "__main__":
    main()
