"""The variances of a reverse step: between the bounds, or learned.

`alpha`, `sigma` are float64 [B] (see process.py).
"""

from __future__ import annotations

from torch import Tensor

from dkdm.core.diffusion.prediction import LEARNED, VarianceType
from dkdm.core.diffusion.process import per_sample
from dkdm.errors import UsageError

MIN_VAR = 1e-20


def posterior_var(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """Variance of q(x_s | x_t, x_0), the lower bound beta~, float64 [B] (DDPM, Eq. 7)."""
    return sigma_s**2 / sigma_t**2 * transition_var(alpha_t, sigma_t, alpha_s, sigma_s)


def transition_var(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """Variance of q(x_t | x_s), the upper bound; beta_{t|s} on a VP process. float64 [B]."""
    return (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).clamp(min=0)


def step_log_var(
    kind: VarianceType, post: Tensor, beta: Tensor, variance_output: Tensor | None, like: Tensor
) -> Tensor:
    """Natural log of the noise variance of one reverse step, broadcastable to `like` [B, ...].

    post, beta: float64 [B], `posterior_var` and `transition_var` of the move. The learned range
    interpolates between their logs (DKDM, Eq. 12; arXiv 2102.09672, Eq. 15).
    """
    low, high = post.clamp(min=MIN_VAR).log(), beta.clamp(min=MIN_VAR).log()
    if kind not in LEARNED:
        return per_sample(high if "large" in kind else low, like)
    if variance_output is None:
        raise UsageError(f"variance '{kind}' needs a network with variance channels")
    if kind == "learned":
        return variance_output.clamp(min=MIN_VAR).log()
    fraction = (variance_output + 1) / 2
    return fraction * per_sample(high, like) + (1 - fraction) * per_sample(low, like)
