"""A source made of one for each of several teachers; every batch has a part of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.teachers import Place, joined_predictions
from dkdm.core.diffusion.clipping import Clipping
from dkdm.core.diffusion.prediction import Prediction, clip_x_0
from dkdm.core.diffusion.process import Process
from dkdm.core.saving.checkpoint import Part
from dkdm.core.sources.chains import joined
from dkdm.core.sources.source import Source
from dkdm.errors import UsageError


@dataclass(frozen=True, eq=False)
class Shared:
    """One teacher's source, and how the student sees it.

    place: of the teacher's conditions among those of all. levels: where its noise levels lie on the
    common axis, int64 [T]. clipping: of x_0 in targets, as `Objective` has it for one teacher.
    """

    source: Source
    place: Place
    levels: Tensor
    clipping: Clipping = Clipping()

    def seen(self, batch: Batch) -> Batch:
        """A batch of this source on the common axis, with the conditions of all."""
        s = None if batch.s is None else torch.where(batch.s < 0, -1, self.levels[batch.s])
        cond = self.place.to_all(batch.cond, len(batch.t))
        return Batch(batch.x, self.levels[batch.t], cond, batch.rows, s)

    def wanted(self, batch: Batch, target: Prediction) -> Prediction:
        """The target of this source's own batch, clipped."""
        alpha, sigma = self.source.process.at(batch.t)
        return clip_x_0(target, batch.x, alpha, sigma, self.clipping)


@dataclass(eq=False)
class Several:
    """Sources of several teachers: each moves its own states on its own noise levels.

    process: the levels of all on one axis, `common_levels`. counts: samples of each in a batch.
    """

    shares: Sequence[Shared]
    process: Process
    counts: Sequence[int]
    _answers: Sequence[Prediction] = field(default=(), init=False, repr=False)

    @property
    def evaluations(self) -> int:
        """Of all teachers."""
        return sum(share.source.evaluations or 0 for share in self.shares)

    def draw(self, batch_size: int) -> Batch:
        """A part of each source; the parts as they were drawn are its `rows`."""
        if batch_size != sum(self.counts):
            raise UsageError(f"a batch of {batch_size}: these teachers share {sum(self.counts)}")
        pairs = zip(self.shares, self.counts, strict=True)
        parts = [share.source.draw(count) for share, count in pairs]
        seen = [share.seen(part) for share, part in zip(self.shares, parts, strict=True)]
        x, t = torch.cat([each.x for each in seen]), torch.cat([each.t for each in seen])
        s = [each.s for each in seen if each.s is not None]
        at = torch.cat(s) if len(s) == len(seen) else None
        return Batch(x, t, joined([each.cond for each in seen]), parts, at)

    def places(self, batch_size: int) -> Tensor:
        """Of each source's part, one after the other."""
        del batch_size
        pairs = zip(self.shares, self.counts, accumulate((0, *self.counts[:-1])), strict=True)
        return torch.cat([first + share.source.places(count) for share, count, first in pairs])

    def target(self, batch: Batch) -> Prediction:
        """Each teacher's evaluation of its part, kept for `advance`."""
        pairs = list(zip(self.shares, batch.rows, strict=True))
        self._answers = [share.source.target(part) for share, part in pairs]
        found = zip(pairs, self._answers, strict=True)
        return joined_predictions([share.wanted(part, own) for (share, part), own in found])

    def advance(self, batch: Batch, target: Prediction) -> None:
        """Move every part on by its teacher's evaluation."""
        del target
        for share, part, answer in zip(self.shares, batch.rows, self._answers, strict=True):
            share.source.advance(part, answer)
        self._answers = ()

    def mend(self) -> int:
        """Mend every source; returns how many entries."""
        return sum(share.source.mend() for share in self.shares)

    def parts(self) -> Mapping[str, Part]:
        """Those of every source, in a folder for each teacher."""
        return {
            f"teacher-{number}/{name}": part
            for number, share in enumerate(self.shares)
            for name, part in share.source.parts().items()
        }


def shared_out(batch_size: int, shares: Sequence[float]) -> list[int]:
    """Samples of a batch for each teacher, in proportion to the shares, one or more each.

    Raises UsageError for a batch of fewer samples than teachers.
    """
    if batch_size < len(shares):
        raise UsageError(
            f"--train-batch-size {batch_size} is smaller than the number of teachers: give "
            f"{len(shares)} or more"
        )
    exact = [share / sum(shares) * (batch_size - len(shares)) for share in shares]
    counts = [1 + int(each) for each in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: int(exact[i]) - exact[i])
    for i in by_rest[: batch_size - sum(counts)]:
        counts[i] += 1
    return counts
