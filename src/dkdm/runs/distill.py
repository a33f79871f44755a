"""Distil a teacher into a student: from options to a finished folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dkdm.config import DistillConfig
from dkdm.core.denoiser import Denoiser
from dkdm.core.given import config_given, student_given, teacher_given
from dkdm.core.matching import on_levels_of
from dkdm.core.modes import evaluating, put_into_evaluation, say_if
from dkdm.core.trainer import Trainer
from dkdm.data.reference import Reference
from dkdm.models import chosen_teacher, place
from dkdm.models.architectures import component_of
from dkdm.runs.cost import Estimate, Speeds, advice, estimated, in_words, measured
from dkdm.runs.launch import carry_out, check_run_folder, checkpoint_of, start_accelerator
from dkdm.runs.models import (
    check_null_condition,
    name_of,
    open_student,
    ready_teacher,
    student_reading,
    student_warnings,
    teacher_warning,
)
from dkdm.runs.objective import features_of, objective_of
from dkdm.runs.outputs import (
    Measured,
    compare_models,
    reference_of,
    sample_grids,
    sampling_guidance,
)
from dkdm.runs.source import SourcePlan, plan_source, source_of
from dkdm.students.lora import merge_lora
from dkdm.students.start import Start, start_student


def distill(
    teacher: str | Path | Denoiser | None = None,
    student: str | Path | Denoiser | nn.Module | None = None,
    config: DistillConfig | None = None,
) -> Path:
    """Distil a teacher into a student without images; returns the output folder.

    teacher, student: what the command line takes, or a Denoiser; None takes the config's. A student
    may be a bare network too, called as `network(x_t, t, **cond)`. The folder is a diffusers
    pipeline with a model card, `report.html`, metrics and checkpoints. A teacher in training mode
    is put into evaluation mode, and stays in it.
    Raises UsageError for options that do not fit together, DkdmError for a run that fails.
    """
    teacher = None if teacher is None else teacher_given(teacher)
    student = None if student is None else student_given(student)
    config = DistillConfig() if config is None else config_given(config, DistillConfig)
    config = replace(
        config,
        teacher=name_of(teacher) or config.teacher_choice.model,
        student=name_of(student) or config.student_choice.student,
    )
    check_run_folder(config.run, config.checkpoints, DistillConfig)
    ready = prepared(config, teacher, student)
    teacher, trainer = ready.teacher, ready.trainer
    said = [f"student starts from {ready.start}", f"this run takes {in_words(ready.needed)}"]
    said += ready.warnings
    if config.teacher_choice.check and trainer.step_number == 0:
        said.append(teacher_warning(teacher, ready.speeds.evaluation))
    for line in filter(None, said):
        print(line, file=sys.stderr)

    def begin() -> None:
        if ready.fill is not None:
            ready.fill()
            trainer.save()

    def measure(finished: Denoiser) -> Measured:
        shown = config.run, config.evaluation, config.guidance, ready.reference
        return compare_models(ready.teacher, finished, *shown)

    with evaluating(teacher.network, teacher.call, teacher.decode, frozen=True):
        return carry_out(config, trainer, measure, begin, teacher)


def describe(config: DistillConfig) -> str:
    """What `distill` would do and cost, in words; nothing is written.

    Raises what `distill` raises before its work, but for an output folder that is taken.
    """
    ready, pool = prepared(config), config.pool
    teacher, student, plan = ready.teacher, ready.trainer.student, ready.plan
    is_set = pool.source == "synthetic"
    what, held_in = ("samples", "float32") if is_set else ("entries", pool.pool_dtype)
    numbers = plan.entries * torch.Size(teacher.sample_shape).numel()
    mebibytes = numbers * getattr(torch, held_in).itemsize / 2**20
    lines = [
        f"teacher   {teacher.name}: {teacher.num_parameters:,} parameters",
        f"student   {student.name}: {student.num_parameters:,} parameters "
        f"({student.num_parameters / teacher.num_parameters:.1%})",
        student_reading(student, teacher),
        f"start     {ready.start}",
        f"source    {pool.source}: {plan.entries:,} {what}, {mebibytes:,.1f} MiB",
        f"cost      {plan.preparing:,} teacher evaluations to prepare, {plan.training:,} to train, "
        "and restarts of chains",
        f"time      {in_words(ready.needed)}",
        f"output    {config.run.output_dir}",
        *ready.warnings,
    ]
    return "\n".join(filter(None, lines))


class Ready(NamedTuple):
    """A distillation up to the first write: nothing can be refused any more.

    fill: prepares the source; None if the run goes on from a checkpoint, which holds it.
    """

    teacher: Denoiser
    trainer: Trainer
    fill: Callable[[], None] | None
    plan: SourcePlan
    start: Start
    speeds: Speeds
    needed: Estimate
    reference: Reference | None
    warnings: list[str]


def prepared(
    config: DistillConfig,
    teacher: str | Denoiser | None = None,
    student: str | Denoiser | nn.Module | None = None,
) -> Ready:
    """Teacher, student, source and trainer of a run; given models take the place of named ones."""
    run, training, evaluation = config.run, config.training, config.evaluation
    pool, conditions, guidance = config.pool, config.conditions, config.guidance
    found = checkpoint_of(run, config.checkpoints)
    accelerator = start_accelerator(run, training, config.checkpoints)
    if not isinstance(teacher, Denoiser):
        teacher = chosen_teacher(config.teacher_choice)
    say_if(put_into_evaluation(teacher.network, teacher.call, teacher.decode))
    teacher = ready_teacher(teacher, conditions, guidance, evaluation, run.seed)
    factory = config.teacher_choice.factory
    student = open_student(teacher, config.student_choice, pool.source, factory, student)
    guided = sampling_guidance(evaluation, guidance, student)[1] != 1
    check_null_condition(student, guided, conditions.condition_dropout)
    warnings = student_warnings(student, teacher)
    plan = plan_source(teacher, pool, training, guidance, config.synthetic)
    start = start_student(student, teacher, config.student_choice, found)
    place(teacher, accelerator.device, config.teacher_choice.offload)
    features = features_of(teacher, student, config.loss, pool.source)
    watched = features.watched if features is not None else lambda model: model
    source, fill = source_of(
        watched(teacher),
        student,
        plan.entries,
        pool,
        guidance,
        config.synthetic,
        conditions,
        training.train_batch_size,
        run.seed,
        accelerator.device,
    )
    on_teacher_levels = watched(on_levels_of(student, source.process))
    trainer = Trainer(
        run.output_dir,
        training,
        config.optimizer,
        config.checkpoints,
        student,
        on_teacher_levels,
        source,
        objective_of(student, on_teacher_levels, teacher, config.loss, features, pool.source),
        accelerator,
        component_of(type(student.network).__name__),
        sample_grids(run, evaluation, teacher, guidance),
        evaluation.validation_steps,
        features=features,
        frozen=start.frozen,
        merge=merge_lora,
    )
    reference = reference_of(evaluation, teacher)
    if found:
        trainer.resume(found)
    speeds = measured(teacher, student, training)
    needed = estimated(plan, training.max_train_steps, trainer.step_number, speeds)
    warnings.append(advice(needed, pool))
    filled_by = None if found else fill
    return Ready(teacher, trainer, filled_by, plan, start, speeds, needed, reference, warnings)
