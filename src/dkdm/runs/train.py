"""Train a model on images: a teacher, or a baseline."""

from __future__ import annotations

import time
from pathlib import Path

from accelerate import Accelerator

from dkdm.config import TrainConfig
from dkdm.core.given import config_given
from dkdm.core.objective import Objective
from dkdm.core.sources import Images
from dkdm.core.trainer import Trainer
from dkdm.data.training_set import training_data
from dkdm.runs.launch import (
    check_run_folder,
    checkpoint_of,
    claim_output,
    run_to_end,
    start_accelerator,
)
from dkdm.runs.outputs import reference_of, sample_grids, write_results_of_training
from dkdm.shipping.hub import publish
from dkdm.shipping.pipeline_folder import component_name
from dkdm.students import student_of


def train(config: TrainConfig) -> Path:
    """Train a model on images; returns the output folder, a diffusers pipeline.

    Raises UsageError for options that do not fit together, DkdmError for a run that fails.
    """
    config = config_given(config, TrainConfig)
    check_run_folder(config)
    accelerator = start_accelerator(config.run, config.training, config.checkpoints)
    trainer = trainer_of(config, accelerator)
    reference = reference_of(config.evaluation, trainer.student)
    found = checkpoint_of(config)
    if found:
        trainer.resume(found)
    config = claim_output(config, accelerator)
    started = time.monotonic()
    finished = run_to_end(trainer)
    write_results_of_training(config, finished, reference, time.monotonic() - started)
    publish(config.hub, config.run.output_dir)
    return config.run.output_dir


def trainer_of(config: TrainConfig, accelerator: Accelerator) -> Trainer:
    """A model with random weights, its images and its objective, ready to train."""
    data, like = training_data(config)
    model = student_of(config.model.network, like, factory=config.model.student_factory)
    if config.evaluation.sampling_guidance_scale != 1 and not model.embeds_guidance:
        model.conditioning.null(1)
    source = Images(
        data.images,
        data.conditions,
        model.process,
        model.parameterization,
        model.conditioning,
        config.run.seed,
        config.conditions.condition_dropout,
        accelerator.device,
    )
    objective = Objective(model, None, config.loss)
    name = component_name(model.network)  # type: ignore[arg-type]
    return Trainer(
        config.run.output_dir,
        config.training,
        config.optimizer,
        config.checkpoints,
        model,
        model,
        source,
        objective,
        accelerator,
        name,
        sample_grids(config.run, config.evaluation),
        config.evaluation.validation_steps,
    )
