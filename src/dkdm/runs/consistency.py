"""`--objective consistency`: a plain run, whose student learns to jump too in the last part."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from dkdm.config import USUAL_STEPS, DistillConfig
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.matching import on_levels_of
from dkdm.core.distributed.sharded import own_state
from dkdm.core.distributed.spread import spread_of
from dkdm.core.few_steps.grid import grid_levels, grid_of
from dkdm.core.few_steps.jumps import Jumps
from dkdm.core.few_steps.model import FewStep, usual_steps
from dkdm.core.few_steps.pairs import Pairs, PairsObjective, averaged_network
from dkdm.core.few_steps.tasks import for_both_tasks, tasks_of
from dkdm.core.objectives.feature_loss import Features
from dkdm.core.objectives.objective import Objective
from dkdm.core.saving import checkpoint
from dkdm.core.sources.chains import Guidance
from dkdm.core.sources.pool import Pool
from dkdm.core.sources.source import Source
from dkdm.errors import UsageError
from dkdm.evaluation.few_steps import Drawn
from dkdm.reading.fields import read_json
from dkdm.runs.arms import Teaching
from dkdm.runs.defaults import with_pool_of
from dkdm.runs.few_steps import PLAIN, FewSteps, check_states, plain_steps
from dkdm.runs.objectives import Loss, Program
from dkdm.runs.source import SourcePlan, guidance_factor
from dkdm.runs.teachers import make_source, prepare_source
from dkdm.shipping.pipeline_folder import write_pipeline

MANY_STEPS = "many-steps"


class Consistency(FewSteps):
    """Consistency on pairs of the teacher's states, beside the plain loss."""

    ignores: ClassVar[tuple[str, ...]] = (
        "few_step_heads",
        "few_step_targets",
        "few_step_on_policy",
        "few_step_pool",
    )

    def last(self, config: DistillConfig) -> DistillConfig:
        """The part that learns to jump; it goes on with the pool of the plain part."""
        conditions, plain = config.conditions, plain_steps(config)
        return replace(
            super().last(config),
            condition_dropout=conditions.condition_dropout,
            random_conditioning=conditions.random_conditioning,
            fill="none" if plain else config.pool.fill,
        )

    def batch_size(self, config: DistillConfig) -> int:
        """As in the plain part."""
        return config.training.batch_size

    def check(self, config: DistillConfig) -> None:
        """Raise UsageError for what pairs cannot be learnt with."""
        Program.check(self, config)
        check_states(config)
        if config.pool.eta:
            raise UsageError(
                f"--eta {config.pool.eta:g}: --objective consistency learns from pairs of states, "
                "and with noise between them they are not on one trajectory: give --eta 0"
            )
        if config.student_choice.lora_rank is not None:
            raise UsageError(
                "--lora-rank: --objective consistency trains all weights: remove --lora-rank"
            )
        if config.teachers.more_teachers:
            raise UsageError(
                "--objective consistency takes one --teacher: leave the others out, or use "
                "--objective few-step"
            )

    def teaching(self, teacher: Denoiser, config: DistillConfig) -> Teaching:
        """What the pool's teacher says; hidden features are not compared."""
        return replace(Program.teaching(self, teacher, config), features=False)

    def samples(self, config: DistillConfig) -> int:
        """Of the pool's states, and of those at T-1."""
        return Program.samples(self, config) + starts_of(config)

    def plan(self, teacher: Denoiser, config: DistillConfig) -> SourcePlan:
        """The pool's, and the states at T-1."""
        plan, training, starts = (
            Program.plan(self, teacher, config),
            config.training,
            starts_of(config),
        )
        batches = training.max_train_steps * training.gradient_accumulation_steps
        more = round(batches * starts * guidance_factor(teacher, config.guidance))
        return plan._replace(training=plan.training + more)

    def describe(self, teacher: Denoiser, config: DistillConfig) -> str:
        """The pool in words, and what is beside it."""
        share = config.few_steps.start_share
        return f"{Program.describe(self, teacher, config)}; {share:.0%} more states of pure noise"

    def student(self, student: Denoiser, teacher: Denoiser, config: DistillConfig) -> Denoiser:
        """The student on a grid of its sampling steps."""
        few = config.few_steps
        student = for_both_tasks(student, on_levels_of(student, teacher.process))
        try:
            levels = grid_levels(teacher.process, lcm(*few.steps), few.few_step_shift)
        except UsageError as error:
            raise UsageError(
                f"--student-steps {few.student_steps}: the teacher's {teacher.process.num_levels} "
                "levels lie too far apart for a grid of all these: give fewer steps"
            ) from error
        return Jumps.of(student, grid_of(student, teacher.process, levels, few.steps))

    def warning(self, student: Denoiser) -> str:
        """That eps says little where all is noise."""
        fixed = replace(student.parameterization, variance="fixed_small")
        learns = student.parameterization.learns_variance
        return "" if learns else super().warning(replace(student, parameterization=fixed))

    def source(
        self, teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
    ) -> Source:
        """The pool, and states at T-1 beside it."""
        few, network = config.few_steps, student.network
        assert isinstance(network, nn.Module)
        former = plain_checkpoint(config)
        config = with_pool_of(former, config)
        averaged = averaged_network(network, few.pair_decay, device)
        spread = spread_of(config.training.fsdp, device)
        spread.place_beside(replace(student, network=averaged.module))
        return Pairs(
            make_source(teacher, student, replace(config, replay=1), device),
            teacher,
            network,
            averaged,
            few.pair_length,
            few.start_share,
            Guidance.of_options(config.guidance),
            config.conditions.condition_dropout,
            config.run.seed,
            saved=spread.part(averaged, own_state(averaged)),
        )

    def prepare(self, source: Source, teacher: Denoiser, config: DistillConfig) -> None:
        """Take over the pool of the plain part, which counts what it has cost; else fill one."""
        assert isinstance(source, Pairs)
        found = plain_checkpoint(config)
        if found is None:
            prepare_source(source.inner, teacher, config)
            return
        assert isinstance(source.inner, Pool)
        values = read_json(found / checkpoint.STATE, "a checkpoint's state")["parts"]
        with checkpoint.restoring(found):
            for name, part in source.inner.parts().items():
                whole = f"{checkpoint.SOURCE}{name}"
                checkpoint.restore(part, found / f"{whole}.safetensors", values[whole])
        source.inner.evaluated.zero_()

    def loss(
        self,
        student: Denoiser,
        on_teacher_levels: Denoiser,
        teacher: Denoiser,
        config: DistillConfig,
        features: Features | None,
        source: Source,
    ) -> Loss:
        """The plain loss, and that of jumps."""
        plain = Program.loss(self, student, on_teacher_levels, teacher, config, features, source)
        assert isinstance(plain, Objective) and isinstance(source, Pairs)
        averaged = replace(on_teacher_levels, network=source.averaged.module)
        return PairsObjective(plain, teacher, averaged)

    def finished(self, student: Denoiser, network: nn.Module) -> nn.Module:
        """At a level it says where the trajectory ends."""
        model = replace(student, network=network)
        return tasks_of(model).jumping(model)

    def narrow(self, student: FewStep) -> nn.Module:
        """As wide as it is."""
        network: nn.Module = copy.deepcopy(student.network)  # type: ignore[assignment]
        return network

    def ship_beside(self, student: FewStep, folder: Path) -> list[Drawn]:
        """Write the model for many steps, the same weights as they denoise."""
        many = replace(student.without_grid(), network=tasks_of(student).denoising(student))
        write_pipeline(folder / MANY_STEPS, many, folder)
        steps = *student.intervals.steps, usual_steps(many, USUAL_STEPS)
        return [Drawn("student, many steps", many, steps)]


def starts_of(config: DistillConfig) -> int:
    """States of pure noise beside a batch."""
    return round(config.few_steps.start_share * config.training.batch_size)


def plain_checkpoint(config: DistillConfig) -> Path | None:
    """The last checkpoint of the plain part, whose pool is taken over; None to fill one."""
    former = config.run.output_dir / PLAIN
    if config.pool.fill != "none" or not former.is_dir():
        return None
    return checkpoint.resolve(former, "latest")
