"""What is checked: a student, a copy of it with noise on its weights, and inputs for both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dkdm.core.denoisers.calls import Network
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.modes import silence_label_dropout
from dkdm.models.custom_network import awakened

# Two outputs are the same up to this, of the largest value; a network that depends on something
# changes by hundreds of times as much when it is replaced by something else.
TOLERANCE = 1e-5

# What a network is fed, by name: x [B, ...], t float [B], and conditions as they are embedded.
Probe = dict[str, Tensor]


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
        silence_label_dropout(self.perturbed)

    @property
    def network(self) -> nn.Module:
        """The student's network as it was made; the check never changes it."""
        network: nn.Module = self.student.network  # type: ignore[assignment]
        return network

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
        shares = torch.linspace((1 - reach) / 2, (1 + reach) / 2, count)
        t = (shares * (student.process.num_levels - 1)).round().long().roll(seed)
        fed = {
            "x": torch.randn(count, *student.sample_shape, generator=random),
            "t": student.network_time[t].float(),
            **{
                name: value.expand(count, *value.shape) for name, value in student.constants.items()
            },
        }
        turns = student.conditioning.in_turns(count + seed)
        later = {name: value[seed:] for name, value in turns.items()}
        fed |= student.conditioning.embed(student.conditioning.null(count) if null else later)
        if student.embeds_guidance:
            fed["guidance"] = torch.full((count,), 2.0)
        return {name: value.to(student.device) for name, value in fed.items()}

    def other_probe(self, probe: Probe) -> Probe:
        """Inputs for as many samples that differ from the given ones in every row.

        If there is a single prompt or class, its embedding or id is replaced by an invented one.
        """
        other = self.probe(len(probe["x"]), seed=1)
        same = [name for name, value in other.items() if torch.equal(value, probe[name])]
        return other | {name: self._unlike(name, other[name]) for name in same}

    def _unlike(self, name: str, value: Tensor) -> Tensor:
        if "mask" in name:  # only the first token counts
            return value * (torch.arange(value.shape[-1], device=value.device) == 0).to(value)
        if value.is_floating_point():
            random = torch.Generator().manual_seed(2)
            return value + torch.randn(value.shape, generator=random).to(value)
        null = getattr(self.student.conditioning, "null_class", None)
        return value if null is None else torch.full_like(value, null)

    def evaluate(self, network: Network, probe: Probe) -> Tensor:
        """One evaluation, as training calls it."""
        cond = {name: value for name, value in probe.items() if name not in ("x", "t")}
        assert self.student.call is not None
        return self.student.call(network, probe["x"], probe["t"], cond)

    def answer(self, network: Network, probe: Probe) -> Tensor:
        """One evaluation on a copy of the inputs."""
        return self.evaluate(network, {name: value.clone() for name, value in probe.items()})

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


def with_rows_of(probe: Probe, other: Probe, name: str, rows: list[int]) -> Probe:
    """A probe with some rows of one input from another."""
    mixed = probe[name].clone()
    mixed[rows] = other[name][rows]
    return {**probe, name: mixed}
