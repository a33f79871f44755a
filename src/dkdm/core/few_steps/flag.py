"""A network that denoises as it is, and jumps when a flag says so.

The flag is a learned shift of what the layers that see the time alone give: an input that is 0 or
1, and the weights that it comes with. It is the same at each level, so that the network that jumps
is an ordinary one, with the shift added to the biases of these layers (to each row of a table).
Which layers see the time is found by evaluating the network. If none has a bias, the first layer
that sees the state has the flag.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.core.denoisers.calls import Call, Network
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.devices import to_device
from dkdm.core.few_steps.both_levels import (
    answers,
    are_close,
    on_levels_twice,
    some_levels,
    tried_copy,
)
from dkdm.errors import DkdmError

SHIFT = "jump"  # a parameter of a layer with the flag, [D]
STD = 0.1  # of a shift at first: of zeros both tasks would begin as one, and part slowly
WITHOUT = "without_jump"  # a buffer of a layer that jumps: its bias, or table, when it denoises
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS)


def is_flagged(model: Denoiser) -> bool:
    """Whether the network of a model has the flag, or had it before it was made to jump."""
    return bool(_layers(model.network, SHIFT) or _layers(model.network, WITHOUT))


def both(model: Denoiser) -> Denoiser:
    """The model on 2T levels: t as it is, and t + T the same level with the flag."""
    numbers = torch.arange(2 * model.process.num_levels, dtype=torch.float64)
    assert model.call is not None
    told = _Told(model.call, model.network_time, _layers(model.network, SHIFT))
    return on_levels_twice(model, numbers, told)


@dataclass(eq=False)
class _Told:
    """A call of a network at the numbers of 2T levels; layers are told which samples jump.

    They are told until the next call if gradients are wanted, since activations may be computed
    again in the backward pass.
    """

    call: Call
    times: Tensor
    layers: list[Any]

    def __call__(
        self, network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        """The network's output for states x [B, ...] at levels whose numbers are `time`, [B]."""
        self.times = to_device(self.times, x.device, torch.float32)
        number, levels = time.long(), len(self.times)
        self._tell(number >= levels, True)
        try:
            return self.call(network, x, self.times[number % levels], cond)
        finally:
            self._tell(number >= levels if torch.is_grad_enabled() else None, False)

    def _tell(self, jumps: Tensor | None, called: bool) -> None:
        for layer in self.layers:
            layer.jumps, layer.called = jumps, called


def _shifted(layer: Any, args: Any, output: Tensor) -> Tensor:
    """A forward hook: what the layer gives, and the shift for the samples that jump.

    In a call of the network by itself, without gradients, none do.
    """
    del args
    if layer.jumps is None or not (layer.called or torch.is_grad_enabled()):
        return output
    rows = layer.jumps.to(output.dtype).reshape(-1, *[1] * (output.ndim - 1))
    shift = getattr(layer, SHIFT).to(output.dtype)
    if isinstance(layer, CONVOLUTIONS):
        shift = shift.reshape(-1, *[1] * (output.ndim - 2))
    return output + rows * shift


def with_flag(model: Denoiser) -> nn.Module | None:
    """A copy of the network with the flag, a small random shift; None if no layer can have it.

    That it acts on samples that jump alone, and that `jumping` changes nothing, is tried on a copy
    whose weights all matter.
    """
    tried = replace(model, network=tried_copy(model))
    for names in _places(tried):
        if names and _works(replace(model, network=tried_copy(_flagged(model, names)))):
            return _flagged(model, names).network  # type: ignore[return-value]
    return None


def _works(model: Denoiser) -> bool:
    t, plain = some_levels(model), replace(model, network=_bare(model))
    with suppress(RuntimeError, DkdmError):  # rows of a layer that are not those of the batch
        direct, jump = answers(both(model), t, t + model.process.num_levels)
        (as_before,), (folded,) = (
            answers(one, t) for one in (plain, replace(model, network=jumping(model)))
        )
        same = are_close(direct, as_before) and are_close(jump, folded)
        return same and not are_close(jump, direct)
    return False


def _bare(model: Denoiser) -> nn.Module:
    return denoising(replace(model, network=jumping(model)))


def _flagged(model: Denoiser, names: list[str]) -> Denoiser:
    network: nn.Module = copy.deepcopy(model.network)  # type: ignore[assignment]
    random = torch.Generator().manual_seed(0)
    for name in names:
        layer: Any = network.get_submodule(name)
        target = _target(layer)
        shift = torch.randn(target.shape[-1], generator=random).mul(STD).to(target.detach())
        layer.register_parameter(SHIFT, nn.Parameter(shift, requires_grad=target.requires_grad))
        layer.register_forward_hook(_shifted)
        layer.jumps, layer.called = None, False
    return replace(model, network=network)


def jumping(model: Denoiser) -> nn.Module:
    """A copy of the network whose shift is in its biases; it remembers them without."""
    network: nn.Module = copy.deepcopy(model.network)  # type: ignore[assignment]
    for layer in _layers(network, SHIFT):
        target = _target(layer)
        layer.register_buffer(WITHOUT, target.detach().clone(), persistent=False)
        with torch.no_grad():
            target.add_(getattr(layer, SHIFT))
        delattr(layer, SHIFT)
        del layer.jumps, layer.called
        for number, hook in list(layer._forward_hooks.items()):
            if hook is _shifted:
                del layer._forward_hooks[number]
    return network


def denoising(model: Denoiser) -> nn.Module:
    """A copy of a network that `jumping` made with its biases as they were without the shift."""
    network: nn.Module = copy.deepcopy(model.network)  # type: ignore[assignment]
    for layer in _layers(network, WITHOUT):
        with torch.no_grad():
            _target(layer).copy_(getattr(layer, WITHOUT))
        delattr(layer, WITHOUT)
    return network


def _layers(network: Any, name: str) -> list[Any]:
    """Layers that have a parameter or a buffer of this name themselves."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    return [each for each in modules if isinstance(each, LAYERS) and hasattr(each, name)]


def _target(layer: Any) -> Tensor:
    """What the shift can be added to: the bias [D], or a table [N, D]."""
    found: Tensor = layer.weight if isinstance(layer, nn.Embedding) else layer.bias
    return found


def _can_shift(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is None
    return isinstance(layer, LAYERS) and layer.bias is not None


def _places(model: Denoiser) -> Iterator[list[str]]:
    """Layers that may have the flag, the best first: all that see the time and no state, and the
    first that sees a state."""
    t = some_levels(model)
    usual, at_others = (_inputs(model, levels) for levels in (t, t.roll(1)))
    of_others = _inputs(model, t, seed=1)
    sees_time = _differing(usual, at_others)
    sees_state = _differing(usual, of_others)
    yield [name for name in usual if name in sees_time and name not in sees_state]
    yield [name for name in usual if name in sees_state][:1]


def _differing(one: Mapping[str, list[Tensor]], other: Mapping[str, list[Tensor]]) -> set[str]:
    """Layers whose inputs differ."""
    alike: Callable[[Tensor, Tensor], bool] = torch.equal
    return {
        name for name, inputs in one.items() if not all(map(alike, inputs, other.get(name, inputs)))
    }


def _inputs(model: Denoiser, t: Tensor, seed: int = 0) -> dict[str, list[Tensor]]:
    """What the layers that can shift are fed for the states of a seed, in the order of calls."""
    seen: dict[str, list[Tensor]] = {}
    network: nn.Module = copy.deepcopy(model.network)  # type: ignore[assignment]
    for name, module in network.named_modules():
        if _can_shift(module):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).extend(
                    each.detach().clone() for each in args[:1]
                )
            )
    answers(replace(model, network=network), t, seed=seed)
    return seen
