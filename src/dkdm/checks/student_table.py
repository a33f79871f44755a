"""The presets at a teacher's sample shape: size, cost, and speed compared with the teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dkdm.config import MeasureOptions
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.saving.progress import track
from dkdm.errors import UsageError
from dkdm.evaluation.cost import count_macs, evaluations_in_turns
from dkdm.evaluation.numbers import count, number
from dkdm.models.place import device_of_run, place
from dkdm.students import PRESETS, Preset, sketched_student_of, untried_student_of

MAX_MACS_ON_CPU = 2e11  # of a batch that is timed there: about ten seconds on one core
WIDE = 120  # columns that a terminal needs to show a ratio beside its number, not below it


@dataclass(frozen=True)
class StudentRow:
    """A preset at the teacher's shape; `misfit` is why it does not fit, with None for all numbers.

    parameters, macs: of one network, and multiply-accumulates of one evaluation of one sample.
    samples_per_second: measured under `measured`, network evaluations a second over sampler steps,
    without decoding latents; None if it was not measured. *_ratio: over the teacher's, or None.
    """

    name: str
    summary: str
    parameters: int | None = None
    parameter_ratio: float | None = None
    macs: int | None = None
    mac_ratio: float | None = None
    samples_per_second: float | None = None
    speed_ratio: float | None = None
    measured: str | None = None
    misfit: str | None = None


def list_students(
    teacher: Denoiser, measuring: MeasureOptions | None = None, seconds: float = 1.0
) -> list[StudentRow]:
    """Every preset with the teacher's sample shape, conditioning and variance.

    The students are built on torch's meta device, which holds no numbers, and the teacher is
    evaluated once, on one sample. measuring: then build the smaller ones, with random weights, and
    time each for `seconds`, alternating with the teacher, which is moved to the accelerator; None
    times nothing.
    """
    teacher_macs, rows = count_macs(teacher), []
    beside = _timed_teacher(teacher, teacher_macs, measuring) if measuring else None
    with track(len(PRESETS), 0, "students") as show:
        for preset in PRESETS.values():
            row = _row(preset, teacher, teacher_macs)
            if measuring and row.parameters and _is_timed(measuring, row.parameters, row.macs or 0):
                row = _with_speed(row, teacher, beside, measuring, seconds)
            rows.append(row)
            show(len(rows))
    return rows


def _row(preset: Preset, teacher: Denoiser, teacher_macs: int) -> StudentRow:
    try:
        student = sketched_student_of(preset.name, teacher)
    except UsageError as error:
        why = str(error).removeprefix(f"{preset.name}: ")  # the table says its name
        return StudentRow(preset.name, preset.summary, misfit=why)
    parameters, macs = student.num_parameters, count_macs(student)
    size = (parameters, _ratio(parameters, teacher.num_parameters))
    return StudentRow(preset.name, preset.summary, *size, macs, _ratio(macs, teacher_macs))


def _ratio(number: int, of: int) -> float | None:
    return number / of if of else None


def _is_timed(how: MeasureOptions, parameters: int, macs: int) -> bool:
    slow = device_of_run().type == "cpu" and macs * how.measure_batch_size > MAX_MACS_ON_CPU
    return parameters <= how.measure_below * 1e6 and not slow


def _conditions(how: MeasureOptions) -> str:
    """Steps, batch, device and threads in words."""
    kind, threads = device_of_run().type, torch.get_num_threads()
    cores = f", {threads} thread{'s' * (threads > 1)}" if kind == "cpu" else ""
    return f"{how.steps} sampler steps, batches of {how.measure_batch_size}, {kind}{cores}"


def _timed_teacher(teacher: Denoiser, macs: int, how: MeasureOptions) -> Denoiser | None:
    """The teacher on the device, with random weights if they were not read.

    None if it is too large, or a custom network that was not read.
    """
    if not _is_timed(how, teacher.num_parameters, macs):
        return None
    if teacher.device.type == "meta":
        sketched: Any = teacher.network
        if not hasattr(sketched, "from_config"):
            return None
        network = type(sketched).from_config(sketched.config)
        network = torch.nn.Module.to(network, sketched.dtype)
        teacher = replace(teacher, network=network, call=None)
    place(teacher, device_of_run())
    return teacher


def _with_speed(
    row: StudentRow, teacher: Denoiser, beside: Denoiser | None, how: MeasureOptions, seconds: float
) -> StudentRow:
    student = untried_student_of(row.name, teacher)
    place(student, device_of_run())
    models = [student] if beside is None else [student, beside]
    speeds = evaluations_in_turns(models, how.measure_batch_size, seconds)
    return replace(
        row,
        samples_per_second=speeds[0] / how.steps,
        speed_ratio=None if beside is None else speeds[0] / speeds[1],
        measured=_conditions(how),
    )


def print_students(
    rows: list[StudentRow],
    teacher: Denoiser,
    console: Console,
    measuring: MeasureOptions | None = None,
) -> None:
    """Print the presets that fit as a table, then why the others do not."""
    shape = " x ".join(map(str, teacher.sample_shape))
    size = f"samples of {shape}, {count(teacher.num_parameters)} parameters"
    title = f"Students for {escape(teacher.name)}: {size}"
    unit = "images/s" if len(teacher.sample_shape) == 3 else "samples/s"
    if measuring:
        title += f"\n{unit}: {_conditions(measuring)}, random weights"
    headings = ["parameters", "MACs a sample", *([unit] if measuring else [])]
    table = Table(
        Column("student", no_wrap=True),
        *(Column(f"{each}\n(x teacher)", justify="right", no_wrap=True) for each in headings),
        Column(ratio=1),
        title=title,
        title_justify="left",
    )
    gap = " " if console.width >= WIDE else "\n"
    misfits: dict[str, list[str]] = {}
    for row in rows:
        if row.misfit:
            misfits.setdefault(row.misfit, []).append(row.name)
            continue
        cells = [
            _cell(row.parameters, row.parameter_ratio, count, gap),
            _cell(row.macs, row.mac_ratio, count, gap),
            _cell(row.samples_per_second, row.speed_ratio, number, gap),
        ]
        table.add_row(row.name, *cells[: len(headings)], escape(row.summary))
    console.print(table)
    for why, names in misfits.items():
        verb = "do" if len(names) > 1 else "does"
        console.print(f"{', '.join(names)} {verb} not fit: {escape(why)}")


def _cell(value: float | None, ratio: float | None, shown: Callable[[float], str], gap: str) -> str:
    if value is None:
        return "-"
    return shown(value) + ("" if ratio is None else f"{gap}({number(ratio, 2)}x)")
