"""Samples as images to look at: 8-bit pixels, grids, two models beside each other, PNG."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dkdm.report.plots import is_plotted, plots, value_range

# Colours of a difference of 0, 1/4, 1/2, 3/4 and all of the range, RGB in 0..255.
HEAT = ((0, 0, 0), (122, 24, 60), (226, 77, 41), (250, 170, 60), (255, 252, 220))


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Turn images [N, C, H, W] in [-1, 1] into pixels [N, H, W, 1 or 3] in 0..255.

    Values outside are clamped, NaN is black. One or two channels give the first one in grey; more
    than three, as latents have, give the first three in colour.
    """
    pixels = (_shown(images).nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).numpy()


def as_images(samples: Tensor) -> Tensor | None:
    """Images [N, C, H, W] in about [-1, 1] that show samples [N, ...].

    These are the images themselves, the middle frames of videos, and plots of vectors and signals;
    None for samples of more dimensions.
    """
    if is_plotted(samples):
        return plots(samples)
    if samples.ndim == 5:
        return samples[:, :, samples.shape[2] // 2]
    return samples if samples.ndim == 4 else None


def sample_grid(samples: Tensor, columns: int) -> Image.Image | None:
    """Lay samples [N, ...] out in rows of `columns`; None if they cannot be shown."""
    images = as_images(samples)
    if images is None:
        return None
    return grid(images, columns, scale=1 if is_plotted(samples) else 4)


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 1) -> Image.Image:
    """Lay images [N, C, H, W] in [-1, 1] out in rows of `columns`, the gaps transparent.

    scale: side of the square each pixel becomes. gap: pixels between images, before scaling.
    Returns an image of mode LA or RGBA.
    """
    pixels = to_uint8(images)
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    columns = min(columns, count)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels + 1)
    canvas = np.zeros(shape, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width, :channels] = image
        canvas[top : top + height, left : left + width, channels] = 255
    return Image.fromarray(canvas.repeat(scale, axis=0).repeat(scale, axis=1))


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Colour |a - b| of images [N, C, H, W] in [-1, 1], averaged over the shown channels.

    Black is equal, white the whole range; the colours between are `HEAT`. Returns [N, 3, H, W] in
    [-1, 1].
    """
    apart = np.abs(to_uint8(a).astype(np.float32) - to_uint8(b)).mean(axis=3) / 255
    stops = np.linspace(0, 1, len(HEAT))
    colours = [np.interp(apart, stops, channel) for channel in zip(*HEAT, strict=True)]
    return torch.from_numpy(np.stack(colours, axis=1)).float() / 127.5 - 1


def comparison_strip(teacher: Tensor, student: Tensor, scale: int = 1, gap: int = 1) -> Image.Image:
    """Put three rows under each other: teacher, student, and the colour of their difference.

    teacher, student: [N, C, H, W] in [-1, 1], one column a sample; or vectors and signals, all
    plotted over one range, and the third row student - teacher. Returns an RGBA image.
    """
    if is_plotted(teacher):
        low, high = value_range(torch.cat([teacher, student]))
        half = (high - low) / 2
        rows = [plots(samples, (low, high)) for samples in (teacher, student)]
        rows.append(plots(student - teacher, (-half, half)))
    else:
        colour = [_shown(images).expand(-1, 3, -1, -1) for images in (teacher, student)]
        rows = [*colour, difference(teacher, student)]
    return grid(torch.cat(rows), len(teacher), scale, gap)


def _shown(images: Tensor) -> Tensor:
    """The channels that are shown: three, or the first."""
    return images[:, : 3 if images.shape[1] >= 3 else 1].detach().float().cpu()


def png_data_uri(image: Image.Image) -> str:
    """Encode an image as the `data:` address of a PNG, for a page without other files."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
