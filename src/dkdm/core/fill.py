"""What fills a pool: pure noise, few-step samples that are noised again, or exact chains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dkdm.core.chains import joined
from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.filling import Filling
from dkdm.core.pool import Pool
from dkdm.core.progress import track
from dkdm.core.randomness import generator
from dkdm.core.shards import ONE_PROCESS, Shards
from dkdm.core.steps import reverse_step
from dkdm.core.storage import in_memory, on_disk


def uniform_levels(size: int, num_levels: int, random: torch.Generator) -> Tensor:
    """Levels spread evenly over 0..T-1 in random order, int64 [size]."""
    u = (torch.arange(size) + torch.rand(size, generator=random, dtype=torch.float64)) / size
    levels = (u * num_levels).long().clamp(max=num_levels - 1)
    return levels[torch.randperm(size, generator=random)]


def empty_pool(
    teacher: Denoiser,
    size: int,
    storage: torch.device,
    dtype: torch.dtype,
    shards: Shards = ONE_PROCESS,
    kind: type[Pool] = Pool,
    folder: Path | None = None,
    **fields: object,
) -> Pool:
    """A pool of pure noise with every entry at T-1, ready to be filled.

    folder: on whose disk the states lie, mapped into the memory of the CPU; None: in the storage
    device's memory. Raises UsageError if they do not fit in what is free there.
    """
    shards = replace(shards, total=min(shards.total, size))
    shards.check(size)
    shape = (sum(shards.sizes(size).values()), *teacher.sample_shape)
    x = in_memory(shape, dtype, storage) if folder is None else on_disk(shape, dtype, folder)
    t = torch.full((len(x),), teacher.process.num_levels - 1)
    pool = kind(teacher, x, t, {}, shards=shards, size=size, **fields)  # type: ignore[arg-type]
    conds = []
    for shard, here in pool.entries.slices.items():
        noise = generator(x.device, pool.seed, "start", shard)
        x[here].normal_(generator=noise).mul_(teacher.process.start_std)
        host = generator("cpu", pool.seed, "condition", shard)
        conds.append(pool.new_conditions(here.stop - here.start, host))
    pool.cond = joined(conds)
    return pool


@torch.no_grad()
def fill_few_step(
    pool: Pool, num_steps: int, batch_size: int, filling: Filling | None = None
) -> None:
    """Spread the entries over all levels: sample each in `num_steps` DDIM steps, then noise it.

    Costs num_steps teacher evaluations per entry. The few-step sampler decides which states there
    are; the target of each is exact. The steps start at T-1 (trailing spacing), the level of pure
    noise, whatever spacing the teacher has. filling: knows what is done, and notes what is.
    """
    teacher, filling = pool.teacher, filling or Filling(pool)
    for part, levels, noise in _parts(filling, batch_size, "few-step fill"):
        cond = {key: value[part] for key, value in pool.cond.items()}
        shape = (len(levels), *teacher.sample_shape)

        def draw(
            step: int, shape: tuple[int, ...] = shape, noise: torch.Generator = noise
        ) -> Tensor:
            del step
            return torch.randn(shape, generator=noise, device=teacher.device)

        scale = pool.guidance.of(cond)
        for level in teacher.process.timesteps(num_steps, "trailing"):
            pool.count(part, torch.full_like(part, level))
        x_0 = teacher.sample(draw, cond, num_steps, 0.0, scale, "trailing")
        x = teacher.process.add_noise(x_0, draw(0), levels)
        pool.store(part, x, levels, cond)


@torch.no_grad()
def fill_ancestral(pool: Pool, batch_size: int, filling: Filling | None = None) -> None:
    """Shuffle denoise (DKDM, algorithm 1): move each entry from T-1 down to its level.

    Costs T-1-t teacher evaluations per entry, about T/2 on average, and is exact.
    """
    teacher, filling = pool.teacher, filling or Filling(pool)
    process = teacher.process
    for part, levels, noise in _parts(filling, batch_size, "ancestral fill", in_order=True):
        cond = {key: value[part] for key, value in pool.cond.items()}
        x = pool.x[part.to(pool.x.device)].to(teacher.device, torch.float32)
        for level in range(process.num_levels - 1, int(levels.min()), -1):
            active = levels < level
            on = active.nonzero().flatten().to(x.device)
            t = torch.full((int(active.sum()),), level)
            own = {key: value[active] for key, value in cond.items()}
            target = pool.target(Batch(x[on], t, own, part[active]))
            target, kind = target.chain or target, teacher.parameterization
            z = torch.randn(x[on].shape, generator=noise, device=x.device)
            x[on] = reverse_step(process, kind, x[on], target, t, t - 1, z, 1.0)
        pool.store(part, x, levels, cond)


def _parts(
    filling: Filling, batch_size: int, label: str, in_order: bool = False
) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
    """Cut every shard into batches: (rows, their levels, noise), with progress; those that are
    done are left out."""
    pool, passed = filling.pool, 0
    device, num_levels = pool.teacher.device, pool.teacher.process.num_levels
    with track(len(pool.t), 0, label) as progress:
        for shard, here in pool.entries.slices.items():
            size = here.stop - here.start
            host = generator("cpu", pool.seed, "levels", shard)
            levels = uniform_levels(size, num_levels, host)
            order = levels.argsort(descending=True) if in_order else torch.arange(size)
            for i, chunk in enumerate(order.split(batch_size)):
                passed += 1
                if passed <= filling.done:
                    continue
                noise = generator(device, pool.seed, "fill", shard, i)
                with filling.batch():
                    yield here.start + chunk, levels[chunk], noise
                progress(here.start + min((i + 1) * batch_size, size))
