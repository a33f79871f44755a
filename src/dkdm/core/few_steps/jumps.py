"""A student that jumps: at any level it gives x_0 at the end of the trajectory that it is on.

A consistency model (arXiv 2303.01469, algorithm 1): jump to x_0, put new noise on it, jump again.
Its weights are those of an ordinary denoiser too, at the mirrored time -t: both tasks meet at the
data, where the time is 0 and a jump is of no length. Time reaches a network by sines and cosines,
so that a network with the columns of the sines negated answers at t as the other does at -t.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.few_steps.model import FewStep
from dkdm.core.matching import Matched
from dkdm.core.modes import evaluating
from dkdm.errors import UsageError

TRIED_STD = 0.05  # added to the weights that a mirror is tried with: zeros show nothing
TOLERANCE = 1e-4


@dataclass(eq=False)
class Jumps(FewStep):
    """A consistency model on a grid, one jump from each point that it samples at."""

    renoises: ClassVar[bool] = True
    beside: ClassVar[str] = (
        "`many-steps/` holds the same weights at mirrored time, for many steps; `plain/`, if it "
        "is there, the student before"
    )


def at_both_times(model: Denoiser) -> Denoiser:
    """The model on 2T levels: t as it is, and t + T the same level at the mirrored time -t."""
    own, time = model.process, model.network_time
    alpha, sigma = (torch.cat([table, table]) for table in (own.alpha, own.sigma))
    both = Matched(alpha, sigma, torch.cat([time, -time]), own.final, scheduler=own.scheduler)
    rescale = None if model.rescale is None else torch.cat([model.rescale, model.rescale])
    return replace(model, process=both, time=None, rescale=rescale)


def check_mirror(model: Denoiser) -> None:
    """Raise UsageError for a network that cannot be mirrored in time, or has no time to mirror.

    What `mirrored` does is tried on a copy whose weights all matter.
    """
    time = model.network_time
    if not bool((time.diff() >= 0).all() and 0 <= time[0] < time[-1]):
        raise UsageError(
            f"{model.name}: --objective consistency asks it at the mirrored time -t too, and its "
            "time does not rise from 0 at the data: use --objective few-step, or a network that "
            "is fed the level itself"
        )
    tried: nn.Module = copy.deepcopy(model.network)  # type: ignore[assignment]
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in tried.parameters():
            noise = TRIED_STD * torch.randn(weight.shape, generator=random)
            weight.add_(noise.to(weight))
    network = mirrored(replace(model, network=tried))
    now, _ = _answers(replace(model, network=network))
    plain, then = _answers(replace(model, network=tried))
    if not _close(now, then):
        raise _no_mirror(model)
    if _close(plain[0], then[0]):
        raise UsageError(
            f"{model.name}: at pure noise it answers as at the mirrored time, because its time is "
            "periodic: use --objective few-step, or a network whose time is not"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().max())))


def mirrored(model: Denoiser) -> nn.Module:
    """A copy of the network that answers at each time as the network does at its mirror image.

    The columns of its linear layers that see sines of the time are negated. Raises UsageError if no
    layer sees sines and cosines.
    """
    odd = sine_columns(model)
    if not odd:
        raise _no_mirror(model)
    network: nn.Module = copy.deepcopy(model.network)  # type: ignore[assignment]
    with torch.no_grad():
        for name, columns in odd.items():
            layer: Any = network.get_submodule(name)
            layer.weight[:, columns.to(layer.weight.device)] *= -1
    return network


def _no_mirror(model: Denoiser) -> UsageError:
    return UsageError(
        f"{model.name}: --objective consistency asks a student at mirrored times, and no linear "
        "layer of this network sees its time as sines and cosines alone: use --objective few-step"
    )


def sine_columns(model: Denoiser) -> dict[str, Tensor]:
    """Linear layers that see sines and cosines of the time: which columns are sines, bool [D]."""
    seen: dict[str, list[Tensor]] = {}
    network: nn.Module = copy.deepcopy(model.network)  # type: ignore[assignment]
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).extend(
                    each.detach() for each in args[:1]
                )
            )
    _answers(replace(model, network=network))
    found = {name: _sines(inputs) for name, inputs in seen.items()}
    return {name: odd for name, odd in found.items() if odd is not None}


def _sines(inputs: list[Tensor]) -> Tensor | None:
    """Which columns change their sign from the first half of a layer's inputs to the second.

    None if another one changes, or none does.
    """
    half = len(inputs) // 2
    halves = inputs[:half], inputs[half:]
    if [each.shape for each in halves[0]] != [each.shape for each in halves[1]]:
        return None
    a, b = (torch.cat([each.flatten(0, -2) for each in part]) for part in halves)
    odd, even = (a == -b).all(0), (a == b).all(0)
    whole = bool((odd | even).all()) and not bool(even.all())
    return odd & ~even if whole else None


@torch.no_grad()
def _answers(model: Denoiser) -> tuple[Tensor, Tensor]:
    """Outputs for three states as asked, and at the mirrored times, in evaluation mode."""
    both, levels = at_both_times(model), model.process.num_levels
    t = torch.tensor([levels - 1, levels // 2, levels // 4])
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, *model.sample_shape, generator=random).to(model.device)
    cond: Mapping[str, Tensor] = model.conditioning.draw(3, random)
    with evaluating(both.network, both.call):
        outputs = [both.predict(Batch(x, at, dict(cond))).output for at in (t, t + levels)]
    return outputs[0], outputs[1]
