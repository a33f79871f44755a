"""Train a model on images: a teacher, or a baseline."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from dkdm.config import TrainConfig
from dkdm.core import processes
from dkdm.core.captured.choice import capture_steps
from dkdm.core.given import config_given
from dkdm.core.objective import Objective
from dkdm.core.sources import Images
from dkdm.core.trainer import Trainer
from dkdm.data.training_set import training_data
from dkdm.models.architectures import component_of
from dkdm.runs.defaults import with_optimizer
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
    run, conditions, evaluation = config.run, config.conditions, config.evaluation
    check_metric(evaluation)
    check_run_folder(run, config.checkpoints, TrainConfig)
    found = checkpoint_of(run, config.checkpoints)
    changes = check_changes(config, found)
    config = with_optimizer(config, found, new=True)
    accelerator = start_accelerator(run, config.training, config.checkpoints)
    data, like = training_data(config.data, config.model, conditions.negative_prompt, run.seed)
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
    reference = processes.main_first(lambda: reference_of(evaluation, model))
    if config.training.acceleration == "graph":
        capture_steps(trainer)  # which says why not
    validate_by_metric(trainer, config, reference)
    processes.own_randomness(run.seed)
    if found:
        trainer.resume(found)
    for note in without_effect(config):
        print(note, file=sys.stderr)
    if line := anew(run, config.checkpoints):
        print(line, file=sys.stderr)
    measure = partial(measure_model, run=run, evaluation=evaluation, reference=reference)
    return carry_out(config, trainer, measure, changes=changes)
