"""What every few-step model is: a denoiser on a grid, which draws in a few numbers of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.modes import evaluating
from dkdm.core.denoisers.refusals import check_output
from dkdm.core.denoisers.teachers import parts_of
from dkdm.core.devices import to_device
from dkdm.core.diffusion.prediction import scale_input, to_x_0_eps
from dkdm.core.diffusion.process import Spacing
from dkdm.core.diffusion.solvers import Solver
from dkdm.core.few_steps.grid import Grid
from dkdm.errors import UsageError

OWN_SAMPLER = "its own sampler"  # what draws from a few-step model, in words
NO_GUIDANCE = (
    "a few-step model takes no guidance scale: guidance was mixed into what it learnt, and its "
    "steps lead over many levels at once; sample it with a scale of 1, or distil with another "
    "--guidance-scale"
)


@dataclass(eq=False)
class FewStep(Denoiser):
    """A denoiser whose sampling steps lead from one point of its grid to another.

    A step takes x_0 and eps from the mean of the network's outputs, and then alpha x_0 + sigma eps;
    if the model `renoises`, alpha x_0 + sigma z with new noise z. beside: the folders that a run
    may ship inside such a model's, and what each holds.
    """

    renoises: ClassVar[bool] = False
    beside: ClassVar[Mapping[str, str]] = {}

    grid: Grid | None = None

    @classmethod
    def of(cls, denoiser: Denoiser, grid: Grid) -> Self:
        """The same denoiser on a grid."""
        return cls(**_fields(denoiser), grid=grid)

    def without_grid(self) -> Denoiser:
        """The same network as a denoiser of its levels."""
        return Denoiser(**_fields(self))

    @classmethod
    def outputs_on(cls, grid: Grid) -> int:
        """Predictions of C channels in one output of a network."""
        del grid
        return 1

    @property
    def intervals(self) -> Grid:
        """The grid, which every such model has."""
        assert self.grid is not None
        return self.grid

    @property
    def num_outputs(self) -> int:
        """N, how often C channels are in an output, a variance included."""
        return self.out_channels // self.sample_shape[0]

    def shares(self, block: range) -> Tensor:
        """What each output counts in a step over a block of intervals, float64 [N]."""
        del block
        return torch.eye(self.num_outputs, dtype=torch.float64)[0]

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
        return output.unflatten(1, (self.num_outputs, self.sample_shape[0]))

    def _meant(self, outputs: Tensor, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        own, grid = self.parameterization, self.intervals
        levels = grid.alpha[first], grid.sigma[first]
        return to_x_0_eps(own.prediction, outputs, x, *levels, own.sigma_data)

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
            for number, block in enumerate(blocks):
                first = torch.full((len(x),), block.start)
                outputs = self.heads(x, first, cond)
                mean = torch.tensordot(outputs, self.shares(block).to(outputs), ([1], [0]))
                x_0, eps = self._meant(mean, x, first)
                alpha, sigma = float(grid.alpha[block.stop]), float(grid.sigma[block.stop])
                if self.renoises and sigma:
                    eps = noise(number).to(x)
                x = alpha * x_0 + sigma * eps
        return x

    def saved(self) -> dict[str, Any]:
        """The grid and the kind of the model as JSON values."""
        return {**self.intervals.as_dict(), "renoises": self.renoises}


def usual_steps(model: Denoiser, many: int) -> int:
    """The most steps that a few-step model draws in; `many` of any other, if it has the levels."""
    if isinstance(model, FewStep):
        return max(model.intervals.steps)
    return min(many, *(one.process.num_levels for one in parts_of(model)))


def fewest_steps(model: Denoiser) -> int:
    """The fewest steps that a model draws in, 1 of any but a few-step model."""
    return min(model.intervals.steps) if isinstance(model, FewStep) else 1


def _fields(denoiser: Denoiser) -> dict[str, Any]:
    return {each.name: getattr(denoiser, each.name) for each in fields(Denoiser)}


def check_sampling(model: Denoiser, num_steps: int, guidance_scale: float = 1.0) -> None:
    """Raise UsageError for a number of steps, or a scale, that a model cannot be drawn with."""
    if not isinstance(model, FewStep):
        model.process.timesteps(num_steps)
        return
    model.intervals.blocks(num_steps)
    if guidance_scale != 1 and not model.embeds_guidance:
        raise UsageError(NO_GUIDANCE)
