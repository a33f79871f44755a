"""Parallel heads for any network: its last layer N times, and folded again into one.

A network is made again with other output channels: by its config (diffusers, dkdm), by its user's
factory, or as a copy whose last layer is replaced. How the rows of the last layer lie is found by
evaluating the network, which need not say anything about it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.modes import evaluating
from dkdm.core.few_steps.grid import Grid
from dkdm.core.few_steps.heads import ParallelHeads
from dkdm.core.saving.checkpoint import ORIGIN
from dkdm.errors import DkdmError, UsageError
from dkdm.models.custom_network import is_own, make, origin_of

LAST_STD = 0.5  # of the random last layer that a copy is tried with: one of zeros shows nothing
TOLERANCE = 1e-4
DEFAULTS = "_use_default_values"  # of a config: what diffusers would put back to its default
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Rows = Callable[[Tensor, int], Tensor]  # (rows, values of a token before its channels) -> rows


def with_heads(student: Denoiser, grid: Grid) -> ParallelHeads:
    """A copy of a student whose last layer stands N times: N equal heads.

    A learned variance is dropped. Raises UsageError for a network whose output cannot be widened.
    """
    count, channels = grid.num_heads, student.sample_shape[0]

    def heads_of(network: nn.Module) -> ParallelHeads:
        return ParallelHeads.of(replace(student, network=network), grid)

    def widened(rows: Tensor, outer: int) -> Tensor:
        mean = rows.unflatten(0, (outer, student.out_channels, -1))[:, :channels].unsqueeze(1)
        return mean.expand(-1, count, *mean.shape[2:]).flatten(0, 3)

    def alike(narrow: nn.Module, wide: nn.Module) -> bool:
        models = replace(student, network=narrow), heads_of(wide)
        return _close(*map(_answer, models))

    found = _with_rows(student, count * channels, widened, alike)
    if found is None:
        raise UsageError(
            f"{student.name}: its output cannot be widened to {count} heads: give a network that "
            "ends in a linear layer or a convolution of hidden channels, or a factory module:name "
            "whose network has as many output channels as it is asked for"
        )
    return heads_of(found)


def one_step(student: ParallelHeads) -> ParallelHeads | None:
    """The same model in one step as an ordinary network, the mean of its heads one last layer.

    None if the last layer is not linear in its weights.
    """
    grid, channels = student.intervals, student.sample_shape[0]
    if 1 not in grid.steps:
        return None
    student = replace(student, network=_without_autocast(student.network))
    shares = grid.shares(range(grid.num_heads))
    ends = [0, grid.num_heads]
    single = Grid(grid.alpha[ends], grid.sigma[ends], grid.time[:1], (1,))

    def folded(rows: Tensor, outer: int) -> Tensor:
        split = rows.unflatten(0, (outer, grid.num_heads, channels, -1)).double()
        mean = (split * shares.to(rows.device).reshape(-1, *[1] * (split.ndim - 2))).sum(1)
        return mean.flatten(0, 2).to(rows.dtype)

    def alike(wide: nn.Module, narrow: nn.Module) -> bool:
        models = replace(student, network=wide), replace(student, network=narrow, grid=single)
        return _close(*map(_drawn, models))

    found = _with_rows(student, channels, folded, alike)
    return None if found is None else replace(student, network=found, grid=single)


def narrowed(student: ParallelHeads) -> nn.Module | None:
    """A network like the student's with one output instead of its heads; its weights are any."""
    with torch.random.fork_rng():
        network: nn.Module = student.network  # type: ignore[assignment]
        return _remade(network, student, student.sample_shape[0])


def _without_autocast(network: Any) -> nn.Module:
    """A copy of a network without what accelerate puts around its forward in mixed precision."""
    copied: Any = copy.deepcopy(network)
    original = copied.__dict__.pop("_original_forward", None)
    if original is not None:
        copied.forward = original
    return copied


def _with_rows(
    model: Denoiser, channels: int, rows_of: Rows, alike: Callable[[nn.Module, nn.Module], bool]
) -> nn.Module | None:
    """The network with so many output channels, its last layer's rows made of the old ones.

    alike: whether two networks answer the same. None if they do in no order of the rows.
    """
    network: nn.Module = model.network  # type: ignore[assignment]
    with torch.random.fork_rng():
        made = _remade(network, model, channels)
        if made is None:
            return None
        tried, state = copy.deepcopy(network), network.state_dict()
        names = [key for key, value in made.state_dict().items() if value.shape != state[key].shape]
        _randomize([tried.state_dict()[name] for name in names])
        for outer in {1, *(len(state[name]) // model.out_channels for name in names)}:
            try:
                made.load_state_dict(_replaced(tried.state_dict(), names, rows_of, outer))
                if alike(tried, made):
                    made.load_state_dict(_replaced(state, names, rows_of, outer))
                    return made
            except (RuntimeError, DkdmError):  # rows that do not lie so, or no rows of its output
                continue
    return None


def _replaced(
    state: Mapping[str, Tensor], names: list[str], rows_of: Rows, outer: int
) -> dict[str, Tensor]:
    return {**state, **{name: rows_of(state[name], outer) for name in names}}


@torch.no_grad()
def _randomize(tensors: list[Tensor]) -> None:
    random = torch.Generator().manual_seed(0)
    for tensor in tensors:
        noise = LAST_STD * torch.randn(tensor.shape, generator=random)
        tensor.copy_(noise.to(tensor))


def _remade(network: nn.Module, model: Denoiser, channels: int) -> nn.Module | None:
    """The network with other output channels and any weights; None if it cannot be made."""
    origin, config = origin_of(network), getattr(network, "config", {})
    if origin is not None and origin.factory is not None and origin.arguments is None:
        made = make(replace(origin, out_channels=channels), Path(origin.factory), origin.factory)
    elif is_own(network):
        return _with_another_last_layer(network, model, channels)
    else:
        kind: Any = type(network)
        own = config.get("out_channels") or config.get("in_channels", 0)  # 4C if it packs 2x2
        wanted = own * channels // model.out_channels
        kept = {name: config[name] or model.sample_shape[0] for name in _of_one_output(kind)}
        said = {name: value for name, value in config.items() if name != DEFAULTS}
        made = kind.from_config({**said, **kept, "out_channels": wanted})
    if not _differs_in_shapes(made, network):
        return None
    made = made if model.dtype in (None, torch.float32) else made.to(model.dtype)
    return made.to(model.device)


def _of_one_output(kind: type) -> tuple[str, ...]:
    """Options of a network of dkdm that stay what they are for one of several outputs."""
    found: tuple[str, ...] = getattr(kind, "of_one_output", ())
    return found


def _differs_in_shapes(made: nn.Module, network: nn.Module) -> bool:
    """Whether some tensor has another shape, and all have the same names."""
    one, other = made.state_dict(), network.state_dict()
    return one.keys() == other.keys() and any(one[k].shape != other[k].shape for k in one)


def _with_another_last_layer(
    network: nn.Module, model: Denoiser, channels: int
) -> nn.Module | None:
    """A copy whose last layer gives so many channels; None if it ends in no such layer."""
    copied, called = copy.deepcopy(network), list[str]()
    for name, module in copied.named_modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    _answer(replace(model, network=copied))
    last = called[-1] if called else ""
    copied = copy.deepcopy(network)
    parent, _, name = last.rpartition(".")
    layer: Any = copied.get_submodule(last)
    rows = len(layer.weight) if isinstance(layer, LAYERS) and not is_parametrized(layer) else 0
    if not rows or rows % model.out_channels:
        return None
    wanted = rows // model.out_channels * channels
    setattr(copied.get_submodule(parent), name, _like(layer, wanted))
    if (origin := origin_of(network)) is not None:
        known = replace(origin, factory=None, arguments=None, out_channels=channels)
        setattr(copied, ORIGIN, known)
    return copied


def _like(layer: Any, rows: int) -> nn.Module:
    """A layer of the same kind with so many outputs."""
    copied = copy.deepcopy(layer)
    for name in ("weight", "bias"):
        old = getattr(copied, name)
        if old is not None:
            setattr(copied, name, nn.Parameter(old.new_zeros(rows, *old.shape[1:])))
    setattr(copied, "out_features" if isinstance(layer, nn.Linear) else "out_channels", rows)
    return copied


def _inputs(model: Denoiser, t: Tensor) -> Batch:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(len(t), *model.sample_shape, generator=random).to(model.device)
    return Batch(x, t, model.conditioning.draw(len(t), random), t)


@torch.no_grad()
def _answer(model: Denoiser) -> Tensor:
    """Outputs at levels in the first, a middle and the last interval, in evaluation mode."""
    last = model.process.num_levels - 1
    batch = _inputs(model, torch.tensor([last, last // 2, 0]))
    with evaluating(model.network, model.call):
        return model.predict(batch).output


def _drawn(model: ParallelHeads) -> Tensor:
    """Three samples in one step."""
    batch = _inputs(model, torch.zeros(3, dtype=torch.int64))
    return model.sample(lambda _: batch.x, batch.cond, 1)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(a.abs().max())))
