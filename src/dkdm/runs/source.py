"""What a student learns from: a pool or a synthetic set, its size and its cost."""

from __future__ import annotations

from dataclasses import replace

import torch

from dkdm.config import DistillConfig
from dkdm.core.chains import Guidance, Stride
from dkdm.core.denoiser import Denoiser
from dkdm.core.feature_loss import Features, match_features
from dkdm.core.fill import empty_pool, fill_ancestral, fill_few_step
from dkdm.core.matching import level_weights
from dkdm.core.objective import Objective
from dkdm.core.pool import Pool
from dkdm.core.shards import Shards
from dkdm.core.sources import Source, Synthetic, draw_set, empty_set
from dkdm.errors import UsageError
from dkdm.models import place


def source_of(
    teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
) -> Pool | Synthetic:
    """What the student learns from, unfilled. Moves the teacher to the device."""
    place(teacher, device, config.teacher_offload)
    if config.source != "synthetic":
        return make_pool(teacher, config, device)
    scale = guidance_of_set(config)
    source = empty_set(
        teacher,
        student,
        set_size(teacher, config),
        seed=config.seed,
        condition_dropout=config.condition_dropout,
        device=device,
    )
    if student.embeds_guidance:
        source.conditions["guidance"] = torch.full((len(source.images),), scale)
    return source


def objective_of(
    student: Denoiser,
    on_teacher_levels: Denoiser,
    teacher: Denoiser,
    config: DistillConfig,
    features: Features | None,
) -> Objective:
    """What the student is to be like. With a synthetic set no teacher sees the batches."""
    if config.source == "synthetic":
        return Objective(student, None, config.loss)
    weights = level_weights(student, teacher, config.loss.loss_weighting)
    further = () if features is None else (features,)
    return Objective(on_teacher_levels, teacher, config.loss, weights, further)


def features_of(teacher: Denoiser, student: Denoiser, config: DistillConfig) -> Features | None:
    """The hidden features to match, if any. Raises UsageError if there are none to match."""
    if config.feature_weight == 0:
        return None
    if config.source == "synthetic":
        raise UsageError(
            "--feature-weight: with --source synthetic the teacher does not see the batches: "
            "remove --feature-weight, or choose another --source"
        )
    return match_features(teacher, student, config.feature_layers, config.feature_weight)


def set_size(teacher: Denoiser, config: DistillConfig) -> int:
    """Samples in the synthetic set: as asked, or for as many evaluations as the dynamic source."""
    if config.synthetic_samples is not None:
        return config.synthetic_samples
    filling, training = planned_evaluations(teacher, replace(config, source="dynamic"))
    return max(
        config.train_batch_size,
        int((filling + training) // (config.synthetic_steps * guidance_factor(teacher, config))),
    )


def make_pool(teacher: Denoiser, config: DistillConfig, device: torch.device) -> Pool:
    """An unfilled pool as the config describes it.

    Raises UsageError if it does not fit in memory.
    """
    storage = torch.device("cpu") if config.pool_device == "cpu" else device
    return empty_pool(
        teacher,
        pool_entries(config, teacher.process.num_levels),
        storage,
        getattr(torch, config.pool_dtype),
        stride=Stride.parse(config.stride, teacher.process.num_levels),
        eta=config.eta,
        guidance=Guidance.of_options(config.guidance),
        condition_dropout=config.condition_dropout,
        random_conditioning=config.random_conditioning,
        seed=config.seed,
        shards=Shards(config.shards),
    )


def pool_entries(config: DistillConfig, num_levels: int) -> int:
    """Entries of the pool: the batch, or rho * T * batch, but at most what the run draws."""
    batch = config.train_batch_size
    if config.source != "dynamic":
        return batch
    if config.pool_size is not None:
        if config.pool_size < batch:
            raise UsageError(
                f"--pool-size {config.pool_size} is smaller than a batch of {batch}: give {batch} "
                "or more"
            )
        return config.pool_size
    drawn = config.max_train_steps * config.gradient_accumulation_steps * batch
    return max(batch, min(round(config.rho * num_levels * batch), drawn))


def prepare(source: Source, teacher: Denoiser, config: DistillConfig) -> None:
    """Let the teacher prepare the source: fill the pool, or draw the synthetic set."""
    if isinstance(source, Pool):
        fill(source, config)
    elif isinstance(source, Synthetic):
        steps, batch = config.synthetic_steps, config.train_batch_size
        draw_set(source, teacher, steps, guidance_of_set(config), batch)


def guidance_of_set(config: DistillConfig) -> float:
    """The guidance scale of a synthetic set. Raises UsageError for a range."""
    low, high = config.guidance.scales
    if low != high:
        raise UsageError(
            f"--guidance-scale {config.guidance_scale}: --source synthetic takes one number"
        )
    return low


def fill(pool: Pool, config: DistillConfig) -> None:
    """Prepare the pool as the config says; the iterative source stays pure noise at T-1."""
    if config.source == "iterative" or config.fill == "none":
        return
    if config.fill == "ancestral":
        fill_ancestral(pool, config.train_batch_size)
    else:
        fill_few_step(pool, config.fill_steps, config.train_batch_size)


def guidance_factor(teacher: Denoiser, config: DistillConfig) -> float:
    """Evaluations of the teacher that one prediction takes, over all levels equally."""
    levels = torch.arange(teacher.process.num_levels)
    return float(teacher.evaluations_at(levels, not config.guidance.is_off).double().mean())


def planned_evaluations(teacher: Denoiser, config: DistillConfig) -> tuple[int, int]:
    """Teacher evaluations to prepare the source, and to train from it, without restarts."""
    doubled = guidance_factor(teacher, config)
    if config.source == "synthetic":
        return round(set_size(teacher, config) * config.synthetic_steps * doubled), 0
    batch = config.train_batch_size * config.gradient_accumulation_steps
    training = round(config.max_train_steps * batch * doubled)
    if config.source == "iterative" or config.fill == "none":
        return 0, training
    levels = teacher.process.num_levels
    per_entry = levels / 2 if config.fill == "ancestral" else config.fill_steps
    return round(pool_entries(config, levels) * per_entry * doubled), training
