"""Whole runs: `train` and `distill`, from a config to a finished output folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from dkdm import checkpoint
from dkdm.conditioning import ClassLabels, Conditioning, Unconditional
from dkdm.config import RunConfig, TrainConfig, read_config, to_json
from dkdm.datasets import load_images
from dkdm.denoiser import Denoiser
from dkdm.errors import UsageError
from dkdm.objective import Objective
from dkdm.prediction import Parameterization
from dkdm.process import from_scheduler_config
from dkdm.sources import Images
from dkdm.students import build_denoiser
from dkdm.trainer import Trainer

COSINE_V = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
}


def train(config: TrainConfig) -> Path:
    """Train a model on images; returns the output folder, a diffusers pipeline.

    Raises UsageError for options that do not fit together, DkdmError for a run that fails.
    """
    scheduler = json.loads(Path(config.scheduler).read_text()) if config.scheduler else COSINE_V
    images, labels = load_images(config.images, config.sample_shape)
    conditioning: Conditioning = Unconditional()
    if labels is not None:
        classes = int(labels.max()) + 1
        conditioning = ClassLabels(classes, null_class=classes)
    process = from_scheduler_config(scheduler)
    parameterization = Parameterization(scheduler.get("prediction_type", "epsilon"))
    accelerator = prepare(config)
    student = build_denoiser(
        config.network, process, parameterization, config.sample_shape, conditioning
    )
    source = Images(
        images,
        labels,
        process,
        parameterization,
        conditioning,
        config.seed,
        config.condition_dropout,
        accelerator.device,
    )
    objective = Objective(student, None, config.loss_weighting, config.snr_gamma)
    trainer = Trainer(config, student, source, objective, accelerator, "unet")
    if config.resume_from_checkpoint:
        found = checkpoint.resolve(config.output_dir, config.resume_from_checkpoint)
        if found:
            trainer.resume(found)
    trainer.run()
    return config.output_dir


def prepare(config: RunConfig) -> Accelerator:
    """Claim the output folder and seed everything.

    Raises UsageError where the folder already holds a run and this is not a resumption of it.
    """
    from accelerate.utils import set_seed

    existing = config.output_dir / "config.json"
    if existing.is_file() and not config.resume_from_checkpoint:
        raise UsageError(
            f"--output-dir {config.output_dir} already holds a run: expected an empty folder, or "
            "--resume-from-checkpoint latest to go on with it"
        )
    set_seed(config.seed)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    existing.write_text(to_json(config))
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
