"""All options of a training run, and how `config.json` keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dkdm.config.conditions import ConditionOptions, GuidanceOptions, TeacherConditions
from dkdm.config.evaluation import EvaluationOptions
from dkdm.config.models import NetworkOptions, SeveralTeachers, StudentOptions, TeacherOptions
from dkdm.config.output import CheckpointOptions, HubOptions, RunOptions
from dkdm.config.pool import DataOptions, ImageOptions, PoolOptions, SyntheticOptions
from dkdm.config.training import (
    FewStepOptions,
    LossOptions,
    OptimizerOptions,
    TrainingOptions,
    WeightingOptions,
)
from dkdm.errors import UsageError
from dkdm.reading.fields import read_json
from dkdm.reading.options import Grouped

MEANT = {
    "batch_size": "train_batch_size",
    "load_best_model_at_end": "ship_best",
    "metric_for_best_model": "validation_metric",
    "epochs": "max_train_steps",
    "iterations": "max_train_steps",
    "lr": "learning_rate",
    "max_steps": "max_train_steps",
    "num_steps": "max_train_steps",
    "output": "output_dir",
    "prediction": "student_prediction",
    "resume": "resume_from_checkpoint",
    "steps": "max_train_steps",
}


class RunConfig(Grouped, meant=MEANT):
    """What every training run has."""

    run: RunOptions
    training: TrainingOptions
    conditions: ConditionOptions
    loss: WeightingOptions
    optimizing: OptimizerOptions
    checkpoints: CheckpointOptions
    evaluation: EvaluationOptions
    hub: HubOptions


class TrainConfig(RunConfig, command="train"):
    """Train a model on images (a teacher, or a baseline).

    examples:
      dkdm train --recipe fashion-teacher
      dkdm train --images path/to/images --sample-shape 3 32 32 --network unet-32m
    """

    data: DataOptions
    model: NetworkOptions


class DistillConfig(RunConfig, command="distill"):
    """Distil a teacher into a student without images.

    examples:
      dkdm distill --recipe demo
      dkdm distill --teacher path/to/ddpm --student dit-tiny --output-dir runs/mine
    """

    teacher_choice: TeacherOptions
    teachers: SeveralTeachers
    student_choice: StudentOptions
    run: RunOptions
    training: TrainingOptions
    conditions: TeacherConditions
    guidance: GuidanceOptions
    pool: PoolOptions
    synthetic: SyntheticOptions
    images_choice: ImageOptions
    loss: LossOptions
    few_steps: FewStepOptions
    optimizing: OptimizerOptions
    checkpoints: CheckpointOptions
    evaluation: EvaluationOptions
    hub: HubOptions

    @property
    def reads_images(self) -> bool:
        """Whether the student sees real images."""
        return self.pool.source in ("images", "mixed")

    @property
    def is_taught(self) -> bool:
        """Whether a teacher's evaluations, samples or weights make the student what it is."""
        by_noise = self.pool.source == "images" and self.images_choice.images_target == "noise"
        return not by_noise or self.student_choice.student_init == "teacher"


def to_json(config: RunConfig) -> str:
    """The config as JSON with its kind, as written to `config.json`: every option by its name."""
    return (
        json.dumps({"kind": type(config).__name__, **config.flat()}, indent=2, default=str) + "\n"
    )


Config = TypeVar("Config", bound=RunConfig)


def from_mapping(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config from JSON values.

    Raises UsageError naming options that are unknown, or have a value of another type.
    """
    return cls(**{key: value for key, value in values.items() if key != "kind"})


def read_config(path: Path) -> TrainConfig | DistillConfig:
    """Read a `config.json`. Raises UsageError if it is missing or not a config."""
    kinds: dict[str, Any] = {cls.__name__: cls for cls in (TrainConfig, DistillConfig)}
    values = read_json(path, "the config.json of a run")
    if not isinstance(values.get("kind"), str) or values["kind"] not in kinds:
        raise UsageError(f"{path}: 'kind' must be one of {', '.join(kinds)}")
    try:
        config: TrainConfig | DistillConfig = from_mapping(kinds[values["kind"]], values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return config
