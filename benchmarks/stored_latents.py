"""Images per second of training's latents: read from shards, read from one file an image, and encoded on the fly.

    python benchmarks/stored_latents.py                                   (make stored-latents; 5 minutes, 3 GB of disk)
    python benchmarks/stored_latents.py --folder /scratch --num_images 20000                     (a disk of your own)

Latents have the size of DINOv2-B's at 256 px, 768 x 16 x 16, both flips in bf16; their values are noise. All three go
through the loader of train_dit.py in the order of its steps, with the same batches and workers, up to the float32
latent on the device: from the shards of scripts/encode_latents.py, from .safetensors files of one image each, and from
JPEGs of 500 x 375 pixels through DINOv2-B (random weights, float32, on a GPU where there is one). The files are read
with the system's cache emptied of them ("cold") and again ("warm"). `--workers 0` loads in the process itself, with one
thread, and counts the processor's time, which other work on the machine does not change: images per second of one core,
without the disk's share. `--json FILE` writes the numbers for machines.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from data_pipeline import ROOT, write_photographs
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT))

from modeling_rae import RAEConfig, RAEModel  # noqa: E402
from rae_suite.images import TrainingView  # noqa: E402
from rae_suite.launch import to_device  # noqa: E402
from rae_suite.loaders import TrainBatches, build_loader, train_loader  # noqa: E402
from rae_suite.sources import HeldSource  # noqa: E402
from rae_suite.splits import scan_folder  # noqa: E402
from rae_suite.stored_latents import LatentsOfImages, StoredLatents, collate_latents, latent_loader  # noqa: E402
from scripts.encode_latents import Shard, num_shards, shard_name, shard_rows  # noqa: E402

SHAPE, SIZE = [768, 16, 16], 256
VIEW = TrainingView(SIZE, crop="center", flip=True)


class FileOfAnImage:
    """Stands for StoredLatents: a file for each image, as many trainers keep their latents."""

    unreadable = frozenset()

    def __init__(self, folder: Path):
        self.folder = folder

    def latent(self, index: int, mirrored: bool) -> torch.Tensor:
        return load_file(self.folder / f"{index:08d}.safetensors")["latents"][int(mirrored)]


def write_latents(folder: Path, images: HeldSource, shard_images: int) -> dict:
    """Write the same latents as shards and as files of an image each. Returns what latents.json would say."""
    info = {"shape": SHAPE, "flip": True, "dtype": "bf16", "shard_images": shard_images, "num_images": len(images)}
    (folder / "shards").mkdir()
    (folder / "files").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(num_shards(info)):
        rows = shard_rows(info, number)
        shard = Shard(info, rows, torch.device("cpu"))
        for i in rows:
            latents = torch.randn(1, 2, *SHAPE, generator=generator)
            shard.add({"index": torch.tensor([i]), "label": torch.tensor([0])}, latents)
            save_file({"latents": latents[0].bfloat16()}, folder / "files" / f"{i:08d}.safetensors")
        shard.write(folder / "shards" / shard_name(number), images)
    return info | {"unreadable": []}


def empty_cache(folder: Path) -> None:
    """Have the system forget what it holds of these files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def images_per_second(build: Callable, finish: Callable, args: argparse.Namespace) -> float:
    """Of a loader from its first batch to its last, each with what is done to it."""
    clock = time.perf_counter if args.workers else time.process_time
    batches = iter(build())
    finish(next(batches))  # the workers are up
    start, count = clock(), 0
    for batch in batches:
        finish(batch)
        count += args.batch_size
    return count / (clock() - start)


def batches_of(num_images: int, batch_size: int, steps: int) -> TrainBatches:
    return TrainBatches(num_images, batch_size, batch_size, 0, 1, seed=0, start_step=0, total_steps=steps)


def build_encoder(device: torch.device) -> RAEModel:
    """DINOv2-B with registers at 224 px with random weights, and a decoder of one narrow block."""
    encoder = {"model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12, "image_size": 518}
    encoder.update(num_attention_heads=12, patch_size=14, num_register_tokens=4)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = {f"decoder_{name}": value for name, value in sizes.items()}
    model = RAEModel(RAEConfig(encoder_config=encoder, encoder_input_size=224, decoder_patch_size=16, **decoder))
    return model.eval().to(device)


def stored(folder: Path, info: dict, images: HeldSource, args: argparse.Namespace, device: torch.device) -> dict:
    """{way of reading: images per second}, cold and then warm."""
    steps = len(images) // args.batch_size
    batches, rates = batches_of(len(images), args.batch_size, steps), {}

    def shards() -> torch.utils.data.DataLoader:
        store = StoredLatents(folder / "shards", info)
        return latent_loader(store, images, batches, VIEW, 0, args.workers)

    def files() -> torch.utils.data.DataLoader:
        latents = LatentsOfImages(FileOfAnImage(folder / "files"), images, VIEW, 0, 0)
        return build_loader(latents, batches, collate_latents, args.workers)

    for name, build in (("shards", shards), ("one file an image", files)):
        for temperature in ("cold", "warm"):
            found = []
            for _ in range(args.rounds):
                if temperature == "cold":
                    empty_cache(folder / ("shards" if name == "shards" else "files"))
                found.append(images_per_second(build, lambda b: to_device(b["latents"], device).float(), args))
            rates[f"{name}, {temperature}"] = max(found)
    return rates


@torch.no_grad()
def on_line(folder: Path, args: argparse.Namespace, device: torch.device) -> float:
    write_photographs(folder / "jpegs", 4 * args.batch_size, quality=95)
    source, model = scan_folder(str(folder / "jpegs")), build_encoder(device)
    batches = batches_of(len(source), args.batch_size, args.encoded_batches)

    def finish(batch: dict) -> None:
        pixels = to_device(batch["pixels"], device).float() / 255
        model.encode(pixels, add_noise=False, normalize=False).latent.sum().item()  # waits for the device

    return images_per_second(lambda: train_loader(source, batches, VIEW, 0, args.workers), finish, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_images", type=int, default=1536)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard_images", type=int, default=256)
    parser.add_argument("--encoded_batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="the best counts")
    parser.add_argument("--folder", help="where the files are written (default: the system's for temporary files)")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.workers == 0:
        torch.set_num_threads(1)
    images = HeldSource([(f"image {i}", b"", 0) for i in range(args.num_images)])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        info = write_latents(Path(folder), images, args.shard_images)
        print(f"{args.num_images} images, {2 * 768 * 16 * 16 * 2 * args.num_images / 1e9:.2f} GB, batches of "
              f"{args.batch_size}, {args.workers} workers, torch {version('torch')}, {device.type}")  # fmt: skip
        rates = stored(Path(folder), info, images, args, device)
        rates["encoded on the fly"] = on_line(Path(folder), args, device)
    print(f"{'':<28}{'images/s':>10}{'times':>8}")
    for name, rate in rates.items():
        print(f"{name:<28}{rate:>10.0f}{rate / rates['encoded on the fly']:>8.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps({**vars(args), "images_per_second": rates}, indent=1))


if __name__ == "__main__":
    main()
