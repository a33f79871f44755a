"""What a step does with some entries of a pool, known before it: no number of it is on a device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.diffusion.steps import next_states
from dkdm.core.sources.chains import Guidance


class Moves(NamedTuple):
    """Entries of a pool, where each goes, and under which conditions; on the CPU.

    rows: the entries, int64 [B]. t, s: the levels they are at and move to, int64 [B]; -1 is the
    end of a chain. following: the level that each is at afterwards, int64 [B]: s, or that at which
    a new chain begins. own, next: conditions now and afterwards. shown: those of the batch.
    """

    rows: Tensor
    t: Tensor
    s: Tensor
    following: Tensor
    own: Condition
    next: Condition
    shown: Condition

    @property
    def done(self) -> Tensor:
        """Whose chains end, bool [B]."""
        return self.s < 0

    def batch(self, x: Tensor) -> Batch:
        """The batch of states x [B, ...] before the step."""
        return Batch(x, self.t, self.shown, self.rows, self.s)

    def only(self, some: Tensor) -> Moves:
        """Those of some entries: numbers int64 [n], or a mask bool [B]."""
        rows, t, s, following = (value[some] for value in self[:4])
        own, after, shown = (rows_of(cond, some) for cond in self[4:])
        return Moves(rows, t, s, following, own, after, shown)

    def begin_below(self, top: int) -> Tensor:
        """Whose new chains begin below the level of pure noise, bool [B]."""
        return self.done & (self.following < top)

    def restarts(self, x: Tensor, top: int) -> Batch:
        """The batch that moves new chains from pure noise x [B, ...] at `top` to their levels."""
        level = torch.full_like(self.following, top)
        return Batch(x, level, self.next, self.rows, self.following)


def answer(teacher: Denoiser, guidance: Guidance, batch: Batch) -> Prediction:
    """The teacher's prediction for a batch, guided as its chains are.

    If the chain alone is guided, it is unguided and carries the guided one for `moved`.
    """
    unguided, guided = teacher.predict_both(batch, guidance.of(batch.cond))
    return unguided._replace(chain=guided) if guidance.chain_only else guided


def moved(teacher: Denoiser, batch: Batch, target: Prediction, z: Tensor, eta: float) -> Tensor:
    """The batch's states at their next levels s < t, which are not looked at.

    z: [B, ...] standard normal noise.
    """
    assert batch.s is not None
    kind, prediction = teacher.parameterization, target.chain or target
    return next_states(teacher.process, kind, batch.x, prediction, batch.t, batch.s, z, eta)


def rows_of(cond: Condition, rows: Tensor) -> Condition:
    """Some rows of a condition: numbers int64 [n], or a mask bool [B]."""
    return {key: value[rows] for key, value in cond.items()}
