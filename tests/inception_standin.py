"""A small TorchScript network with the interface of the Inception file that clean-fid uses: a test takes seconds.

It has the parts that metrics take of that file: `layers`, a sequence with a child `mixed_6` whose `conv` gives a map of
17 x 17, the 1,008 classes `output`, and TensorFlow 1's resize, which is written here without grid_sample.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class Mixed(nn.Module):
    """Two branches side by side, (B, 32, 17, 17) to (B, 32, 17, 17)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(32, 12, 1), nn.ReLU())
        self.tower = nn.Sequential(nn.Conv2d(32, 20, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x), self.tower(x)], dim=1)


class Inception(nn.Module):
    """Images (B, 3, H, W) in [0, 255], resized inside (bilinear, not antialiased), to features (B, 2048) or the
    probabilities (B, 1008) of classes: random convolutions, ReLU and a spatial mean."""

    def __init__(self):
        super().__init__()
        layers = [
            ("conv", nn.Conv2d(3, 32, 7, stride=6)),  # 49 x 49
            ("relu", nn.ReLU()),
            ("pool0", nn.MaxPool2d(3, stride=3, padding=1)),  # 17 x 17
            ("mixed_6", Mixed()),
            ("conv_1", nn.Conv2d(32, 2048, 3, stride=4)),  # 4 x 4
            ("relu_1", nn.ReLU()),
            ("pool2", nn.AdaptiveAvgPool2d(1)),
        ]
        self.layers = nn.Sequential(OrderedDict(layers))
        self.output = nn.Linear(2048, 1008)
        with torch.no_grad():  # probabilities that differ between images, and a bias that would show
            self.output.weight.mul_(100)
            self.output.bias.normal_(std=3)

    def forward(
        self, x: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        for side in (2, 3):  # output pixel j lies at j * length / 299 of the input
            length = x.shape[side]
            place = torch.arange(299, device=x.device) * (length / 299)
            left = place.long()
            right = (left + 1).clamp(max=length - 1)
            share = (place - left).view(-1, 1) if side == 2 else place - left
            x = x.index_select(side, left) * (1 - share) + x.index_select(side, right) * share
        features = self.layers((x - 128) / 128).flatten(1)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(1)


def save_standin(path: Path) -> None:
    torch.manual_seed(0)
    torch.jit.script(Inception().eval()).save(str(path))
