"""Two autoencoders compared: their tensors, and what they make of the same images."""

import math

import numpy as np
import torch
from PIL import Image

from modeling_rae import RAEModel
from rae_suite.autoencoders import Autoencoder
from rae_suite.images import center_crop
from rae_suite.position_tables import largest_difference


def compare_tensors(expected: RAEModel, found: RAEModel) -> dict:
    """How many tensors are equal bit for bit. The variance may be off by rounding: diffusers keeps its square root."""
    expected, found = expected.state_dict(), found.state_dict()
    different = []
    for name in sorted(expected.keys() | found.keys()):
        both = name in expected and name in found and expected[name].shape == found[name].shape
        if not both or not torch.equal(expected[name], found[name]):
            rounding = both and torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-9)
            different.append({"name": name, "rounding": name == "latent_var" and rounding})
    return {"number": len(expected), "different": different}


@torch.no_grad()
def compare_images(expected: Autoencoder, found: Autoencoder, size: int) -> dict:
    """Largest differences of latents and of reconstructions, each side decoding its own latents."""
    pixels = sample_images(size)
    latents = expected.encode(pixels), found.encode(pixels)
    samples = expected.decode(latents[0]), found.decode(latents[1])
    report = {"number": len(pixels)}
    for name, (a, b) in (("latents", latents), ("reconstructions", samples)):
        difference = largest_difference(a, b) if a.shape == b.shape else math.inf
        report[name] = {"largest_difference": difference, "largest_value": a.abs().max().item()}
    return report


def sample_images(size: int) -> torch.Tensor:
    """Two photographs that come with scikit-learn, and seeded noise: (3, 3, size, size) in [0, 1]."""
    from sklearn.datasets import load_sample_images  # slow to import

    photographs = [np.asarray(center_crop(Image.fromarray(image), size)) for image in load_sample_images().images]
    pixels = torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2).float() / 255  # (2, 3, S, S)
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return torch.cat([pixels, noise])
