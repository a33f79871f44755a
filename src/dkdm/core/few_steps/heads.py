"""A student with parallel heads: one evaluation gives the mean velocity over N intervals of noise.

Parallel-head distillation (PDD). A sampling step rolls a block of heads: x~ + sum of width_k v_k.
Since each head's velocity is an affine map of its output, that is one DDIM step with the heads'
outputs averaged by their widths, and where the last layer is linear, one with averaged weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.diffusion.prediction import Prediction, from_x_0_eps, to_x_0_eps
from dkdm.core.diffusion.process import per_sample
from dkdm.core.few_steps.grid import Grid
from dkdm.core.few_steps.model import FewStep


@dataclass(eq=False)
class ParallelHeads(FewStep):
    """A denoiser whose network gives N outputs of C channels, the heads of a grid.

    Each head is read in the parameterization at the level the network was asked at. At any level of
    the process, `predict` takes the head of the interval that it lies in.
    """

    beside: ClassVar[Mapping[str, str]] = {
        "one-step": "the same model in one step, as an ordinary network",
        "plain": "the student for many steps, as it was before",
    }

    @classmethod
    def of(cls, denoiser: Denoiser, grid: Grid) -> Self:
        """A denoiser whose network gives the heads of a grid; its variance is fixed."""
        fixed = replace(denoiser.parameterization, variance="fixed_small")
        return replace(super().of(denoiser, grid), parameterization=fixed)

    @classmethod
    def outputs_on(cls, grid: Grid) -> int:
        """N."""
        return grid.num_heads

    @property
    def out_channels(self) -> int:
        """N C."""
        return self.sample_shape[0] * self.intervals.num_heads

    def shares(self, block: range) -> Tensor:
        """The share of each head in a step over a block of intervals, float64 [N]."""
        return self.intervals.shares(block)

    def velocities(self, outputs: Tensor, x: Tensor, first: Tensor) -> Tensor:
        """v = eps - x_0 of each head [B, N, C, ...], of outputs for states x [B, C, ...]."""
        x_0, eps = self._meant(outputs, x.unsqueeze(1), first)
        return eps - x_0

    def wanted(self, velocity: Tensor, x: Tensor, first: Tensor) -> Tensor:
        """The output [B, C, ...] of a head whose velocity from a state x [B, C, ...] is this."""
        own, grid = self.parameterization, self.intervals
        alpha, sigma = grid.alpha[first], grid.sigma[first]
        place, tau = x / per_sample(alpha + sigma, x), per_sample(grid.tau[first], x)
        x_0, eps = place - tau * velocity, place + (1 - tau) * velocity
        return from_x_0_eps(own.prediction, x_0, eps, alpha, sigma, own.sigma_data)

    def read(self, raw: Tensor, batch: Batch) -> Prediction:
        """What the head of the interval that each level lies in means."""
        grid, (alpha, sigma) = self.intervals, self.process.at(batch.t)
        tau = (sigma / (alpha + sigma)).unsqueeze(1)
        first = ((grid.tau[:-1] >= tau * (1 - 1e-9)).sum(1) - 1).clamp(min=0)
        outputs = raw.unflatten(1, (grid.num_heads, self.sample_shape[0]))
        output = outputs[torch.arange(len(raw)), first.to(raw.device)]
        own = self.parameterization
        x_0, eps = to_x_0_eps(own.prediction, output, batch.x, alpha, sigma, own.sigma_data)
        return Prediction(output, x_0, eps)
