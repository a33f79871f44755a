"""What is checked: a student, a copy of it with noise on its weights, and inputs for both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dkdm.core.calls import Call, Network
from dkdm.core.conditioning import Condition
from dkdm.core.denoiser import Denoiser
from dkdm.core.modes import silence_label_dropout
from dkdm.models.custom_network import awakened

# Two outputs are the same up to this, of the largest value; a network that depends on something
# changes by hundreds of times as much when it is replaced by something else.
TOLERANCE = 1e-5


class Probe(NamedTuple):
    """What a network is fed: x [B, ...], time float [B], cond as embedded."""

    x: Tensor
    time: Tensor
    cond: Condition

    def with_rows_of(self, other: Probe, what: str, rows: Iterable[int]) -> Probe:
        """This probe with some rows of one input ("x", "t" or a condition) from another."""
        index = list(rows)
        mixed = self.inputs()[what].clone()
        mixed[index] = other.inputs()[what][index]
        if what in self.cond:
            return self._replace(cond={**self.cond, what: mixed})
        return self._replace(x=mixed) if what == "x" else self._replace(time=mixed)

    def inputs(self) -> dict[str, Tensor]:
        """All inputs by name."""
        return {"x": self.x, "t": self.time, **self.cond}

    def copied(self) -> Probe:
        """A copy of all tensors."""
        cond = {key: value.clone() for key, value in self.cond.items()}
        return Probe(self.x.clone(), self.time.clone(), cond)

    def to(self, dtype: torch.dtype) -> Probe:
        """States and conditions in another precision; times stay float32, as in training."""
        cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.cond.items()}
        return Probe(self.x.to(dtype), self.time, cond)


@dataclass(eq=False)
class Case:
    """A student to check.

    remake: makes it once more; None if it was given as an object. perturbed: a copy of its
    network with noise on every weight, in evaluation mode. A layer that starts at zero would hide
    all layers before it; what is zero in the copy stays zero.
    """

    student: Denoiser
    teacher: Denoiser
    remake: Callable[[], Denoiser] | None
    perturbed: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.perturbed = awakened(self.network).eval()

    @property
    def network(self) -> nn.Module:
        """The student's network as it was made; the check never changes it."""
        network: nn.Module = self.student.network  # type: ignore[assignment]
        return network

    @property
    def call(self) -> Call:
        """How the network is called."""
        assert self.student.call is not None
        return self.student.call

    @property
    def channels(self) -> int:
        """How many channels it has to give."""
        learned = self.student.parameterization.learns_variance
        return self.student.sample_shape[0] * (2 if learned else 1)

    @property
    def inputs(self) -> list[str]:
        """Names of all its inputs."""
        constant = set(self.student.constants) | {"guidance"}
        return ["x", "t", *(name for name in self.probe(2).cond if name not in constant)]

    def copied(self) -> nn.Module:
        """A copy of the network, to be changed."""
        copied = copy.deepcopy(self.network)
        silence_label_dropout(copied)
        return copied

    def probe(self, count: int, seed: int = 0, null: bool = False, reach: float = 0.8) -> Probe:
        """Random states at noise levels from low to high, and a condition for each.

        null: feed the null condition. reach: share of the levels that they span; 1 is all of them.
        """
        student = self.student
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(count, *student.sample_shape, generator=random).to(student.device)
        last = student.process.num_levels - 1
        low, high = (1 - reach) / 2, (1 + reach) / 2
        t = (torch.linspace(low, high, count) * last).round().long().roll(seed)
        turns = student.conditioning.in_turns(count + seed)
        later = {name: value[seed:] for name, value in turns.items()}
        drawn = student.conditioning.null(count) if null else later
        cond = {k: v.expand(count, *v.shape) for k, v in student.constants.items()}
        cond |= student.conditioning.embed(drawn)
        if student.embeds_guidance:
            cond["guidance"] = torch.full((count,), 2.0)
        on_device = {key: value.to(x.device) for key, value in cond.items()}
        return Probe(x, student.network_time[t].to(x.device, torch.float32), on_device)

    def other_probe(self, probe: Probe) -> Probe:
        """Inputs for as many samples that differ from the given ones in every row.

        If there is a single prompt or class, its embedding or id is replaced by an invented one.
        """
        other = self.probe(len(probe.x), seed=1)
        for name, value in other.cond.items():
            if torch.equal(value, probe.cond[name]):
                other.cond[name] = self._unlike(name, value)
        return other

    def _unlike(self, name: str, value: Tensor) -> Tensor:
        if "mask" in name:  # only the first token counts
            return value * (torch.arange(value.shape[-1], device=value.device) == 0).to(value)
        if value.is_floating_point():
            random = torch.Generator().manual_seed(2)
            return value + torch.randn(value.shape, generator=random).to(value)
        null = getattr(self.student.conditioning, "null_class", None)
        return value if null is None else torch.full_like(value, null)

    def answer(self, network: Network, probe: Probe) -> Tensor:
        """One evaluation, as training calls it, on a copy of the inputs."""
        return self.call(network, *probe.copied())

    def answer_alike(self, network: nn.Module, probe: Probe) -> Tensor:
        """One evaluation that can be repeated: random numbers and buffers are restored.

        Dropout draws numbers, and some layers (spectral_norm) update buffers in training mode.
        """
        kept = [(buffer, buffer.clone()) for buffer in network.buffers()]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            output = self.answer(network, probe)
        for buffer, value in kept:
            buffer.copy_(value)
        return output


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ by more than rounding."""
    largest = one.abs().max().clamp(min=1e-12)
    return bool((one - other).abs().max() > TOLERANCE * largest)
