"""Noise processes: `x_t = alpha_t * x_0 + sigma_t * eps` for integer t in 0..T-1 (0 = least noise).

A process is a pair of tables and the number the network is fed for each t. Everything is kept in
float64 on the CPU; timesteps live there too, so that looking a level up never waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from dkdm.errors import UsageError
from dkdm.reading.arguments import NamedArguments, chosen, number, refuse, whole
from dkdm.reading.arrays import table

Spacing = Literal["leading", "trailing", "linspace"]
MAX_LEVELS = 1_000_000
BETA_SCHEDULES = (
    "linear",
    "scaled_linear",
    "squaredcos_cap_v2",
    "sigmoid",
    "laplace",
    "exp",
)


@dataclass(frozen=True)
class Clipping(NamedArguments):
    """What is done to a predicted x_0 before the chain uses it.

    range: largest distance from `center` kept; None leaves x_0 alone.
    quantile: if given, dynamic thresholding (Imagen, arXiv 2205.11487, sec. 2.3): each sample is
        clamped to its own quantile s of |x_0|, 1 <= s <= range, and divided by s.
    rederive_eps: True recomputes eps from the clipped x_0 (DDPM); False keeps it (diffusers' DDIM).
    center: middle of the values of clean samples, 0.5 for those in [0, 1].
    """

    range: float | None = None
    quantile: float | None = None
    rederive_eps: bool = True
    center: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.range, (tuple, list)):
            refuse("Clipping: range", self.range, _clipping_between(self.range))
        if self.range is not None:
            _set(self, range=number("Clipping: range", self.range, 0, open_low=True))
        if self.quantile is not None:
            _set(self, quantile=number("Clipping: quantile", self.quantile, 0, 1, open_low=True))
        if self.quantile is not None and self.range is None:
            refuse("Clipping: range", None, "give the largest quantile with quantile=...")
        if type(self.rederive_eps) is not bool:
            refuse("Clipping: rederive_eps", self.rederive_eps, "give True or False")
        _set(self, center=number("Clipping: center", self.center))


def _clipping_between(ends: Any) -> str:
    """How values between two ends are said."""
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        return "give one number, the largest distance from the center"
    middle, reach = (low + high) / 2, abs(high - low) / 2
    return (
        "give one number, the largest distance from the center: "
        f"Clipping(range={reach:g}, center={middle:g}) keeps {low:g} to {high:g}"
    )


def _set(value: Any, **fields: Any) -> None:
    """Set fields of a frozen dataclass while it is made."""
    for name, found in fields.items():
        object.__setattr__(value, name, found)


@dataclass(frozen=True, eq=False)
class Process(NamedArguments):
    """A Gaussian noise process on T levels.

    alpha, sigma: float64 [T], sigma > 0 everywhere; sigma / alpha grows with t.
    network_time: float64 [T], the number the network is fed at each t.
    final: (alpha, sigma) of the clean end, s = -1.
    scheduler: the diffusers scheduler config (with `_class_name`) that samples this process.
    """

    alpha: Tensor
    sigma: Tensor
    network_time: Tensor
    final: tuple[float, float] = (1.0, 0.0)
    clipping: Clipping = Clipping()
    spacing: Spacing = "leading"
    steps_offset: int = 0
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma", "network_time"):
            _set(self, **{name: table(f"Process: {name}", getattr(self, name))})
        if not len(self.alpha) == len(self.sigma) == len(self.network_time):
            lengths = f"{len(self.alpha)}, {len(self.sigma)} and {len(self.network_time)}"
            raise UsageError(
                "Process: alpha, sigma and network_time must have the same length T, and have "
                f"{lengths}"
            )
        if not (self.sigma > 0).all() or not (self.alpha >= 0).all():
            raise UsageError("Process: expected sigma > 0 and alpha >= 0 at every level")
        self._check_order()
        self._check_rest()

    def _check_order(self) -> None:
        """Raise UsageError unless the noise grows with t."""
        change = torch.diff(self.alpha / self.sigma)
        if bool((change < 0).all()):
            return
        turned = len(change) and bool((change > 0).all())
        what = (
            "give the tables from least to most noise (alpha.flip(0), ...)"
            if turned
            else ("two levels have the same noise, or more noise comes first")
        )
        raise UsageError(
            f"Process: alpha / sigma must fall strictly with t (0 = least noise): {what}"
        )

    def _check_rest(self) -> None:
        """Raise UsageError for a wrong clean end, clipping, spacing, offset or scheduler."""
        if not isinstance(self.clipping, Clipping):
            refuse("Process: clipping", self.clipping, "give a dkdm.Clipping(range=...)")
        chosen("Process: spacing", self.spacing, get_args(Spacing), {})
        _set(self, steps_offset=whole("Process: steps_offset", self.steps_offset))
        if not isinstance(self.scheduler, Mapping):
            refuse("Process: scheduler", self.scheduler, "give its config, a dict; {} for none")
        if not isinstance(self.final, (tuple, list)) or len(self.final) != 2:
            refuse("Process: final", self.final, "give (alpha, sigma) of the clean end")
        low, high = (number("Process: final", end, 0) for end in self.final)
        _set(self, final=(low, high))

    @property
    def num_levels(self) -> int:
        """T, the number of noise levels."""
        return len(self.alpha)

    @property
    def start_std(self) -> float:
        """Standard deviation of a chain's first state: that of data of variance 1 at T-1.

        It is 1 on a VP process and at the start of a flow; sigma_{T-1} where alpha = 1.
        """
        alpha, sigma = float(self.alpha[-1]), float(self.sigma[-1])
        return sigma if alpha == 1 else math.hypot(alpha, sigma)

    @property
    def gauge(self) -> Gauge:
        """Which family this process is of. Raises UsageError where it is of none."""
        for gauge in GAUGES.values():
            norm = gauge.norm(self.alpha, self.sigma)
            if torch.allclose(norm, torch.ones_like(norm), rtol=0, atol=1e-9):
                return gauge
        raise UsageError(
            "the process has neither alpha^2 + sigma^2 = 1, alpha + sigma = 1 nor alpha = 1: it "
            "cannot be matched with another one's"
        )

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Look up (alpha, sigma) at t.

        t: int64 [B] in -1..T-1, where -1 is the clean end. Returns two float64 [B] on the CPU.
        """
        t = t.cpu()
        if t.numel() and not -1 <= int(t.min()) <= int(t.max()) < self.num_levels:
            raise UsageError(
                f"timestep out of range: expected -1..{self.num_levels - 1}, "
                f"found {int(t.min())}..{int(t.max())}"
            )
        final_alpha, final_sigma = self.final
        alpha = torch.cat([self.alpha, self.alpha.new_tensor([final_alpha])])
        sigma = torch.cat([self.sigma, self.sigma.new_tensor([final_sigma])])
        return alpha[t], sigma[t]

    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 of every level, float64 [T]."""
        return (self.alpha / self.sigma) ** 2

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The forward process, `alpha_t * x_0 + sigma_t * eps` (DDPM, arXiv 2006.11239, Eq. 4).

        x_0, eps: [B, ...]; t: int64 [B]. Returns [B, ...].
        """
        alpha, sigma = self.at(t)
        return per_sample(alpha, x_0) * x_0 + per_sample(sigma, x_0) * eps

    def timesteps(self, num_steps: int, spacing: Spacing | None = None) -> list[int]:
        """The levels a sampler of `num_steps` steps visits, from most to least noise.

        Spacings as in diffusers (arXiv 2305.08891, table 2). Raises UsageError for a number of
        steps outside 1..T.
        """
        total = self.num_levels
        num_steps = whole("sampling steps", num_steps, -(2**31))
        if not 1 <= num_steps <= total:
            raise UsageError(f"sampling steps: expected 1..{total}, found {num_steps}")
        spacing = spacing or self.spacing
        if spacing == "linspace":
            levels: np.ndarray = np.linspace(0, total - 1, num_steps).round()
        elif spacing == "trailing":
            levels = np.arange(total, 0, -total / num_steps)[:num_steps].round() - 1
        else:
            levels = np.arange(num_steps) * (total // num_steps) + self.steps_offset
        return sorted({min(int(level), total - 1) for level in levels}, reverse=True)


class Gauge(NamedTuple):
    """A family of processes whose alpha and sigma follow from their ratio.

    norm: (alpha, sigma) -> what is 1 at every level. coordinate: (alpha, sigma) -> a finite number
    that grows with the noise; pair: its inverse. All float64 of any shape.
    """

    norm: Callable[[Tensor, Tensor], Tensor]
    coordinate: Callable[[Tensor, Tensor], Tensor]
    pair: Callable[[Tensor], tuple[Tensor, Tensor]]


GAUGES = {
    "vp": Gauge(
        norm=torch.hypot,
        coordinate=lambda alpha, sigma: torch.atan2(sigma, alpha),
        pair=lambda angle: (angle.cos(), angle.sin()),
    ),
    "flow": Gauge(
        norm=lambda alpha, sigma: alpha + sigma,
        coordinate=lambda alpha, sigma: sigma / (alpha + sigma),
        pair=lambda share: (1 - share, share),
    ),
    "ve": Gauge(
        norm=lambda alpha, _: alpha,
        coordinate=lambda alpha, sigma: (sigma / alpha).log(),
        pair=lambda log_ratio: (torch.ones_like(log_ratio), log_ratio.exp()),
    ),
}


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Shape [B] values so that they multiply a [B, ...] tensor, in its dtype and on its device."""
    return values.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


TimeKind = Literal["index", "fraction", "data_fraction", "sigma", "log_snr", "c_noise"]


def network_times(process: Process, kind: TimeKind | Callable[[Process], Tensor]) -> Tensor:
    """What a network is fed for each t, float64 [T].

    "index": t itself. "fraction": the noise's share of the way, sigma / (alpha + sigma), 0 at the
    data and 1 at noise (on a flow: its time). "data_fraction": one minus that, 1 at the data.
    "sigma": sigma / alpha. "log_snr": ln(alpha^2 / sigma^2). "c_noise": ln(sigma) / 4 (EDM, arXiv
    2206.00364, table 1). Or a function of the process.
    """
    if isinstance(kind, type):
        refuse("time", kind, "give a word, or a function of the process that returns [T] numbers")
    if callable(kind):
        try:
            found = table("time, what your function returned,", kind(process))
        except (TypeError, AttributeError, ValueError, RuntimeError) as error:
            refuse("time", kind, f"called with the process it raised {error}")
        if len(found) != process.num_levels:
            refuse("time", kind, f"it returned {len(found)} numbers, give {process.num_levels}")
        return found
    word = chosen("time", kind, _TIMES, _OTHER_TIMES)
    return _TIMES[word](process)


_OTHER_TIMES = {
    "t": "index",
    "timestep": "index",
    "timesteps": "index",
    "step": "index",
    "level": "index",
    "discrete": "index",
    "continuous": "fraction",
    "noise_fraction": "fraction",
    "flow": "fraction",
    "reversed": "data_fraction",
    "1_t": "data_fraction",
    "logsnr": "log_snr",
    "lambda": "log_snr",
    "snr": "log_snr",
    "edm": "c_noise",
    "cnoise": "c_noise",
}


_TIMES: dict[str, Callable[[Process], Tensor]] = {
    "index": lambda p: torch.arange(p.num_levels, dtype=torch.float64),
    "fraction": lambda p: p.sigma / (p.alpha + p.sigma),
    "data_fraction": lambda p: p.alpha / (p.alpha + p.sigma),
    "sigma": lambda p: p.sigma / p.alpha,
    "log_snr": lambda p: 2 * (p.alpha / p.sigma).log(),
    "c_noise": lambda p: (p.sigma / p.alpha).log() / 4,
}


def beta_schedule(name: str, num_levels: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """One of diffusers' named beta schedules in float64, shape [T].

    Raises UsageError for an unknown name.
    """
    if name == "linear":
        return torch.linspace(start, end, num_levels, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_levels, dtype=torch.float64) ** 2
    if name == "sigmoid":
        ramp = torch.linspace(-6, 6, num_levels, dtype=torch.float64)
        return torch.sigmoid(ramp) * (end - start) + start
    if name in _ALPHA_BAR:
        u = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
        alpha_bar = torch.tensor([_ALPHA_BAR[name](v) for v in u.tolist()], dtype=torch.float64)
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise UsageError(f"unknown beta schedule '{name}': expected one of {', '.join(BETA_SCHEDULES)}")


def _cosine(u: float) -> float:
    """Improved DDPM, arXiv 2102.09672, Eq. 17."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """Laplace schedule, arXiv 2407.03297, as diffusers computes it."""
    magnitude = math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * magnitude)
    return math.sqrt(snr / (1 + snr))


_ALPHA_BAR = {
    "squaredcos_cap_v2": _cosine,
    "laplace": _laplace,
    "exp": lambda u: math.exp(-12 * u),
}


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last level is pure noise.

    betas: float64 [T]. Source: arXiv 2305.08891, algorithm 1.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * first / (first - last)) ** 2
    ratio = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - ratio


def from_betas(betas: Tensor | np.ndarray | Sequence[float], **fields: Any) -> Process:
    """A variance-preserving process from per-step variances.

    betas: [T] in (0, 1], a tensor, an array or a list. fields: any other field of `Process`. Raises
    UsageError for other values, and for alphas or alphas_cumprod in their place. Source: DDPM,
    arXiv 2006.11239.
    """
    betas = _checked_betas(betas)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    times = torch.arange(len(betas), dtype=torch.float64)
    config = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "clip_sample": False,
    }
    return Process(
        alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), times, **{"scheduler": config, **fields}
    )


def _checked_betas(given: Any) -> Tensor:
    """betas, float64 [T]. Raises UsageError for what are none."""
    exact = table("betas", given)
    falls = len(exact) > 1 and bool((torch.diff(exact) < 0).all())
    if falls and exact[0] > 0.5:
        raise UsageError(
            f"betas fall from {exact[0]:.4g} to {exact[-1]:.4g}, as alphas_cumprod do: betas are "
            "the variances added at each step. Give betas = 1 - alphas_cumprod[1:] / "
            "alphas_cumprod[:-1], after betas[0] = 1 - alphas_cumprod[0]"
        )
    if len(exact) > 1 and bool((exact > 0.5).all()):
        raise UsageError(
            f"betas lie between {exact.min():.4g} and {exact.max():.4g}, as alphas = 1 - betas do: "
            "give the betas"
        )
    wrong = (exact <= 0) | (exact > 1)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise UsageError(f"betas[{at}] is {exact[at]:.6g}: give numbers above 0, 1 at most")
    return exact


def rectified_flow(
    num_levels: int = 1000, shift: float = 1.0, lowest: float | None = None, **fields: Any
) -> Process:
    """A straight-line flow, `x_t = (1 - sigma) x_0 + sigma eps`, sigma = 1 at t = T-1.

    shift: moves levels towards noise, `shift * u / (1 + (shift - 1) u)` for T even steps of u up to
    1 (SD3, arXiv 2403.03206, Eq. 23); lowest: u at t = 0, None is 1 / T. The network is fed
    sigma * T.
    """
    num_levels = whole("num_levels", num_levels, 2, MAX_LEVELS)
    shift = number("shift", shift, 0, open_low=True)
    start = 1 / num_levels if lowest is None else number("lowest", lowest, 0, 1, open_low=True)
    u = torch.linspace(start, 1, num_levels, dtype=torch.float64)
    sigma = shift * u / (1 + (shift - 1) * u)
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": num_levels,
        "shift": shift,
    }
    fields = {"spacing": "trailing", "scheduler": config, **fields}
    return Process(1 - sigma, sigma, sigma * num_levels, **fields)


def karras(
    num_levels: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    **fields: Any,
) -> Process:
    """The variance-exploding levels of EDM, alpha = 1 (arXiv 2206.00364, Eq. 5).

    The network is fed c_noise = ln(sigma) / 4 (table 1).
    """
    num_levels = whole("num_levels", num_levels, 2, MAX_LEVELS)
    sigma_min, sigma_max = _sigma_range(sigma_min, sigma_max)
    rho = number("rho", rho, 0, open_low=True)
    ramp = torch.linspace(0, 1, num_levels, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigma = (low + ramp * (high - low)) ** rho
    config = {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": num_levels,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "rho": rho,
    }
    fields = {"spacing": "trailing", "scheduler": config, **fields}
    return Process(torch.ones_like(sigma), sigma, sigma.log() / 4, **fields)


def _sigma_range(low: float, high: float) -> tuple[float, float]:
    """The least and the most noise. Raises UsageError where they are not in this order."""
    low = number("sigma_min", low, 0, open_low=True)
    high = number("sigma_max", high, 0, open_low=True)
    if low >= high:
        swapped = f"; did you mean sigma_min={high:g}, sigma_max={low:g}?" if low > high else ""
        raise UsageError(
            f"sigma_min is {low:g} and sigma_max {high:g}: sigma_min must be smaller{swapped}"
        )
    return low, high
