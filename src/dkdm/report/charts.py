"""Line charts as inline SVG: logarithmic y, colours from the page's style, no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from dkdm.reading.files import render

Point = tuple[float, float]

LEFT, RIGHT, TOP, BOTTOM = 66, 384, 12, 214  # the plot, as templates/chart.html.j2 has it


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    style: CSS class that gives its colour. markers: whether each point shows, with its value as a
    tooltip. Points that a logarithm cannot show (y <= 0, not finite) are left out.
    """

    name: str
    points: Sequence[Point]
    style: str
    markers: bool = False

    def drawable(self) -> list[Point]:
        """The points that a logarithmic axis can show."""
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y) and y > 0]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    colours: Mapping[str, str] | None = None,
) -> Markup | None:
    """Draw the series over a linear x and a logarithmic y; None if no point can be drawn.

    colours: of each series' style, for a separate file, on white, with a legend; None for a part of
    a page, whose style gives them.
    """
    points = [point for line in series for point in line.drawable()]
    if not points:
        return None
    x_values, y_values = zip(*points, strict=True)
    first, last = min(x_values), max(x_values)
    ticks = log_ticks(min(y_values), max(y_values))

    def place(x: float, y: float) -> Point:
        across = (x - first) / ((last - first) or 1.0)
        up = math.log(y / ticks[0]) / math.log(ticks[-1] / ticks[0])
        left, top = LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)
        return round(left, 1), round(top, 1)

    svg = render(
        "dkdm.report",
        "chart.html.j2",
        title=title,
        lines=[(each, [(*place(x, y), x, y) for x, y in each.drawable()]) for each in series],
        x_label=x_label,
        y_label=y_label,
        marks=[(place(tick, ticks[0])[0], f"{tick:,.10g}") for tick in linear_ticks(first, last)],
        rules=[(place(first, tick)[1], f"{tick:g}") for tick in ticks],
        colours=colours,
    )
    return Markup(svg)  # nosec: the template escapes what it is given


def bin_means(points: Sequence[Point], bins: int) -> list[Point]:
    """Average neighbouring points until at most `bins` are left."""
    size = max(1, math.ceil(len(points) / bins))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers in low..high, 1, 2 or 5 times a power of ten apart; about five."""
    rough = (high - low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers that enclose low..high: powers of ten, on a short range multiples of them too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = [1.0, 2.0, 5.0] if last - first <= 3 else [1.0]
    if high < 3 * low:
        factors = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]
    ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
    below = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    above = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[below : max(above, below + 1) + 1]
