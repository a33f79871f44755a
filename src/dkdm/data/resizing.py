"""How images are rounded and brought to the size that a network sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from dkdm.config import Resize

RESIZES: Sequence[str] = get_args(Resize)


def eight_bits(images: Tensor) -> Tensor:
    """Whole pixels in 0..255, float32 [N, 3, H, W], of grey or RGB images in [-1, 1]."""
    pixels = (images.float() * 127.5 + 127.5).round().clamp(0, 255)
    return pixels.expand(-1, 3, -1, -1)


def resized(pixels: Tensor, how: str, height: int, width: int) -> Tensor:
    """Bring pixels [N, C, H, W] in 0..255 to height x width, as float32.

    how: "bilinear" takes pixel centres at half integers and does not smooth (pytorch-fid);
    "tensorflow" is bilinear with corners at integers, which the first FID code and ADM's tables
    use; "bicubic" smooths when it makes smaller, as PIL does (clean-fid), and may leave 0..255.
    """
    pixels = pixels.float()
    if how == "tensorflow":
        before, after = pixels.shape[-2:], (height, width)
        rows, columns = (_corner_bilinear(*n).to(pixels) for n in zip(before, after, strict=True))
        return rows @ pixels @ columns.T
    antialias = how == "bicubic"
    return functional.interpolate(
        pixels, (height, width), mode=how, align_corners=False, antialias=antialias
    )


def _corner_bilinear(before: int, after: int) -> Tensor:
    """The matrix [after, before] that interpolates between pixels at 0, 1, ..., before - 1."""
    at = torch.arange(after, dtype=torch.float64) * before / after
    low = at.long().clamp(max=before - 1)
    high, share = (low + 1).clamp(max=before - 1), at - low
    every = torch.eye(before, dtype=torch.float64)
    return (1 - share)[:, None] * every[low] + share[:, None] * every[high]
