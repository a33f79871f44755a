"""What a student learns from: a pool or a synthetic set, its size and its cost."""

from __future__ import annotations

from dataclasses import replace

import torch

from dkdm.config import DistillConfig
from dkdm.core.chains import Guidance, Stride
from dkdm.core.denoiser import Denoiser
from dkdm.core.feature_loss import Features, match_features
from dkdm.core.fill import empty_pool, fill_ancestral, fill_few_step
from dkdm.core.matching import level_weights, on_levels_of
from dkdm.core.objective import Objective
from dkdm.core.pool import Pool
from dkdm.core.sources import Synthetic, draw_set, empty_set
from dkdm.errors import UsageError
from dkdm.models import place


def lesson(
    teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
) -> tuple[Pool | Synthetic, Objective]:
    """What the student learns from, unfilled, and how; the objective's student is the same as it
    looks from the source's levels. Moves the teacher to the device.
    """
    weighting = config.loss_weighting, config.snr_gamma
    if config.source == "synthetic":
        place(teacher, device, config.teacher_offload)
        source = empty_set(
            teacher,
            student,
            set_size(teacher, config),
            seed=config.seed,
            condition_dropout=config.condition_dropout,
            device=device,
        )
        if student.embeds_guidance:
            scale = Guidance.parse(config.guidance_scale).low
            source.conditions["guidance"] = torch.full((len(source.images),), scale)
        return source, Objective(student, None, *weighting)
    objective = Objective(
        on_levels_of(student, teacher.process),
        teacher,
        *weighting,
        config.vlb_weight,
        level_weights(student, teacher, config.loss_weighting),
    )
    return make_pool(teacher, config, device), objective


def make_features(teacher: Denoiser, student: Denoiser, config: DistillConfig) -> Features | None:
    """The hidden features to match, if any. Raises UsageError where there are none to match."""
    if config.feature_weight == 0:
        return None
    if config.source == "synthetic":
        raise UsageError(
            "--feature-weight: with --source synthetic the teacher does not see the batches; "
            "expected 0, or another source"
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
    """An unfilled pool as the config describes it. Moves the teacher to the device.

    Raises UsageError where it does not fit in memory.
    """
    place(teacher, device, config.teacher_offload)
    storage = torch.device("cpu") if config.pool_device == "cpu" else device
    return empty_pool(
        teacher,
        pool_entries(config, teacher.process.num_levels),
        storage,
        getattr(torch, config.pool_dtype),
        stride=Stride.parse(config.stride, teacher.process.num_levels),
        eta=config.eta,
        guidance=Guidance.parse(config.guidance_scale, config.guidance_on == "chain"),
        condition_dropout=config.condition_dropout,
        random_conditioning=config.random_conditioning,
        seed=config.seed,
        shards=config.shards,
    )


def pool_entries(config: DistillConfig, num_levels: int) -> int:
    """How many entries: the batch, or rho * T * batch but no more than the run draws."""
    batch = config.train_batch_size
    if config.source != "dynamic":
        return batch
    if config.pool_size is not None:
        if config.pool_size < batch:
            raise UsageError(f"--pool-size {config.pool_size} is smaller than a batch of {batch}")
        return config.pool_size
    drawn = config.max_train_steps * config.gradient_accumulation_steps * batch
    return max(batch, min(round(config.rho * num_levels * batch), drawn))


def prepare(source: Pool | Synthetic, teacher: Denoiser, config: DistillConfig) -> None:
    """Let the teacher prepare the source: fill the pool, or draw the synthetic set."""
    if isinstance(source, Pool):
        fill(source, config)
        return
    guidance = Guidance.parse(config.guidance_scale)
    if guidance.low != guidance.high:
        raise UsageError(
            f"--guidance-scale {config.guidance_scale}: --source synthetic takes one number"
        )
    steps, batch = config.synthetic_steps, config.train_batch_size
    draw_set(source, teacher, steps, guidance.low, batch)


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
    guided = not Guidance.parse(config.guidance_scale).is_off and not teacher.embeds_guidance
    return 1 + float(teacher.guided_levels.double().mean()) if guided else 1


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
