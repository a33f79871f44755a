"""Constructors of noise processes: from betas, a straight-line flow, the levels of EDM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dkdm.core.diffusion.process import Process
from dkdm.errors import UsageError
from dkdm.reading.arguments import number, whole
from dkdm.reading.arrays import table

MAX_LEVELS = 1_000_000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")


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
    raise UsageError(f"unknown beta schedule '{name}': use one of {', '.join(BETA_SCHEDULES)}")


def _cosine(u: float) -> float:
    """Improved DDPM, arXiv 2102.09672, Eq. 17."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """Laplace schedule, arXiv 2407.03297, as diffusers computes it."""
    magnitude = math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * magnitude)
    return math.sqrt(snr / (1 + snr))


_ALPHA_BAR = {"squaredcos_cap_v2": _cosine, "laplace": _laplace, "exp": lambda u: math.exp(-12 * u)}


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
    UsageError for other values, such as alphas or alphas_cumprod. Source: DDPM, arXiv 2006.11239.
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
    1 (SD3, arXiv 2403.03206, Eq. 23); lowest: u at t = 0, None is 1 / T. Networks are fed sigma T.
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
    low = number("sigma_min", low, 0, open_low=True)
    high = number("sigma_max", high, 0, open_low=True)
    if low >= high:
        swapped = f"; did you mean sigma_min={high:g}, sigma_max={low:g}?" if low > high else ""
        raise UsageError(
            f"sigma_min is {low:g} and sigma_max {high:g}: sigma_min must be smaller{swapped}"
        )
    return low, high
