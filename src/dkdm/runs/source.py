"""What a student learns from: a pool or a synthetic set, its size and its cost."""

from __future__ import annotations

from dataclasses import replace

import torch

from dkdm.config import (
    DistillConfig,
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
from dkdm.core.sources import Source, Synthetic, draw_set, empty_set
from dkdm.errors import UsageError
from dkdm.models import place


def source_of(
    teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
) -> Pool | Synthetic:
    """What the student learns from, unfilled. Moves the teacher to the device."""
    place(teacher, device, config.teacher_choice.offload)
    pool, training, seed = config.pool, config.training, config.run.seed
    if pool.source != "synthetic":
        size = pool_entries(pool, training, teacher.process.num_levels)
        return make_pool(teacher, size, pool, config.guidance, config.conditions, seed, device)
    size = set_size(teacher, pool, training, config.guidance, config.synthetic)
    dropout = config.conditions.condition_dropout
    scale = guidance_of_set(config.guidance)
    source = empty_set(teacher, student, size, seed=seed, condition_dropout=dropout, device=device)
    if student.embeds_guidance:
        source.conditions["guidance"] = torch.full((size,), scale)
    return source


def set_size(
    teacher: Denoiser,
    pool: PoolOptions,
    training: TrainingOptions,
    guidance: GuidanceOptions,
    synthetic: SyntheticOptions,
) -> int:
    """Samples in the synthetic set: as asked, or for as many evaluations as the dynamic source."""
    if synthetic.synthetic_samples is not None:
        return synthetic.synthetic_samples
    dynamic = replace(pool, source="dynamic")
    evaluations = sum(planned_evaluations(teacher, dynamic, training, guidance, synthetic))
    each = synthetic.synthetic_steps * guidance_factor(teacher, guidance)
    return max(training.train_batch_size, int(evaluations // each))


def make_pool(
    teacher: Denoiser,
    size: int,
    pool: PoolOptions,
    guidance: GuidanceOptions,
    conditions: TeacherConditions,
    seed: int,
    device: torch.device,
) -> Pool:
    """An unfilled pool as the options describe it.

    Raises UsageError if it does not fit in memory.
    """
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
    drawn = training.max_train_steps * training.gradient_accumulation_steps * batch
    return max(batch, min(round(pool.rho * num_levels * batch), drawn))


def prepare(source: Source, teacher: Denoiser, config: DistillConfig) -> None:
    """Let the teacher prepare the source: fill the pool, or draw the synthetic set."""
    batch = config.training.train_batch_size
    if isinstance(source, Pool):
        fill(source, config.pool, batch)
    elif isinstance(source, Synthetic):
        steps, scale = config.synthetic.synthetic_steps, guidance_of_set(config.guidance)
        draw_set(source, teacher, steps, scale, batch)


def guidance_of_set(guidance: GuidanceOptions) -> float:
    """The guidance scale of a synthetic set. Raises UsageError for a range."""
    low, high = guidance.scales
    if low != high:
        raise UsageError(
            f"--guidance-scale {guidance.guidance_scale}: --source synthetic takes one number"
        )
    return low


def fill(pool: Pool, options: PoolOptions, batch_size: int) -> None:
    """Prepare the pool as asked; the iterative source stays pure noise at T-1."""
    if options.source == "iterative" or options.fill == "none":
        return
    if options.fill == "ancestral":
        fill_ancestral(pool, batch_size)
    else:
        fill_few_step(pool, options.fill_steps, batch_size)


def guidance_factor(teacher: Denoiser, guidance: GuidanceOptions) -> float:
    """Evaluations of the teacher that one prediction takes, over all levels equally."""
    levels = torch.arange(teacher.process.num_levels)
    return float(teacher.evaluations_at(levels, not guidance.is_off).double().mean())


def planned_evaluations(
    teacher: Denoiser,
    pool: PoolOptions,
    training: TrainingOptions,
    guidance: GuidanceOptions,
    synthetic: SyntheticOptions,
) -> tuple[int, int]:
    """Teacher evaluations to prepare the source, and to train from it, without restarts."""
    doubled = guidance_factor(teacher, guidance)
    if pool.source == "synthetic":
        size = set_size(teacher, pool, training, guidance, synthetic)
        return round(size * synthetic.synthetic_steps * doubled), 0
    batch = training.train_batch_size * training.gradient_accumulation_steps
    to_train = round(training.max_train_steps * batch * doubled)
    if pool.source == "iterative" or pool.fill == "none":
        return 0, to_train
    levels = teacher.process.num_levels
    per_entry = levels / 2 if pool.fill == "ancestral" else pool.fill_steps
    return round(pool_entries(pool, training, levels) * per_entry * doubled), to_train
