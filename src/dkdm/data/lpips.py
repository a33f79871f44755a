"""The perceptual distance LPIPS: how different two images look, by the layers of a classifier.

The layers are built here and weights alone are read. Source: Zhang et al., The Unreasonable
Effectiveness of Deep Features as a Perceptual Metric (2018), eq. 1, with the linear heads v0.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
EPS = 1e-10


@dataclass(frozen=True)
class Backbone:
    """The convolutional part of a classifier.

    - `convolutions`: (outputs, size, stride, padding), each followed by a rectifier; None is a
      maximum over `pool` pixels with a stride of 2.
    - `taps`: the layers whose outputs are compared.
    """

    convolutions: tuple[tuple[int, int, int, int] | None, ...]
    pool: int
    taps: tuple[int, ...]


def _threes(*counts: tuple[int, int]) -> tuple[tuple[int, int, int, int] | None, ...]:
    """Blocks of (convolutions, outputs) with 3 x 3 pixels, a maximum between two blocks."""
    blocks = [[None, *[(outputs, 3, 1, 1)] * count] for count, outputs in counts]
    return tuple(sum(blocks, []))[1:]


BACKBONES: Mapping[str, Backbone] = {
    "alex": Backbone(
        ((64, 11, 4, 2), None, (192, 5, 1, 2), None, *_threes((1, 384)), *_threes((2, 256))),
        pool=3,
        taps=(1, 4, 7, 9, 11),
    ),
    "vgg": Backbone(
        _threes((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)),
        pool=2,
        taps=(3, 8, 15, 22, 29),
    ),
}


class Lpips(nn.Module):
    """LPIPS of pairs of images [N, 3, H, W] in [-1, 1]: [N], 0 for equal images.

    `features` has the layers and names of torchvision's AlexNet and VGG16; `heads` has one
    weight, at least 0, for each channel of each tap.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths, inputs = {}, 3
        for layer in backbone.convolutions:
            if layer is None:
                layers.append(nn.MaxPool2d(backbone.pool, stride=2))
                continue
            outputs, kernel, stride, padding = layer
            layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU()]
            widths[len(layers) - 1] = inputs = outputs
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList([torch.ones(widths[tap]) for tap in backbone.taps])
        self.taps = backbone.taps

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum over taps of the mean over pixels of the weighted squared difference."""
        found = zip(self.heads, self._directions(a), self._directions(b), strict=True)
        apart = [
            torch.einsum("nchw,c->nhw", (x - y).square(), head).mean(dim=(1, 2))
            for head, x, y in found
        ]
        return torch.stack(apart).sum(dim=0)

    def _directions(self, images: Tensor) -> list[Tensor]:
        """The taps' outputs, each pixel's channels of length 1."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        x, taken = (images - mean) / std, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taps:
                taken.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + EPS))
        return taken
