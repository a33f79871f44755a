"""A network that denoises at time t and jumps at the mirrored time -t.

Both tasks meet at the data, where the time is 0 and a jump is of no length. Time reaches a network
by sines and cosines, so that a network with the columns of the sines negated answers at t as the
other does at -t.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.few_steps.both_levels import (
    answers,
    are_close,
    on_levels_twice,
    some_levels,
    tried_copy,
)


def both(model: Denoiser) -> Denoiser:
    """The model on 2T levels: t as it is, and t + T the same level at the mirrored time -t."""
    time = model.network_time
    return on_levels_twice(model, torch.cat([time, -time]))


def can_mirror(model: Denoiser) -> bool:
    """Whether a network can be mirrored in time: the time rises from 0 at the data, is not
    periodic, and reaches the network by sines and cosines alone.

    What `jumping` does is tried on a copy whose weights all matter.
    """
    time = model.network_time
    if not bool((time.diff() >= 0).all() and 0 <= time[0] < time[-1]):
        return False
    tried = replace(model, network=tried_copy(model))
    if not sine_columns(tried):
        return False
    t = some_levels(model)
    plain, then = answers(both(tried), t, t + model.process.num_levels)
    (now,) = answers(replace(model, network=jumping(tried)), t)
    return are_close(now, then) and not are_close(plain[0], then[0])


def jumping(model: Denoiser) -> nn.Module:
    """A copy of the network that answers at each time as the network does at its mirror image.

    The columns of its linear layers that see sines of the time are negated.
    """
    odd = sine_columns(model)
    network: nn.Module = copy.deepcopy(model.network)  # type: ignore[assignment]
    with torch.no_grad():
        for name, columns in odd.items():
            layer: Any = network.get_submodule(name)
            layer.weight[:, columns.to(layer.weight.device)] *= -1
    return network


denoising = jumping  # a mirror image mirrored


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
    t = some_levels(model)
    answers(both(replace(model, network=network)), t, t + model.process.num_levels)
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
