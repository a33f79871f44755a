"""Runs of a few steps with tiny models."""

from dataclasses import replace

import dkdm
from dkdm.core.progress import read_metrics
from dkdm.runs.defaults import with_defaults
from dkdm.students import student_of
from factories import denoiser

SMALL = dkdm.DistillConfig(
    max_train_steps=4,
    train_batch_size=8,
    pool_size=24,
    fill_steps=2,
    learning_rate=1e-3,
    logging_steps=1,
    validation_steps=0,
    validation_sampling_steps=2,
    evaluation_samples=8,
)


def run(tmp_path, teacher=None, student=None, **changes):
    teacher = teacher or denoiser()
    student = student_of("dit-tiny", teacher) if student is None else student
    config = replace(SMALL, output_dir=tmp_path / "run", **changes)
    folder = dkdm.distill(teacher, student, config)
    metrics = read_metrics(folder / "metrics.jsonl")
    return folder, metrics, metrics[-1]["teacher_evaluations"]


def student_parameterization(teacher):
    """What a new student of a teacher predicts, and the variance that they share."""
    config = with_defaults(dkdm.DistillConfig(), teacher, None)
    prediction = config.student_choice.student_prediction or teacher.parameterization.prediction
    return replace(teacher.parameterization, prediction=prediction)
