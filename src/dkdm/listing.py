"""The named students at a teacher's sample shape: size and cost, without building one for real."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dkdm.denoiser import Denoiser
from dkdm.errors import UsageError
from dkdm.evaluation.cost import count_macs
from dkdm.progress import track
from dkdm.students import PRESETS, Preset, untried_student_of


@dataclass(frozen=True)
class StudentRow:
    """A preset at the teacher's shape; `misfit` is why it does not fit, and the numbers are None.

    parameters, macs: of one network, and multiply-accumulates of one evaluation of one sample.
    parameter_ratio, mac_ratio: over the teacher's; None where the teacher has none.
    """

    name: str
    summary: str
    parameters: int | None = None
    parameter_ratio: float | None = None
    macs: int | None = None
    mac_ratio: float | None = None
    misfit: str | None = None


def list_students(teacher: Denoiser) -> list[StudentRow]:
    """Every preset with the teacher's sample shape, conditioning and variance.

    The students are built on torch's meta device, which holds no numbers: seconds for all of them,
    and no memory. The teacher is evaluated once, on one sample.
    """
    teacher_macs, rows = count_macs(teacher), []
    with track(len(PRESETS), 0, "students") as show:
        for preset in PRESETS.values():
            rows.append(_row(preset, teacher, teacher_macs))
            show(len(rows))
    return rows


def _row(preset: Preset, teacher: Denoiser, teacher_macs: int) -> StudentRow:
    try:
        student = _without_numbers(preset.name, teacher)
    except UsageError as error:
        return StudentRow(preset.name, preset.summary, misfit=str(error))
    parameters, macs = student.num_parameters, count_macs(student)
    return StudentRow(
        name=preset.name,
        summary=preset.summary,
        parameters=parameters,
        parameter_ratio=_ratio(parameters, teacher.num_parameters),
        macs=macs,
        mac_ratio=_ratio(macs, teacher_macs),
    )


def _without_numbers(name: str, teacher: Denoiser) -> Denoiser:
    with torch.device("meta"):
        student = untried_student_of(name, teacher)
    student.network.to("meta")  # type: ignore[union-attr]  # tables made from numpy were not
    return student


def _ratio(number: int, of: int) -> float | None:
    return number / of if of else None


def print_students(rows: list[StudentRow], teacher: Denoiser, console: Console) -> None:
    """Print the students as a table; the teacher's size is in its title."""
    shape = " x ".join(map(str, teacher.sample_shape))
    table = Table(
        title=f"Students for {escape(teacher.name)}: samples of {shape}, "
        f"{_millions(teacher.num_parameters)} parameters",
        title_justify="left",
    )
    table.add_column("student", no_wrap=True)
    for heading in ("parameters", "MACs a sample"):
        table.add_column(f"{heading}\n(x teacher)", justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    for row in rows:
        table.add_row(row.name, *_numbers(row), escape(row.misfit or row.summary))
    console.print(table)


def _numbers(row: StudentRow) -> list[str]:
    if row.parameters is None or row.macs is None:
        return ["-"] * 2
    return [
        _millions(row.parameters) + _times(row.parameter_ratio),
        _millions(row.macs) + _times(row.mac_ratio),
    ]


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.2g}x)" if ratio < 10 else f" ({ratio:,.0f}x)"
