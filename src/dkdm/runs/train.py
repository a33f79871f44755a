"""Train a model on images: a teacher, or a baseline."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from dkdm.config import TrainConfig
from dkdm.core import processes
from dkdm.core.captured.choice import capture_steps
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.given import config_given
from dkdm.core.objectives.objective import Objective
from dkdm.core.sources.images import Images
from dkdm.core.training.trainer import Trainer
from dkdm.data.reference import Reference
from dkdm.data.training_set import TrainingData, training_data
from dkdm.models.architectures import component_of
from dkdm.runs.batch_size import AUTO, Measure, with_batch_size
from dkdm.runs.defaults import with_optimizer
from dkdm.runs.earlier import run_of
from dkdm.runs.launch import anew, carry_out, check_run_folder, checkpoint_of, start_accelerator
from dkdm.runs.models import check_null_condition
from dkdm.runs.outputs import measure_model, reference_of, sample_grids
from dkdm.runs.resume import check_changes, facts_of
from dkdm.runs.validation import check_metric, validate_by_metric
from dkdm.runs.without_effect import without_effect
from dkdm.students import student_of


def train(config: TrainConfig) -> Path:
    """Train a model on images; returns the output folder, a diffusers pipeline.

    Raises UsageError for options that do not fit together, DkdmError for a run that fails.
    """
    with processes.quiet_unless_main():
        return _train(config_given(config, TrainConfig))


def _train(config: TrainConfig) -> Path:
    run, evaluation = config.run, config.evaluation
    check_metric(evaluation)
    check_run_folder(run, config.checkpoints, TrainConfig)
    found = checkpoint_of(run, config.checkpoints)
    config = _with_batch_size(config)
    changes = check_changes(config, found)
    config, trainer, reference = _prepared(config, found)
    if found:
        trainer.resume(found)
    for note in without_effect(config):
        print(note, file=sys.stderr)
    if line := anew(run, config.checkpoints):
        print(line, file=sys.stderr)
    measure = partial(measure_model, run=run, evaluation=evaluation, reference=reference)
    return carry_out(config, trainer, measure, changes=changes)


def _with_batch_size(config: TrainConfig) -> TrainConfig:
    """The config with a number of samples in a batch: a run that goes on has one."""
    if config.training.train_batch_size != AUTO:
        return config
    goes_on = config.checkpoints.resume_from_checkpoint
    begun = run_of(config.run.output_dir) if goes_on else None
    if begun is not None:
        return replace(config, train_batch_size=begun.training.batch_size)

    data = cache(_data_of(config))

    def try_with(tried: TrainConfig, measure: Measure) -> int:
        return measure(_prepared(tried, None, data)[1], None)

    return with_batch_size(config, try_with)


def _data_of(config: TrainConfig) -> Callable[[], tuple[TrainingData, Denoiser]]:
    """Reads the images of a run."""
    negative, seed = config.conditions.negative_prompt, config.run.seed
    return partial(training_data, config.data, config.model, negative, seed)


def _prepared(
    config: TrainConfig,
    found: Path | None,
    read: Callable[[], tuple[TrainingData, Denoiser]] | None = None,
) -> tuple[TrainConfig, Trainer, Reference | None]:
    """The options with what was left open, a trainer before its first step, and what the model is
    measured against.

    found: the checkpoint that the run goes on from. read: gives the images, if they were read.
    """
    run, conditions, evaluation = config.run, config.conditions, config.evaluation
    config = with_optimizer(config, found, new=True)
    accelerator = start_accelerator(run, config.training, config.checkpoints)
    data, like = (read or _data_of(config))()
    model = student_of(config.model.network, like, factory=config.model.student_factory)
    check_null_condition(model, guided=evaluation.sampling_guidance_scale != 1)
    source = Images(
        data.images,
        data.conditions,
        model.process,
        model.parameterization,
        model.conditioning,
        run.seed,
        conditions.condition_dropout,
        accelerator.device,
    )
    trainer = Trainer(
        run.output_dir,
        config.training,
        config.optimizing,
        config.checkpoints,
        model,
        model,
        source,
        Objective(model, None, config.loss),
        accelerator,
        component_of(type(model.network).__name__),
        sample_grids(run, evaluation),
        evaluation.validation_steps,
        about=facts_of(config),
    )
    reference = reference_of(evaluation, model)
    capture_steps(trainer)
    validate_by_metric(trainer, config, reference)
    processes.own_randomness(run.seed)
    return config, trainer, reference
