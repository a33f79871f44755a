"""The key numbers of a run, each with what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dkdm.evaluation.numbers import compared, count, duration, number, percent
from dkdm.evaluation.results import Comparison
from dkdm.evaluation.rows import Row, comparison_rows
from dkdm.reading.fields import is_number
from dkdm.report.run import Run


@dataclass(frozen=True)
class Tile:
    """A key number; teacher and student, if given, are drawn as two bars."""

    label: str
    text: str
    detail: str
    teacher: float | None = None
    student: float | None = None

    @property
    def value(self) -> str:
        """The number itself."""
        return self.text.rpartition(" ")[0] or self.text

    @property
    def unit(self) -> str:
        """What comes behind it in small letters."""
        return self.text.removeprefix(self.value).strip()

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
    found = []
    if run.comparison:
        found = [_tile(row) for row in comparison_rows(run.comparison) if row.better]
        found[2:2] = _copy_tile(run.comparison)
    if run.is_distillation:
        things = f"{run.noun.capitalize()}s"
        found.append(Tile(f"{things} read", "0", "the student saw the teacher's answers only"))
    last = run.metrics[-1] if run.metrics else {}
    evaluations: Any = last.get("teacher_evaluations")
    rate: Any = last.get("steps_per_second")
    if is_number(evaluations) and evaluations > 0:
        detail = f"samples through the teacher in {run.step:,} steps"
        found.append(Tile("Teacher evaluations", count(evaluations), detail))
    if is_number(rate) and rate > 0:
        detail = f"{run.step:,} steps, {number(rate)} a second"
        found.append(Tile("Training time", duration(run.step / rate), detail))
    return found


def _tile(row: Row) -> Tile:
    """A share as it is, any other measurement as a multiple of the teacher's."""
    teacher, student = row.texts
    text = student if row.format is percent else compared(row.student, row.teacher or 0)
    detail = f"{student} · teacher {teacher}; {row.better} is better"
    return Tile(row.label.capitalize(), text, detail, row.teacher, row.student)


def _copy_tile(comparison: Comparison) -> list[Tile]:
    same, other = comparison.same_noise_difference, comparison.other_noise_difference
    if not other:
        return []
    detail = "between two samples from the same noise; from different noise it is 100 %"
    return [Tile("Distance to the teacher", percent(same / other), detail)]
