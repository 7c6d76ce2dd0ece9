"""Images per second of the training pipeline: JPEG decoding, resize and crop, next to torchvision's ImageFolder.

    python benchmarks/data_pipeline.py                                              (make data-pipeline; 1 minute)

The files are 500 x 375 JPEGs cut from scikit-learn's two sample photographs. Baseline: ImageFolder with Resize(384),
RandomCrop(256) and ToTensor. Resize interpolates bilinearly by default, which is cheaper than the bicubic filter that
training asks for, and ToTensor converts to float, which training leaves to the device: the table has the baseline with
and without each. First one process with one thread, all pipelines in turn in each round, by the processor's time; then
DataLoaders with two workers, by the clock. The best rounds are compared: what else the machine does only takes away.
`--json FILE` writes them for machines.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, PILToTensor, RandomCrop, Resize, ToTensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rae_suite.images import TrainingView  # noqa: E402
from rae_suite.loaders import TrainBatches, TrainImages, train_loader  # noqa: E402
from rae_suite.splits import scan_folder  # noqa: E402

IMAGE_SIZE, RESIZE_SIZE, BATCH_SIZE = 256, 384, 32


def write_photographs(folder: Path, count: int, quality: int) -> float:
    """Write `count` JPEGs of 500 x 375 pixels, each another part of a photograph; returns their mean size in bytes."""
    generator = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427
    folder.mkdir(parents=True)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        width = int(generator.integers(500, 570))
        height = width * 3 // 4
        left = int(generator.integers(photograph.width - width + 1))
        top = int(generator.integers(photograph.height - height + 1))
        part = photograph.resize((500, 375), Image.Resampling.LANCZOS, (left, top, left + width, top + height))
        part.save(folder / f"{i:05d}.jpg", quality=quality)
    return sum(file.stat().st_size for file in folder.iterdir()) / count


def baseline(folder: Path, interpolation: InterpolationMode, to_tensor: Callable) -> ImageFolder:
    return ImageFolder(folder, Compose([Resize(RESIZE_SIZE, interpolation), RandomCrop(IMAGE_SIZE), to_tensor]))


def single_process(folder: Path, rounds: int) -> dict:
    """{pipeline: images per second of one core, of each round}, in this process with one thread."""
    images = TrainImages(scan_folder(str(folder), ["photographs"]), TrainingView(IMAGE_SIZE, RESIZE_SIZE))
    bilinear, bicubic = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
    folders = {
        "ImageFolder, bilinear, ToTensor": baseline(folder, bilinear, ToTensor()),
        "ImageFolder, bilinear, 8 bit": baseline(folder, bilinear, PILToTensor()),
        "ImageFolder, bicubic, ToTensor": baseline(folder, bicubic, ToTensor()),
        "ImageFolder, bicubic, 8 bit": baseline(folder, bicubic, PILToTensor()),
    }
    pipelines = {
        **{name: images_of.__getitem__ for name, images_of in folders.items()},
        "training, bicubic, 8 bit": lambda i: images[0, i],
        "training, bicubic, as float": lambda i: images[0, i]["pixels"].float() / 255,
    }
    rates = {name: [] for name in pipelines}
    for _ in range(rounds):
        for name, load in pipelines.items():
            start = time.process_time()  # without what others on the machine take
            for i in range(len(images)):
                load(i)
            rates[name].append(len(images) / (time.process_time() - start))
    return rates


def loaders(folder: Path, rounds: int, workers: int) -> dict:
    """{pipeline: images per second of each round} of DataLoaders, from their first batch to their last."""
    source = scan_folder(str(folder), ["photographs"])
    steps = 4 * len(source) // BATCH_SIZE

    def image_folder() -> DataLoader:
        images = baseline(folder, InterpolationMode.BILINEAR, ToTensor())
        order = torch.utils.data.RandomSampler(images, num_samples=steps * BATCH_SIZE)
        return DataLoader(images, BATCH_SIZE, sampler=order, num_workers=workers)

    def training() -> DataLoader:
        batches = TrainBatches(len(source), BATCH_SIZE, BATCH_SIZE, 0, 1, seed=0, start_step=0, total_steps=steps)
        return train_loader(source, batches, TrainingView(IMAGE_SIZE, RESIZE_SIZE), num_workers=workers)

    builds = {
        f"ImageFolder, bilinear, ToTensor, {workers} workers": image_folder,
        f"training, bicubic, 8 bit, {workers} workers": training,
    }
    rates = {name: [] for name in builds}
    for _ in range(rounds):
        for name, build in builds.items():
            batches = iter(build())
            next(batches)  # the workers are up
            start = time.perf_counter()
            count = sum(1 for _ in batches)
            rates[name].append(count * BATCH_SIZE / (time.perf_counter() - start))
    return rates


def show(rates: dict) -> dict:
    """Print a table of the best rates, the first being what the others are compared with; returns it."""
    base = max(next(iter(rates.values())))
    table = {name: {"images_per_second": max(rounds), "times": max(rounds) / base} for name, rounds in rates.items()}
    for name, row in table.items():
        print(f"{name:<46}{row['images_per_second']:>10.0f}{row['times']:>10.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG files")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("torch", "torchvision", "pillow")}
    with tempfile.TemporaryDirectory() as folder:
        size = write_photographs(Path(folder) / "photographs", args.num_images, args.quality)
        print(f"{args.num_images} JPEGs of 500 x 375 pixels, quality {args.quality}, {size / 1000:.0f} kB on average; "
              + ", ".join(f"{name} {number}" for name, number in versions.items()))  # fmt: skip
        print(f"{'':<46}{'images/s':>10}{'times':>10}")
        table = show(single_process(Path(folder), args.rounds))
        table.update(show(loaders(Path(folder), args.rounds, args.workers)))
    if args.json:
        result = {**vars(args), "mean_bytes": size, "versions": versions, "pipelines": table}
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
