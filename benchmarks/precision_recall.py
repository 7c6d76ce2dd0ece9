"""Time and memory of precision and recall at the published size: 10,000 reference images and 50,000 samples.

    python benchmarks/precision_recall.py                  (3.1 billion distances; 8 minutes on 2 CPU cores)
    python benchmarks/precision_recall.py --scale 0.2      (25 times fewer; their speed tells the whole)

2,048 features, random and not negative as Inception's are; what they are does not change the time.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rae_suite.launch import share_cores  # noqa: E402
from rae_suite.precision_recall import precision_and_recall  # noqa: E402

REFERENCE, SAMPLES, WIDTH = 10_000, 50_000, 2_048


def distances(reference: int, samples: int) -> int:
    """How many are computed: within each set and between them."""
    return reference**2 + samples**2 + reference * samples


def peak_memory() -> float:
    """GiB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of both numbers of images")
    parser.add_argument("--float16", action="store_true", help="distances rounded as in ADM's evaluator")
    args = parser.parse_args()

    accelerator = Accelerator()
    share_cores(accelerator)
    sizes = [round(count * args.scale) for count in (REFERENCE, SAMPLES)]
    generator = torch.Generator().manual_seed(0)
    features = [torch.rand(size, WIDTH, generator=generator).square_().to(accelerator.device) for size in sizes]
    before = peak_memory()
    start = time.perf_counter()
    precision, recall = precision_and_recall(*features, accelerator, args.float16)  # ends on the host
    seconds = time.perf_counter() - start
    whole = seconds * distances(REFERENCE, SAMPLES) / distances(*sizes)
    print(f"{sizes[0]} reference images, {sizes[1]} samples: {seconds:.1f} s on {accelerator.device}, "
          f"{torch.get_num_threads()} threads; precision {precision:.4f}, recall {recall:.4f}")  # fmt: skip
    print(f"{distances(*sizes) / seconds / 1e6:.1f} million distances/s: {REFERENCE} and {SAMPLES} take {whole:.0f} s")
    print(f"peak memory {peak_memory():.2f} GiB, {before:.2f} with the features alone")


if __name__ == "__main__":
    main()
