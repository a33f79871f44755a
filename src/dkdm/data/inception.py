"""The Inception network that published distances rest on, without the file's own code.

The layers are built here and only weights are read, so that no file is run; what they compute is
tested against the published TorchScript.
Source: Szegedy et al., Rethinking the Inception Architecture (2015), as the graph of 2015-12-05
that Heusel et al. (2017) measured with: no scale in its normalizations, averages that leave out
the padding, and a maximum in the pooling branch of its last block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZE = 299
FEATURES, SPATIAL, CLASSES = 2048, 2023, 1008
SPATIAL_CHANNELS = 7  # of 17 x 17 pixels each: the 2,023 features of sFID


class Convolution(nn.Sequential):
    """A convolution without bias, its normalization with fixed statistics, and a rectifier."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int | tuple[int, int],
        stride: int = 1,
        pad: bool = True,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        padding = (height // 2, width // 2) if pad else 0
        super().__init__(
            nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3),
            nn.ReLU(inplace=True),
        )


class Parallel(nn.ModuleList):
    """Branches that see the same input; their outputs side by side, as channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, sum of the branches' channels, ...]."""
        return torch.cat([branch(x) for branch in self], dim=1)


def _chain(inputs: int, *convolutions: tuple[int, int | tuple[int, int]]) -> list[nn.Module]:
    """Convolutions of (outputs, size), one after the other."""
    widths = [inputs, *(outputs for outputs, _ in convolutions)]
    return [
        Convolution(before, outputs, size)
        for before, (outputs, size) in zip(widths, convolutions, strict=False)
    ]


def _pooled(inputs: int, outputs: int, pool: nn.Module) -> nn.Module:
    return nn.Sequential(pool, Convolution(inputs, outputs, 1))


def _average() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _block_35(inputs: int, pooled: int) -> nn.Module:
    """A block at 35 x 35 pixels."""
    return Parallel(
        [
            Convolution(inputs, 64, 1),
            nn.Sequential(*_chain(inputs, (48, 1), (64, 5))),
            nn.Sequential(*_chain(inputs, (64, 1), (96, 3), (96, 3))),
            _pooled(inputs, pooled, _average()),
        ]
    )


def _to_17(inputs: int) -> nn.Module:
    return Parallel(
        [
            Convolution(inputs, 384, 3, stride=2, pad=False),
            nn.Sequential(
                *_chain(inputs, (64, 1), (96, 3)), Convolution(96, 96, 3, stride=2, pad=False)
            ),
            nn.MaxPool2d(3, stride=2),
        ]
    )


def _block_17(inner: int) -> nn.Module:
    """A block at 17 x 17 pixels: 7 x 7 convolutions as rows and columns."""
    row, column = (1, 7), (7, 1)
    long = (inner, 1), (inner, column), (inner, row), (inner, column), (192, row)
    return Parallel(
        [
            Convolution(768, 192, 1),
            nn.Sequential(*_chain(768, (inner, 1), (inner, row), (192, column))),
            nn.Sequential(*_chain(768, *long)),
            _pooled(768, 192, _average()),
        ]
    )


def _to_8() -> nn.Module:
    return Parallel(
        [
            nn.Sequential(*_chain(768, (192, 1)), Convolution(192, 320, 3, stride=2, pad=False)),
            nn.Sequential(
                *_chain(768, (192, 1), (192, (1, 7)), (192, (7, 1))),
                Convolution(192, 192, 3, stride=2, pad=False),
            ),
            nn.MaxPool2d(3, stride=2),
        ]
    )


def _block_8(inputs: int, pool: nn.Module) -> nn.Module:
    """A block at 8 x 8 pixels, whose 3 x 3 convolutions end in a row and a column side by side."""

    def both() -> nn.Module:
        return Parallel([Convolution(384, 384, (1, 3)), Convolution(384, 384, (3, 1))])

    return Parallel(
        [
            Convolution(inputs, 320, 1),
            nn.Sequential(Convolution(inputs, 384, 1), both()),
            nn.Sequential(*_chain(inputs, (448, 1), (384, 3)), both()),
            _pooled(inputs, 192, pool),
        ]
    )


class Inception(nn.Module):
    """Give the three outputs that distances and scores use.

    Images are float [N, 3, 299, 299], (pixel - 128) / 128 of pixels in 0..255.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(
            Convolution(3, 32, 3, stride=2, pad=False),
            Convolution(32, 32, 3, pad=False),
            Convolution(32, 64, 3),
            nn.MaxPool2d(3, stride=2),
            Convolution(64, 80, 1),
            Convolution(80, 192, 3, pad=False),
            nn.MaxPool2d(3, stride=2),
            _block_35(192, 32),
            _block_35(256, 64),
            _block_35(288, 64),
            _to_17(288),
            _block_17(128),
            _block_17(160),
        )
        self.middle = _block_17(160)
        self.after = nn.Sequential(
            _block_17(192),
            _to_8(),
            _block_8(1280, _average()),
            _block_8(2048, nn.MaxPool2d(3, stride=1, padding=1)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(FEATURES, CLASSES, bias=False)

    def convolutions(self) -> list[Convolution]:
        """All 94 in the order of their names in the published files."""
        return [module for module in self.modules() if isinstance(module, Convolution)]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [N, 2048], spatial features [N, 2023] and logits [N, 1008].

        The spatial ones are the first channels of the graph's mixed_6/conv, row by row, a pixel's
        channels side by side: the order of ADM's `mu_s` and `sigma_s`.
        """
        x = self.before(images)
        spatial = next(self.middle.children())(x)[:, :SPATIAL_CHANNELS]
        features = self.after(self.middle(x))
        return features, spatial.permute(0, 2, 3, 1).flatten(1), self.head(features)
