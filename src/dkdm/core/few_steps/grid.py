"""Flow coordinates of any process, and the grid that a student with parallel heads lives on.

With x = alpha x_0 + sigma eps let tau = sigma / (alpha + sigma), x~ = x / (alpha + sigma) =
(1 - tau) x_0 + tau eps, and v = eps - x_0 the velocity. The probability flow is dx~ / dtau = v, and
one Euler step in tau is exactly one DDIM step. Sources: rectified flow (arXiv 2209.03003), DDIM
(arXiv 2010.02502).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.matching import gauge_of, on_levels_of, same_levels
from dkdm.core.diffusion.process import Process
from dkdm.errors import UsageError
from dkdm.reading.fields import Fields

GRID = "_few_steps"  # in model_index.json
TABLES = ("alpha", "sigma", "time")
LARGEST = 1e9  # of their numbers in a file: far beyond any noise level, and finite in float32


@dataclass(frozen=True, eq=False)
class Grid:
    """N intervals between noise levels, most noise first; head k is the mean velocity over one.

    alpha, sigma: float64 [N + 1] of a process, the last its clean end. time: float64 [N], what a
    network is fed at the beginning of each interval. steps: the numbers of sampling steps, each a
    divisor of N.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor
    steps: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        """N."""
        return len(self.time)

    @property
    def scale(self) -> Tensor:
        """alpha + sigma, by which flow coordinates differ from states, float64 [N + 1]."""
        return self.alpha + self.sigma

    @property
    def tau(self) -> Tensor:
        """Shares of noise, falling, float64 [N + 1]."""
        return self.sigma / self.scale

    @property
    def widths(self) -> Tensor:
        """The step in tau over each interval, negative, float64 [N]."""
        return self.tau.diff()

    @property
    def shortest(self) -> int:
        """Intervals of the shortest move; every sampling step begins at a multiple of it."""
        return math.gcd(*(self.num_heads // steps for steps in self.steps))

    @property
    def longest(self) -> int:
        """Intervals of the longest sampling step."""
        return self.num_heads // min(self.steps)

    def blocks(self, num_steps: int) -> list[range]:
        """The intervals of each of `num_steps` steps. Raises UsageError for other numbers."""
        if num_steps not in self.steps:
            *most, last = map(str, sorted(self.steps))
            known = f"{', '.join(most)} or {last}" if most else last
            raise UsageError(f"{num_steps} sampling steps: this few-step model draws in {known}")
        length = self.num_heads // num_steps
        return [range(first, first + length) for first in range(0, self.num_heads, length)]

    def as_dict(self) -> dict[str, list[float]]:
        """The grid as JSON values."""
        tables = {name: getattr(self, name).tolist() for name in TABLES}
        return {**tables, "steps": list(self.steps)}

    @classmethod
    def of_dict(cls, values: Any, where: str) -> Grid:
        """The grid that `as_dict` wrote. Raises UsageError, naming `where`, for anything else."""
        if not isinstance(values, Mapping):
            raise UsageError(f"{where} is no grid of a few-step model")
        found = Fields(values, where)
        lowest = {"alpha": 0.0, "sigma": 0.0, "time": -LARGEST}
        alpha, sigma, time = (
            torch.tensor(found.numbers(name, low=lowest[name], high=LARGEST), dtype=torch.float64)
            for name in TABLES
        )
        heads = len(time)
        steps = found.numbers("steps", low=1, high=heads)
        grid = cls(alpha, sigma, time, tuple(int(number) for number in steps))
        fits = len(alpha) == len(sigma) == heads + 1
        whole = all(each.is_integer() and heads % each == 0 for each in steps)
        if not fits or not whole or not _falls(grid):
            raise UsageError(f"{where} is no grid of a few-step model")
        return grid

    def shares(self, block: range) -> Tensor:
        """The share of each interval in a block of them, summing to 1, float64 [N]."""
        widths = torch.zeros_like(self.widths)
        widths[block.start : block.stop] = self.widths[block.start : block.stop]
        return (widths / widths.sum()).abs()  # without a minus before zeros


def _falls(grid: Grid) -> bool:
    """Whether there is less noise at the end of each interval."""
    return bool((grid.scale > 0).all() and (grid.widths < 0).all())


def grid_levels(process: Process, num_heads: int, shift: float = 1.0) -> Tensor:
    """The levels between which `num_heads` intervals lie, from T-1 down to -1, int64 [N + 1].

    They are the levels nearest to an even grid in tau, shifted towards noise by tau' = s tau / (1 +
    (s - 1) tau) (SD3, arXiv 2403.03206, Eq. 23). Raises UsageError if two would be the same.
    """
    remedy = "give fewer heads" if shift == 1 else "give fewer heads, or --few-step-shift 1"
    too_fine = UsageError(
        f"--few-step-heads {num_heads}: the teacher's {process.num_levels} levels lie too far "
        f"apart for so many intervals: {remedy}"
    )
    if num_heads > process.num_levels:
        raise too_fine
    share = process.sigma / (process.alpha + process.sigma)
    end, start = process.final[1] / sum(process.final), share[-1]
    even = torch.linspace(1, 0, num_heads + 1, dtype=torch.float64)
    wanted = end + (start - end) * shift * even / (1 + (shift - 1) * even)
    levels = (share.unsqueeze(1) - wanted[:-1]).abs().argmin(0)
    if bool((levels.diff() >= 0).any()):
        raise too_fine
    return torch.cat([levels, levels.new_tensor([-1])])


def grid_of(student: Denoiser, process: Process, levels: Tensor, steps: Sequence[int]) -> Grid:
    """The grid between levels of a teacher's process, as a student of any process is fed it.

    Raises UsageError if a level has no finite place in the student's process.
    """
    alpha, sigma = process.at(levels)
    if not same_levels(student.process, process):
        gauge = gauge_of(student.process)
        alpha, sigma = gauge.pair(gauge.coordinate(alpha, sigma))
        alpha[-1], sigma[-1] = student.process.final
    if not bool((alpha.isfinite() & sigma.isfinite()).all()):
        raise UsageError(
            "--student-process: the student's process has no level of pure noise, where the "
            "teacher's chains begin: use --student-process teacher or flow"
        )
    time = on_levels_of(student, process).network_time[levels[:-1]]
    return Grid(alpha, sigma, time, tuple(sorted(steps)))
