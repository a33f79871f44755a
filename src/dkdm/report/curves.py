"""The curves of a run: loss over steps, loss and gap over noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, TypeGuard

from markupsafe import Markup

from dkdm.reading.fields import is_number
from dkdm.report.charts import Point, Series, bin_means, line_chart
from dkdm.report.run import Run

MAX_RANGES = 1000
ROUNDING = 1e-12  # a mean squared gap below it, as a share of the output, is float32 arithmetic


def charts(run: Run) -> dict[str, Markup | None]:
    """The curves; None for one without points."""
    loss = [point for entry in run.metrics if (point := loss_point(entry))]
    tenth = max(1, len(run.metrics) // 10)
    gaps = run.comparison.gaps if run.comparison else ()
    levels = run.comparison.num_levels - 1 if run.comparison else 1
    wrong = [(gap.t / levels, gap.relative) for gap in gaps if gap.relative > ROUNDING]
    return {
        "loss": line_chart(
            "Loss over the training",
            [
                Series("single lines", bin_means(loss, 300), "faint"),
                Series("mean", bin_means(loss, 40), "student"),
            ],
            "optimizer step",
            "loss",
        ),
        "levels": line_chart(
            "Loss at each noise level",
            [
                Series("first tenth", level_means(run.metrics[:tenth]), "faint", markers=True),
                Series("last tenth", level_means(run.metrics[-tenth:]), "student", markers=True),
            ],
            "noise level t / T",
            "loss",
        ),
        "gaps": line_chart(
            "Gap between teacher and student at each noise level",
            [Series("gap", wrong, "student", markers=True)],
            "noise level t / T",
            "share of the output",
        ),
    }


def loss_point(entry: dict[str, Any]) -> Point | None:
    """Step and loss of a line of metrics; None if one is not a finite number."""
    step, loss = entry.get("step"), entry.get("loss")
    return (step, loss) if _is_number(step) and _is_number(loss) else None


def level_means(entries: Sequence[dict[str, Any]]) -> list[Point]:
    """Mean loss of each range of levels over some lines of metrics, at the middle of the range."""
    found = [entry.get("loss_per_level") for entry in entries]
    rows = [row[:MAX_RANGES] for row in found if isinstance(row, list) and row]
    columns = [
        [value for value in column if _is_number(value)] for column in zip(*rows, strict=False)
    ]
    places = [(index + 0.5) / len(columns) for index in range(len(columns))]
    return [(x, fmean(known)) for x, known in zip(places, columns, strict=True) if known]


def _is_number(value: object) -> TypeGuard[float]:
    return is_number(value)
