"""Curves of several runs over one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dkdm.evaluation.validation import WITHOUT_IMAGES
from dkdm.reading.fields import is_number
from dkdm.report.charts import Series, bin_means, line_chart
from dkdm.report.curves import ROUNDING
from dkdm.report.entries import Entry
from dkdm.report.run import Run

COLOURS = 8  # styles c0 to c7 of the page
OF_THE_LOSS = (
    *("teacher", "student_prediction", "student_process", "source", "guidance_scale"),
    *("loss_weighting", "snr_gamma", "vlb_weight", "feature_weight"),
)
OF_VALIDATION = (
    *("validation_samples", "validation_sampling_steps", "sampling_guidance_scale"),
    *("teacher", "guidance_scale", "guidance_on", "guidance_interval"),
)
OF_IMAGES = ("evaluation_reference", "feature_network", "resize")
Named = Sequence[tuple[str, str, Run]]


@dataclass(frozen=True)
class Overlaid:
    """One chart: title, drawing, style and name of each line, and what a reader has to know."""

    title: str
    drawing: Markup
    keys: list[tuple[str, str]]
    note: str = ""


def style(column: int) -> str:
    """The style of a column's lines."""
    return f"c{column % COLOURS}"


def overlaid(entries: Sequence[Entry], names: Sequence[str]) -> list[Overlaid]:
    """Loss, validation metrics and gaps of the runs among the entries, as far as they have any."""
    columns = enumerate(zip(entries, names, strict=True))
    runs = [(style(i), name, entry.run) for i, (entry, name) in columns if entry.run]
    loss = [Series(name, _losses(run), of) for of, name, run in runs]
    gaps = [Series(name, _gaps(run), of, markers=True) for of, name, run in runs]
    over = "noise level t / T"
    charts = [
        _chart("Loss over the training", loss, ("optimizer step", "loss"), _loss_note(runs)),
        *_validations(runs),
        _chart("Gap to the teacher at each noise level", gaps, (over, "share of the output")),
    ]
    return [chart for chart in charts if chart is not None]


def _chart(
    title: str, series: Sequence[Series], axes: tuple[str, str], note: str = ""
) -> Overlaid | None:
    drawn = [line for line in series if line.drawable()]
    chart = line_chart(title, drawn, *axes)
    keys = [(line.style, line.name) for line in drawn]
    return None if chart is None else Overlaid(title, chart, keys, note)


def _losses(run: Run) -> list[tuple[float, float]]:
    points = [(e["step"], e["loss"]) for e in run.metrics if is_number(e.get("loss"))]
    return bin_means(points, 80)


def _gaps(run: Run) -> list[tuple[float, float]]:
    found = run.comparison
    if found is None:
        return []
    last = max(1, found.num_levels - 1)
    return [(gap.t / last, gap.relative) for gap in found.gaps if gap.relative > ROUNDING]


def _loss_note(runs: Named) -> str:
    """Which options make the losses different numbers; empty if they are alike."""
    flat = [run.config.flat() for _, _, run in runs]
    different = [
        name for name in OF_THE_LOSS if len({str(options.get(name)) for options in flat}) > 1
    ]
    return f"different losses, by {', '.join(different)}: compare no heights" if different else ""


def _validations(runs: Named) -> list[Overlaid | None]:
    """A chart for each metric, and for each way in which it was measured."""
    found: dict[tuple[str, str], list[tuple[str, str, Run]]] = {}
    for of, name, run in runs:
        metric = run.config.evaluation.validation_metric
        if metric is not None and run.validated:
            found.setdefault((metric, measured_how(run)), []).append((of, name, run))
    return [_validation(metric, how, alike) for (metric, how), alike in found.items()]


def _validation(metric: str, how: str, runs: Named) -> Overlaid | None:
    lines = [Series(name, run.validated, of, markers=True) for of, name, run in runs]
    noise = {run.config.run.seed: None for _, _, run in runs}
    note = (
        f"{how}; {'seed' if len(noise) == 1 else 'other noise, seeds'} {', '.join(map(str, noise))}"
    )
    return _chart(f"Validation: {metric}", lines, ("optimizer step", metric), note)


def measured_how(run: Run) -> str:
    """What a run's validation is measured under; equal for values that can be compared."""
    without_images = run.config.evaluation.validation_metric in WITHOUT_IMAGES
    names = OF_VALIDATION if without_images else OF_VALIDATION + OF_IMAGES
    options = run.config.flat()
    known = [(name.replace("_", " "), options.get(name)) for name in names]
    return ", ".join(f"{name} {value}" for name, value in known if value is not None)
