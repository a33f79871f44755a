"""`--objective few-step`: a plain run, whose student learns parallel heads in the last part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dkdm.config import DistillConfig
from dkdm.core.chains import Guidance
from dkdm.core.denoiser import Denoiser
from dkdm.core.feature_loss import Features
from dkdm.core.few_steps.grid import grid_levels, grid_of
from dkdm.core.few_steps.heads import ParallelHeads
from dkdm.core.few_steps.objective import HeadsObjective
from dkdm.core.few_steps.rolled import empty_rolled
from dkdm.core.sources import Source
from dkdm.errors import UsageError
from dkdm.runs.arms import ARMS, Teaching, mebibytes
from dkdm.runs.objectives import Loss, Program
from dkdm.runs.source import SourcePlan, guidance_factor
from dkdm.students.heads import with_heads

PLAIN = "plain"  # the folder of the first part, in that of the run
SHARE = 0.35


def plain_steps(config: DistillConfig) -> int:
    """Optimizer steps of the plain part; 0 if the student starts from a run or from weights."""
    share, steps = config.few_steps.few_step_share, config.training.max_train_steps
    if share is None:
        share = SHARE if config.student_choice.student_init in ("random", "teacher") else 1.0
    return min(round(steps * (1 - share)), steps - 1)


class FewSteps(Program):
    """Parallel-head distillation, from the weights of a plain run."""

    def before(self, config: DistillConfig) -> list[DistillConfig]:
        """The plain part, if there is one."""
        steps = plain_steps(config)
        if not steps:
            return []
        folder = config.run.output_dir / PLAIN
        plain: dict[str, Any] = {
            "objective": "dkdm",
            "output_dir": folder,
            "max_train_steps": steps,
        }
        return [replace(config, **plain, push_to_hub=False, hub_model_id=None)]

    def last(self, config: DistillConfig) -> DistillConfig:
        """The part that learns few steps, without what belongs to a chain or to many steps."""
        few, plain = config.few_steps, plain_steps(config)
        folder = config.run.output_dir / PLAIN
        start = str(folder) if plain else config.student_choice.student_init
        return replace(
            config,
            student_init=start,
            max_train_steps=config.training.max_train_steps - plain,
            few_step_share=1.0,
            optimizer="adamw",
            learning_rate=few.few_step_learning_rate,
            feature_weight=0.0,
            replay=1,
            keep_finished=0,
            condition_dropout=0.0,
            random_conditioning=0.0,
            validation_sampling_steps=max(few.steps),
            validation_metric=None,
            ship_best=False,
        )

    def check(self, config: DistillConfig) -> None:
        """Raise UsageError for what few steps cannot be learnt with."""
        super().check(config)
        few, source, batch = config.few_steps, config.pool.source, config.training.train_batch_size
        if ARMS[source].images or not ARMS[source].chains:
            raise UsageError(
                f"--objective few-step: --source {source} has no states of the teacher alone: use "
                "--source dynamic, or distil with --objective dkdm"
            )
        if config.guidance.chain_only:
            raise UsageError(
                "--guidance-on chain: --objective few-step has no chain beside what it learns: use "
                "--guidance-on target, which mixes guidance in once"
            )
        if config.student_choice.lora_rank is not None:
            raise UsageError(
                "--lora-rank: --objective few-step trains a new last layer: remove --lora-rank"
            )
        if few.few_step_pool < batch:
            raise UsageError(
                f"--few-step-pool {few.few_step_pool} is smaller than a batch of {batch}: give "
                f"{batch} or more"
            )

    def teaching(self, teacher: Denoiser, config: DistillConfig) -> Teaching:
        """Its predictions; hidden features are not compared."""
        del teacher, config
        return Teaching(features=False)

    def plan(self, teacher: Denoiser, config: DistillConfig) -> SourcePlan:
        """Nothing to prepare; in training as many evaluations as targets."""
        few, training = config.few_steps, config.training
        batches = training.max_train_steps * training.gradient_accumulation_steps
        asked = batches * training.train_batch_size * few.few_step_targets
        return SourcePlan(
            few.few_step_pool, 0, round(asked * guidance_factor(teacher, config.guidance))
        )

    def describe(self, teacher: Denoiser, config: DistillConfig) -> str:
        """The pool in words."""
        count = config.few_steps.few_step_pool
        return f"the student's own rolls: {count:,} states, {mebibytes(teacher, count, 'float32')}"

    def student(self, student: Denoiser, teacher: Denoiser, config: DistillConfig) -> Denoiser:
        """The student with its last layer N times."""
        few = config.few_steps
        levels = grid_levels(teacher.process, few.few_step_heads, few.few_step_shift)
        return with_heads(student, grid_of(student, teacher.process, levels, few.steps))

    def source(
        self, teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
    ) -> Source:
        """States that the student itself rolls on."""
        few = config.few_steps
        assert isinstance(student, ParallelHeads)
        levels = grid_levels(teacher.process, few.few_step_heads, few.few_step_shift)
        return empty_rolled(
            teacher,
            student,
            levels,
            few.few_step_pool,
            device,
            config.run.seed,
            Guidance.of_options(config.guidance),
            targets=few.few_step_targets,
            on_policy=few.few_step_on_policy,
        )

    def prepare(self, source: Source, teacher: Denoiser, config: DistillConfig) -> None:
        """Nothing: the states begin as noise."""

    def loss(
        self,
        student: Denoiser,
        on_teacher_levels: Denoiser,
        teacher: Denoiser,
        config: DistillConfig,
        features: Features | None,
    ) -> Loss:
        """Head by head."""
        del on_teacher_levels, teacher, config, features
        assert isinstance(student, ParallelHeads)
        return HeadsObjective(student)


OBJECTIVES: dict[str, Program] = {"dkdm": Program(), "few-step": FewSteps()}
