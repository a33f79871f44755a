"""`--objective few-step`: a plain run, whose student learns parallel heads in the last part."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, lcm
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dkdm.config import (
    MOST_HEADS,
    USUAL_STEPS,
    DistillConfig,
    FewStepOptions,
    OptimizerOptions,
)
from dkdm.core import processes
from dkdm.core.denoisers.calls import call_of
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.graphs import Replayed
from dkdm.core.few_steps.grid import grid_levels, grid_of
from dkdm.core.few_steps.heads import ParallelHeads
from dkdm.core.few_steps.model import OWN_SAMPLER, FewStep, usual_steps
from dkdm.core.few_steps.objective import HeadsObjective
from dkdm.core.few_steps.rolled import empty_rolled
from dkdm.core.objectives.feature_loss import Features
from dkdm.core.sources.chains import Guidance
from dkdm.core.sources.source import Source
from dkdm.data.reference import Reference
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.circumstances import circumstances_of
from dkdm.evaluation.comparison import compare
from dkdm.evaluation.few_steps import (
    PLAIN_STUDENT,
    TRAILING,
    Drawn,
    StepsTable,
    measure_steps,
    trailing,
)
from dkdm.evaluation.rows import comparison_rows
from dkdm.models import LoadOptions, load_teacher
from dkdm.models.place import place
from dkdm.runs.arms import ARMS, Teaching, mebibytes
from dkdm.runs.earlier import distillation_of
from dkdm.runs.objectives import Loss, Program
from dkdm.runs.outputs import GRID_COLUMNS, GRID_SAMPLES, sampling_guidance, save_grid
from dkdm.runs.source import SourcePlan, guidance_factor
from dkdm.shipping.card import Measured
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students.heads import narrowed, one_step, with_heads
from dkdm.students.loading import load_student

PLAIN = "plain"  # the folder of the first part, in that of the run
ONE_STEP = "one-step"
FEW_STEPS_GRID = "few-steps"
SHARE = 0.35


def plain_steps(config: DistillConfig) -> int:
    """Optimizer steps of the plain part; 0 if the student starts from a run or from weights."""
    share, steps = config.few_steps.few_step_share, config.training.max_train_steps
    if share is None:
        share = SHARE if config.student_choice.student_init in ("random", "teacher") else 1.0
    return min(round(steps * (1 - share)), steps - 1)


def _optimizing(config: DistillConfig) -> OptimizerOptions:
    """The optimizer of the last part, and its rate: those that trained the weights before."""
    own, rate = config.optimizing, config.few_steps.few_step_learning_rate
    if rate is not None:
        return replace(own, learning_rate=rate).decided(new=False)
    start = config.student_choice.student_init
    begun = None if start in ("random", "teacher") else distillation_of(start)
    if begun is not None and own.optimizer == "auto" and own.learning_rate is None:
        return begun.optimizing.decided(new=False)
    return own.decided(new=start == "random")


def check_states(config: DistillConfig) -> None:
    """Raise UsageError for a source without the teacher's states, and for guidance beside them."""
    source, asked = config.pool.source, f"--objective {config.few_steps.objective}"
    if ARMS[source].images or not ARMS[source].chains:
        raise UsageError(
            f"{asked}: --source {source} has no states of the teacher alone: use --source dynamic, "
            "or distil with --objective dkdm"
        )
    if config.guidance.chain_only:
        raise UsageError(
            f"--guidance-on chain: {asked} has no chain beside what it learns: use --guidance-on "
            "target, which mixes guidance in once"
        )


def check_heads(few: FewStepOptions) -> None:
    """Raise UsageError for numbers of steps that the heads cannot be divided into."""
    heads, steps, least = few.few_step_heads, few.steps, lcm(*few.steps)
    odd = [number for number in steps if heads % number]
    if not odd:
        return
    if max(steps) > heads:
        reason, fitting = f"{max(steps)} steps need as many heads or more", 2 * least
    else:
        reason = f"{odd[0]} does not divide the {heads} intervals of --few-step-heads"
        fitting = least * ceil(heads / least)
    remedy = f"give --few-step-heads {fitting}"
    if fitting > MOST_HEADS:
        remedy = f"give fewer or other steps, which fit into {MOST_HEADS} heads"
    raise UsageError(f"--student-steps {few.student_steps}: {reason}: {remedy}")


class FewSteps(Program):
    """Parallel-head distillation, from the weights of a plain run."""

    ignores: ClassVar[tuple[str, ...]] = ("start_share", "pair_length", "pair_decay")

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
        few, plain, size = config.few_steps, plain_steps(config), self.batch_size(config)
        steps = config.training.max_train_steps - plain
        folder = config.run.output_dir / PLAIN
        start = str(folder) if plain else config.student_choice.student_init
        how = _optimizing(config)
        return replace(
            config,
            student_init=start,
            few_step_share=1.0,
            max_train_steps=max(round(steps * config.training.batch_size / size), 1),
            train_batch_size=size,
            few_step_batch_size=size,
            optimizer=how.optimizer,
            learning_rate=how.learning_rate,
            feature_weight=0.0,
            replay=1,
            keep_finished=0,
            condition_dropout=0.0,
            random_conditioning=0.0,
            validation_sampling_steps=max(few.steps),
            sampling_guidance_scale=1.0,
            validation_metric=None,
            ship_best=False,
        )

    def batch_size(self, config: DistillConfig) -> int:
        """States in a batch of the last part, which takes steps for as many states as otherwise."""
        return config.few_steps.few_step_batch_size or max(config.training.batch_size // 2, 1)

    def check(self, config: DistillConfig) -> None:
        """Raise UsageError for what few steps cannot be learnt with."""
        super().check(config)
        check_states(config)
        check_heads(config.few_steps)
        few, batch = config.few_steps, config.training.batch_size
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

    def samples(self, config: DistillConfig) -> int:
        """One for each target."""
        return super().samples(config) * config.few_steps.few_step_targets

    def plan(self, teacher: Denoiser, config: DistillConfig) -> SourcePlan:
        """Nothing to prepare; in training as many evaluations as targets."""
        few, training = config.few_steps, config.training
        batches = training.max_train_steps * training.gradient_accumulation_steps
        asked = batches * training.batch_size * few.few_step_targets
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

    def warning(self, student: Denoiser) -> str:
        """That a learned variance is dropped, and that eps says little where all is noise."""
        own = student.parameterization
        if own.learns_variance:
            return "note: a few-step student has no variance: the student's is dropped"
        if own.prediction == "epsilon":
            return (
                "warning: the student predicts eps, whose error at pure noise grows in a step from "
                "there: use --student-prediction v_prediction if its weights allow it"
            )
        return ""

    def source(
        self, teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
    ) -> Source:
        """States that the student itself rolls on."""
        few = config.few_steps
        assert isinstance(student, ParallelHeads)
        # a graph's gradients are those of one evaluation, in one process
        once = not few.few_step_anchor and processes.world() == 1
        if once and config.training.replays and config.training.mixed_precision == "no":
            student = replace(student, call=Replayed(student.call or call_of(student.network)))
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
        source: Source,
    ) -> Loss:
        """Head by head."""
        del on_teacher_levels, teacher, features, source
        assert isinstance(student, ParallelHeads)
        return HeadsObjective(student, config.few_steps.few_step_anchor)

    def measure(
        self,
        teacher: Denoiser,
        student: Denoiser,
        config: DistillConfig,
        reference: Reference | None,
        weights: str,
        source: Source,
    ) -> Measured:
        """Write what ships beside, and measure every number of steps beside teacher and plain."""
        del source
        assert isinstance(student, FewStep)
        folder, evaluation = config.run.output_dir, config.evaluation
        others = self.ship_beside(student, folder)
        if evaluation.evaluation_samples == 0:
            return Measured()
        scale, _ = sampling_guidance(evaluation, config.guidance, student)
        many = usual_steps(teacher, USUAL_STEPS)
        first = Drawn("teacher", teacher, (*student.intervals.steps, many), scale)
        if (plain := self.plain(config, student)) is not None:
            steps = *student.intervals.steps, usual_steps(plain, USUAL_STEPS)
            others = [Drawn(PLAIN_STUDENT, plain, steps), *others]
        table, images = _by_steps(first, student, others, config, reference)
        table.save(folder)
        save_grid(folder, FEW_STEPS_GRID, torch.cat(images))
        found = compare(
            trailing(teacher),
            student,
            num_samples=evaluation.evaluation_samples,
            num_steps=max(student.intervals.steps),
            seed=config.run.seed,
            guidance_teacher=scale,
            reference=reference,
        )
        # its outputs are no denoiser's, and the teacher's in so few steps are no aim: see the table
        found = replace(found, weights=weights, gaps=(), teacher_distance=None)
        found = replace(found, sampler=OWN_SAMPLER, teacher_sampler=TRAILING)
        found.save(folder)
        save_grid(folder, "grid", found.samples["student"][:GRID_SAMPLES])
        rows, how = comparison_rows(found), circumstances_of(found).in_words()
        return Measured(1.0, rows, how, found.student.metrics, found.measurement, table)

    def plain(self, config: DistillConfig, student: FewStep) -> Denoiser | None:
        """The model that the student started from, asked for the same as it; None if it was random,
        or its folder is no model."""
        start = config.student_choice.student_init
        if start in ("random", "teacher"):
            return None
        found: Denoiser | None
        try:
            found = load_teacher(start, options=LoadOptions(factory=config.teacher_choice.factory))
        except DkdmError:  # nobody but the user can make the network: here is one
            found = self._in_a_narrow(student, start)
        if found is None:
            return None
        place(found, student.device)
        return replace(found, conditioning=student.conditioning)

    def _in_a_narrow(self, student: FewStep, start: str) -> Denoiser | None:
        network = self.narrow(student)
        if network is None:
            return None
        try:
            return replace(student.without_grid(), network=load_student(start, network=network))
        except DkdmError:  # weights alone
            return None

    def narrow(self, student: FewStep) -> nn.Module | None:
        """A network that the weights of the plain part fit into; None if it cannot be made."""
        assert isinstance(student, ParallelHeads)
        return narrowed(student)

    def ship_beside(self, student: FewStep, folder: Path) -> list[Drawn]:
        """Write the one-step model; returns further models to be measured."""
        assert isinstance(student, ParallelHeads)
        single = one_step(student)
        if single is not None:
            write_pipeline(folder / ONE_STEP, single, folder)
        return []


def _by_steps(
    teacher: Drawn,
    student: FewStep,
    others: list[Drawn],
    config: DistillConfig,
    reference: Reference | None,
) -> tuple[StepsTable, list[Tensor]]:
    steps = student.intervals.steps
    before = [each for each in others if each.name == PLAIN_STUDENT]
    after = [each for each in others if each.name != PLAIN_STUDENT]
    models = [*before, Drawn("student", student, steps), *after]
    count, seed = config.evaluation.evaluation_samples, config.run.seed
    table, images = measure_steps(teacher, models, count, seed, reference, GRID_COLUMNS)
    rows = [("teacher", max(teacher.steps)), *(("student", number) for number in steps)]
    return table, [images[row] for row in rows]
