"""What a source is made with: its size, its cost, and an unfilled pool."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from dkdm.config import (
    GuidanceOptions,
    PoolOptions,
    RunOptions,
    TeacherConditions,
)
from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.shards import Shards
from dkdm.core.sources.chains import Guidance, Stride
from dkdm.core.sources.fill import empty_pool, fill_ancestral, fill_few_step
from dkdm.core.sources.filling import Filling
from dkdm.core.sources.pool import Pool
from dkdm.errors import UsageError
from dkdm.evaluation.fastest import fastest, seconds_a_sample
from dkdm.reading.files import check_output

FILL = "fill"  # folder of a run, of pools that are not filled yet
# what decides a pool's size and beginning, and what moves, stores and shows its states
OF_A_FILL = ("pool_size", "rho", "fill", "fill_steps", "fill_entries", "fill_batch_size")
OF_CHAINS = (
    *("stride", "eta", "random_conditioning"),
    *("shards", "pool_dtype", "pool_device", "pool_dir", "pool_pinned"),
)


class SourcePlan(NamedTuple):
    """The size of a source and what it costs.

    entries: noisy samples in the pool, or clean ones in a set; 0 where only the images say it.
    preparing, training: teacher evaluations before and during training, without restarts of chains.
    """

    entries: int
    preparing: int
    training: int


def make_pool(
    teacher: Denoiser,
    size: int,
    pool: PoolOptions,
    guidance: GuidanceOptions,
    conditions: TeacherConditions,
    device: torch.device,
    run: RunOptions,
    kind: type[Pool] = Pool,
) -> Pool:
    """An unfilled pool as the options describe it."""
    return empty_pool(
        teacher,
        size,
        device if pool.pool_device == "device" else torch.device("cpu"),
        getattr(torch, pool.pool_dtype),
        Shards(pool.shards, processes.rank(), processes.world()),
        kind,
        _folder(pool, run),
        stride=Stride.of_options(pool, teacher.process.num_levels),
        eta=pool.eta,
        guidance=Guidance.of_options(guidance),
        condition_dropout=conditions.condition_dropout,
        random_conditioning=conditions.random_conditioning,
        seed=run.seed,
        pinned=pool.pool_pinned,
    )


def _folder(pool: PoolOptions, run: RunOptions) -> Path | None:
    """The folder on whose disk the pool lies; None for one in memory."""
    if pool.pool_device != "disk":
        return None
    if pool.pool_dir is None:
        return run.output_dir
    return check_output("--pool-dir", pool.pool_dir, folder=True, overwrite=True)


def guidance_of_set(guidance: GuidanceOptions) -> float:
    """The guidance scale of a synthetic set. Raises UsageError for a range."""
    low, high = guidance.scales
    if low != high:
        raise UsageError(
            f"--guidance-scale {guidance.guidance_scale}: --source synthetic takes one number"
        )
    return low


def fill(
    pool: Pool, options: PoolOptions, batch_size: int, output_dir: Path, others: bool = False
) -> None:
    """Prepare the pool as asked; what a killed run had filled in `output_dir` is taken over.

    others: whether the run has other pools, which other teachers fill.
    """
    place = f"{pool.seed}-{pool.shards.rank}-of-{pool.shards.world}"
    how = {
        "batch_size": batch_size,
        "fill": options.fill,
        "fill_steps": options.fill_steps,
        "fill_entries": options.entries_of_a_sample,
    }
    filling = Filling(pool, output_dir / FILL / place, how, others or processes.world() > 1)
    with filling.kept():
        if options.fill == "none":
            return
        together = max(1, _at_once(pool, options, batch_size) // batch_size)
        if options.fill == "ancestral":
            fill_ancestral(pool, batch_size, filling, together)
        else:
            each = options.fill_steps, batch_size, filling, together, options.entries_of_a_sample
            fill_few_step(pool, *each)


def _at_once(pool: Pool, options: PoolOptions, batch_size: int) -> int:
    """How many samples the fill evaluates at once: as asked, or what the device is fastest with."""
    if options.fill_batch_size != "auto":
        return options.fill_batch_size or batch_size
    most = max(part.stop - part.start for part in pool.entries.slices.values())
    found = fastest(partial(seconds_a_sample, pool.teacher), batch_size, most)
    print(f"the fill evaluates {found:,} samples at once", file=sys.stderr)
    return found


def guidance_factor(teacher: Denoiser, guidance: GuidanceOptions) -> float:
    """Evaluations of the teacher that one prediction takes, over all levels equally."""
    levels = torch.arange(teacher.process.num_levels)
    return float(teacher.evaluations_at(levels, not guidance.is_off).double().mean())
