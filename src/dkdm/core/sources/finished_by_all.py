"""Finished samples of several processes, which the main one writes as one process does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

from torch import Tensor

from dkdm.core import processes
from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.shards import Entries, Shards
from dkdm.core.sources.finished import Finished

EVERY = 64  # steps between two meetings


class Waiting(NamedTuple):
    """Samples of one shard of the pool that a step has finished; place: of the shard in a batch."""

    step: int
    place: int
    x: Tensor
    cond: Condition


@dataclass(eq=False)
class FinishedByAll(Finished):
    """Each process keeps its own samples until all meet; the main one then has them in order.

    That is the order of one process: by step, then as the shards lie in a batch. They meet every
    `EVERY` steps and at checkpoints. pool: its shards; entries: those of this process.
    """

    pool: Shards = field(kw_only=True)
    entries: Entries = field(kw_only=True)
    batch_size: int = field(kw_only=True)
    own: list[Waiting] = field(default_factory=list, repr=False)

    def end_step(self, step: int, x: Tensor, cond: Condition, rows: Tensor) -> None:
        """Keep a step's samples here; together."""
        order = list(replace(self.pool, rank=0, world=1).shares(self.batch_size, step))
        first = 0
        for number, count in self.entries.by_shard(rows):
            here = slice(first, first + count)
            own = {key: value[here].clone() for key, value in cond.items()}
            self.own.append(Waiting(step, order.index(number), x[here].detach().float().cpu(), own))
            first += count
        if step % EVERY == 0:
            self._meet()

    def _meet(self) -> None:
        """Let the main process have what waits in all, in order; nothing, for one by itself."""
        if processes.world() == 1:
            return
        waiting = sorted(chain(*processes.gathered(self.own)), key=lambda each: each[:2])
        self.own = []
        for each in waiting:
            self.add(each.x, each.cond)

    def state_dict(self) -> dict[str, Tensor]:
        """As of one process, in the main one; together."""
        self._meet()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.own = []
        if processes.is_main():
            super().load_state_dict(state)
