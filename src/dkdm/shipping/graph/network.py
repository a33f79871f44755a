"""What a graph file holds: a denoiser's network and its call, as one module with named inputs."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import Condition, null_or_none
from dkdm.core.few_steps.model import FewStep
from dkdm.core.randomness import generator
from dkdm.errors import UsageError
from dkdm.shipping.few_steps import few_steps_table


class GraphNetwork(nn.Module):
    """A denoiser's network as it is called, constants included.

    Called by keyword with `sample` float32 [B, C, ...], `timestep` float32 [B] and the embedded
    conditions, floating ones in float32; returns float32 [B, C or 2C, ...]. The arithmetic between
    is in the network's own precision.
    """

    def __init__(self, denoiser: Denoiser, inputs: Condition) -> None:
        super().__init__()
        if not isinstance(denoiser.network, nn.Module):
            raise UsageError(f"{denoiser.name}: only a torch.nn.Module can be exported as a graph")
        assert denoiser.call is not None
        self.network, self.call, self.dtype = denoiser.network, denoiser.call, denoiser.dtype
        self.fixed = tuple(denoiser.constants)
        for name, value in denoiser.constants.items():
            self.register_buffer(f"constant_{name}", self._cast(value))
        self.forward = self._named(tuple(inputs))

    def _named(self, names: tuple[str, ...]):  # type: ignore[no-untyped-def]
        """A `forward` with one parameter an input: torch.export names inputs by its signature."""

        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            return self.evaluate(**dict(zip(names, args, strict=False)), **kwargs)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return forward

    def evaluate(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """One evaluation; `sample.shape[0]`, never `len`, keeps the batch variable."""
        fixed = {name: getattr(self, f"constant_{name}") for name in self.fixed}
        fed = {name: row.expand(sample.shape[0], *row.shape) for name, row in fixed.items()}
        fed |= {name: self._cast(value) for name, value in conditions.items()}
        return self.call(self.network, self._cast(sample), timestep, fed).float()

    def _cast(self, value: Tensor) -> Tensor:
        floating = value.is_floating_point() and self.dtype is not None
        return value.to(self.dtype) if floating else value


class GraphSampler(GraphNetwork):
    """A few-step model as it is sampled in its fewest steps: noise in, samples out.

    Called by keyword with `noise` float32 [B, C, ...], standard normal, and the embedded
    conditions; returns float32 [B, C, ...], clean samples, or latents of a latent model.
    """

    def __init__(self, denoiser: FewStep, inputs: Condition) -> None:
        super().__init__(denoiser, inputs)
        self.start_std, self.channels = denoiser.process.start_std, denoiser.sample_shape[0]
        self.steps = few_steps_table(denoiser)[min(denoiser.intervals.steps)]
        if any(step.noise for step in self.steps):
            raise UsageError(
                f"{denoiser.name}: {len(self.steps)} steps take new noise in between, and a graph "
                "takes noise once: distil with 1 among --student-steps"
            )

    def evaluate(self, noise: Tensor, **conditions: Tensor) -> Tensor:  # type: ignore[override]
        """All sampling steps, one after the other."""
        x = self.start_std * noise
        for step in self.steps:
            time = torch.full_like(x.flatten(1)[:, 0], step.time)
            heads = super().evaluate(step.shown * x, time, **conditions)
            heads = heads.unflatten(1, (len(step.shares), self.channels))
            mean = torch.tensordot(heads, heads.new_tensor(step.shares), ([1], [0]))
            x = step.kept * x + step.taken * mean
        return x


def graph_network(denoiser: Denoiser, inputs: Condition) -> GraphNetwork:
    """What is exported of a denoiser: its network, or all sampling of a few-step model."""
    if isinstance(denoiser, FewStep):
        return GraphSampler(denoiser, inputs)
    return GraphNetwork(denoiser, inputs)


def random_inputs(denoiser: Denoiser, count: int, seed: int = 0) -> Condition:
    """Inputs by their names: normal states, times of all levels, every second condition null.

    Normal because that is about what states at every level are, and what EDM's are scaled to.
    """
    random = generator("cpu", seed, "graph", count)
    t = torch.randint(denoiser.process.num_levels, (count,), generator=random)
    states = torch.randn(count, *denoiser.sample_shape, generator=random)
    fed = {"sample": states, "timestep": denoiser.network_time[t].float()}
    if isinstance(denoiser, FewStep):
        fed = {"noise": states}
    if denoiser.embeds_guidance:
        fed["guidance"] = 1 + 7 * torch.rand(count, generator=random)
    embedded = denoiser.conditioning.embed(_conditions(denoiser, count, random))
    return fed | {
        name: value.float() if value.is_floating_point() else value
        for name, value in embedded.items()
    }


def _conditions(denoiser: Denoiser, count: int, random: torch.Generator) -> Condition:
    drawn = denoiser.conditioning.draw(count, random)
    null = null_or_none(denoiser.conditioning, count)
    if null is None:
        return drawn
    asked = torch.arange(count) % 2 == 0
    return {name: torch.where(asked, value, null[name]) for name, value in drawn.items()}
