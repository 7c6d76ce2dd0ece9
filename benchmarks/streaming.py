"""Resident memory while a million images are streamed, with and without workers.

    python benchmarks/streaming.py                                              (1.2 GB of disk, 15 minutes on a CPU)
    python benchmarks/streaming.py --num_images 100000 --workers 2              (a short one)

Writes that many PPM images of 16 px, half of them into parquet files and half into tars, and reads them as a mixture
of both through 4 lanes, decoded and cropped, as train_rae.py does. Prints the resident memory of the process and its
workers after each tenth, and the largest rise from one of them to a later one. Exits with 1 when it is above 50 MB;
`--json FILE` writes the numbers.
"""

import argparse
import io
import itertools
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rae_suite.lanes import StreamLoader  # noqa: E402
from rae_suite.settings import DataConfig  # noqa: E402
from rae_suite.streams import open_stream  # noqa: E402

SHARD_IMAGES = 5000
BATCH, LANES, SIZE = 256, 4, 16
LIMIT = 50  # MB


def write_parquet(path: Path, images: list) -> None:
    column = pa.array([{"bytes": image, "path": None} for image in images])
    pq.write_table(pa.table({"image": column}), path, row_group_size=1000, use_dictionary=False)


def write_tar(path: Path, images: list) -> None:
    with tarfile.open(path, "w") as archive:
        for i, image in enumerate(images):
            member = tarfile.TarInfo(f"{i:06}.ppm")
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))


def write_shards(folder: Path, num_images: int) -> None:
    """Shards of SHARD_IMAGES images, by turns parquet and tar."""
    for i, first in enumerate(range(0, num_images, SHARD_IMAGES)):
        count = min(SHARD_IMAGES, num_images - first)
        pixels = np.random.default_rng(i).integers(0, 256, (count, SIZE * SIZE * 3), np.uint8)
        images = [b"P6 %d %d 255\n%b" % (SIZE, SIZE, image.tobytes()) for image in pixels]
        if i % 2:
            write_tar(folder / f"{i:04}.tar", images)
        else:
            write_parquet(folder / f"{i:04}.parquet", images)


def resident() -> float:
    """Resident memory of this process and its workers, in MB."""
    process = psutil.Process()
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True))) / 1e6


def measure(folder: Path, num_images: int, workers: int) -> dict:
    cfg = DataConfig(
        streaming=True,
        mixture={f"{folder}/*.parquet": 1.0, f"{folder}/*.tar": 1.0},
        steps_per_epoch=num_images // BATCH,
        stream_lanes=LANES,
        num_workers=workers,
        resize_size=SIZE,
    )
    stream = open_stream(cfg, BATCH, 0, Accelerator(cpu=True))
    loader = iter(StreamLoader(stream, cfg, SIZE, 0, 1, 1))
    every = num_images // 10 // BATCH * BATCH
    start, memory = time.perf_counter(), []
    for given in range(BATCH, num_images + 1, BATCH):
        next(loader)
        if given % every == 0:
            memory.append(round(resident(), 1))
            print(f"{workers} workers, {given:>9} images: {memory[-1]:8.1f} MB", flush=True)
    seconds = time.perf_counter() - start
    # between any two: a machine short of memory takes back pages that are not in use
    growth = round(max(later - earlier for earlier, later in itertools.combinations(memory, 2)), 1)
    print(f"{workers} workers: largest rise {growth} MB, {given / seconds:.0f} images/s")
    return {
        "workers": workers,
        "images": given,
        "seconds": round(seconds, 1),
        "resident_mb": memory,
        "growth_mb": growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=1_000_000, help="images that are written and streamed")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of workers, one run each")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), args.num_images)
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        print(f"{args.num_images} images in {len(list(Path(folder).iterdir()))} shards, {size:.0f} MB", flush=True)
        results = [measure(Path(folder), args.num_images, workers) for workers in args.workers]
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    sys.exit(any(result["growth_mb"] > LIMIT for result in results))


if __name__ == "__main__":
    main()
