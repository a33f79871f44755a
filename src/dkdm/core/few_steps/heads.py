"""A student with parallel heads: one evaluation gives the mean velocity over N intervals of noise.

Parallel-head distillation (PDD). A sampling step rolls a block of heads: x~ + sum of width_k v_k.
Since each head's velocity is an affine map of its output, that is one DDIM step with the heads'
outputs averaged by their widths, and where the last layer is linear, one with averaged weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dkdm.core.conditioning import Condition
from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.devices import to_device
from dkdm.core.few_steps.grid import Grid
from dkdm.core.modes import evaluating
from dkdm.core.prediction import Prediction, from_x_0_eps, scale_input, to_x_0_eps
from dkdm.core.process import Spacing, per_sample
from dkdm.core.refusals import check_output
from dkdm.core.solvers import Solver
from dkdm.errors import UsageError

NO_GUIDANCE = (
    "a few-step model takes no guidance scale: guidance was mixed into what it learnt, and its "
    "heads lead over many levels at once; sample it with a scale of 1, or distil with another "
    "--guidance-scale"
)


@dataclass(eq=False)
class ParallelHeads(Denoiser):
    """A denoiser whose network gives N outputs of C channels, the heads of a grid.

    Each head is read in the parameterization at the level the network was asked at. At any level of
    the process, `predict` takes the head of the interval that it lies in.
    """

    grid: Grid | None = None

    @property
    def intervals(self) -> Grid:
        """The grid, which every such model has."""
        assert self.grid is not None
        return self.grid

    @property
    def out_channels(self) -> int:
        """N C."""
        return self.sample_shape[0] * self.intervals.num_heads

    def heads(self, x: Tensor, first: Tensor, cond: Condition) -> Tensor:
        """The network's outputs [B, N, C, ...] in float32 for states x [B, ...].

        first: int64 [B], the interval at whose beginning each state is.
        """
        meaning, grid = self.parameterization, self.intervals
        sigma = grid.sigma[:-1][first]
        time = to_device(grid.time[first], x.device, torch.float32)
        shown = scale_input(meaning.prediction, x, sigma, meaning.sigma_data)
        if self.embeds_guidance:
            cond = {"guidance": torch.ones(len(x)), **cond}
        output = self._called(self._cast(shown), time, cond)
        check_output(self.name, output, x, self.out_channels)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return output.unflatten(1, (grid.num_heads, self.sample_shape[0]))

    def velocities(self, outputs: Tensor, x: Tensor, first: Tensor) -> Tensor:
        """v = eps - x_0 of each head [B, N, C, ...], of outputs for states x [B, C, ...]."""
        x_0, eps = self._meant(outputs, x.unsqueeze(1), first)
        return eps - x_0

    def _meant(self, outputs: Tensor, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        own, grid = self.parameterization, self.intervals
        levels = grid.alpha[first], grid.sigma[first]
        return to_x_0_eps(own.prediction, outputs, x, *levels, own.sigma_data)

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

    @torch.no_grad()
    def sample(
        self,
        noise: Callable[[int], Tensor],
        cond: Condition,
        num_steps: int,
        eta: float = 0.0,
        guidance_scale: float | Tensor = 1.0,
        spacing: Spacing | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """Draw samples in one of the numbers of steps that the grid has; see `Denoiser.sample`.

        Raises UsageError for another number of steps, for guidance and for another sampler.
        """
        del spacing
        blocks, grid = self.intervals.blocks(num_steps), self.intervals
        if eta or solver is not None:
            raise UsageError("a few-step model has its own sampler: use --sampler ddim")
        if not self.embeds_guidance and (isinstance(guidance_scale, Tensor) or guidance_scale != 1):
            raise UsageError(NO_GUIDANCE)
        x = self.process.start_std * noise(-1).to(self.device)
        if self.embeds_guidance:
            scale = torch.as_tensor(guidance_scale, dtype=torch.float32)
            cond = {"guidance": scale.expand(len(x)), **cond}
        with evaluating(self.network, self.call):
            for block in blocks:
                first = torch.full((len(x),), block.start)
                outputs = self.heads(x, first, cond)
                mean = torch.tensordot(outputs, grid.shares(block).to(outputs), ([1], [0]))
                x_0, eps = self._meant(mean, x, first)
                alpha, sigma = float(grid.alpha[block.stop]), float(grid.sigma[block.stop])
                x = alpha * x_0 + sigma * eps
        return x


def usual_steps(model: Denoiser, many: int) -> int:
    """The most steps that a few-step model draws in; `many` of any other."""
    return max(model.intervals.steps) if isinstance(model, ParallelHeads) else many


def check_sampling(model: Denoiser, num_steps: int, guidance_scale: float = 1.0) -> None:
    """Raise UsageError for a number of steps, or a scale, that a model cannot be drawn with."""
    if not isinstance(model, ParallelHeads):
        model.process.timesteps(num_steps)
        return
    model.intervals.blocks(num_steps)
    if guidance_scale != 1 and not model.embeds_guidance:
        raise UsageError(NO_GUIDANCE)


def on_grid(denoiser: Denoiser, grid: Grid) -> ParallelHeads:
    """A denoiser whose network gives the heads of a grid; its variance, if learned, is fixed."""
    given = {each.name: getattr(denoiser, each.name) for each in fields(Denoiser)}
    fixed = replace(denoiser.parameterization, variance="fixed_small")
    return ParallelHeads(**{**given, "parameterization": fixed, "grid": grid})
