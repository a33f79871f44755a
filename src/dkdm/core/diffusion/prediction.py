"""Parameterizations: a network's output <-> (x_0, eps).

Pure functions on tensors [B, ...] of any rank; `alpha`, `sigma` are float64 [B] (see process.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dkdm.config import PredictionType as PredictionType
from dkdm.core.diffusion.clipping import Clipping
from dkdm.core.diffusion.other_names import OTHER_PREDICTIONS, OTHER_VARIANCES
from dkdm.core.diffusion.process import Process, per_sample
from dkdm.errors import UsageError
from dkdm.reading.arguments import NamedArguments, chosen, number, set_fields

VarianceType = Literal[
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
]
LEARNED = ("learned", "learned_range")


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
        set_fields(self, sigma_data=sigma_data)

    @property
    def learns_variance(self) -> bool:
        """Whether the network has a second half of output channels for the variance."""
        return self.variance in LEARNED


class Prediction(NamedTuple):
    """One evaluation of a denoiser at (x_t, t).

    output: the network's raw output without variance channels [B, ...], guided if asked.
    x_0, eps: what it means [B, ...], with x_t = alpha x_0 + sigma eps.
    variance_output: the raw variance channels [B, ...], or None.
    chain: the prediction that moves the chain, if it is another one (guidance of the chain only).
    """

    output: Tensor
    x_0: Tensor
    eps: Tensor
    variance_output: Tensor | None = None
    chain: Prediction | None = None

    @property
    def raw(self) -> Tensor:
        """What the network said, with its variance, [B, C or 2C, ...]."""
        variance = self.variance_output
        return self.output if variance is None else torch.cat([self.output, variance], 1)


Coefficient = Tensor | int
Row = tuple[Coefficient, Coefficient, Coefficient]


class Linear(NamedTuple):
    """A parameterization as one linear map at given levels; coefficients are float64 [B] or int.

    x_0, eps: (p, q, n), read as x_0 = (p x + q output) / n and likewise for eps. output: (p, q, n),
    read as output = (p x_0 + q eps) / n. shown: the factor of x before the network sees it.
    """

    x_0: Row
    eps: Row
    output: Row
    shown: Coefficient = 1


ONE = 1
FIRST: Row = (1, 0, 1)
SECOND: Row = (0, 1, 1)


def _edm(a: Tensor, s: Tensor, sigma_data: float, sign: int = 1) -> Linear:
    """x_0 = c_skip x + c_out F(c_in x) (EDM, arXiv 2206.00364, Eq. 7 and table 1)."""
    total = s**2 + sigma_data**2
    skip, out = sigma_data**2 / total, sign * (s * sigma_data / total.sqrt())
    left = 1 - a * skip
    return Linear((skip, out, 1), (left, -a * out, s), (left, -s * skip, out), total.rsqrt())


# For each kind, its map at (alpha, sigma, sigma_data). Sources: epsilon DDPM (arXiv 2006.11239); v
# progressive distillation (arXiv 2202.00512, app. D); flow velocity eps - x_0, rectified flow
# (arXiv 2209.03003).
KINDS: dict[PredictionType, Callable[[Tensor, Tensor, float], Linear]] = {
    "epsilon": lambda a, s, _: Linear((1, -s, a), SECOND, SECOND),
    "sample": lambda a, s, _: Linear(SECOND, (1, -a, s), FIRST),
    "v_prediction": lambda a, s, _: Linear((a, -s, a**2 + s**2), (s, a, a**2 + s**2), (-s, a, 1)),
    "flow_prediction": lambda a, s, _: Linear((1, -s, a + s), (1, a, a + s), (-1, 1, 1)),
    "edm": _edm,
    "edm_v": lambda a, s, sigma_data: _edm(a, s, sigma_data, sign=-1),
}
EDM: tuple[PredictionType, ...] = ("edm", "edm_v")


def _combined(row: Row, x: Tensor, y: Tensor) -> Tensor:
    """(p x + q y) / n."""
    if row is FIRST or row is SECOND:
        return x if row is FIRST else y
    p, q, n = (c if isinstance(c, int) else per_sample(c, x) for c in row)
    total = _times(p, x) + _times(q, y)
    return total if n is ONE else total / n


def _times(factor: Coefficient, x: Tensor) -> Tensor:
    return x if factor is ONE else factor * x


def check_compatible(parameterization: Parameterization, process: Process) -> None:
    """Raise UsageError if the output does not determine x_0 at some level (arXiv 2305.08891)."""
    kind, sigma_data = parameterization.prediction, parameterization.sigma_data
    divisor = KINDS[kind](process.alpha, process.sigma, sigma_data).x_0[2]
    if isinstance(divisor, Tensor) and bool((divisor == 0).any()):
        raise UsageError(
            f"{kind} prediction cannot be used with alpha_t = 0 (zero terminal SNR, "
            "start of a flow): x_0 is not determined there; use sample, v_prediction or "
            "flow_prediction"
        )


def to_x_0_eps(
    kind: PredictionType,
    output: Tensor,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Recover (x_0, eps) [B, ...] from a network's output at x = alpha x_0 + sigma eps."""
    linear = KINDS[kind](alpha, sigma, sigma_data)
    return _combined(linear.x_0, x, output), _combined(linear.eps, x, output)


def from_x_0_eps(
    kind: PredictionType,
    x_0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    """The output a network of this kind should give; the inverse of `to_x_0_eps`."""
    return _combined(KINDS[kind](alpha, sigma, sigma_data).output, x_0, eps)


def x_0_slope(
    kind: PredictionType, alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5
) -> Tensor:
    """|d output / d x_0| at fixed x, so that an output error is this times the x_0 error.

    float64 [B]; its square turns weights on x_0 into those on the output (arXiv 2303.09556).
    """
    _, q, n = KINDS[kind](alpha, sigma, sigma_data).x_0
    return (torch.ones_like(alpha) * n / q).abs()


def scale_input(kind: PredictionType, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """What the network sees for x [B, ...] at sigma [B]: c_in x for EDM (alpha is 1); else x."""
    if kind not in EDM:
        return x
    shown = KINDS[kind](torch.ones_like(sigma), sigma, sigma_data).shown
    return x if isinstance(shown, int) else x * per_sample(shown, x)


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
    """Clamp each sample to the quantile s of its |x_0|, 1 <= s <= max_value, and divide by s.

    A max_value below 1 is s, as in diffusers. Source: Imagen, arXiv 2205.11487, sec. 2.3.
    """
    s = torch.quantile(x_0.flatten(1).abs(), quantile, dim=1).clamp(1, max_value)
    s = per_sample(s, x_0)
    return x_0.clamp(-s, s) / s
