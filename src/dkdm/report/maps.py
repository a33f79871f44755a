"""Bars and heat maps as inline SVG: colours from the page's style, no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeGuard

from markupsafe import Markup

from dkdm.reading.files import render
from dkdm.report.charts import BOTTOM, LEFT, RIGHT, TOP, linear_ticks

FLOOR = 154  # lower edge of a bar chart, as templates/bars.html.j2 has it
FAINTEST = 0.06  # opacity of the smallest value


def bar_chart(
    title: str,
    counts: Sequence[int],
    end: float,
    x_label: str,
    y_label: str,
    even: float | None = None,
) -> Markup | None:
    """Draw counts in equal ranges from 0 to `end`; None if all are 0.

    even: a height to mark by a dashed line, None is none.
    """
    tallest = max([*counts, even or 0], default=0)
    if not any(counts):
        return None
    width, each = (RIGHT - LEFT) / len(counts), end / len(counts)

    def height(value: float) -> float:
        return round((FLOOR - TOP) * value / tallest, 1)

    bars = [
        (
            round(LEFT + i * width + 0.5, 1),
            round(FLOOR - height(count), 1),
            round(width - 1, 1),
            height(count),
            f"{count:,} between {i * each:,.4g} and {(i + 1) * each:,.4g}",
        )
        for i, count in enumerate(counts)
    ]
    return _svg(
        "bars.html.j2",
        title=title,
        x_label=x_label,
        y_label=y_label,
        bars=bars,
        rules=[(round(FLOOR - height(tick), 1), f"{tick:,g}") for tick in linear_ticks(0, tallest)],
        marks=_marks(0, end),
        even=None if even is None else round(FLOOR - height(even), 1),
    )


def heat_map(
    title: str,
    columns: Sequence[tuple[float, Sequence[float | None]]],
    x_label: str,
    y_label: str,
    words: Callable[[float, int, float], str],
) -> Markup | None:
    """Draw positive values as squares, the darker the larger, on a logarithmic scale.

    columns: x in rising order, and the values from the lowest row to the highest, equally many;
    what no logarithm shows is left out. words: of (x, row, value), as a tooltip. None if there is
    nothing to draw.
    """
    known = [value for _, values in columns for value in values if _positive(value)]
    if not known:
        return None
    low, high = math.log(min(known)), math.log(max(known))
    rows = max(len(values) for _, values in columns)
    width, height = (RIGHT - LEFT) / len(columns), (BOTTOM - TOP) / rows
    cells = [
        (
            round(LEFT + i * width, 2),
            round(BOTTOM - (row + 1) * height, 2),
            round(width + 0.2, 2),
            round(height - 0.5, 2),
            round(FAINTEST + (1 - FAINTEST) * (math.log(value) - low) / (high - low or 1), 3),
            words(x, row, value),
        )
        for i, (x, values) in enumerate(columns)
        for row, value in enumerate(values)
        if _positive(value)
    ]
    return _svg(
        "heat.html.j2",
        title=title,
        x_label=x_label,
        y_label=y_label,
        cells=cells,
        rules=[(round(BOTTOM - s * (BOTTOM - TOP), 1), f"{s:g}") for s in (0, 0.25, 0.5, 0.75, 1)],
        marks=_marks(0, columns[-1][0]),
    )


def _positive(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and value > 0


def _marks(low: float, high: float) -> list[tuple[float, str]]:
    scale = (RIGHT - LEFT) / ((high - low) or 1)
    ticks = linear_ticks(low, high)
    return [(round(LEFT + (tick - low) * scale, 1), f"{tick:,.10g}") for tick in ticks]


def _svg(template: str, **values: object) -> Markup:
    return Markup(render("dkdm.report", template, **values))  # nosec: the template escapes
