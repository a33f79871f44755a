"""The curves of a run: loss over steps, loss and gap over noise levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from dkdm.errors import UsageError
from dkdm.evaluation.numbers import number
from dkdm.evaluation.validation import watched
from dkdm.reading.fields import is_number
from dkdm.report.charts import Point, Series, bin_means, line_chart
from dkdm.report.maps import heat_map
from dkdm.report.run import Run

MAX_RANGES = 1000
MAX_COLUMNS = 40  # of the map of levels over time
ROUNDING = 1e-12  # a mean squared gap below it, as a share of the output, is float32 arithmetic


def charts(run: Run) -> dict[str, Markup | None]:
    """The curves; None for one without points."""
    loss = [(entry["step"], entry["loss"]) for entry in run.metrics if is_number(entry.get("loss"))]
    tenth = max(1, len(run.metrics) // 10)
    early, late = level_means(run.metrics[:tenth]), level_means(run.metrics[-tenth:])
    found = run.comparison
    gaps = [(g.t / (found.num_levels - 1), g.relative) for g in found.gaps] if found else []
    gaps = [point for point in gaps if point[1] > ROUNDING]
    smoothed = Series("mean", bin_means(loss, 40), "student")
    first = Series("first tenth", early, "faint", markers=True)
    last = Series("last tenth", late, "student", markers=True)
    over = "noise level t / T"
    return {
        "validation": validation_chart(run),
        "loss": line_chart(
            "Loss over the training",
            [Series("single lines", bin_means(loss, 300), "faint"), smoothed],
            "optimizer step",
            "loss",
        ),
        "heat": levels_over_time(run),
        "levels": line_chart("Loss at each noise level", [first, last], over, "loss"),
        "gaps": line_chart(
            "Gap between teacher and student at each noise level",
            [Series("gap", gaps, "student", markers=True)],
            over,
            "share of the output",
        ),
    }


def levels_over_time(run: Run) -> Markup | None:
    """The loss of each range of noise levels over the training; None without."""
    last, found = run.step, [*level_rows(run.metrics)]
    if not found or not last:
        return None
    bins = min(MAX_COLUMNS, len(found))
    columns: list[list[list[float | None]]] = [[] for _ in range(bins)]
    for step, row in found:
        columns[min(bins - 1, max(0, (step - 1) * bins // last))].append(row)
    ranges = max(len(row) for _, row in found)

    def words(step: float, row: int, value: float) -> str:
        return f"{number(value)} at t / T {row / ranges:g} to {(row + 1) / ranges:g}, step {step:g}"

    ends = [round((i + 1) * last / bins) for i in range(bins)]
    means = [_means(column, ranges) for column in columns]
    over = "optimizer step", "noise level t / T"
    return heat_map(
        "Loss at each noise level over the training", [*zip(ends, means, strict=True)], *over, words
    )


def level_rows(entries: Sequence[dict[str, Any]]) -> Iterator[tuple[int, list[float | None]]]:
    """The steps that logged a loss for each range of levels, and these; None where none was."""
    for entry in entries:
        row, step = entry.get("loss_per_level"), entry.get("step")
        if isinstance(row, list) and row and is_number(step):
            yield int(step), [x if is_number(x) else None for x in row[:MAX_RANGES]]


def _means(rows: Sequence[Sequence[float | None]], count: int) -> list[float | None]:
    known = [[row[i] for row in rows if i < len(row)] for i in range(count)]
    numbers = [[x for x in column if x is not None] for column in known]
    return [fmean(column) if column else None for column in numbers]


def levels_table(run: Run) -> list[tuple[str, list[str]]]:
    """The loss of each range of levels at the start, in the middle and at the end, as text."""
    tenth, middle = max(1, len(run.metrics) // 10), len(run.metrics) // 2
    parts = run.metrics[:tenth], run.metrics[middle : middle + tenth], run.metrics[-tenth:]
    rows = [[row for _, row in level_rows(part)] for part in parts]
    count = max((len(row) for part in rows for row in part), default=0)
    means = [_means(part, count) for part in rows]
    texts = [["" if x is None else number(x) for x in column] for column in means]
    return [
        (f"{i / count:.2g} to {(i + 1) / count:.2g}", list(row))
        for i, row in enumerate(zip(*texts, strict=True))
    ]


def validation_chart(run: Run) -> Markup | None:
    """The validation metric over the steps, with the best; None for a run without one."""
    name, points = run.config.evaluation.validation_metric, run.validated
    if name is None or not points:
        return None
    values = Series("measured", points, "faint", markers=True)
    best = Series("best", best_of(points, name), "student", markers=True)
    return line_chart(f"{name} during the training", [values, best], "optimizer step", name)


def best_in_words(run: Run) -> str:
    """The best of the validation and its step; empty without one."""
    name = run.config.evaluation.validation_metric
    best = best_of(run.validated, name) if name and run.validated else []
    return "".join(f"{watched(str(name)).format(value)} at step {step:,}" for step, value in best)


def best_of(points: Sequence[Point], metric: str) -> list[Point]:
    """The first of the best points, in a list; empty for a metric that this version lacks."""
    try:
        better = watched(metric).better
    except UsageError:
        return []
    best = min(points, key=lambda point: point[1] if better == "lower" else -point[1])
    return [best]


def level_means(entries: Sequence[dict[str, Any]]) -> list[Point]:
    """Mean loss of each range of levels over some lines of metrics, at the middle of the range."""
    found = [entry.get("loss_per_level") for entry in entries]
    rows = [row[:MAX_RANGES] for row in found if isinstance(row, list) and row]
    columns = [list(filter(is_number, column)) for column in zip(*rows, strict=False)]
    middles = [(index + 0.5) / len(columns) for index in range(len(columns))]
    return [(x, fmean(known)) for x, known in zip(middles, columns, strict=True) if known]
