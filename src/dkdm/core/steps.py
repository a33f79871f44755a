"""One reverse step from t to any s < t for a vector of t, and the sampling loop made of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dkdm.core.prediction import Parameterization, Prediction, clip_x_0
from dkdm.core.process import Process, per_sample
from dkdm.core.variances import posterior_var, step_log_var, transition_var
from dkdm.errors import UsageError


def reverse_step(
    process: Process,
    parameterization: Parameterization,
    x: Tensor,
    prediction: Prediction,
    t: Tensor,
    s: Tensor,
    z: Tensor,
    eta: float = 1.0,
) -> Tensor:
    """Move each state from its level t to its level s (DKDM, Eqs. 3-7).

    x, z: [B, ...], z standard normal noise; t, s: int64 [B] with -1 <= s < t, where -1 is the
    end of a chain (`process.final`). eta: 1 is DDPM (arXiv 2006.11239, Eq. 7), 0 is DDIM (arXiv
    2010.02502, Eq. 12) and Euler on a flow. Fixed-large and learned variances need eta = 1, act
    on the noise alone, never on the mean, and add none at the end. Returns x_prev [B, ...].
    """
    check_move(parameterization, t, s, eta)
    return next_states(process, parameterization, x, prediction, t, s, z, eta)


def next_states(
    process: Process,
    parameterization: Parameterization,
    x: Tensor,
    prediction: Prediction,
    t: Tensor,
    s: Tensor,
    z: Tensor,
    eta: float,
) -> Tensor:
    """`reverse_step` of levels that are known to be right, which are not looked at."""
    alpha_t, sigma_t = process.at(t)
    alpha_s, sigma_s = process.at(s)
    prediction = clip_x_0(prediction, x, alpha_t, sigma_t, process.clipping)
    beta = transition_var(alpha_t, sigma_t, alpha_s, sigma_s)
    post = eta**2 * posterior_var(alpha_t, sigma_t, alpha_s, sigma_s)
    direction = (sigma_s**2 - post).clamp(min=0).sqrt()
    mean = per_sample(alpha_s, x) * prediction.x_0 + per_sample(direction, x) * prediction.eps
    if eta == 0:
        return mean
    if parameterization.variance.startswith("fixed_small"):
        return mean + per_sample(post.sqrt(), x) * z
    log_var = step_log_var(parameterization.variance, post, beta, prediction.variance_output, x)
    return mean + per_sample((s >= 0).double(), x) * (0.5 * log_var).exp() * z


def check_move(parameterization: Parameterization, t: Tensor, s: Tensor, eta: float) -> None:
    """Raise UsageError for a move that is none, or noise that a variance does not allow."""
    if not (s < t).all():
        raise UsageError("reverse step: every s must be smaller than its t")
    if eta not in (0, 1) and not parameterization.variance.startswith("fixed_small"):
        raise UsageError(
            f"eta = {eta} cannot be combined with variance '{parameterization.variance}': "
            "use 1 (that variance) or 0 (no noise)"
        )


def sample(
    predict: Callable[[Tensor, Tensor], Prediction],
    process: Process,
    parameterization: Parameterization,
    x: Tensor,
    timesteps: list[int],
    noise: Callable[[int], Tensor],
    eta: float = 0.0,
) -> Tensor:
    """Run the reverse chain over `timesteps` (descending), ending at the clean end.

    predict: (x, t) -> Prediction, t an int64 [B]; x: [B, ...] at level timesteps[0]; noise: step
    index -> [B, ...] standard normal, asked for only if eta > 0. Returns x_0 [B, ...].
    """
    for i, (level, following) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True)):
        t = torch.full((len(x),), level)
        z = noise(i) if eta else torch.zeros_like(x)
        s = torch.full_like(t, following)
        x = reverse_step(process, parameterization, x, predict(x, t), t, s, z, eta)
    return x


def not_finite(x: Tensor, rows: int = 4096) -> Tensor:
    """The entries of x [N, ...] with a value that is not finite, int64 [n] on the CPU."""
    bad = [~part.flatten(1).isfinite().all(1) for part in x.split(rows)]
    return torch.cat(bad).nonzero().flatten().cpu()
