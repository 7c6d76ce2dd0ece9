"""Precision and recall of generated images (Kynkaanniemi et al., arXiv 1904.06991), as ADM's evaluator computes them.

Each image of a set claims the ball around its features that reaches to its third nearest neighbour within the set.
Precision is the share of samples that lie in a ball of the reference, recall the share of reference images that lie in
a ball of the samples. Distances are squared and made block by block, so that memory does not grow with the sets.
"""

import torch
from accelerate import Accelerator

from rae_suite.launch import without_tf32

NEIGHBOURS = 3
BLOCK = 2_500  # rows and columns of a block of distances
FLOAT16_BLOCK = 10_000  # ADM's: whether a block falls back to float32 depends on what is in it


def squared_distances(a: torch.Tensor, b: torch.Tensor, float16: bool = False) -> torch.Tensor:
    """|a_i - b_j|^2, float32 (N, M), of rows (N, D) and (M, D), as |a|^2 - 2ab + |b|^2, not below 0.

    With `float16`, features, products, norms and sums are rounded to float16 as in ADM's evaluator, unless one of the
    block's values is then not finite.
    """
    rounded = torch.float16 if float16 else torch.float32
    a_rounded, b_rounded = a.to(rounded), b.to(rounded)
    with without_tf32():  # products are summed in float32, as a GPU does it for float16
        distances = (a_rounded.float() @ b_rounded.float().T).to(rounded).mul_(-2)
    distances.add_(a_rounded.square().sum(1)[:, None]).add_(b_rounded.square().sum(1)).clamp_(min=0)
    if float16 and not distances.isfinite().all():
        return squared_distances(a, b)
    return distances.float()


def starts(length: int, block: int, rank: int = 0, world_size: int = 1) -> range:
    """Where the blocks of this process begin: rank, rank + world_size, ..."""
    return range(rank * block, length, world_size * block)


def squared_radii(features: torch.Tensor, accelerator: Accelerator, float16: bool = False) -> torch.Tensor:
    """The squared distance of each row of (N, D) to its third nearest other row, float32 (N,); the row itself counts as
    the nearest, and stands at distance 0 beside rows that equal it. The blocks are shared out among the processes."""
    block = FLOAT16_BLOCK if float16 else BLOCK
    radii = features.new_zeros(len(features))
    for start in starts(len(features), block, accelerator.process_index, accelerator.num_processes):
        rows = features[start : start + block]
        nearest = rows.new_full((len(rows), NEIGHBOURS + 1), torch.inf)
        for other in starts(len(features), block):
            found = squared_distances(rows, features[other : other + block], float16)
            nearest = torch.cat([nearest, found], dim=1).topk(NEIGHBOURS + 1, dim=1, largest=False).values
        radii[start : start + block] = nearest[:, -1]
    return radii if accelerator.num_processes == 1 else accelerator.reduce(radii, "sum")  # 0 where others computed


def precision_and_recall(
    reference: torch.Tensor, samples: torch.Tensor, accelerator: Accelerator, float16: bool = False
) -> tuple:
    """(precision, recall) of the features of samples (N, D), float32, to those of a reference (M, D), on the same
    device.

    Every process calls this with the same features. Both sets need NEIGHBOURS + 1 images.
    """
    block = FLOAT16_BLOCK if float16 else BLOCK
    radii, sample_radii = (squared_radii(features, accelerator, float16) for features in (reference, samples))
    in_reference, in_samples = radii.new_zeros(len(samples)), radii.new_zeros(len(reference))
    for start in starts(len(reference), block, accelerator.process_index, accelerator.num_processes):
        stop = start + block
        for other in starts(len(samples), block):
            end = other + block
            found = squared_distances(reference[start:stop], samples[other:end], float16)
            in_samples[start:stop] += (found <= sample_radii[other:end]).any(1)
            in_reference[other:end] += (found <= radii[start:stop, None]).any(0)
    if accelerator.num_processes > 1:
        in_samples, in_reference = (accelerator.reduce(hits, "sum") for hits in (in_samples, in_reference))
    return (in_reference > 0).double().mean().item(), (in_samples > 0).double().mean().item()
