"""What a network is fed for each noise level t: its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dkdm.core.diffusion.other_names import OTHER_TIMES
from dkdm.core.diffusion.process import Process
from dkdm.reading.arguments import chosen, refuse
from dkdm.reading.arrays import table

TimeKind = Literal["index", "fraction", "data_fraction", "sigma", "log_snr", "c_noise"]
Time = TimeKind | Callable[[Process], Tensor]


def network_time(process: Process, time: Time) -> Tensor:
    """What a network is fed for each t, float64 [T].

    "index": t itself. "fraction": the noise's share of the way, sigma / (alpha + sigma), 0 at the
    data and 1 at noise (on a flow: its time). "data_fraction": one minus that, 1 at the data.
    "sigma": sigma / alpha. "log_snr": ln(alpha^2 / sigma^2). "c_noise": ln(sigma / alpha) / 4
    (EDM, arXiv 2206.00364, table 1). Or a function of the process.
    """
    if isinstance(time, type):
        refuse("time", time, "give a word, or a function of the process that returns [T] numbers")
    if callable(time):
        try:
            found = table("time, what your function returned,", time(process))
        except (TypeError, AttributeError, ValueError, RuntimeError) as error:
            refuse("time", time, f"called with the process it raised {error}")
        if len(found) != process.num_levels:
            refuse("time", time, f"it returned {len(found)} numbers, give {process.num_levels}")
        return found
    word = chosen("time", time, _TIMES, OTHER_TIMES)
    return _TIMES[word](process)


_TIMES: dict[str, Callable[[Process], Tensor]] = {
    "index": lambda p: torch.arange(p.num_levels, dtype=torch.float64),
    "fraction": lambda p: p.sigma / (p.alpha + p.sigma),
    "data_fraction": lambda p: p.alpha / (p.alpha + p.sigma),
    "sigma": lambda p: p.sigma / p.alpha,
    "log_snr": lambda p: 2 * (p.alpha / p.sigma).log(),
    "c_noise": lambda p: (p.sigma / p.alpha).log() / 4,
}


def levels_inside(process: Process, interval: tuple[float, float] | None) -> Tensor:
    """Levels whose share of noise lies in an interval, bool [T]; None holds all."""
    low, high = interval or (0.0, 1.0)
    share = process.sigma / (process.alpha + process.sigma)
    return (share >= low) & (share <= high)
