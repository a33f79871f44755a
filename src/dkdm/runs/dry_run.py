"""What a distillation would do and cost, in words."""

from __future__ import annotations

import torch
from torch import nn

from dkdm.config import DistillConfig
from dkdm.core.denoiser import Denoiser
from dkdm.core.learning import make_trainable
from dkdm.core.matching import covered, same_levels
from dkdm.models import place
from dkdm.models.place import Offload
from dkdm.runs.cost import advice, estimated, in_words, measured
from dkdm.runs.launch import checkpoint_of
from dkdm.runs.models import open_student, open_teacher, student_warnings
from dkdm.runs.outputs import reference_of
from dkdm.runs.source import planned_evaluations, pool_entries, set_size
from dkdm.students.start import start_student


def describe(config: DistillConfig) -> str:
    """What a distillation would do and cost, in words; nothing is written."""
    teacher = open_teacher(config)
    student = open_student(teacher, config)
    reference_of(config.evaluation, teacher)
    odd = "".join(f"\n{warning}" for warning in student_warnings(student, teacher))
    pool, training = config.pool, config.training
    asked = teacher, pool, training, config.guidance, config.synthetic
    planned = planned_evaluations(*asked)
    if pool.source == "synthetic":
        what, entries, width = "samples", set_size(*asked), 4
    else:
        what, entries = "entries", pool_entries(pool, training, teacher.process.num_levels)
        width = getattr(torch, pool.pool_dtype).itemsize
    place_for_dry_run(teacher, student, config.teacher_choice.offload)
    speeds = measured(teacher, student, training)
    needed = estimated(planned, training.max_train_steps, 0, speeds)
    warning = advice(needed, pool)
    odd += f"\n{warning}" if warning else ""
    mebibytes = entries * torch.Size(teacher.sample_shape).numel() * width / 2**20
    start = start_student(student, teacher, config.student_choice, checkpoint_of(config))
    return (
        f"teacher   {teacher.name}: {teacher.num_parameters:,} parameters\n"
        f"student   {student.name}: {student.num_parameters:,} parameters "
        f"({student.num_parameters / teacher.num_parameters:.1%})\n"
        f"{_kind_of(student, teacher)}"
        f"start     {start}\n"
        f"source    {pool.source}: {entries:,} {what}, {mebibytes:,.1f} MiB\n"
        f"cost      {planned[0]:,} teacher evaluations to prepare, {planned[1]:,} to train, "
        "and restarts of chains\n"
        f"time      {in_words(needed)}\n"
        f"output    {config.run.output_dir}{odd}"
    )


def place_for_dry_run(teacher: Denoiser, student: Denoiser, offload: Offload) -> None:
    """Move both models to the device they would compute on."""
    network: nn.Module = student.network  # type: ignore[assignment]
    make_trainable(network.train())
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        place(teacher, device, offload)
        network.to(device)


def _kind_of(student: Denoiser, teacher: Denoiser) -> str:
    """A line on the student's process and parameterization, if they differ from the teacher's."""
    own, other = student.parameterization.prediction, teacher.parameterization.prediction
    if own == other and same_levels(student.process, teacher.process):
        return ""
    unseen = int((~covered(student.process, teacher.process)).sum())
    return (
        f"          {own} on the {student.process.num_levels} levels of "
        f"{student.process.scheduler.get('_class_name', 'its process')} that the teacher "
        f"({other}) has; {unseen} of the teacher's levels weigh nothing\n"
    )
