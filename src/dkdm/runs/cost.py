"""What a distillation takes, from the speed of one batch; nothing of the run is touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dkdm.config import DistillConfig, PoolOptions, TrainingOptions
from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.learning import make_trainable
from dkdm.core.matching import covered, same_levels
from dkdm.core.modes import without_label_dropout
from dkdm.evaluation.cost import undisturbed
from dkdm.evaluation.numbers import duration
from dkdm.models import chosen_teacher, place
from dkdm.models.place import Offload
from dkdm.runs.arms import ARMS
from dkdm.runs.defaults import with_defaults
from dkdm.runs.launch import checkpoint_to_resume
from dkdm.runs.models import open_student, ready_teacher, student_warnings
from dkdm.runs.outputs import reference_of
from dkdm.runs.source import SourcePlan
from dkdm.students.start import start_student


@dataclass(frozen=True)
class Speeds:
    """evaluation: seconds of the teacher for one sample. step: of the student for one optimizer
    step, forward and backward."""

    evaluation: float
    step: float


@dataclass(frozen=True)
class Estimate:
    """Seconds to prepare the source and to train, and the teacher evaluations of each."""

    preparing: float
    training: float
    evaluations: tuple[int, int]
    steps: int


def estimated(plan: SourcePlan, steps: int, done: int, speeds: Speeds) -> Estimate:
    """What is left of a run of `steps` steps.

    done: steps that a resumed run has behind it; then nothing is to be prepared.
    """
    left = max(0, steps - done)
    preparing = 0 if done else plan.preparing
    training = round(plan.training * left / max(1, steps))
    return Estimate(
        preparing * speeds.evaluation,
        training * speeds.evaluation + left * speeds.step,
        (preparing, training),
        left,
    )


def in_words(estimate: Estimate) -> str:
    """One line: minutes in total, to prepare and to train, and of what."""
    preparing, training = estimate.evaluations
    total = duration(estimate.preparing + estimate.training)
    first = f"{duration(estimate.preparing)} to prepare ({preparing:,} teacher evaluations)"
    second = f"{duration(estimate.training)} to train ({estimate.steps:,} steps"
    second += f", {training:,} teacher evaluations)" if training else ")"
    return f"{total} in total, by the speed of one batch: {first}, {second}"


def advice(estimate: Estimate, pool: PoolOptions) -> str | None:
    """What to change if preparing takes longer than training; None if it does not."""
    if estimate.preparing <= estimate.training or estimate.preparing < 1:
        return None
    shorter = ARMS[pool.source].shorter(pool)
    return (
        f"warning: preparing takes longer than training: {shorter}; more --max-train-steps make "
        "more use of it"
    )


def describe(config: DistillConfig) -> str:
    """What a distillation would do and cost, in words; nothing is written."""
    pool, training, guidance = config.pool, config.training, config.guidance
    arm = ARMS[pool.source]
    found = checkpoint_to_resume(config.run, config.checkpoints, DistillConfig)
    teacher = chosen_teacher(config.teacher_choice)
    asked = config.conditions, guidance, config.evaluation, config.run.seed
    teacher = ready_teacher(teacher, *asked)
    config = with_defaults(config, teacher, found)
    factory = config.teacher_choice.factory
    variance = arm.teaching(config.images_choice).variance
    student = open_student(teacher, config.student_choice, variance, factory)
    reference_of(config.evaluation, teacher)
    plan = arm.plan(teacher, config)
    place_for_dry_run(teacher, student, config.teacher_choice.offload)
    needed = estimated(plan, training.max_train_steps, 0, measured(teacher, student, training))
    warnings = [*student_warnings(student, teacher), advice(needed, pool)]
    odd = "".join(f"\n{warning}" for warning in warnings if warning)
    start = start_student(student, teacher, config.student_choice, found)
    return (
        f"teacher   {teacher.name}: {teacher.num_parameters:,} parameters\n"
        f"student   {student.name}: {student.num_parameters:,} parameters "
        f"({student.num_parameters / teacher.num_parameters:.1%})\n"
        f"{_kind_of(student, teacher)}"
        f"start     {start}\n"
        f"source    {pool.source}: {arm.size(teacher, config)}\n"
        f"cost      {plan.preparing:,} teacher evaluations to prepare, {plan.training:,} to train, "
        "and restarts of chains\n"
        f"time      {in_words(needed)}\n"
        f"output    {config.run.output_dir}{odd}"
    )


def place_for_dry_run(teacher: Denoiser, student: Denoiser, offload: Offload) -> None:
    """Move both models to the device they would compute on."""
    network: nn.Module = student.network  # type: ignore[assignment]
    make_trainable(network.train())
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        place(teacher, device, offload)
        network.to(device)


def _kind_of(student: Denoiser, teacher: Denoiser) -> str:
    """A line on the student's process and parameterization, if they differ from the teacher's."""
    own, other = student.parameterization.prediction, teacher.parameterization.prediction
    if own == other and same_levels(student.process, teacher.process):
        return ""
    unseen = int((~covered(student.process, teacher.process)).sum())
    return (
        f"          {own} on the {student.process.num_levels} levels of "
        f"{student.process.scheduler.get('_class_name', 'its process')} that the teacher "
        f"({other}) has; {unseen} of the teacher's levels weigh nothing\n"
    )


def measured(teacher: Denoiser, student: Denoiser, training: TrainingOptions) -> Speeds:
    """The speeds of both models in one batch, after a warm-up of two samples.

    Weights, buffers, gradients, modes, counters and the global random state are as before.
    """
    size = training.train_batch_size
    with undisturbed(teacher), torch.no_grad(), torch.random.fork_rng():
        evaluation = _seconds(lambda count: teacher.predict(_batch(teacher, count)), size) / size

    def step(count: int) -> None:
        output = student.predict(_batch(student, count)).output
        output.float().square().mean().backward()

    with _as_before(student), torch.random.fork_rng():
        step_seconds = _seconds(step, size)
    return Speeds(evaluation, step_seconds * training.gradient_accumulation_steps)


def _seconds(work: Callable[[int], object], size: int) -> float:
    work(2)
    _wait()
    started = time.perf_counter()
    work(size)
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _batch(denoiser: Denoiser, count: int) -> Batch:
    random = torch.Generator().manual_seed(0)
    cond = denoiser.conditioning.draw(count, random)
    x = torch.randn(count, *denoiser.sample_shape, generator=random).to(denoiser.device)
    t = torch.randint(denoiser.process.num_levels, (count,), generator=random)
    return Batch(x, t, cond, t)


@contextmanager
def _as_before(student: Denoiser) -> Iterator[None]:
    """Train without a trace: buffers, gradients and counter as they were."""
    network = student.network
    assert isinstance(network, nn.Module)
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    gradients = [(weight, weight.grad) for weight in network.parameters()]
    for weight, _ in gradients:
        weight.grad = None
    try:
        with without_label_dropout(network):
            yield
    finally:
        for weight, gradient in gradients:
            weight.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
