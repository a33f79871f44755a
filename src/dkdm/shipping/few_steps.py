"""What a program needs to sample a few-step model: a few numbers for each sampling step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.core.few_steps.heads import ParallelHeads
from dkdm.core.prediction import KINDS, Row


class Step(NamedTuple):
    """A sampling step from x: the network is fed `shown x` at `time`; `kept x + taken o` is next.

    o is the mean of the heads' outputs by their `shares`. A DDIM step, in which all is linear.
    """

    time: float
    shown: float
    kept: float
    taken: float
    shares: tuple[float, ...]


def few_steps_table(denoiser: ParallelHeads) -> dict[int, list[Step]]:
    """The steps by their number, for each number that the model draws in."""
    steps = denoiser.intervals.steps
    return {
        number: [_step(denoiser, b) for b in denoiser.intervals.blocks(number)] for number in steps
    }


def _step(denoiser: ParallelHeads, block: range) -> Step:
    grid, own = denoiser.intervals, denoiser.parameterization
    here = grid.alpha[block.start], grid.sigma[block.start]
    linear = KINDS[own.prediction](*here, own.sigma_data)
    ends = torch.stack([grid.alpha[block.stop], grid.sigma[block.stop]])
    kept, taken = (ends @ torch.stack([_pair(linear.x_0), _pair(linear.eps)])).tolist()
    shares = tuple(grid.shares(block).tolist())
    return Step(float(grid.time[block.start]), float(linear.shown), kept, taken, shares)


def _pair(row: Row) -> Tensor:
    """What x and the output count for in (p x + q output) / n."""
    p, q, n = (torch.as_tensor(each, dtype=torch.float64) for each in row)
    return torch.stack([p / n, q / n])
