"""A comparison as rows: the terminal, the model card and the page of a run show the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dkdm.evaluation.evaluated import Evaluation
from dkdm.evaluation.metrics import METRICS, Metrics
from dkdm.evaluation.numbers import count, memory, number, percent, ratio
from dkdm.evaluation.results import Comparison, Measurement, ModelResult

ENERGY = "energy distance to the teacher's samples"


@dataclass(frozen=True)
class Row:
    """One measurement of a student, beside its teacher's if it has one.

    - `format`: makes text of a value.
    - `better`: which values are better, for what makes a headline; None for details.
    - `floor`: the best that can be asked for; None if unknown.
    """

    label: str
    teacher: float | None
    student: float
    format: Callable[[float], str]
    better: Literal["lower", "higher"] | None = None
    floor: float | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The values as text: teacher and student, or the student's alone."""
        values = (self.student,) if self.teacher is None else (self.teacher, self.student)
        return tuple(map(self.format, values))

    @property
    def floor_text(self) -> str:
        """The floor as text; empty if it is unknown."""
        return "" if self.floor is None else self.format(self.floor)

    @property
    def ratio(self) -> str:
        """The student's value by the teacher's: 1.50 ×."""
        return ratio(self.student, self.teacher or 0)


def comparison_rows(comparison: Comparison) -> list[Row]:
    """What was measured of both models, or of a model alone."""
    teacher, student, steps = comparison.teacher, comparison.student, comparison.num_steps

    def row(
        label: str,
        value: Callable[[ModelResult], float],
        format: Callable[[float], str],
        better: Literal["lower", "higher"] | None = None,
    ) -> Row:
        of_teacher = None if teacher is None else value(teacher)
        return Row(label, of_teacher, value(student), format, better)

    return [
        *_measured(comparison),
        *_beside_other_samples(comparison),
        row("parameters", lambda model: model.parameters, count, "lower"),
        row("multiply-accumulates", lambda model: model.macs, count, "lower"),
        *_memory_rows(comparison),
        row("network evaluations a second", lambda model: model.evaluations_per_second, number),
        row(
            f"{comparison.noun}s a second, {steps} steps",
            lambda model: model.images_per_second(steps),
            number,
            "higher",
        ),
    ]


def _measured(comparison: Comparison) -> list[Row]:
    """The metrics of the samples; empty if a model has none."""
    teacher, student = comparison.teacher, comparison.student
    floors = floors_in(comparison.measurement)
    if student.metrics is None or (teacher is not None and teacher.metrics is None):
        return []
    return metric_rows(student.metrics, teacher.metrics if teacher else None, floors)


def _beside_other_samples(comparison: Comparison) -> list[Row]:
    """How far samples are from the teacher's of other noise, as a share of the largest."""
    apart = comparison.teacher_distance
    if apart is None or apart.floor_share is None:
        return []
    return [Row(ENERGY, apart.floor_share, apart.share, percent, "lower")]


def _memory_rows(comparison: Comparison) -> list[Row]:
    """What models need in memory; empty for files of earlier versions."""
    fields = {
        "weights_mib": "memory of the weights",
        "evaluation_mib": "memory of an evaluation beside them",
    }
    teacher, student = comparison.teacher, comparison.student
    found = []
    for name, label in fields.items():
        values = [getattr(model, name) for model in (teacher, student) if model is not None]
        if None not in values:
            found.append(Row(label, values[0] if teacher else None, values[-1], memory))
    return found


def evaluation_rows(evaluation: Evaluation) -> list[Row]:
    """What was measured of one model, with floors."""
    rows = [
        Row(metric.label, None, found.value, metric.format, metric.better, found.floor)
        for name, metric in METRICS.items()
        if (found := evaluation.metrics.get(name))
    ]
    if apart := evaluation.teacher_distance:
        share = "the same, as a share of the largest", None, apart.share, percent
        rows += [
            Row(
                "distance to the teacher's samples",
                None,
                apart.distance,
                number,
                "lower",
                apart.floor,
            ),
            Row(*share, "lower", apart.floor_share),
        ]
    if gap := evaluation.gap:
        widest = max(level.relative for level in gap.levels)
        rows += [
            Row("gap to the teacher's outputs, mean over levels", None, gap.mean, percent, "lower"),
            Row("the same, widest level", None, widest, percent, "lower"),
        ]
    return rows


def evaluation_in_words(found: Evaluation) -> list[tuple[str, str]]:
    """What the numbers of an evaluation depend on, each by its name."""
    model, interval = found.model, found.guidance_interval
    words = [
        ("samples", f"{found.num_samples:,}, seed {found.seed}"),
        ("sampler", f"{found.sampler}, {found.num_steps} steps"),
        ("guidance", guidance_in_words(model.guidance_scale, interval)),
        ("weights", model.weights),
    ]
    against = found.reference
    if against is not None and found.metrics.keys() - found.judges.keys():
        images = f", {against.images:,} images" if against.images else ""
        words += [("reference", f"{against.name}{images}"), ("features", against.features)]
    words += [("judged by", judge) for judge in dict.fromkeys(found.judges.values())]
    if teacher := found.teacher:
        scale = guidance_in_words(teacher.guidance_scale, interval)
        words.append(("teacher", f"{teacher.name}, guidance {scale}"))
    if apart := found.teacher_distance:
        words.append(("distance", f"of {apart.num_samples:,} samples of each, from other noise"))
    if gap := found.gap:
        levels = f"at {len(gap.levels)} noise levels"
        words.append(("gap", f"on {gap.num_samples:,} samples of the teacher, {levels}"))
    return words


def guidance_in_words(scale: float, interval: str | None = None) -> str:
    """A guidance scale; interval: where guidance acts, None is everywhere."""
    if scale == 1:
        return "none"
    return f"{scale:g}{f', from {interval} of noise' if interval else ''}"


def floors_in(measurement: Measurement | None) -> Mapping[str, float]:
    """What real images are given, by the names of metrics."""
    if measurement is None:
        return {}
    if measurement.floors or measurement.real_distance is None:
        return measurement.floors
    name = "fid" if measurement.network.startswith("inception") else "fd"
    return {name: measurement.real_distance}


def metric_rows(
    student: Metrics, teacher: Metrics | None = None, floors: Mapping[str, float] | None = None
) -> list[Row]:
    """What was measured of one model, or of both; floors: what real images are given."""
    measured = student.values.keys() & (teacher or student).values.keys()
    return [
        Row(
            each.label,
            teacher.get(name) if teacher else None,
            student[name],
            each.format,
            each.better,
            (floors or {}).get(name),
        )
        for name, each in METRICS.items()
        if name in measured
    ]
