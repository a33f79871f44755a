"""What a program needs to sample a few-step model: a few numbers for each sampling step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.core.diffusion.prediction import KINDS, Row
from dkdm.core.few_steps.model import FewStep


class Step(NamedTuple):
    """A sampling step from x: the network is fed `shown x` at `time`; `kept x + taken o` is next.

    o is the mean of the outputs by their `shares`; `noise` times new noise is added. A DDIM step,
    or a jump that is noised again, in which all is linear.
    """

    time: float
    shown: float
    kept: float
    taken: float
    shares: tuple[float, ...]
    noise: float


def few_steps_table(denoiser: FewStep) -> dict[int, list[Step]]:
    """The steps by their number, for each number that the model draws in."""
    steps = denoiser.intervals.steps
    return {
        number: [_step(denoiser, b) for b in denoiser.intervals.blocks(number)] for number in steps
    }


def _step(denoiser: FewStep, block: range) -> Step:
    grid, own = denoiser.intervals, denoiser.parameterization
    here = grid.alpha[block.start], grid.sigma[block.start]
    linear = KINDS[own.prediction](*here, own.sigma_data)
    alpha, sigma = grid.alpha[block.stop], grid.sigma[block.stop]
    ends = torch.stack([alpha, torch.zeros_like(sigma) if denoiser.renoises else sigma])
    kept, taken = (ends @ torch.stack([_pair(linear.x_0), _pair(linear.eps)])).tolist()
    shares, noise = tuple(denoiser.shares(block).tolist()), float(sigma * denoiser.renoises)
    return Step(float(grid.time[block.start]), float(linear.shown), kept, taken, shares, noise)


def _pair(row: Row) -> Tensor:
    """What x and the output count for in (p x + q output) / n."""
    p, q, n = (torch.as_tensor(each, dtype=torch.float64) for each in row)
    return torch.stack([p / n, q / n])
