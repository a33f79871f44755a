"""Line charts as inline SVG: logarithmic y, colours from the page's style, no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

Point = tuple[float, float]

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 12, 46


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


@dataclass(frozen=True)
class Frame:
    """The scales of a chart: x linear over `x`, y logarithmic over `y`."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> Point:
        """The position of a point on the drawing."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = math.log(y / self.y[0]) / math.log(self.y[1] / self.y[0])
        left = LEFT + across * (WIDTH - LEFT - RIGHT)
        return round(left, 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)


def line_chart(title: str, series: Sequence[Series], x_label: str, y_label: str) -> Markup | None:
    """Draw the series over a linear x and a logarithmic y; None if no point can be drawn."""
    points = [point for line in series for point in line.drawable()]
    if not points:
        return None
    x_values, y_values = zip(*points, strict=True)
    ticks = log_ticks(min(y_values), max(y_values))
    frame = Frame((min(x_values), max(x_values)), (ticks[0], ticks[-1]))
    inside = [_rule(frame, tick) for tick in ticks]
    inside += [_mark(frame, tick) for tick in linear_ticks(*frame.x)]
    inside += [_names(x_label, y_label)]
    inside += [_line(line, frame, x_label) for line in series]
    return _SVG.format(WIDTH, HEIGHT, title, Markup("").join(inside))


_SVG = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')


def standalone_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, colours: Mapping[str, str]
) -> str:
    """The chart as the text of an SVG file, on white, with a legend.

    colours: of each series' style. Raises ValueError if no point can be drawn.
    """
    chart = line_chart(title, series, x_label, y_label)
    if chart is None:
        raise ValueError(f"{title}: nothing to draw")
    rules = "".join(
        f".line.{style}{{stroke:{colour}}}circle.{style}{{fill:{colour}}}"
        for style, colour in colours.items()
    )
    style = (
        "text{font:11px sans-serif;fill:#444}.mid{text-anchor:middle}.end{text-anchor:end}"
        f".rule{{stroke:#ddd}}.line{{fill:none;stroke-width:1.5}}{rules}"
    )
    legend = Markup("").join(
        Markup('<text class="end" x="{}" y="{}" style="fill:{}">{}</text>').format(
            WIDTH - RIGHT - 4, TOP + 14 * row, colours[line.style], line.name
        )
        for row, line in enumerate(series, start=1)
    )
    size = f'xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}"'
    opened = f'<style>{style}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    sized = str(chart).replace("<svg ", f"<svg {size} ", 1).replace(">", f">{opened}", 1)
    return sized.replace("</svg>", f"{legend}</svg>\n")


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
    """Numbers that enclose low..high: powers of ten, with 2 and 5 times them on a short range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
    below = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    above = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[below : max(above, below + 1) + 1]


def _rule(frame: Frame, tick: float) -> Markup:
    _, y = frame.place(frame.x[0], tick)
    rule = Markup('<path class="rule" d="M{} {}H{}"/><text class="end" x="{}" y="{}">{:g}</text>')
    return rule.format(LEFT, y, WIDTH - RIGHT, LEFT - 8, y + 4, tick)


def _mark(frame: Frame, tick: float) -> Markup:
    x, _ = frame.place(tick, frame.y[0])
    mark = Markup('<text class="mid" x="{}" y="{}">{}</text>')
    return mark.format(x, HEIGHT - BOTTOM + 18, f"{tick:,.10g}")


def _names(x_label: str, y_label: str) -> Markup:
    below = Markup('<text class="mid name" x="{}" y="{}">{}</text>')
    beside = Markup('<text class="mid name" transform="translate(12 {}) rotate(-90)">{}</text>')
    return below.format((WIDTH + LEFT - RIGHT) / 2, HEIGHT - 8, x_label) + beside.format(
        (HEIGHT - BOTTOM + TOP) / 2, y_label
    )


def _line(line: Series, frame: Frame, x_label: str) -> Markup:
    places = [(frame.place(x, y), x, y) for x, y in line.drawable()]
    path = " ".join(f"{left} {top}" for (left, top), _, _ in places)
    drawn = (
        Markup('<path class="line {}" d="M{}"/>').format(line.style, path) if places else Markup()
    )
    dot = Markup('<circle class="{}" cx="{}" cy="{}" r="3.5"><title>{}</title></circle>')
    for (left, top), x, y in places if line.markers else []:
        drawn += dot.format(line.style, left, top, f"{line.name}: {y:.4g} at {x_label} {x:g}")
    return drawn
