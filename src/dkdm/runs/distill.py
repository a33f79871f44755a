"""Distil a teacher into a student: from options to a finished folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from dkdm.config import DistillConfig, PoolOptions, TrainingOptions
from dkdm.core.denoiser import Denoiser
from dkdm.core.given import config_given, student_given, teacher_given
from dkdm.core.matching import on_levels_of
from dkdm.core.modes import evaluating, put_into_evaluation, say_if
from dkdm.core.trainer import Trainer
from dkdm.models import chosen_teacher, place
from dkdm.models.architectures import component_of
from dkdm.runs.arms import ARMS
from dkdm.runs.cost import advice, estimated, in_words, measured
from dkdm.runs.defaults import with_defaults
from dkdm.runs.launch import carry_out, checkpoint_to_resume, start_accelerator
from dkdm.runs.models import (
    check_null_condition,
    name_of,
    open_student,
    ready_teacher,
    student_warnings,
    teacher_warning,
)
from dkdm.runs.objective import features_of, objective_of
from dkdm.runs.outputs import (
    compare_models,
    reference_of,
    sample_grids,
    sampling_guidance,
)
from dkdm.runs.source import SourcePlan
from dkdm.runs.validation import check_metric, validate_by_metric
from dkdm.shipping.card import Measured
from dkdm.students.lora import merge_lora
from dkdm.students.start import start_student


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
    check_metric(config.evaluation)
    found = checkpoint_to_resume(config.run, config.checkpoints, DistillConfig)
    accelerator = start_accelerator(config.run, config.training, config.checkpoints)
    if not isinstance(teacher, Denoiser):
        teacher = chosen_teacher(config.teacher_choice)
    called = teacher.network, teacher.call, teacher.decode
    say_if(put_into_evaluation(*called))
    with evaluating(*called, frozen=True):
        teacher = ready_teacher(
            teacher, config.conditions, config.guidance, config.evaluation, config.run.seed
        )
        config = with_defaults(config, teacher, found)
        student = open_student(
            teacher,
            config.student_choice,
            ARMS[config.pool.source].teaching(config.images_choice).variance,
            config.teacher_choice.factory,
            student,
        )
        return _distill(teacher, student, config, accelerator, found)


def _distill(
    teacher: Denoiser,
    student: Denoiser,
    config: DistillConfig,
    accelerator: Accelerator,
    found: Path | None,
) -> Path:
    run, training, evaluation = config.run, config.training, config.evaluation
    conditions, guidance, arm = config.conditions, config.guidance, ARMS[config.pool.source]
    guided = sampling_guidance(evaluation, guidance, student)[1] != 1
    check_null_condition(student, guided, conditions.condition_dropout)
    for warning in student_warnings(student, teacher):
        print(warning, file=sys.stderr)
    plan, teaching = arm.plan(teacher, config), arm.teaching(config.images_choice)
    start = start_student(student, teacher, config.student_choice, found)
    print(f"student starts from {start}", file=sys.stderr)
    place(teacher, accelerator.device, config.teacher_choice.offload)
    features = features_of(teacher, student, config.loss, teaching)
    watched = features.watched if features is not None else lambda model: model
    source = arm.make(watched(teacher), student, config, accelerator.device)
    on_teacher_levels = watched(on_levels_of(student, source.process))
    trainer = Trainer(
        run.output_dir,
        training,
        config.optimizer,
        config.checkpoints,
        student,
        on_teacher_levels,
        source,
        objective_of(student, on_teacher_levels, teacher, config.loss, features, teaching),
        accelerator,
        component_of(type(student.network).__name__),
        sample_grids(run, evaluation, teacher, guidance),
        evaluation.validation_steps,
        features=features,
        frozen=start.frozen,
        merge=merge_lora,
    )
    with accelerator.main_process_first():  # the others find what it keeps
        reference = reference_of(evaluation, teacher)
    validate_by_metric(trainer, config, reference, teacher, guidance)

    def begin() -> None:
        check = config.teacher_choice.check
        say_what_it_takes(teacher, student, plan, trainer.step_number, config.pool, training, check)
        if not found:
            arm.prepare(source, teacher, config)
            trainer.save()

    def measure(finished: Denoiser, weights: str) -> Measured:
        return compare_models(teacher, finished, run, evaluation, guidance, reference, weights)

    return carry_out(config, trainer, found, measure, begin, teacher)


def say_what_it_takes(
    teacher: Denoiser,
    student: Denoiser,
    plan: SourcePlan,
    done: int,
    pool: PoolOptions,
    training: TrainingOptions,
    check: bool,
) -> None:
    """Say how long the run takes, and warn about a teacher that does not denoise.

    done: steps that a resumed run has behind it; its teacher is not checked again.
    """
    speeds = measured(teacher, student, training)
    needed = estimated(plan, training.max_train_steps, done, speeds)
    lines = [f"this run takes {in_words(needed)}", advice(needed, pool)]
    if check and not done:
        lines.append(teacher_warning(teacher, speeds.evaluation))
    for line in lines:
        if line:
            print(line, file=sys.stderr)
