"""The Inception network of 2015 that FID is defined on: its file, and the features and logits that metrics take of it.

The file is NVIDIA's TorchScript translation of TensorFlow's graph, the one that clean-fid fetches. It takes pixels in
[0, 255] of any size, resizes them as TensorFlow 1 did, and gives 2,048 pooled features, or probabilities of 1,008
classes.
"""

import hashlib
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from cleanfid.downloads_helper import inception_url
from torch import nn
from torch.nn import functional as F

from rae_suite.downloads import fetched_file
from rae_suite.errors import ConfigError
from rae_suite.launch import without_tf32

INCEPTION_WIDTH = 2048
SIDE = 299  # pixels of the resized image
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17  # of the map that sFID looks at
SPATIAL_WIDTH = SPATIAL_CHANNELS * SPATIAL_SIDE**2  # 2,023
TOLERANCE = 1e-3  # of the largest feature, between two ways of computing the same: rounding is about 1e-5
EXPECTED = f"expected the TorchScript network {Path(inception_url).name}"


def load_inception(path: Optional[str], key: str, device: torch.device) -> tuple:
    """(clean-fid's wrapper of the network on `device`, sha256 of its file). `path`: local copy; none: torch.hub's
    folder, else downloaded. Raises ConfigError, about the setting `key`, when the file cannot be had or is of another
    kind."""
    from cleanfid.inception_torchscript import InceptionV3W  # slow to import

    file = fetched_file(inception_url, key, "FID", path)
    # clean-fid's class takes a folder and knows one file name
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        Path(folder, Path(inception_url).name).symlink_to(file.resolve())
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.load is deprecated, and what the file is made for
        try:
            network = InceptionV3W(folder, download=False).to(device).eval().requires_grad_(False)
        except (RuntimeError, AttributeError) as error:
            reason, again = str(error).splitlines()[0], "" if path else "; delete the file to have it downloaded again"
            raise ConfigError(f"{key}: {file} cannot be used ({reason}), {EXPECTED}{again}") from error
    try:
        for network.resize_inside in (False, True):
            network(torch.zeros(1, 3, SIDE, SIDE, device=device))
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{key}: {file} does not give {INCEPTION_WIDTH} features ({reason}), {EXPECTED}") from error
    return network, hashlib.sha256(file.read_bytes()).hexdigest()


def tensorflow_resize(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) as (B, 3, 299, 299): TensorFlow 1's bilinear resize, in which output pixel j is read at
    j * H / 299, without a shift by half a pixel and without antialiasing, as the network does it inside."""
    height, width = images.shape[2:]
    shift = torch.eye(2, 3, device=images.device)
    # half a pixel of the input less half a pixel of the output, where the side is 2 long
    shift[0, 2], shift[1, 2] = 1 / width - 1 / SIDE, 1 / height - 1 / SIDE
    places = F.affine_grid(shift.expand(len(images), 2, 3), [len(images), 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images, places, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class InceptionParts:
    """The network, part by part. Hooks do not work on a TorchScript network, so its children are run one by one."""

    network: nn.Module
    digest: str  # of its file

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> tuple:
        """Images, uint8 (B, 3, H, W) on the network's device, to pooled features (B, 2048) and spatial ones (B, 2023).

        The spatial ones are the first 7 channels of `mixed_6/conv`, 17 x 17, in the order row, column, channel, as
        ADM's evaluator flattens them.
        """
        with without_tf32():
            x, spatial = (tensorflow_resize(images.float()) - 128) / 128, None
            for name, layer in self.network.layers.named_children():
                if name == "mixed_6":
                    spatial = layer.conv(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
                x = layer(x)
        return x.reshape(-1, INCEPTION_WIDTH), spatial

    @torch.no_grad()
    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, 2048) to logits (B, 1008) without the layer's bias: the Inception Score is defined so."""
        with without_tf32():
            return F.linear(pooled, self.network.output.weight)


def load_inception_parts(path: Optional[str], key: str, device: torch.device) -> InceptionParts:
    """The network and its parts. Arguments and errors as of `load_inception`; it also raises ConfigError when the
    parts, run one by one, do not give what the whole network gives of the same images."""
    wrapper, digest = load_inception(path, key, device)
    parts = InceptionParts(wrapper.base, digest)
    # smooth and not square, with values over the whole range: a wrong resize shows
    noise = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    images = (255 * F.interpolate(noise, size=(60, 44), mode="bicubic").clamp(0, 1)).to(torch.uint8).to(device)
    try:
        with torch.no_grad():
            pooled, spatial = parts.features(images)
            found = {"features": pooled, "probabilities": parts.logits(pooled).softmax(1)}
            own = {
                "features": wrapper.base(images, return_features=True),
                "probabilities": wrapper.base(images, no_output_bias=True),
            }
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{key}: the network's parts are not where they should be ({reason}), {EXPECTED}") from error
    width = None if spatial is None else spatial.shape[1]
    if width != SPATIAL_WIDTH:
        raise ConfigError(
            f"{key}: expected {SPATIAL_WIDTH} values of the network's mixed_6.conv, got {width}, {EXPECTED}"
        )
    for what, values in own.items():
        off = (values.reshape_as(found[what]) - found[what]).abs().max() / values.abs().max()
        if not off < TOLERANCE:
            raise ConfigError(
                f"{key}: the network's parts, run one by one, give other {what} than the whole network "
                f"({off:.1e} of the largest off), {EXPECTED}"
            )
    return parts
