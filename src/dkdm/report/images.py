"""Single samples as images inside a page, and pairs of them that a slider wipes between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dkdm.report.grids import as_images, png_data_uri, to_uint8
from dkdm.report.plots import is_plotted, plots

LARGEST_IMAGE = 128  # pixels; larger samples are averaged down for the page
PLOT_SCALE, PLOT_COLOURS = 2, 64  # twice as many pixels a side as in rows; a third of the bytes
SHARP = 96  # pixels; smaller images are enlarged without blurring


@dataclass(frozen=True)
class PageImage:
    """An image in a page. src: its `data:` address; alt: what it shows, in words."""

    src: str
    width: int
    height: int
    alt: str

    @property
    def is_smooth(self) -> bool:
        """Whether it may be blurred where it is enlarged: its pixels are not to be seen."""
        return max(self.width, self.height) >= SHARP


@dataclass(frozen=True)
class Pair:
    """Two images of one size from the same noise, under one name, which may be empty."""

    name: str
    first: PageImage
    second: PageImage


def reduced(samples: Tensor, largest: int = LARGEST_IMAGE) -> Tensor:
    """Average large images and video frames [N, ...] down; leave vectors and signals alone."""
    images = None if is_plotted(samples) else as_images(samples)
    if images is None:
        return samples
    return avg_pool2d(images.float(), math.ceil(max(images.shape[2:]) / largest))


def page_images(samples: Tensor, alts: Sequence[str]) -> list[PageImage]:
    """An image of each of the samples [N, ...]: images in [-1, 1], videos, vectors or signals.

    alts: what each shows, N of them. Vectors and signals are drawn over one range.
    """
    plotted = is_plotted(samples)
    shown = plots(samples, scale=PLOT_SCALE) if plotted else reduced(samples)
    images = [_image(pixels) for pixels in to_uint8(shown)]
    if plotted:
        images = [each.quantize(PLOT_COLOURS, dither=Image.Dither.NONE) for each in images]
    return [
        PageImage(png_data_uri(image), image.width, image.height, alt)
        for image, alt in zip(images, alts, strict=True)
    ]


def pairs(
    first: Tensor,
    second: Tensor,
    names: Sequence[str],
    who: tuple[str, str] = ("teacher", "student"),
) -> list[Pair]:
    """Samples [N, ...] of two models, row by row. names: of each row; who: drew them."""
    alts = [f"{name or f'Sample {i + 1}'}: {each}" for each in who for i, name in enumerate(names)]
    images = page_images(torch.cat([first, second]), alts)
    count = len(first)
    return [Pair(*each) for each in zip(names, images[:count], images[count:], strict=True)]


def _image(pixels: Any) -> Image.Image:
    """Pixels [H, W, 1 or 3] as an image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
