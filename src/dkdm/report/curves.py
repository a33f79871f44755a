"""The curves of a run: loss over steps, loss and gap over noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from dkdm.errors import UsageError
from dkdm.evaluation.validation import watched
from dkdm.reading.fields import is_number
from dkdm.report.charts import Point, Series, bin_means, line_chart
from dkdm.report.run import Run

MAX_RANGES = 1000
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
        "levels": line_chart("Loss at each noise level", [first, last], over, "loss"),
        "gaps": line_chart(
            "Gap between teacher and student at each noise level",
            [Series("gap", gaps, "student", markers=True)],
            over,
            "share of the output",
        ),
    }


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
