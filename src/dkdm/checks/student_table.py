"""The presets at a teacher's sample shape: size, cost, and speed compared with the teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dkdm.core.denoiser import Denoiser
from dkdm.core.progress import track
from dkdm.errors import UsageError
from dkdm.evaluation.cost import count_macs, evaluations_in_turns
from dkdm.evaluation.numbers import count, number
from dkdm.models import place
from dkdm.students import PRESETS, Preset, untried_student_of

MAX_MACS_ON_CPU = 2e11
"""Of a batch: about ten seconds on one core. More expensive networks are not timed on a CPU."""


@dataclass(frozen=True)
class Measuring:
    """How speeds are measured.

    batch_size: samples at once. below: networks with more parameters are not timed. steps: sampler
    steps of one sample, each an evaluation. seconds: for each student, in turns with the teacher.
    """

    batch_size: int = 8
    below: float = 60e6
    steps: int = 50
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.steps < 1:
            raise UsageError(
                f"--measure-batch-size {self.batch_size}, --steps {self.steps}: give at least 1 "
                "for both"
            )

    @property
    def device(self) -> torch.device:
        """The accelerator if there is one, otherwise the CPU."""
        return torch.accelerator.current_accelerator() or torch.device("cpu")

    @property
    def conditions(self) -> str:
        """Device, threads, batch and steps in words."""
        threads = torch.get_num_threads()
        cores = f", {threads} thread{'s' * (threads > 1)}" if self.device.type == "cpu" else ""
        batch = f"batches of {self.batch_size}"
        return f"{self.steps} sampler steps, {batch}, {self.device.type}{cores}"

    def times(self, parameters: int, macs: int) -> bool:
        """Whether a network is small enough to be timed."""
        slow = self.device.type == "cpu" and macs * self.batch_size > MAX_MACS_ON_CPU
        return parameters <= self.below and not slow


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


def list_students(teacher: Denoiser, measuring: Measuring | None = None) -> list[StudentRow]:
    """Every preset with the teacher's sample shape, conditioning and variance.

    The students are built on torch's meta device, which holds no numbers, and the teacher is
    evaluated once, on one sample. measuring: then build the smaller ones, with random weights, and
    time them in turns with the teacher, which is moved to the accelerator. None: do not.
    """
    teacher_macs, rows = count_macs(teacher), []
    beside = _timed_teacher(teacher, teacher_macs, measuring) if measuring else None
    with track(len(PRESETS), 0, "students") as show:
        for preset in PRESETS.values():
            row = _row(preset, teacher, teacher_macs)
            rows.append(_with_speed(row, teacher, beside, measuring) if measuring else row)
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


def _timed_teacher(teacher: Denoiser, macs: int, measuring: Measuring) -> Denoiser | None:
    """The teacher on the device, with random weights if they were not read.

    None if it is too large, or a custom network that was not read.
    """
    if not measuring.times(teacher.num_parameters, macs):
        return None
    if teacher.device.type == "meta":
        sketched: Any = teacher.network
        if not hasattr(sketched, "from_config"):
            return None
        network = type(sketched).from_config(sketched.config)
        network = torch.nn.Module.to(network, sketched.dtype)
        teacher = replace(teacher, network=network, call=None)
    place(teacher, measuring.device)
    return teacher


def _with_speed(
    row: StudentRow, teacher: Denoiser, beside: Denoiser | None, measuring: Measuring
) -> StudentRow:
    """The row with the measured speed of its student, unless it is too large."""
    if row.parameters is None or not measuring.times(row.parameters, row.macs or 0):
        return row
    student = untried_student_of(row.name, teacher)
    place(student, measuring.device)
    models = [student] if beside is None else [student, beside]
    speeds = evaluations_in_turns(models, measuring.batch_size, measuring.seconds)
    return replace(
        row,
        samples_per_second=speeds[0] / measuring.steps,
        speed_ratio=None if beside is None else speeds[0] / speeds[1],
        measured=measuring.conditions,
    )


def print_students(
    rows: list[StudentRow],
    teacher: Denoiser,
    console: Console,
    measuring: Measuring | None = None,
) -> None:
    """Print the presets that fit as a table, then why the others do not."""
    shape = " x ".join(map(str, teacher.sample_shape))
    title = (
        f"Students for {escape(teacher.name)}: samples of {shape}, "
        f"{count(teacher.num_parameters)} parameters"
    )
    unit = "images/s" if len(teacher.sample_shape) == 3 else "samples/s"
    if measuring:
        title += f"\n{unit}: {measuring.conditions}, random weights"
    table = Table(title=title, title_justify="left")
    table.add_column("student", no_wrap=True)
    for heading in ("parameters", "MACs a sample", *([unit] if measuring else [])):
        table.add_column(f"{heading}\n(x teacher)", justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    gap = " " if console.width >= WIDE else "\n"
    misfits: dict[str, list[str]] = {}
    for row in rows:
        if row.misfit:
            misfits.setdefault(row.misfit, []).append(row.name)
            continue
        numbers = [gap.join(parts) for parts in _numbers(row)[: 3 if measuring else 2]]
        table.add_row(row.name, *numbers, escape(row.summary))
    console.print(table)
    for why, names in misfits.items():
        verb = "do" if len(names) > 1 else "does"
        console.print(f"{', '.join(names)} {verb} not fit: {escape(why)}")


WIDE = 120
"""Columns a terminal needs to show a ratio beside its number, not below it."""


def _numbers(row: StudentRow) -> list[list[str]]:
    """Parameters, multiply-accumulates and speed, each with its ratio if there is one."""
    missing = ["-"]
    if row.parameters is None or row.macs is None:
        return [missing] * 3
    speed = row.samples_per_second
    return [
        [count(row.parameters), *_times(row.parameter_ratio)],
        [count(row.macs), *_times(row.mac_ratio)],
        missing if speed is None else [number(speed), *_times(row.speed_ratio)],
    ]


def _times(ratio: float | None) -> list[str]:
    if ratio is None:
        return []
    return [f"({number(ratio, 2)}x)"]
