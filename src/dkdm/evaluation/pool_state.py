"""How the entries of a pool lie at the end of a run: their levels, and how old their chains are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dkdm.core.sources.pool import Pool
from dkdm.errors import DkdmError, UsageError
from dkdm.reading.fields import read_json
from dkdm.reading.files import atomic
from dkdm.reading.values import made_of

POOL = "pool.json"
BINS = 20


@dataclass(frozen=True)
class Histogram:
    """How many values lie in equal ranges from 0 to `end`, which is excluded."""

    end: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class PoolState:
    """A pool when its run ended.

    - `batches`: moved so far, one an optimizer step without gradient accumulation.
    - `t`: of the levels of its entries.
    - `age`: of the batches that were moved since an entry's chain began, of those known.
    - `as_filled`: entries whose chain has run since the fill; they are as old as the run.
    - `unknown`: entries whose beginning an earlier version did not note.
    """

    entries: int
    batches: int
    t: Histogram
    age: Histogram
    as_filled: int
    unknown: int

    def save(self, run_dir: Path) -> None:
        """Write `pool.json` into a run folder."""
        with atomic(run_dir / POOL) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def state_of(pool: Pool) -> PoolState:
    """The entries of this process as they lie now."""
    return states_of([(pool, None)], pool.process.num_levels)


def states_of(pools: Sequence[tuple[Pool, Tensor | None]], num_levels: int) -> PoolState:
    """The same of several pools together.

    Beside each pool: where its levels lie among `num_levels` common ones; None if they are its own.
    """
    t = torch.cat([pool.t if levels is None else levels[pool.t] for pool, levels in pools])
    born, step = torch.cat([pool.born for pool, _ in pools]), pools[0][0].step
    known = born >= 0
    return PoolState(
        entries=len(t),
        batches=step,
        t=histogram(t, num_levels),
        age=histogram(step - born[known], step + 1),
        as_filled=int((born == 0).sum()),
        unknown=int((~known).sum()),
    )


def histogram(values: Tensor, end: int, bins: int = BINS) -> Histogram:
    """Count int64 values of 0..end-1 in at most `bins` equal ranges."""
    bins = min(bins, end)
    counts = torch.bincount(values * bins // end, minlength=bins)
    return Histogram(end, tuple(counts.tolist()))


def read_pool_state(run_dir: Path) -> PoolState | None:
    """Read what `PoolState.save` wrote; None if there is no file: earlier runs, and other sources.

    Raises `DkdmError` if it is damaged.
    """
    file = run_dir / POOL
    if not file.exists():
        return None
    try:
        found = made_of(PoolState, read_json(file, "a pool, written when a run ends"), POOL)
    except UsageError as error:
        raise DkdmError(f"{POOL} cannot be read ({error})") from error
    if not all(map(_is_sound, (found.t, found.age))):
        raise DkdmError(f"{POOL} cannot be read (it holds no histograms)")
    return found


def _is_sound(found: Histogram) -> bool:
    return found.end > 0 and len(found.counts) <= 10 * BINS and min(found.counts, default=0) >= 0
