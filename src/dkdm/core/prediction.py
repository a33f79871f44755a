"""Parameterizations: a network's output <-> (x_0, eps), and the variances of a reverse step.

Pure functions on tensors [B, ...] of any rank; `alpha`, `sigma` are float64 [B] (see process.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dkdm.core.clipping import Clipping
from dkdm.core.process import Process, per_sample
from dkdm.errors import UsageError
from dkdm.names import PredictionType as PredictionType
from dkdm.reading.arguments import NamedArguments, chosen, number

VarianceType = Literal[
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
]
LEARNED = ("learned", "learned_range")
MIN_VAR = 1e-20


@dataclass(frozen=True)
class Parameterization(NamedArguments):
    """What a network's output means.

    prediction: spelled as in diffusers; "edm" is F in the preconditioned D of EDM
        (arXiv 2206.00364), "edm_v" its negative (diffusers' EDM schedulers with v_prediction).
    variance: of the reverse step; the learned ones come from a second half of the output channels.
    sigma_data: standard deviation of the data, used by "edm" and "edm_v" only.
    """

    prediction: PredictionType = "epsilon"
    variance: VarianceType = "fixed_small"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        kinds = get_args(PredictionType)
        chosen("Parameterization: prediction", self.prediction, kinds, OTHER_PREDICTIONS)
        kinds = get_args(VarianceType)
        chosen("Parameterization: variance", self.variance, kinds, OTHER_VARIANCES)
        sigma_data = number("Parameterization: sigma_data", self.sigma_data, 0, open_low=True)
        object.__setattr__(self, "sigma_data", sigma_data)

    @property
    def learns_variance(self) -> bool:
        """Whether the network has a second half of output channels for the variance."""
        return self.variance in LEARNED


OTHER_PREDICTIONS = {
    "eps": "epsilon",
    "noise": "epsilon",
    "pred_noise": "epsilon",
    "x0": "sample",
    "x_0": "sample",
    "pred_x0": "sample",
    "x_start": "sample",
    "clean": "sample",
    "data": "sample",
    "image": "sample",
    "v": "v_prediction",
    "pred_v": "v_prediction",
    "velocity": "flow_prediction",
    "flow": "flow_prediction",
    "rectified_flow": "flow_prediction",
    "flow_matching": "flow_prediction",
    "f": "edm",
    "karras": "edm",
    "preconditioned": "edm",
}
OTHER_VARIANCES = {
    "fixed": "fixed_small",
    "small": "fixed_small",
    "large": "fixed_large",
    "none": "fixed_small",
    "range": "learned_range",
    "learned_sigma": "learned_range",
    "learn_sigma": "learned_range",
}


class Prediction(NamedTuple):
    """One evaluation of a denoiser at (x_t, t).

    output: the network's raw output without variance channels [B, ...], guided where asked.
    x_0, eps: what it means [B, ...], with x_t = alpha x_0 + sigma eps.
    variance_output: the raw variance channels [B, ...], or None.
    chain: what moves the chain, where that is another prediction than this one (guidance of the
        chain only).
    """

    output: Tensor
    x_0: Tensor
    eps: Tensor
    variance_output: Tensor | None = None
    chain: Prediction | None = None


def check_compatible(parameterization: Parameterization, process: Process) -> None:
    """Refuse epsilon where alpha = 0: there x_0 cannot be recovered from it (arXiv 2305.08891)."""
    if parameterization.prediction == "epsilon" and bool((process.alpha == 0).any()):
        raise UsageError(
            "epsilon prediction cannot be used where alpha_t = 0 (zero terminal SNR, start of a "
            "flow): x_0 is not determined there; expected sample, v_prediction or flow_prediction"
        )


def to_x_0_eps(
    kind: PredictionType,
    output: Tensor,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Recover (x_0, eps) from a network's output at x = alpha x_0 + sigma eps.

    Sources: epsilon DDPM (arXiv 2006.11239); v progressive distillation (arXiv 2202.00512, app. D);
    flow velocity eps - x_0, rectified flow (arXiv 2209.03003); edm (arXiv 2206.00364, Eq. 7).
    """
    a, s = per_sample(alpha, x), per_sample(sigma, x)
    if kind == "epsilon":
        return (x - s * output) / a, output
    if kind == "sample":
        return output, (x - a * output) / s
    if kind == "v_prediction":
        norm = per_sample(alpha**2 + sigma**2, x)
        return (a * x - s * output) / norm, (s * x + a * output) / norm
    if kind == "flow_prediction":
        total = a + s
        return (x - s * output) / total, (x + a * output) / total
    c_skip, c_out = _edm_skip_and_out(kind, sigma, sigma_data)
    x_0 = per_sample(c_skip, x) * x + per_sample(c_out, x) * output
    return x_0, (x - a * x_0) / s


def from_x_0_eps(
    kind: PredictionType,
    x_0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    """The output a network of this kind should give; the inverse of `to_x_0_eps`."""
    a, s = per_sample(alpha, x_0), per_sample(sigma, x_0)
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x_0
    if kind == "v_prediction":
        return a * eps - s * x_0
    if kind == "flow_prediction":
        return eps - x_0
    c_skip, c_out = _edm_skip_and_out(kind, sigma, sigma_data)
    x = a * x_0 + s * eps
    return (x_0 - per_sample(c_skip, x) * x) / per_sample(c_out, x)


EDM: tuple[PredictionType, ...] = ("edm", "edm_v")


def _edm_skip_and_out(
    kind: PredictionType, sigma: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of EDM (arXiv 2206.00364, table 1); of "edm_v" c_out is negative."""
    total = sigma**2 + sigma_data**2
    c_out = sigma * sigma_data / total.sqrt()
    return sigma_data**2 / total, -c_out if kind == "edm_v" else c_out


def x_0_slope(
    kind: PredictionType, alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5
) -> Tensor:
    """|d output / d x_0| at fixed x, so that an output error is this times the x_0 error.

    Its square turns weights on x_0 into weights on the output (min-SNR, arXiv 2303.09556).
    Returns float64 [B].
    """
    if kind == "epsilon":
        return alpha / sigma
    if kind == "sample":
        return torch.ones_like(alpha)
    if kind == "v_prediction":
        return (alpha**2 + sigma**2) / sigma
    if kind == "flow_prediction":
        return (alpha + sigma) / sigma
    return 1 / _edm_skip_and_out("edm", sigma, sigma_data)[1]


def scale_input(kind: PredictionType, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """What the network is shown: c_in x for EDM's kinds (arXiv 2206.00364, table 1), else x."""
    if kind not in EDM:
        return x
    return x * per_sample((sigma**2 + sigma_data**2).rsqrt(), x)


def clip_x_0(
    prediction: Prediction, x: Tensor, alpha: Tensor, sigma: Tensor, clipping: Clipping
) -> Prediction:
    """Clip or threshold x_0 as the chain does, and re-derive or keep eps."""
    if clipping.range is None:
        return prediction
    if clipping.quantile is None:
        low, high = clipping.center - clipping.range, clipping.center + clipping.range
        x_0 = prediction.x_0.clamp(low, high)
    else:
        x_0 = dynamic_threshold(prediction.x_0, clipping.quantile, clipping.range)
    if not clipping.rederive_eps:
        return prediction._replace(x_0=x_0)
    eps = (x - per_sample(alpha, x) * x_0) / per_sample(sigma, x)
    return prediction._replace(x_0=x_0, eps=eps)


def dynamic_threshold(x_0: Tensor, quantile: float, max_value: float) -> Tensor:
    """Clamp each sample to its own quantile s of |x_0|, 1 <= s <= max_value, and divide by s.

    A max_value below 1 is s everywhere, as in diffusers. Source: Imagen, arXiv 2205.11487, sec.
    2.3.
    """
    s = torch.quantile(x_0.flatten(1).abs(), quantile, dim=1).clamp(1, max_value)
    s = per_sample(s, x_0)
    return x_0.clamp(-s, s) / s


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
