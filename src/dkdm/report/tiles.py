"""The key numbers of a run, each with what it means."""

from __future__ import annotations

from dataclasses import dataclass

from dkdm.evaluation.numbers import compared, count, duration, number, percent
from dkdm.evaluation.results import Comparison
from dkdm.evaluation.rows import Row, comparison_rows
from dkdm.report.html import sentence
from dkdm.report.run import Run, spent


@dataclass(frozen=True)
class Tile:
    """A key number.

    bars: who, and its length in percent of the longer one.
    """

    label: str
    text: str
    detail: str
    bars: tuple[tuple[str, float], ...] = ()


def tiles(run: Run) -> list[Tile]:
    """The key numbers, as far as they are known."""
    found = []
    if run.comparison:
        found = [_tile(row) for row in comparison_rows(run.comparison) if row.better]
        found[2:2] = _copy_tile(run.comparison)
    if run.is_data_free:
        things = f"{run.noun.capitalize()}s"
        found.append(Tile(f"{things} read", "0", "the student saw the teacher's answers only"))
    steps, evaluations, seconds = spent(run)
    parts = " of both parts" if run.earlier else ""
    if evaluations:
        detail = f"samples through the teacher in {steps:,} steps{parts}"
        found.append(Tile("Teacher evaluations", count(evaluations), detail))
    if seconds:
        detail = f"{steps:,} steps{parts}, {number(steps / seconds)} a second"
        found.append(Tile("Training time", duration(seconds), detail))
    return found


def _tile(row: Row) -> Tile:
    """A share and a model alone as they are, any other measurement as a multiple of the
    teacher's."""
    if row.teacher is None:
        floor = f"real images {whole(row.floor_text)}; " if row.floor_text else ""
        return Tile(sentence(row.label), row.texts[0], f"{floor}{row.better} is better")
    teacher, student = row.texts
    base = row.teacher
    text = student if row.format is percent else compared(row.student, base)
    values = f"{whole(student)} · teacher {whole(teacher)}"
    detail = f"{values}; {row.better} is better"
    scale = 100 / (max(base, row.student) or 1.0)
    lengths = (round(max(0.0, scale * value), 1) for value in (base, row.student))
    bars = tuple(zip(("teacher", "student"), lengths, strict=True))
    return Tile(sentence(row.label), text, detail, bars)


def whole(text: str) -> str:
    """A number and its unit, which no line break parts."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _copy_tile(comparison: Comparison) -> list[Tile]:
    same, other = comparison.same_noise_difference, comparison.other_noise_difference
    if not other:
        return []
    detail = f"mean difference from the same noise; {whole('100 %')} is that from different noise"
    return [Tile("Distance to the teacher", percent(same / other), detail)]
