"""What a distillation takes, from the fastest of a few batches; nothing of the run is touched."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from dkdm.config import PoolOptions, TrainingOptions
from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.modes import without_label_dropout
from dkdm.core.distributed.sharded import is_sharded
from dkdm.evaluation.cost import probe, undisturbed
from dkdm.evaluation.numbers import duration
from dkdm.runs.arms import ARMS
from dkdm.runs.source import SourcePlan

MOST_BATCHES = 8
ENOUGH = 3.0  # seconds of batches, after which no more is begun


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
    speed = "by the fastest of a few batches, longer beside other work"
    return f"{total} in total, {speed}: {first}, {second}"


def advice(estimate: Estimate, pool: PoolOptions) -> str:
    """What to change if preparing takes longer than training; empty if it does not."""
    if estimate.preparing <= estimate.training or estimate.preparing < 1:
        return ""
    shorter = ARMS[pool.source].shorter(pool)
    return (
        f"warning: preparing takes longer than training: {shorter}; more --max-train-steps make "
        "more use of it"
    )


def measured(teacher: Denoiser, student: Denoiser, training: TrainingOptions) -> Speeds:
    """The speeds of both models in batches of a run, after a warm-up.

    Of all processes, which measure at the same time, each in its part of a batch.
    Weights, buffers, gradients, modes, counters and the global random state are as before.
    """
    world = processes.world()
    size = math.ceil(training.batch_size / world)
    with undisturbed(teacher), torch.no_grad(), torch.random.fork_rng():
        evaluation = _seconds(lambda count: teacher.predict(probe(teacher, count)), size) / size

    network: nn.Module = student.network  # type: ignore[assignment]
    if not any(map(is_sharded, network.parameters())):  # which cannot be copied
        network = copy.deepcopy(network)
    learner = replace(student, network=network)

    def step(count: int) -> None:
        output = learner.predict(probe(learner, count)).output
        output.float().square().mean().backward()

    with torch.random.fork_rng(), without_label_dropout(network):
        step_seconds = _seconds(step, size)
    network.zero_grad(set_to_none=True)
    return Speeds(evaluation / world, step_seconds * training.gradient_accumulation_steps)


def _seconds(work: Callable[[int], object], size: int) -> float:
    """Seconds of a batch on a machine that does nothing else: the fastest of a few, since other
    programs, and the first use of kernels, only ever hold one up.

    Without an accelerator, seconds that this thread computes: it takes part in all of a batch, and
    waiting for a core is not counted. Slow models are timed once. Several processes call sharded
    networks together, so that they take equally many.
    """
    alone = processes.world() == 1
    most = MOST_BATCHES if alone else 2
    clock = time.perf_counter if torch.accelerator.is_available() else time.thread_time
    work(2)
    times: list[float] = []
    while len(times) < most and not (alone and sum(times) > ENOUGH):
        _wait()
        started = clock()
        work(size)
        _wait()
        times.append(clock() - started)
    return min(times)


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
