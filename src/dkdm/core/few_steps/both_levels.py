"""A model on its levels twice, once for each of two tasks, and what it answers there."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dkdm.core.denoisers.calls import Call
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.matching import Matched
from dkdm.core.denoisers.modes import evaluating

TRIED_STD = 0.05  # added to the weights that something is tried with: zeros show nothing
TOLERANCE = 1e-4


def on_levels_twice(model: Denoiser, times: Tensor, call: Call | None = None) -> Denoiser:
    """The model on 2T levels, t and t + T the same, with the time that it is fed at each, [2T].

    call: how its network is called; None is as before.
    """
    own = model.process
    alpha, sigma = (torch.cat([table, table]) for table in (own.alpha, own.sigma))
    both = Matched(alpha, sigma, times, own.final, scheduler=own.scheduler)
    rescale = None if model.rescale is None else torch.cat([model.rescale, model.rescale])
    return replace(model, process=both, time=None, rescale=rescale, call=call or model.call)


def tried_copy(model: Denoiser) -> nn.Module:
    """A copy of the network whose weights all matter."""
    tried: nn.Module = copy.deepcopy(model.network)  # type: ignore[assignment]
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in tried.parameters():
            noise = TRIED_STD * torch.randn(weight.shape, generator=random)
            weight.add_(noise.to(weight))
    return tried


@torch.no_grad()
def answers(model: Denoiser, *levels: Tensor, seed: int = 0) -> list[Tensor]:
    """Outputs for the same states at each tensor of levels, int64 [B], in evaluation mode."""
    random, count = torch.Generator().manual_seed(seed), len(levels[0])
    x = torch.randn(count, *model.sample_shape, generator=random).to(model.device)
    cond: Mapping[str, Tensor] = model.conditioning.draw(count, torch.Generator().manual_seed(0))
    with evaluating(model.network, model.call):
        return [model.predict(Batch(x, t, dict(cond))).output for t in levels]


def some_levels(model: Denoiser) -> Tensor:
    """Three levels, from pure noise on, int64 [3]."""
    levels = model.process.num_levels
    return torch.tensor([levels - 1, levels // 2, levels // 4])


def are_close(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same to rounding."""
    return bool(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().max())))
