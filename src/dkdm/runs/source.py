"""What a student learns from: a pool or a synthetic set, its size and its cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from dkdm.config import (
    GuidanceOptions,
    PoolOptions,
    SyntheticOptions,
    TeacherConditions,
    TrainingOptions,
)
from dkdm.core.chains import Guidance, Stride
from dkdm.core.denoiser import Denoiser
from dkdm.core.fill import empty_pool, fill_ancestral, fill_few_step
from dkdm.core.pool import Pool
from dkdm.core.shards import Shards
from dkdm.core.sources import Synthetic, draw_set, empty_set
from dkdm.errors import UsageError


class SourcePlan(NamedTuple):
    """The size of a source and what it costs.

    entries: noisy samples in the pool, or finished ones in the synthetic set. preparing, training:
    teacher evaluations before and during training, without restarts of chains.
    """

    entries: int
    preparing: int
    training: int


def plan_source(
    teacher: Denoiser,
    pool: PoolOptions,
    training: TrainingOptions,
    guidance: GuidanceOptions,
    synthetic: SyntheticOptions,
) -> SourcePlan:
    """What the options come to. A synthetic set of no given size costs what a dynamic pool does."""
    every = torch.arange(teacher.process.num_levels)
    each = float(teacher.evaluations_at(every, not guidance.is_off).double().mean())
    if pool.source == "synthetic":
        steps, size = synthetic.synthetic_steps, synthetic.synthetic_samples
        if size is None:
            dynamic = replace(pool, source="dynamic")
            _, *costs = plan_source(teacher, dynamic, training, guidance, synthetic)
            size = max(training.train_batch_size, int(sum(costs) // (steps * each)))
        return SourcePlan(size, round(size * steps * each), 0)
    levels = teacher.process.num_levels
    size = pool_entries(pool, training, levels)
    per_entry = levels / 2 if pool.fill == "ancestral" else pool.fill_steps
    preparing = 0 if pool.starts_as_noise else round(size * per_entry * each)
    return SourcePlan(size, preparing, round(training.samples_drawn * each))


def source_of(
    teacher: Denoiser,
    student: Denoiser,
    size: int,
    pool: PoolOptions,
    guidance: GuidanceOptions,
    synthetic: SyntheticOptions,
    conditions: TeacherConditions,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> tuple[Pool | Synthetic, Callable[[], None]]:
    """What the student learns from, with `size` entries, and what fills it.

    Raises UsageError if it does not fit in memory, and for a synthetic set with a range of scales.
    """
    if pool.source != "synthetic":
        states = make_pool(teacher, size, pool, guidance, conditions, seed, device)
        return states, partial(fill, states, pool, batch_size)
    dropout, (low, high) = conditions.condition_dropout, guidance.scales
    if low != high:
        raise UsageError(
            f"--guidance-scale {guidance.guidance_scale}: --source synthetic takes one number"
        )
    images = empty_set(teacher, student, size, seed=seed, condition_dropout=dropout, device=device)
    if student.embeds_guidance:
        images.conditions["guidance"] = torch.full((size,), low)
    return images, partial(draw_set, images, teacher, synthetic.synthetic_steps, low, batch_size)


def make_pool(
    teacher: Denoiser,
    size: int,
    pool: PoolOptions,
    guidance: GuidanceOptions,
    conditions: TeacherConditions,
    seed: int,
    device: torch.device,
) -> Pool:
    """An unfilled pool as the options describe it."""
    return empty_pool(
        teacher,
        size,
        torch.device("cpu") if pool.pool_device == "cpu" else device,
        getattr(torch, pool.pool_dtype),
        Shards(pool.shards),
        stride=Stride.of_options(pool, teacher.process.num_levels),
        eta=pool.eta,
        guidance=Guidance.of_options(guidance),
        condition_dropout=conditions.condition_dropout,
        random_conditioning=conditions.random_conditioning,
        seed=seed,
    )


def pool_entries(pool: PoolOptions, training: TrainingOptions, num_levels: int) -> int:
    """Entries of the pool: the batch, or rho * T * batch, but at most what the run draws."""
    batch = training.train_batch_size
    if pool.source != "dynamic":
        return batch
    if pool.pool_size is not None:
        if pool.pool_size < batch:
            raise UsageError(
                f"--pool-size {pool.pool_size} is smaller than a batch of {batch}: give {batch} "
                "or more"
            )
        return pool.pool_size
    return max(batch, min(round(pool.rho * num_levels * batch), training.samples_drawn))


def fill(pool: Pool, options: PoolOptions, batch_size: int) -> None:
    """Prepare the pool as asked; the iterative source stays pure noise at T-1."""
    if options.starts_as_noise:
        return
    if options.fill == "ancestral":
        fill_ancestral(pool, batch_size)
    else:
        fill_few_step(pool, options.fill_steps, batch_size)
