"""Samplers of second order: a better path from the same noise, from few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dkdm.core.diffusion.prediction import Prediction, PredictionType, clip_x_0
from dkdm.core.diffusion.process import Process, Spacing, per_sample

# (x, t) -> Prediction, t an int64 [B]
Predict = Callable[[Tensor, Tensor], Prediction]
# (predict, process, x [B, ...] at the first of the descending levels, the levels) -> x_0
Solver = Callable[[Predict, Process, Tensor, list[int]], Tensor]


def heun(predict: Predict, process: Process, x: Tensor, timesteps: list[int]) -> Tensor:
    """Correct each Euler step by the slope at its end: two evaluations a step, one in the last.

    The slope is that of x over sigma if alpha is 1 (arXiv 2206.00364, algorithm 1), otherwise that
    of x / (alpha + sigma) over the share of noise, sigma / (alpha + sigma): sigma / alpha is as
    large as 20,000 on a cosine schedule, where a step of it is no line. x: [B, ...] at level
    timesteps[0], which descend. Returns x_0 [B, ...].
    """
    share = not bool((process.alpha == 1).all())
    for t, s in _moves(timesteps, len(x)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t), process.at(s)
        first = _clipped(predict, process, x, t)
        end = _ended(first, alpha_s, sigma_s)
        if int(s[0]) >= 0:
            second = _clipped(predict, process, end, s)
            scale_t, scale_s = (
                (alpha_t + sigma_t, alpha_s + sigma_s) if share else (alpha_t, alpha_s)
            )
            step = sigma_s / scale_s - sigma_t / scale_t
            slopes = (_slope(first, share) + _slope(second, share)) / 2
            end = per_sample(scale_s, x) * (
                x / per_sample(scale_t, x) + per_sample(step, x) * slopes
            )
        x = end
    return x


def dpm(predict: Predict, process: Process, x: Tensor, timesteps: list[int]) -> Tensor:
    """DPM-Solver++(2M): each step uses the prediction before it too; one evaluation a step.

    The first and the last step are of first order. Arguments as `heun`. Source: Lu et al.,
    DPM-Solver++ (arXiv 2211.01095), algorithm 2.
    """
    before: tuple[Tensor, Tensor] | None = None  # x_0 and log(alpha / sigma) of the last step
    for t, s in _moves(timesteps, len(x)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t), process.at(s)
        at, to = (alpha_t / sigma_t).log(), (alpha_s / sigma_s).log()
        found = _clipped(predict, process, x, t)
        x_0 = found.x_0
        if before is not None and bool((to.isfinite() & before[1].isfinite()).all()):
            share = (to - at) / (at - before[1]) / 2
            x_0 = x_0 + per_sample(share, x) * (x_0 - before[0])
        kept = sigma_s / sigma_t
        x = per_sample(kept, x) * x + per_sample(alpha_s - kept * alpha_t, x) * x_0
        before = found.x_0, at
    return x


def _moves(timesteps: list[int], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each level and the next, -1 after the last, as int64 [B]."""
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        yield torch.full((count,), t), torch.full((count,), s)


def _clipped(predict: Predict, process: Process, x: Tensor, t: Tensor) -> Prediction:
    return clip_x_0(predict(x, t), x, *process.at(t), process.clipping)


def _ended(found: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    return per_sample(alpha, found.x_0) * found.x_0 + per_sample(sigma, found.eps) * found.eps


def _slope(found: Prediction, share: bool) -> Tensor:
    return found.eps - found.x_0 if share else found.eps


SOLVERS: dict[str, Solver] = {"heun": heun, "dpm": dpm}
SPACING: Spacing = "trailing"
# alpha / sigma: below it an error of eps is more than 164 times as large in x_0
FAINTEST = math.exp(-5.1)


def spacing_of(name: str, process: Process, prediction: PredictionType) -> Spacing | None:
    """Where the levels of a sampler lie; None if as the process has them.

    Those of second order start at the most noise: "leading" starts below it, where x is no longer
    noise alone. Their last step starts above t = 0: log(alpha / sigma), over which dpm
    extrapolates, leaps there, and heun would divide a network's error by that sigma. Models that
    predict eps keep the process's levels where the most noise hides x_0 (a cosine schedule; Lu et
    al. leave such levels out).
    """
    hidden = process.alpha[-1] / process.sigma[-1] < FAINTEST
    return SPACING if name in SOLVERS and not (prediction == "epsilon" and hidden) else None
