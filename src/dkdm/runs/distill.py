"""Whole runs: `train` and `distill`, from a config to a finished output folder."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from dkdm.config import DistillConfig
from dkdm.core.conditioning import for_student
from dkdm.core.denoiser import Denoiser
from dkdm.core.given import config_given, student_given, teacher_given
from dkdm.core.modes import evaluating, put_into_evaluation, say_if
from dkdm.core.trainer import Trainer
from dkdm.runs.cost import advice, estimated, in_words, measured
from dkdm.runs.launch import claim_output, start_accelerator
from dkdm.runs.models import (
    _is_told_nothing,
    _name_of,
    _refuse_shared_network,
    open_student,
    open_teacher,
    student_warnings,
    teacher_warning,
    with_conditions,
)
from dkdm.runs.outputs import (
    compare_models,
    finish_distillation,
    side_by_side_grids,
)
from dkdm.runs.source import lesson, make_features, planned_evaluations, prepare
from dkdm.shipping.hub import publish, reserve
from dkdm.shipping.pipeline_folder import component_name, write_pipeline
from dkdm.students import given_student
from dkdm.students.lora import merge_lora
from dkdm.students.space import check_same_samples
from dkdm.students.start import begin


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
        teacher=_name_of(teacher) or config.teacher,
        student=_name_of(student) or config.student,
    )
    accelerator = start_accelerator(config)
    if not isinstance(teacher, Denoiser):
        return _distill(open_teacher(config), student, config, accelerator)
    called = teacher.network, teacher.call, teacher.decode
    say_if(put_into_evaluation(*called))
    with evaluating(*called, frozen=True):
        return _distill(with_conditions(teacher, config), student, config, accelerator)


def _distill(
    taught_by: Denoiser,
    student: str | Denoiser | nn.Module | None,
    config: DistillConfig,
    accelerator: Accelerator,
) -> Path:
    _refuse_shared_network(taught_by, student)
    if isinstance(student, Denoiser):
        coders = student.bundle.autoencoder, taught_by.bundle.autoencoder
        check_same_samples(student.sample_shape, taught_by.sample_shape, coders)
        bundle = student.bundle if student.bundle.components else taught_by.bundle
        given = replace(
            student,
            conditioning=for_student(taught_by.conditioning),
            bundle=bundle,
            decode=student.decode or taught_by.decode,
            guidance_interval=taught_by.guidance_interval,
        )
        learner = given_student(given)
    else:
        learner = open_student(taught_by, config, student)
    if _is_told_nothing(learner, config):
        learner.check(learner.conditioning.null(2))
    for warning in student_warnings(learner, taught_by):
        print(warning, file=sys.stderr)
    start = begin(learner, taught_by, config)
    print(f"student starts from {start}", file=sys.stderr)
    source, objective = lesson(taught_by, learner, config, accelerator.device)
    trainer = Trainer(
        config,
        objective.student,
        source,
        objective,
        accelerator,
        component_name(learner.network),  # type: ignore[arg-type]
        side_by_side_grids(config, taught_by),
        shipped=learner,
        teacher=taught_by,
        features=make_features(taught_by, learner, config),
        frozen=start.frozen,
        merge=merge_lora,
    )
    config = reserve(config)
    found = claim_output(config, accelerator)
    if found:
        trainer.resume(found)
    say_what_it_takes(taught_by, trainer, config)
    if not found:
        prepare(source, taught_by, config)
        trainer.save()
    started = time.monotonic()
    trainer.run()
    accelerator.end_training()
    finished = trainer.averaged()
    write_pipeline(config.output_dir, finished)
    comparison = compare_models(taught_by, finished, config)
    seconds = time.monotonic() - started
    finish_distillation(config, taught_by, finished, comparison, seconds)
    publish(config)
    return config.output_dir


def say_what_it_takes(teacher: Denoiser, trainer: Trainer, config: DistillConfig) -> None:
    """Say how long the run takes, and that the teacher does not denoise where it does not.

    The check's evaluations are not counted, and a resumed run is not checked again.
    """
    speeds = measured(teacher, trainer.student, config, trainer.accelerator.autocast)
    done, planned = trainer.step_number, planned_evaluations(teacher, config)
    needed = estimated(planned, config.max_train_steps, done, speeds)
    lines = [f"this run takes {in_words(needed)}", advice(needed, config)]
    if config.check and not done:
        lines.append(teacher_warning(teacher, speeds.evaluation))
    for line in lines:
        if line:
            print(line, file=sys.stderr)
