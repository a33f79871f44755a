"""What a distillation on many devices takes beside memory: evaluations, traffic, hours.

Nothing is measured here. Evaluations, bytes and floating-point operations are counted; hours follow
from a device's peak, the shares of it that networks reach, and the rate of its link.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Column, Table

from dkdm.checks.memory_plan import MemoryPlan, PlannedRun
from dkdm.config import PlanOptions, TrainingOptions
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.sources.budget import fill_cost, newly_drawn
from dkdm.evaluation.cost import count_macs
from dkdm.evaluation.memory import MIB
from dkdm.evaluation.numbers import count, duration, memory
from dkdm.runs.source import guidance_factor
from dkdm.students import sketched_student_of

FORWARD_AND_BACKWARD = 3  # of a forward pass: the backward pass computes two products for each


@dataclass(frozen=True)
class Scale:
    """The work of a run on all devices, and what passes between them.

    preparing, training: teacher evaluations, without restarts of chains. teacher_macs,
    student_macs: multiply-accumulates of one evaluation of one sample. sent: bytes that each device
    sends in an optimizer step, and receives: gradients alone, since no state of a pool leaves its
    device. moved: bytes of pool states between each device and its host in a step. checkpoint:
    bytes. seconds_preparing, seconds_training: shortest and longest.
    """

    gpus: int
    entries: int
    preparing: int
    training: int
    teacher_macs: int
    student_macs: int
    sent: int
    moved: int
    checkpoint: int
    seconds_preparing: tuple[float, float]
    seconds_training: tuple[float, float]

    @property
    def hours(self) -> tuple[float, float]:
        """Shortest and longest, prepared and trained."""
        first, last = zip(self.seconds_preparing, self.seconds_training, strict=True)
        return sum(first) / 3600, sum(last) / 3600

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "hours": self.hours}


class Work(NamedTuple):
    """Of the networks: multiply-accumulates of one evaluation of one sample, and the student's
    parameters."""

    teacher: int
    student: int
    parameters: int


def scale(teacher: Denoiser, found: MemoryPlan, machine: PlanOptions) -> Scale:
    """The work of a planned run, by counting; networks may be on the meta device."""
    return scale_of_work(work_of(teacher, found.run), teacher, found, machine)


def work_of(teacher: Denoiser, run: PlannedRun) -> Work:
    """Count the work of both networks."""
    student = sketched_student_of(run.student_choice.student, teacher, run.teacher_choice.factory)
    return Work(count_macs(teacher), count_macs(student), student.num_parameters)


def scale_of_work(
    counted: Work, teacher: Denoiser, found: MemoryPlan, machine: PlanOptions
) -> Scale:
    """The work of a run whose networks were counted."""
    run, gpus = found.run, found.gpus
    training, pool = run.training, run.pool
    each = guidance_factor(teacher, run.guidance)
    preparing = round(fill_cost(pool, found.pool_size, teacher.process.num_levels) * each)
    evaluations = round(newly_drawn(pool, training) * each)
    samples = training.max_train_steps * training.gradient_accumulation_steps
    samples *= training.batch_size
    passes = FORWARD_AND_BACKWARD + training.gradient_checkpointing
    learning = 2 * counted.teacher * evaluations + 2 * passes * counted.student * samples
    sent = sent_in_a_step(training, counted.parameters, found.device["teacher weights"], gpus)
    state = torch.Size(teacher.sample_shape).numel() * getattr(torch, pool.pool_dtype).itemsize
    return Scale(
        gpus,
        found.pool_size,
        preparing,
        evaluations,
        counted.teacher,
        counted.student,
        sent,
        0 if pool.pool_device == "device" else 2 * state * training.batch_size // gpus,
        round(sum(found.disk.values()) * MIB),
        seconds(2 * counted.teacher * preparing, 0, gpus, machine),
        seconds(learning, training.max_train_steps * sent, gpus, machine),
    )


def sent_in_a_step(
    training: TrainingOptions, parameters: int, teacher_mib: float, gpus: int
) -> int:
    """Bytes that each device sends in an optimizer step, by rings, and receives.

    A replicated student's gradients are added up and handed out, each once around. A sharded
    network's weights are gathered for each pass, its gradients are added up. teacher_mib: of the
    teacher, on each device.
    """
    around, batches = (gpus - 1) / gpus, training.gradient_accumulation_steps
    weights = parameters * torch.float32.itemsize
    sharded = training.fsdp in ("student", "both")
    student = (2 * batches + 1) * weights if sharded else 2 * weights
    teacher = gpus * teacher_mib * MIB if training.fsdp in ("teacher", "both") else 0.0
    return round(around * (student + batches * teacher))


def seconds(operations: float, sent: float, gpus: int, machine: PlanOptions) -> tuple[float, float]:
    """Shortest and longest time of so many floating-point operations on all devices together.

    sent: bytes of each device. Shortest: at the higher utilization, all traffic behind
    computation. Longest: at the lower one, one after the other.
    """
    low, high = machine.utilizations
    peak = gpus * machine.device_tflops * 1e12
    traffic = sent / (machine.link * 1e9)
    return max(operations / (peak * high), traffic), operations / (peak * low) + traffic


def print_scale(found: Scale, console: Console) -> None:
    """Print the work of a run as a table."""
    table = Table("", Column("", justify="right"), show_header=False)
    for name, value in rows(found).items():
        table.add_row(name, value)
    console.print(table)


def rows(found: Scale) -> dict[str, str]:
    """The work of a run in words."""
    times = (found.seconds_preparing, found.seconds_training)
    ranges = [f"{duration(low)} to {duration(high)}" for low, high in times]
    return {
        "entries of the pool": f"{found.entries:,}",
        "teacher evaluations to prepare": f"{found.preparing:,}",
        "teacher evaluations to train": f"{found.training:,}",
        "multiply-accumulates, teacher": count(found.teacher_macs),
        "multiply-accumulates, student": count(found.student_macs),
        "sent by a device in a step": memory(found.sent / MIB),
        "pool states to and from the host": memory(found.moved / MIB),
        "checkpoint": memory(found.checkpoint / MIB),
        "time to prepare": ranges[0],
        "time to train": ranges[1],
    }
