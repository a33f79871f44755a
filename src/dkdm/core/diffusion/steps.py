"""One reverse step from t to any s < t for a vector of t, and the sampling loop made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dkdm.core.diffusion.prediction import Parameterization, Prediction, VarianceType, clip_x_0
from dkdm.core.diffusion.process import Process, per_sample
from dkdm.core.diffusion.variances import posterior_var, step_log_var, transition_var
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
    how, noise = coefficients(process, t, s, eta), z if eta else None
    return stepped(how, process, parameterization.variance, x, prediction, noise)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What moves from levels t to levels s multiply with, float64 [B].

    direction: of eps. post, beta: bounds of the noise's variance. goes_on: 0 at the end of a chain,
    otherwise 1.
    """

    alpha_t: Tensor
    sigma_t: Tensor
    alpha_s: Tensor
    direction: Tensor
    post: Tensor
    beta: Tensor
    goes_on: Tensor

    def each(self) -> Iterator[Coefficients]:
        """Those of every move, [1]."""
        values = (getattr(self, each.name).split(1) for each in fields(self))
        return (Coefficients(*one) for one in zip(*values, strict=True))


def coefficients(process: Process, t: Tensor, s: Tensor, eta: float) -> Coefficients:
    """Of the moves from t to s, int64 [B]."""
    alpha_t, sigma_t = process.at(t)
    alpha_s, sigma_s = process.at(s)
    beta = transition_var(alpha_t, sigma_t, alpha_s, sigma_s)
    post = eta**2 * posterior_var(alpha_t, sigma_t, alpha_s, sigma_s)
    direction = (sigma_s**2 - post).clamp(min=0).sqrt()
    return Coefficients(alpha_t, sigma_t, alpha_s, direction, post, beta, (s >= 0).double())


def stepped(
    how: Coefficients,
    process: Process,
    variance: VarianceType,
    x: Tensor,
    prediction: Prediction,
    z: Tensor | None,
) -> Tensor:
    """Move states x [B, ...] as coefficients say; z: [B, ...] noise, None for none."""
    prediction = clip_x_0(prediction, x, how.alpha_t, how.sigma_t, process.clipping)
    mean = per_sample(how.alpha_s, x) * prediction.x_0
    mean = mean + per_sample(how.direction, x) * prediction.eps
    if z is None:
        return mean
    if variance.startswith("fixed_small"):
        return mean + per_sample(how.post.sqrt(), x) * z
    log_var = step_log_var(variance, how.post, how.beta, prediction.variance_output, x)
    return mean + per_sample(how.goes_on, x) * (0.5 * log_var).exp() * z


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
    levels = torch.tensor([*timesteps, -1])
    check_move(parameterization, levels[:-1], levels[1:], eta)
    moves = coefficients(process, levels[:-1], levels[1:], eta).each()  # all at once
    for i, (level, how) in enumerate(zip(timesteps, moves, strict=True)):
        z = noise(i) if eta else None
        said = predict(x, torch.full((len(x),), level))
        x = stepped(how, process, parameterization.variance, x, said, z)
    return x


def not_finite(x: Tensor, rows: int = 4096) -> Tensor:
    """The entries of x [N, ...] with a value that is not finite, int64 [n] on the CPU."""
    bad = [~part.flatten(1).isfinite().all(1) for part in x.split(rows)]
    return torch.cat(bad).nonzero().flatten().cpu()
