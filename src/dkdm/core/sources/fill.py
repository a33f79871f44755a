"""What fills a pool: pure noise, few-step samples that are noised again, or exact chains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.devices import to_device
from dkdm.core.diffusion.steps import not_finite, reverse_step
from dkdm.core.randomness import generator
from dkdm.core.saving.progress import track
from dkdm.core.shards import ONE_PROCESS, Shards
from dkdm.core.sources.chains import joined
from dkdm.core.sources.filling import Filling
from dkdm.core.sources.pool import Pool
from dkdm.core.sources.storage import in_memory, on_disk
from dkdm.errors import DkdmError


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


@dataclass(frozen=True)
class Noise:
    """Standard normal numbers for batches that are evaluated together, each from its own generator,
    so that none depends on its neighbours. sizes: of the batches."""

    generators: Sequence[torch.Generator]
    sizes: list[int]

    def __call__(self, shape: Sequence[int], chosen: Tensor | None = None) -> Tensor:
        """[sum of sizes, *shape]; chosen: bool, those of them that are drawn. None is all."""
        counts = self.sizes if chosen is None else [int(c.sum()) for c in chosen.split(self.sizes)]
        pairs = zip(counts, self.generators, strict=True)
        return torch.cat([torch.randn(n, *shape, generator=g, device=g.device) for n, g in pairs])


@torch.no_grad()
def fill_few_step(
    pool: Pool,
    num_steps: int,
    batch_size: int,
    filling: Filling | None = None,
    together: int = 1,
    entries: int = 1,
) -> None:
    """Spread the entries over all levels: draw samples in `num_steps` DDIM steps, then noise them.

    Costs num_steps teacher evaluations per sample. The few-step sampler decides which states there
    are; the target of each is exact. The steps start at T-1 (trailing spacing), the level of pure
    noise, whatever spacing the teacher has. filling: knows what is done, and notes what is.
    together: batches that are evaluated at once, which have the same noise as one by one. entries:
    made of each sample, with noise of their own at levels equally far apart.
    """
    teacher, filling = pool.teacher, filling or Filling(pool)
    for part, levels, noise in _parts(
        filling, batch_size, "few-step fill", together, False, entries
    ):
        cond = {key: value[part] for key, value in pool.cond.items()}

        def draw(step: int, noise: Noise = noise) -> Tensor:
            del step
            return noise(teacher.sample_shape)

        scale = pool.guidance.of(cond)
        for level in teacher.process.timesteps(num_steps, "trailing"):
            pool.count(part, torch.full_like(part, level))
        x_0 = teacher.sample(draw, cond, num_steps, 0.0, scale, "trailing")
        for rows, t, of in _of_each(pool, part, levels, entries):
            x = teacher.process.add_noise(x_0, draw(0), t)
            own = {key: value[of] for key, value in cond.items()}
            x = _finite(x, teacher)[to_device(of, x.device)]
            pool.store(rows, x, t[of], own)


def _of_each(
    pool: Pool, part: Tensor, levels: Tensor, entries: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The entries of a batch of samples: (their rows, a level for each sample, of which they are).

    part: the first entry of each; the others lie a share of the shard behind it.
    """
    here = next(each for each in pool.entries.slices.values() if each.stop > int(part[0]))
    apart, num_levels = ceil((here.stop - here.start) / entries), pool.process.num_levels
    for number in range(entries):
        rows, shift = part + number * apart, number * num_levels // entries
        of = (rows < here.stop).nonzero().flatten()
        yield rows[of], (levels + shift) % num_levels, of


@torch.no_grad()
def fill_ancestral(
    pool: Pool, batch_size: int, filling: Filling | None = None, together: int = 1
) -> None:
    """Shuffle denoise (DKDM, algorithm 1): move each entry from T-1 down to its level.

    Costs T-1-t teacher evaluations per entry, about T/2 on average, and is exact. together: as in
    `fill_few_step`.
    """
    teacher, filling = pool.teacher, filling or Filling(pool)
    process = teacher.process
    for part, levels, noise in _parts(filling, batch_size, "ancestral fill", together, True):
        cond = {key: value[part] for key, value in pool.cond.items()}
        x = pool.x[part.to(pool.x.device)].to(teacher.device, torch.float32)
        for level in range(process.num_levels - 1, int(levels.min()), -1):
            active = levels < level
            on = active.nonzero().flatten().to(x.device)
            t = torch.full((int(active.sum()),), level)
            own = {key: value[active] for key, value in cond.items()}
            target = pool.target(Batch(x[on], t, own, part[active]))
            target, kind = target.chain or target, teacher.parameterization
            z = noise(x.shape[1:], active)
            x[on] = reverse_step(process, kind, x[on], target, t, t - 1, z, 1.0)
        pool.store(part, _finite(x, teacher), levels, cond)


def _finite(x: Tensor, teacher: Denoiser) -> Tensor:
    """The states. Raises DkdmError, naming the teacher's type, if one is not finite."""
    bad = len(not_finite(x))
    if bad:
        raise DkdmError(
            f"{bad} of {len(x)} filled states are not finite: {teacher.name} overflows in "
            f"{str(teacher.dtype).removeprefix('torch.')}. Give --teacher-dtype bfloat16 or float32"
        )
    return x


def _parts(
    filling: Filling,
    batch_size: int,
    label: str,
    together: int,
    in_order: bool = False,
    entries: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Noise]]:
    """Cut every shard into batches and take some of them together: (rows, their levels, noise),
    with progress; those that are done are left out. entries: of each row; these are the first."""
    pool, passed, done = filling.pool, 0, filling.done
    device, num_levels = pool.teacher.device, pool.teacher.process.num_levels
    with track(len(pool.t), 0, label) as progress:
        for shard, here in pool.entries.slices.items():
            size = ceil((here.stop - here.start) / entries)
            host = generator("cpu", pool.seed, "levels", shard)
            levels = uniform_levels(size, num_levels, host)
            order = levels.argsort(descending=True) if in_order else torch.arange(size)
            batches = order.split(batch_size)
            first = min(max(0, done - passed), len(batches))
            for i in range(first, len(batches), together):
                some = batches[i : i + together]
                numbers = range(i, i + len(some))
                noise = [generator(device, pool.seed, "fill", shard, number) for number in numbers]
                rows = torch.cat(some)
                with filling.batch(len(some)):
                    yield here.start + rows, levels[rows], Noise(noise, [len(b) for b in some])
                progress(min(here.start + numbers.stop * batch_size * entries, here.stop))
            passed += len(batches)
