"""Runs of a few steps with tiny models."""

from dataclasses import replace

import torch

import dkdm
from dkdm.core.saving.progress import read_metrics
from dkdm.runs.arms import prepare_source
from dkdm.runs.defaults import with_defaults
from dkdm.runs.distill import prepared
from dkdm.students import student_of
from factories import denoiser

SMALL = dkdm.DistillConfig(
    max_train_steps=4,
    train_batch_size=8,
    pool_size=24,
    fill_steps=2,
    learning_rate=1e-3,
    lr_scheduler="constant",
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


def begun(folder, learns_variance=False, levels=1, **changes):
    """A trainer just before its first step, its source prepared; teacher and student are tiny."""
    scheduler, channels = {"variance_type": "learned_range"}, 2
    kinds = (scheduler, channels) if learns_variance else (None, 1)
    sizes = {"out_channels": kinds[1], "levels": levels}
    teacher, student = (denoiser(3, kinds[0], seed, **sizes) for seed in (0, 1))
    changes = {"learning_rate": 1e-3, "lr_warmup_steps": 4, "check": False, **changes}
    found = prepared(replace(SMALL, output_dir=folder / "run", **changes), [teacher], student)
    prepare_source(found.trainer.source, found.teacher, found.config)
    found.teacher.network.eval().requires_grad_(False)
    return found.trainer


def state_of(trainer):
    """Every tensor that a checkpoint would keep, but the random state."""
    return {
        f"{name}/{key}": value.clone()
        for name, part in trainer.parts().items()
        for key, value in part.state_dict().items()
        if isinstance(value, torch.Tensor) and name != "random"
    }
