"""The key numbers of a run, each with what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dkdm.evaluation.results import Comparison
from dkdm.reading.fields import is_number
from dkdm.report.numbers import compared, count, duration, in_units, number, percent
from dkdm.report.run import Run


@dataclass(frozen=True)
class Tile:
    """A key number; teacher and student, where given, are drawn as two bars."""

    label: str
    value: str
    unit: str
    detail: str
    teacher: float | None = None
    student: float | None = None

    @property
    def bars(self) -> list[tuple[str, float]]:
        """Who, and its length in percent of the longer one."""
        if self.teacher is None or self.student is None:
            return []
        longest = max(self.teacher, self.student) or 1.0
        lengths = {"teacher": self.teacher, "student": self.student}
        return [(who, round(100 * value / longest, 1)) for who, value in lengths.items()]


def tiles(run: Run) -> list[Tile]:
    """The key numbers, as far as they are known."""
    things = f"{run.noun.capitalize()}s"
    found = _comparison_tiles(run.comparison, things) if run.comparison else []
    if run.is_distillation:
        found.append(
            Tile(f"{things} read", "0", "", "the teacher's answers are all the student saw")
        )
    last = run.metrics[-1] if run.metrics else {}
    evaluations: Any = last.get("teacher_evaluations")
    rate: Any = last.get("steps_per_second")
    if is_number(evaluations) and evaluations > 0:
        detail = f"samples through the teacher in {run.step:,} steps"
        found.append(Tile("Teacher evaluations", *in_units(evaluations), detail))
    if is_number(rate) and rate > 0:
        detail = f"{run.step:,} steps, {number(rate)} a second"
        found.append(Tile("Training time", *duration(run.step / rate), detail))
    return found


def _comparison_tiles(comparison: Comparison, things: str) -> list[Tile]:
    teacher, student = comparison.teacher, comparison.student
    speeds = [model.images_per_second(comparison.num_steps) for model in (teacher, student)]
    return [
        *_metric_tiles(comparison),
        *_copy_tile(comparison),
        Tile(
            "Parameters",
            *compared(student.parameters, teacher.parameters),
            f"{count(student.parameters)} · teacher {count(teacher.parameters)}",
            teacher.parameters,
            student.parameters,
        ),
        Tile(
            "Multiply-accumulates",
            *compared(student.macs, teacher.macs),
            f"{count(student.macs)} an evaluation · teacher {count(teacher.macs)}",
            teacher.macs,
            student.macs,
        ),
        Tile(
            f"{things} a second",
            *compared(speeds[1], speeds[0]),
            f"{number(speeds[1])} · teacher {number(speeds[0])}, {comparison.num_steps} steps each",
            *speeds,
        ),
    ]


def _metric_tiles(comparison: Comparison) -> list[Tile]:
    teacher, student = comparison.teacher.metrics, comparison.student.metrics
    if teacher is None or student is None:
        return []
    found = [
        Tile(
            "Fréchet distance",
            f"{number(student.fd / teacher.fd)} ×" if teacher.fd else number(student.fd),
            "",
            f"to real images: {number(student.fd)} · teacher {number(teacher.fd)}; lower is better",
            teacher.fd,
            student.fd,
        )
    ]
    if teacher.class_agreement is not None and student.class_agreement is not None:
        found.append(
            Tile(
                "Right class",
                f"{100 * student.class_agreement:.1f}",
                "%",
                f"show the class asked for · teacher {percent(teacher.class_agreement)}",
                teacher.class_agreement,
                student.class_agreement,
            )
        )
    return found


def _copy_tile(comparison: Comparison) -> list[Tile]:
    same, other = comparison.same_noise_difference, comparison.other_noise_difference
    if not other:
        return []
    detail = "between two samples from the same noise; from different noise it is 100 %"
    return [Tile("Distance to the teacher", f"{100 * same / other:.1f}", "%", detail)]
