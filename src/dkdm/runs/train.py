"""Train a model on images: a teacher, or a baseline."""

from __future__ import annotations

import time
from pathlib import Path

from dkdm.config import TrainConfig
from dkdm.core.given import config_given
from dkdm.core.objective import Objective
from dkdm.core.sources import Images
from dkdm.core.trainer import Trainer
from dkdm.data.training_set import training_data
from dkdm.runs.launch import claim_output, start_accelerator
from dkdm.runs.outputs import (
    finish_training,
    sample_grids,
)
from dkdm.shipping.hub import publish, reserve
from dkdm.shipping.pipeline_folder import component_name, write_pipeline
from dkdm.students import student_of


def train(config: TrainConfig) -> Path:
    """Train a model on images; returns the output folder, a diffusers pipeline.

    Raises UsageError for options that do not fit together, DkdmError for a run that fails.
    """
    config = config_given(config, TrainConfig)
    accelerator = start_accelerator(config)
    data, like = training_data(config)
    student = student_of(config.network, like, factory=config.student_factory)
    if config.sampling_guidance_scale != 1 and not student.embeds_guidance:
        student.conditioning.null(1)
    source = Images(
        data.images,
        data.conditions,
        student.process,
        student.parameterization,
        student.conditioning,
        config.seed,
        config.condition_dropout,
        accelerator.device,
    )
    objective = Objective(student, None, config.loss_weighting, config.snr_gamma)
    name = component_name(student.network)  # type: ignore[arg-type]
    trainer = Trainer(config, student, source, objective, accelerator, name, sample_grids(config))
    config = reserve(config)
    found = claim_output(config, accelerator)
    if found:
        trainer.resume(found)
    started = time.monotonic()
    trainer.run()
    accelerator.end_training()
    finished = trainer.averaged()
    write_pipeline(config.output_dir, finished)
    finish_training(config, finished, time.monotonic() - started)
    publish(config)
    return config.output_dir
