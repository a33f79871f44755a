"""A student of another noise process or parameterization than its teacher's.

All processes are linear and Gaussian, so a state of one is a state of the other at the same
signal-to-noise ratio, times a number: `x' = (sigma' / sigma) x` has x_0 and eps in common with x.
The student is fed its process's time at that ratio, which lies between two of its levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dkdm.config import LossWeighting
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.process import Process
from dkdm.core.diffusion.time import network_time
from dkdm.errors import UsageError

AMPLIFICATION = 100.0


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


def gauge_of(process: Process) -> Gauge:
    """Which family a process is of. Raises UsageError for any other process."""
    for gauge in GAUGES.values():
        norm = gauge.norm(process.alpha, process.sigma)
        if torch.allclose(norm, torch.ones_like(norm), rtol=0, atol=1e-9):
            return gauge
    raise UsageError(
        "the process has neither alpha^2 + sigma^2 = 1, alpha + sigma = 1 nor alpha = 1: it "
        "cannot be matched with another one's"
    )


def ratio_range(process: Process) -> tuple[float, float]:
    """Smallest and largest sigma / alpha of a process's levels; the largest may be infinite."""
    ratio = process.sigma / process.alpha
    return float(ratio[0]), float(ratio[-1])


def same_levels(a: Process, b: Process) -> bool:
    """Whether two processes have the same levels."""
    return torch.equal(a.alpha, b.alpha) and torch.equal(a.sigma, b.sigma)


def on_levels_of(student: Denoiser, process: Process) -> Denoiser:
    """The student as it looks from another process: its network on that process's states and t.

    Returns the student itself if both have the same levels.
    """
    if same_levels(student.process, process):
        return student
    matched = matched_process(student.process, process)
    times = matched.network_time
    if student.time is not None:
        exact = isinstance(student.time, str) and student.time != "index"
        times = (
            network_time(matched, student.time)
            if exact
            else _between(student.process, process, student.network_time)
        )
        matched = replace(matched, network_time=times)
    return replace(student, process=matched, time=None, rescale=matched.sigma / process.sigma)


def matched_process(process: Process, other: Process) -> Process:
    """`process` at the signal-to-noise ratios of `other`: as many levels, and the times between.

    Levels of `other` outside those of `process` become its outermost ones, see `covered`.
    """
    alpha, sigma = gauge_of(process).pair(_clamped(process, other))
    times = _between(process, other, process.network_time)
    return Matched(alpha, sigma, times, process.final, scheduler=process.scheduler)


class Matched(Process):
    """Levels some of which are equal: a process's outermost ones stand for several of another."""

    def __post_init__(self) -> None:
        """Nothing is strictly monotone here."""


def _clamped(process: Process, other: Process) -> Tensor:
    """The levels of `other` in the coordinate of `process`, kept within its range, [T]."""
    gauge = gauge_of(process)
    inside = gauge.coordinate(process.alpha, process.sigma)
    return gauge.coordinate(other.alpha, other.sigma).clamp(inside[0], inside[-1])


def _between(process: Process, other: Process, values: Tensor) -> Tensor:
    """Values at the levels of `process`, [T'], interpolated at the ratios of `other`, [T]."""
    inside = gauge_of(process).coordinate(process.alpha, process.sigma)
    wanted = _clamped(process, other)
    return torch.from_numpy(np.interp(wanted.numpy(), inside.numpy(), values.numpy()))


def covered(process: Process, other: Process) -> Tensor:
    """Levels of `other` whose signal-to-noise ratio is within the range of `process`, bool [T]."""
    low, high = ratio_range(process)
    ratio = other.sigma / other.alpha
    return (ratio >= low * (1 - 1e-9)) & (ratio <= high * (1 + 1e-9))


def level_weights(
    student: Denoiser, teacher: Denoiser, weighting: LossWeighting = "uniform"
) -> Tensor | None:
    """A weight of each of the teacher's levels for its student, float64 [T]; None is 1 everywhere.

    0 if the student's process has no such signal-to-noise ratio. min(1, 100 SNR) if the teacher
    predicts eps and the student does not: x_0 = (x - sigma eps) / alpha amplifies the teacher's
    error by sigma / alpha, which then counts no more than 10 times; and min(1, 100 / SNR) if the
    teacher predicts x_0 and the student does not, for eps. "student" weighs levels by how densely
    the student's process places them, mean 1.
    """
    process, other = student.process, teacher.process
    weights = covered(process, other).double()
    if amplifies(student, teacher):
        weights *= (AMPLIFICATION * other.snr()).clamp(max=1)
    if teacher.parameterization.prediction == "sample" != student.parameterization.prediction:
        weights *= (AMPLIFICATION / other.snr()).clamp(max=1)
    if weighting == "student" and not same_levels(process, other):
        position = torch.arange(process.num_levels, dtype=torch.float64)
        density = torch.gradient(_between(process, other, position))[0]
        weights *= density / density.mean()
    return None if bool((weights == 1).all()) else weights


def amplifies(student: Denoiser, teacher: Denoiser) -> bool:
    """Whether an error of the teacher's eps becomes a larger one of the student's target."""
    kinds = teacher.parameterization.prediction, student.parameterization.prediction
    return kinds[0] == "epsilon" and kinds[1] != "epsilon"
