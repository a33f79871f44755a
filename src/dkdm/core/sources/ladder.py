"""The steps of the paper's ablation that lead to dynamic iterative distillation (`pool`)."""

from __future__ import annotations

import torch
from torch import Tensor

from dkdm.core.randomness import generator
from dkdm.core.sources.pool import Pool


class Shuffled(Pool):
    """Shuffled iterative distillation: entries at all levels, in fixed groups that take turns.

    A pool as large as a batch is one group, as in the paper; one of several batches has several, if
    the shards divide a batch. Every draw of a group has the same samples beside each other, which
    a random subset has not.
    """

    def _chosen(self, shard: int, here: slice, count: int) -> list[int]:
        """The shard's part of the next group, or its next entries in order if it has no groups."""
        size, first = here.stop - here.start, count * self.step
        entries = [here.start + (first + i) % size for i in range(count)]
        return self._shuffled(shard, sorted(entries), count)


class Iterative(Shuffled):
    """Iterative distillation: a batch of noises that the teacher moves from T to 0 together.

    All are at one level, so that a step sees one level; clean ones start over together.
    """

    def _strides(self, count: int, random: torch.Generator) -> Tensor:
        """One stride for all."""
        del random
        common = generator("cpu", self.seed, "stride", self.step)
        return self.stride.draw(1, common).expand(count)
