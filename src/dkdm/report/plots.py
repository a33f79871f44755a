"""Vectors and signals as images: bars of components, lines of channels, by Pillow alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

WIDTH, HEIGHT = 160, 104  # pixels of one plot
FINER = 4  # plots are drawn this many times larger and averaged down
MARGIN = 5  # pixels above and below the range
MOST_LINES = 8  # channels to draw
PAPER, RULE = (255, 255, 255), (208, 204, 196)  # RGB in 0..255
COLOURS = (
    (31, 95, 168),
    (201, 79, 24),
    (42, 138, 87),
    (142, 68, 158),
    (180, 138, 20),
    (30, 150, 165),
    (190, 50, 90),
    (105, 105, 105),
)
FIRST, LAST = 0.005, 0.995  # quantiles at the ends of the shown range
MOST_VALUES = 1_000_000  # to take the quantiles of

Range = tuple[float, float]


def is_plotted(samples: Tensor) -> bool:
    """Whether samples [N, ...] are vectors or signals; so are images one pixel high or wide."""
    return samples.ndim in (2, 3) or (samples.ndim == 4 and 1 in samples.shape[2:])


def plots(samples: Tensor, within: Range | None = None, scale: int = 1) -> Tensor:
    """Draw samples, each a plot: vectors [N, C] as bars, signals [N, C, L] as a line a channel.

    within: values at the lower and the upper edge; None is `value_range`. At most the first
    `MOST_LINES` channels are drawn, a long signal through the least and the largest value of each
    column. Values that are not finite are left out. scale: 1, 2 or 4 times as many pixels a side.
    Returns [N, 3, HEIGHT * scale, WIDTH * scale] in [-1, 1].
    """
    samples = _as_signals(samples)
    low, high = within or value_range(samples)
    samples = samples.where(samples.isfinite(), torch.nan)
    drawn = [_plot(values, low, high, scale) for values in samples.numpy()]
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    return pixels / 127.5 - 1


def value_range(samples: Tensor) -> Range:
    """The values that nearly all of samples [N, ...] are between; 0 is always among them."""
    values = samples.detach().float().cpu().flatten()
    values = values[values.isfinite()]
    if not len(values):
        return -1.0, 1.0
    values = values[:: 1 + len(values) // MOST_VALUES]
    low, high = values.quantile(torch.tensor([FIRST, LAST])).tolist()
    low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if high > low else (-1.0, 1.0)


def _as_signals(samples: Tensor) -> Tensor:
    """Vectors [N, C], signals of length 1 among them, or signals [N, C, L]; float32 on the CPU."""
    samples = samples.detach().float().cpu()
    if samples.ndim > 2:
        samples = samples.flatten(2)
    return samples.squeeze(2) if samples.shape[2:] == (1,) else samples


def _plot(values: NDArray[np.float32], low: float, high: float, scale: int) -> NDArray[np.uint8]:
    """One sample [C] or [C, L] as pixels [HEIGHT * scale, WIDTH * scale, 3]."""
    image = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), PAPER)
    pen = ImageDraw.Draw(image)
    heights = _heights(values, low, high)
    zero = float(_heights(np.zeros(1, np.float32), low, high)[0])
    pen.line([(0, zero), (image.width, zero)], fill=RULE, width=FINER)
    if values.ndim == 1:
        _bars(pen, heights, zero)
    else:
        for channel in reversed(range(min(len(values), MOST_LINES))):
            _line(pen, heights[channel], COLOURS[channel])
    pen.rectangle((0, 0, image.width - 1, image.height - 1), outline=RULE, width=FINER)
    return np.asarray(image.resize((WIDTH * scale, HEIGHT * scale), Image.Resampling.BOX))


def _heights(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.float64]:
    """Distances from the upper edge, in fine pixels; values beyond the range lie just outside."""
    share = (values.astype(np.float64) - low) / (high - low)
    inside = HEIGHT - 2 * MARGIN
    return FINER * (MARGIN + (1 - share.clip(-0.05, 1.05)) * inside)


def _bars(pen: ImageDraw.ImageDraw, heights: NDArray[np.float64], zero: float) -> None:
    room = WIDTH * FINER / len(heights)
    for index, height in enumerate(heights):
        if np.isfinite(height):
            left, right = (index + 0.12) * room, max((index + 0.88) * room, index * room + 1)
            top, bottom = sorted((float(height), zero))
            pen.rectangle((left, top, right, max(bottom, top + FINER)), fill=COLOURS[0])


def _line(
    pen: ImageDraw.ImageDraw, heights: NDArray[np.float64], colour: tuple[int, int, int]
) -> None:
    """Draw a line through all finite points; through the extremes of each column if many."""
    if len(heights) > 4 * WIDTH:
        columns = [part[np.isfinite(part)] for part in np.array_split(heights, WIDTH)]
        ends = [(part.min(), part.max()) if len(part) else (np.nan,) * 2 for part in columns]
        heights = np.array(ends).flatten()
    across = np.linspace(2 * FINER, (WIDTH - 2) * FINER, len(heights))
    points = np.stack([across, heights], axis=1)
    gaps = np.flatnonzero(~np.isfinite(heights))
    for piece in np.split(points, gaps):
        piece = piece[np.isfinite(piece).all(axis=1)]
        if len(piece) > 1:
            pen.line([tuple(point) for point in piece], fill=colour, width=2 * FINER, joint="curve")
