"""Noise processes: `x_t = alpha_t * x_0 + sigma_t * eps` for integer t in 0..T-1 (0 = least noise).

A process is a pair of tables and the number the network is fed for each t. Everything is kept in
float64 on the CPU; timesteps live there too, so that looking a level up never waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dkdm.core.devices import to_device
from dkdm.core.diffusion.clipping import Clipping
from dkdm.errors import UsageError
from dkdm.reading.arguments import NamedArguments, chosen, number, refuse, set_fields, whole
from dkdm.reading.arrays import table

Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True, eq=False)
class Process(NamedArguments):
    """A Gaussian noise process on T levels.

    alpha, sigma: float64 [T], sigma > 0 everywhere; sigma / alpha grows with t.
    network_time: float64 [T], the number the network is fed at each t.
    final: (alpha, sigma) of the end of a chain, s = -1; clean if its sigma is 0.
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
            set_fields(self, **{name: table(f"Process: {name}", getattr(self, name))})
        if not len(self.alpha) == len(self.sigma) == len(self.network_time):
            lengths = f"{len(self.alpha)}, {len(self.sigma)} and {len(self.network_time)}"
            raise UsageError(
                "Process: alpha, sigma and network_time must have the same length T, and have "
                f"{lengths}"
            )
        if not (self.sigma > 0).all() or not (self.alpha >= 0).all():
            raise UsageError("Process: sigma must be above 0 and alpha 0 or more at every level")
        self._check_order()
        self._check_rest()

    def _check_order(self) -> None:
        change = torch.diff(self.alpha / self.sigma)
        if bool((change < 0).all()):
            return
        what = "two levels have the same noise, or more noise comes first"
        if len(change) and bool((change > 0).all()):
            what = "give the tables from least to most noise (alpha.flip(0), ...)"
        raise UsageError(
            f"Process: alpha / sigma must fall strictly with t (0 = least noise): {what}"
        )

    def _check_rest(self) -> None:
        if not isinstance(self.clipping, Clipping):
            refuse("Process: clipping", self.clipping, "give a dkdm.Clipping(range=...)")
        chosen("Process: spacing", self.spacing, get_args(Spacing), {})
        set_fields(self, steps_offset=whole("Process: steps_offset", self.steps_offset))
        if not isinstance(self.scheduler, Mapping):
            refuse("Process: scheduler", self.scheduler, "give its config, a dict; {} for none")
        if not isinstance(self.final, (tuple, list)) or len(self.final) != 2:
            refuse("Process: final", self.final, "give (alpha, sigma) of the clean end")
        low, high = (number("Process: final", end, 0) for end in self.final)
        set_fields(self, final=(low, high))

    @property
    def num_levels(self) -> int:
        """T, the number of noise levels."""
        return len(self.alpha)

    @property
    def start_std(self) -> float:
        """Standard deviation of a chain's first state: that of data of variance 1 at T-1.

        It is 1 on a VP process and at the start of a flow; sigma_{T-1} if alpha = 1.
        """
        alpha, sigma = float(self.alpha[-1]), float(self.sigma[-1])
        return sigma if alpha == 1 else math.hypot(alpha, sigma)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Look up (alpha, sigma) at t.

        t: int64 [B] in -1..T-1, where -1 is the clean end. Returns two float64 [B] on the CPU.
        """
        t = t.cpu()
        if t.numel() and not -1 <= int(t.min()) <= int(t.max()) < self.num_levels:
            raise UsageError(
                f"timesteps {int(t.min())}..{int(t.max())} are out of range: use "
                f"-1..{self.num_levels - 1}"
            )
        alpha, sigma = self._to_the_end
        return alpha[t], sigma[t]

    @cached_property
    def _to_the_end(self) -> tuple[Tensor, Tensor]:
        """The tables with the clean end behind the last level, where the index -1 finds it."""
        alpha, sigma = (self.alpha.new_tensor([end]) for end in self.final)
        return torch.cat([self.alpha, alpha]), torch.cat([self.sigma, sigma])

    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 of every level, float64 [T]."""
        return (self.alpha / self.sigma) ** 2

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The forward process, `alpha_t * x_0 + sigma_t * eps` (DKDM, Eqs. 1-2; DDPM, Eq. 4).

        x_0, eps: [B, ...]; t: int64 [B]. Returns [B, ...].
        """
        alpha, sigma = self.at(t)
        return per_sample(alpha, x_0) * x_0 + per_sample(sigma, x_0) * eps

    def timesteps(self, num_steps: int, spacing: Spacing | None = None) -> list[int]:
        """The levels a sampler of `num_steps` steps visits, from most to least noise.

        Spacings as in diffusers (arXiv 2305.08891, table 2). Raises UsageError outside 1..T steps.
        """
        total = self.num_levels
        num_steps = whole("sampling steps", num_steps, -(2**31))
        if not 1 <= num_steps <= total:
            raise UsageError(f"{num_steps} sampling steps: use 1 to {total}")
        spacing = spacing or self.spacing
        if spacing == "linspace":
            levels: np.ndarray = np.linspace(0, total - 1, num_steps).round()
        elif spacing == "trailing":
            levels = np.arange(total, 0, -total / num_steps)[:num_steps].round() - 1
        else:
            levels = np.arange(num_steps) * (total // num_steps) + self.steps_offset
        return sorted({min(int(level), total - 1) for level in levels}, reverse=True)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Shape [B] values so that they multiply a [B, ...] tensor, in its dtype and on its device."""
    return to_device(values, like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))
