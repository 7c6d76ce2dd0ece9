"""A small TorchScript network with the interface of the Inception file that clean-fid uses: a test takes seconds."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class Layers(nn.Module):
    """Images (B, 3, 299, 299) in [-1, 1] to features (B, 2048, 1, 1): random convolutions, ReLU and a spatial mean."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 7, stride=6)
        self.second = nn.Conv2d(32, 2048, 3, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return x.mean(dim=[2, 3], keepdim=True)


class Inception(nn.Module):
    """Images (B, 3, H, W) in [0, 255], resized inside (bilinear, not antialiased), to features (B, 2048)."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = F.interpolate(x, size=[299, 299], mode="bilinear", align_corners=False)
        features = self.layers(x / 128 - 1).flatten(1)
        return features if return_features else features[:, :1008]


def save_standin(path: Path) -> None:
    torch.manual_seed(0)
    torch.jit.script(Inception().eval()).save(str(path))
