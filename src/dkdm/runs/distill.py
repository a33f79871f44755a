"""Distil a teacher into a student: from options to a finished folder."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from dkdm.config import DistillConfig
from dkdm.core.denoiser import Denoiser
from dkdm.core.given import config_given, student_given, teacher_given
from dkdm.core.matching import on_levels_of
from dkdm.core.modes import evaluating, put_into_evaluation, say_if
from dkdm.core.trainer import Trainer
from dkdm.runs.cost import advice, estimated, in_words, measured
from dkdm.runs.launch import (
    check_run_folder,
    checkpoint_of,
    claim_output,
    run_to_end,
    start_accelerator,
)
from dkdm.runs.models import (
    check_null_condition,
    name_of,
    open_student,
    open_teacher,
    student_warnings,
    teacher_warning,
    with_conditions,
)
from dkdm.runs.objective import features_of, objective_of
from dkdm.runs.outputs import compare_models, reference_of, sample_grids, write_results
from dkdm.runs.source import planned_evaluations, prepare, source_of
from dkdm.shipping.hub import publish
from dkdm.shipping.pipeline_folder import component_name
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
    check_run_folder(config)
    accelerator = start_accelerator(config.run, config.training, config.checkpoints)
    if not isinstance(teacher, Denoiser):
        loaded = open_teacher(config)
        return _distill(loaded, open_student(loaded, config, student), config, accelerator)
    called = teacher.network, teacher.call, teacher.decode
    say_if(put_into_evaluation(*called))
    with evaluating(*called, frozen=True):
        teacher = with_conditions(teacher, config)
        return _distill(teacher, open_student(teacher, config, student), config, accelerator)


def _distill(
    teacher: Denoiser, student: Denoiser, config: DistillConfig, accelerator: Accelerator
) -> Path:
    check_null_condition(student, config)
    for warning in student_warnings(student, teacher):
        print(warning, file=sys.stderr)
    found = checkpoint_of(config)
    trainer = trainer_of(teacher, student, config, accelerator, found)
    reference = reference_of(config.evaluation, teacher)
    if found:
        trainer.resume(found)
    config = claim_output(config, accelerator)
    say_what_it_takes(teacher, trainer, config)
    if not found:
        prepare(trainer.source, teacher, config)
        trainer.save()
    started = time.monotonic()
    finished = run_to_end(trainer)
    comparison = compare_models(teacher, finished, config, reference)
    seconds = time.monotonic() - started
    write_results(config, teacher, finished, comparison, seconds)
    publish(config.hub, config.run.output_dir)
    return config.run.output_dir


def trainer_of(
    teacher: Denoiser,
    student: Denoiser,
    config: DistillConfig,
    accelerator: Accelerator,
    found: Path | None,
) -> Trainer:
    """A student with its first weights, its source and its objective, ready to train.

    found: the checkpoint that the run goes on from, if any.
    """
    start = start_student(student, teacher, config.student_choice, found)
    synthetic = config.pool.source == "synthetic"
    print(f"student starts from {start}", file=sys.stderr)
    features = features_of(teacher, student, config.loss, synthetic)
    watched = features.watched if features is not None else lambda model: model
    source = source_of(watched(teacher), student, config, accelerator.device)
    on_teacher_levels = watched(on_levels_of(student, source.process))
    objective = objective_of(student, on_teacher_levels, teacher, config.loss, features, synthetic)
    return Trainer(
        config.run.output_dir,
        config.training,
        config.optimizer,
        config.checkpoints,
        student,
        on_teacher_levels,
        source,
        objective,
        accelerator,
        component_name(student.network),  # type: ignore[arg-type]
        sample_grids(config.run, config.evaluation, teacher, config.guidance),
        config.evaluation.validation_steps,
        features=features,
        frozen=start.frozen,
        merge=merge_lora,
    )


def say_what_it_takes(teacher: Denoiser, trainer: Trainer, config: DistillConfig) -> None:
    """Say how long the run takes, and warn about a teacher that does not denoise.

    The teacher of a resumed run is not checked again.
    """
    speeds = measured(teacher, trainer.student, config.training)
    asked = teacher, config.pool, config.training, config.guidance, config.synthetic
    done, planned = trainer.step_number, planned_evaluations(*asked)
    needed = estimated(planned, config.training.max_train_steps, done, speeds)
    lines = [f"this run takes {in_words(needed)}", advice(needed, config.pool)]
    if config.teacher_choice.check and not done:
        lines.append(teacher_warning(teacher, speeds.evaluation))
    for line in lines:
        if line:
            print(line, file=sys.stderr)
