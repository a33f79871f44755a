"""Complete runs by name: what each changes in the settings that recipes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from dkdm.config import DistillConfig, RunConfig, TrainConfig
from dkdm.errors import UsageError
from dkdm.runs.paper_recipes import PAPER_RECIPES, TO_BE_GIVEN

Config = TypeVar("Config", bound=RunConfig)
Settings = dict[str, Any]

SHARED: Settings = {
    "train_batch_size": 64,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "checkpointing_steps": 250,
    "validation_steps": 500,
    "validation_sampling_steps": 25,
    "evaluation_samples": 2000,
}
TEACHER: Settings = SHARED | {"max_train_steps": 3000, "lr_warmup_steps": 200, "ema_decay": 0.999}
STUDENT: Settings = SHARED | {
    "max_train_steps": 2000,
    "lr_warmup_steps": 100,
    "ema_decay": 0.995,
    "pool_size": 3072,
    "fill_steps": 10,
    "fill_entries": 1,  # as what is said of these runs was measured
    "stride": "random:50",
    "eta": 0.0,
}
GUIDED: Settings = {"condition_dropout": 0.1, "sampling_guidance_scale": 1.5}
ON_TEST_IMAGES: Settings = {"evaluation_reference": "fashion-test"}
LATENT: Settings = TEACHER | ON_TEST_IMAGES | {"sample_shape": (1, 28, 28)}

RECIPES: dict[str, tuple[type[RunConfig], Settings]] = {
    # The embedded teacher: a class-conditional UNet on Fashion-MNIST at 16x16. An hour on two CPU
    # cores.
    "fashion-teacher": (
        TrainConfig,
        TEACHER | GUIDED | {"output_dir": Path("runs/fashion-teacher"), "max_train_steps": 3500},
    ),
    # A class-conditional transformer that predicts eps on DDPM's linear betas. 40 minutes on a CPU
    # core.
    "fashion-dit-teacher": (
        TrainConfig,
        TEACHER
        | GUIDED
        | ON_TEST_IMAGES
        | {
            "output_dir": Path("runs/fashion-dit-teacher"),
            "network": "dit-xs",
            "scheduler": "ddpm-linear",
            "max_train_steps": 6000,
            "checkpointing_steps": 500,
            "validation_steps": 1000,
        },
    ),
    # An unconditional UNet on the latents of Fashion-MNIST at 28x28. 20 minutes on a CPU core.
    # `scripts/train_fashion_autoencoder.py` and `scripts/make_fashion_bases.py` make its base.
    "fashion-latent-teacher": (
        TrainConfig,
        LATENT
        | {
            "output_dir": Path("runs/fashion-latent"),
            "base": "runs/fashion-latent-base",
            "class_conditional": False,
            "network": "unet-latent",
        },
    ),
    # A text-conditional flow on the same latents, an MM-DiT as in SD3, with captions such as "a
    # white sneaker" made from the labels. Half an hour on a CPU core. The same scripts make its
    # base.
    "fashion-text-teacher": (
        TrainConfig,
        LATENT
        | GUIDED
        | {
            "output_dir": Path("runs/fashion-text"),
            "base": "runs/fashion-text-base",
            "network": "mmdit-tiny",
        },
    ),
    # The embedded teacher into a transformer. Minutes on two CPU cores.
    "demo": (
        DistillConfig,
        STUDENT
        | GUIDED
        | {
            "output_dir": Path("runs/demo"),
            "student": "dit-tiny",
            "max_train_steps": 800,
            "replay": 2,
            "learning_rate": None,
            "loss_weighting": "capped",
            "lr_warmup_steps": 30,
            "ema_decay": 0.98,
            "pool_size": 1024,
            "fill_steps": 8,
            "checkpointing_steps": 400,
            "validation_steps": 200,
            "validation_sampling_steps": 20,
            "evaluation_samples": 400,
        },
    ),
    # The embedded teacher into a transformer that draws in 1, 2, 4 or 8 steps. Eleven minutes on a
    # CPU core.
    "fashion-few-steps": (
        DistillConfig,
        STUDENT
        | {
            "output_dir": Path("runs/fashion-few-steps"),
            "student": "dit-tiny",
            "objective": "few-step",
            "max_train_steps": 2000,
            "few_step_share": 0.5,
            "replay": 2,
            "learning_rate": None,
            "lr_warmup_steps": 30,
            "ema_decay": 0.99,
            "pool_size": 1024,
            "fill_steps": 8,
            "evaluation_samples": 1000,
        },
    ),
    # The embedded teacher into a narrower UNet. Less than an hour on two CPU cores.
    "fashion-small": (
        DistillConfig,
        STUDENT
        | GUIDED
        | {
            "output_dir": Path("runs/fashion-small"),
            "student": "unet-mini",
            "max_train_steps": 3500,
            "ema_decay": 0.998,
            "validation_sampling_steps": 20,
            "evaluation_samples": 5000,
        },
    ),
    # The DDPM transformer into a flow-matching one, which the stock FlowMatchEuler scheduler
    # samples.
    "fashion-flow": (
        DistillConfig,
        STUDENT
        | GUIDED
        | ON_TEST_IMAGES
        | {
            "output_dir": Path("runs/fashion-flow"),
            "teacher": "runs/fashion-dit-teacher",
            "student": "dit-tiny",
            "student_process": "flow",
            "learning_rate": 2e-3,
        },
    ),
    # The latent teacher into a transformer. 20 minutes on a CPU core.
    "fashion-latent": (
        DistillConfig,
        STUDENT
        | ON_TEST_IMAGES
        | {
            "output_dir": Path("runs/fashion-latent-dit"),
            "teacher": "runs/fashion-latent",
            "learning_rate": 2e-3,
        },
    ),
    # The text-conditional flow, a transformer, into a UNet. Half an hour on a CPU core. Its prompts
    # are the 40 captions that `scripts/make_fashion_bases.py` writes.
    "fashion-text": (
        DistillConfig,
        STUDENT
        | GUIDED
        | ON_TEST_IMAGES
        | {
            "output_dir": Path("runs/fashion-text-unet"),
            "teacher": "runs/fashion-text",
            "prompts": "runs/fashion-prompts.txt",
            "student": "text-unet-tiny",
            "max_train_steps": 1200,
        },
    ),
} | PAPER_RECIPES


def recipes(kind: type[RunConfig]) -> list[str]:
    """The names of the recipes of one command."""
    return [name for name, (command, _) in RECIPES.items() if command is kind]


def recipe(name: str, kind: type[Config]) -> Config:
    """The config a recipe's name stands for.

    Raises UsageError for an unknown name, and for a recipe of the other command.
    """
    if name not in recipes(kind):
        raise UsageError(f"--recipe '{name}': give one of {', '.join(recipes(kind))}")
    return kind(**RECIPES[name][1])


def check_given(config: RunConfig) -> None:
    """Raise UsageError if a recipe's config still lacks what only the user has."""
    for value in config.flat().values():
        if isinstance(value, str) and value in TO_BE_GIVEN:
            raise UsageError(
                f"this recipe needs {TO_BE_GIVEN[value]}; --smoke tries the run without"
            )
