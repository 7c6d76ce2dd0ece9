"""LPIPS on VGG16, with pretrained or random weights."""

import warnings
import zlib
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rae_suite.downloads import fetched_file
from rae_suite.files import read_tensors


def random_vgg16_state() -> dict:
    """An untrained VGG16 (`features.*`, 13 convolutions) that is the same on every machine: zero biases, weights of
    variance 2 / fan-in from a generator seeded with the layer's name."""
    channels = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    positions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions among torchvision's features
    state, fan_in = {}, 3
    for i, (position, width) in enumerate(zip(positions, channels, strict=True)):
        random = np.random.RandomState(zlib.crc32(f"vgg16.conv{i}".encode()))
        weight = random.standard_normal((width, fan_in, 3, 3)) * np.sqrt(2 / (9 * fan_in))
        state[f"features.{position}.weight"] = torch.from_numpy(weight.astype(np.float32))
        state[f"features.{position}.bias"] = torch.zeros(width)
        fan_in = width
    return state


class _NoRandomWeights(TorchFunctionMode):
    """New layers are left as the memory was: torchvision's VGG16 draws 138 million values, 120 million of them for a
    classifier that LPIPS drops, and all others are replaced."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _pretrained_vgg16_file(path: Optional[str], setting: str) -> Path:
    """torchvision's VGG16: the local copy `path`, or as `fetched_file` finds it."""
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    return fetched_file(url, setting, "LPIPS", path, hash_prefix=Path(url).stem.split("-")[-1])


def build_lpips(
    weights: str = "pretrained", vgg_path: Optional[str] = None, setting: str = "perceptual.vgg_path"
) -> nn.Module:
    """LPIPS 0.1 on VGG16 (arXiv 1801.03924) from the lpips package, frozen, in eval mode.

    It is called on two batches (B, 3, H, W) in [-1, 1] and gives (B, 1, 1, 1). The linear heads come with the package.

    Args:
        weights: "pretrained" (torchvision's VGG16, from `vgg_path` or torch.hub's folder, else downloaded) or "random".
        vgg_path: local copy of torchvision's vgg16-397923af.pth.
        setting: name of the setting that gave `vgg_path`, for errors.

    Raises:
        ConfigError: the weights cannot be had; the message names file and setting.
        ValueError: the file holds something else.
    """
    import lpips  # slow to import

    if weights == "random":
        file, state = None, random_vgg16_state()
    else:
        file = _pretrained_vgg16_file(vgg_path, setting)
        state = read_tensors(file, setting)
        if "features.0.weight" not in state:
            raise ValueError(f"{setting}: {file} is not torchvision's VGG16, it has no 'features.0.weight'")
    with warnings.catch_warnings(), _NoRandomWeights():  # lpips still passes torchvision's old `pretrained` argument
        warnings.simplefilter("ignore", UserWarning)
        model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    own = {name: name.split(".")[-2:] for name in model.net.state_dict()}  # slice1.0.weight -> features.0.weight
    try:
        model.net.load_state_dict({name: state[f"features.{i}.{kind}"] for name, (i, kind) in own.items()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{setting}: {file} is not torchvision's VGG16 ({error})") from None
    return model.requires_grad_(False).eval()
