"""Noise samples, predict them, and compare with the blind guess.

The blind guess is the best linear one from the mean and the variance of the samples alone. A model
that is read as it was trained is below it at every level, and far below in the middle; one that is
read wrongly, or was never trained, is above it somewhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.kinds import Condition, null_or_none
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.diffusion.process import Process
from dkdm.core.diffusion.steps import sample
from dkdm.core.randomness import generator
from dkdm.core.saving.progress import track

# Levels whose SNR times variance lies between these decide: outside, every guess is as good.
DECISIVE = (0.03, 30.0)
INNER_LEVELS = 10
# A working model's largest and smallest ratio to the blind guess. Measured: at most 0.5 and 0.2
# after minutes of training, 1.0 and 0.1 for an exact model; at least 1.2 and 1.0 untrained.
WORST_RATIO = 1.2
BEST_RATIO = 0.85
# A cure must be convincing: of many readings of a wrong network one comes out well by chance.
CURED_RATIO = 0.6
CURED_LEVELS = 3
# Smallest share of the samples' variance that is there under one condition too. Measured: 0.47 for
# builtin:fashion, 0.0025 for an untrained network that follows its labels alone.
LEAST_SPREAD = 0.01
FEW_STEPS = 10
# More samples are drawn if one has few values, so that the ratios are known to a few percent.
MIN_VALUES = 2048


class Samples(NamedTuple):
    """Clean samples and their conditions.

    clipped_share: of the values predicted on the way, how many clipping cut by more than a tenth.
    """

    x_0: Tensor
    cond: Condition
    clipped_share: float = 0.0


@dataclass(frozen=True)
class LevelError:
    """How well the noise of one level is removed.

    t, snr: the level and its alpha^2 / sigma^2.
    x_0_error: squared error of x_0 over the samples' variance; 1 is predicting their mean.
    eps_error: squared error of eps; 1 is predicting 0.
    eps_std: standard deviation of the predicted eps; that of the true one is 1.
    eps_correlation: of the predicted with the true eps.
    blind_ratio: squared error over that of the blind guess; the same for x_0 and eps.
    decisive: whether this level counts for the verdict.
    """

    t: int
    snr: float
    x_0_error: float
    eps_error: float
    eps_std: float
    eps_correlation: float
    blind_ratio: float
    decisive: bool

    @property
    def may_denoise(self) -> bool:
        """Whether this level does not rule out that the model denoises."""
        return not self.decisive or self.blind_ratio <= WORST_RATIO


def drawn_samples(
    denoiser: Denoiser,
    num_samples: int,
    num_steps: int,
    seed: int,
    label: str | None = None,
) -> Samples:
    """Draw from the model without noise in its steps (DDIM).

    label: what the progress line says; None shows no line.
    """
    process, count = denoiser.process, samples_needed(denoiser, num_samples)
    cond = denoiser.conditioning.in_turns(count)
    start = (process.start_std * _start(denoiser, count, seed)).to(denoiser.device)
    steps = process.timesteps(min(num_steps, process.num_levels))
    clipped: list[float] = []
    shown = nullcontext(lambda _: None) if label is None else track(len(steps), 0, label)
    with shown as show:

        def predict(x: Tensor, t: Tensor) -> Prediction:
            prediction = denoiser.predict(Batch(x, t, cond, t))
            clipped.extend(_clipped_share(process, int(t[0]), prediction.x_0))
            show(steps.index(int(t[0])) + 1)
            return prediction

        x_0 = sample(predict, process, denoiser.parameterization, start, steps, torch.zeros)
    return Samples(x_0, cond, sum(clipped) / max(1, len(clipped)))


def _start(denoiser: Denoiser, count: int, seed: int) -> Tensor:
    random = generator("cpu", seed, "denoising check", "start")
    return torch.randn(count, *denoiser.sample_shape, generator=random)


def follows_noise(denoiser: Denoiser, seed: int) -> bool:
    """Whether samples under one condition differ because their chains start from other noise.

    A network that ignores its input predicts its samples perfectly, and is no denoiser.
    """
    count, steps = samples_needed(denoiser, 4), min(FEW_STEPS, denoiser.process.num_levels)
    row = denoiser.conditioning.in_turns(1)
    cond = {name: value.repeat_interleave(count, 0) for name, value in row.items()}
    x_0 = denoiser.sample(lambda _: _start(denoiser, count, seed), cond, steps).double()
    return bool(x_0.var(dim=0).mean() > LEAST_SPREAD * x_0.var())


def samples_needed(denoiser: Denoiser, at_least: int) -> int:
    """How many samples the check draws, so that there are enough values to judge by."""
    return max(at_least, math.ceil(MIN_VALUES / math.prod(denoiser.sample_shape)))


def _clipped_share(process: Process, t: int, x_0: Tensor) -> list[float]:
    """Empty if x_0 is not clipped, or the noise so strong that any prediction overshoots."""
    limit = process.clipping.range
    if limit is None or process.clipping.quantile is not None or process.snr()[t] < 0.1:
        return []
    return [(x_0.abs() > 1.1 * limit).double().mean().item()]


def given_samples(denoiser: Denoiser, images: Tensor) -> Samples:
    """Images [N, ...] as samples of the model, under its null condition if it has one."""
    cond = null_or_none(denoiser.conditioning, len(images))
    if cond is None:
        cond = denoiser.conditioning.in_turns(len(images))
    return Samples(images.to(denoiser.device, torch.float32), cond)


def level_errors(denoiser: Denoiser, samples: Samples, seed: int) -> Iterator[LevelError]:
    """The errors at about 12 levels, least noise first; one evaluation a sample and level."""
    process, x_0 = denoiser.process, samples.x_0
    var = max(x_0.double().var(dim=0).mean().item(), 1e-12)
    noise = generator("cpu", seed, "denoising check", "noise")
    for level in _levels(process.snr() * var):
        t = torch.full((len(x_0),), level)
        eps = torch.randn(x_0.shape, generator=noise).to(x_0.device)
        prediction = denoiser.predict(Batch(process.add_noise(x_0, eps, t), t, samples.cond, t))
        yield _level_error(level, process.snr()[level].item(), var, prediction, x_0, eps)


def _levels(signal: Tensor) -> list[int]:
    """Both ends, and decisive levels evenly spaced in log SNR; signal: SNR times variance [T]."""
    decisive = torch.nonzero((signal >= DECISIVE[0]) & (signal <= DECISIVE[1])).flatten()
    chosen = {0, len(signal) - 1}
    if len(decisive):
        logs = signal[decisive].log()
        aims = torch.linspace(logs[0].item(), logs[-1].item(), INNER_LEVELS)
        chosen |= {int(decisive[(logs - aim).abs().argmin()]) for aim in aims}
    return sorted(chosen)


def _level_error(
    t: int, snr: float, var: float, prediction: Prediction, x_0: Tensor, eps: Tensor
) -> LevelError:
    """The blind guess has a squared error of x_0 of var / (1 + SNR var) (Bishop, Pattern
    Recognition and Machine Learning, Eq. 2.117)."""
    x_0_error = (prediction.x_0 - x_0).double().square().mean().item() / var
    predicted, added = prediction.eps.double().flatten(), eps.double().flatten()
    return LevelError(
        t=t,
        snr=snr,
        x_0_error=x_0_error,
        eps_error=(predicted - added).square().mean().item(),
        eps_std=predicted.std().item(),
        eps_correlation=torch.corrcoef(torch.stack([predicted, added]))[0, 1].item(),
        blind_ratio=x_0_error * (1 + snr * var),
        decisive=DECISIVE[0] <= snr * var <= DECISIVE[1],
    )


def denoises(levels: Sequence[LevelError]) -> bool:
    """Whether a model with these errors is read as it was trained, and trained at all."""
    good = any(ratio <= BEST_RATIO for ratio in _ratios(levels))
    return good and all(level.may_denoise for level in levels)


def cures(levels: Sequence[LevelError]) -> bool:
    """Whether a reading found among many has these errors by merit and not by chance."""
    ratios = _ratios(levels)
    return denoises(levels) and len(ratios) >= CURED_LEVELS and min(ratios) <= CURED_RATIO


def mean_ratio(levels: Sequence[LevelError]) -> float:
    """Geometric mean of the ratio to the blind guess over the decisive levels."""
    return statistics.geometric_mean(max(ratio, 1e-12) for ratio in _ratios(levels))


def _ratios(levels: Sequence[LevelError]) -> list[float]:
    return [level.blind_ratio for level in levels if level.decisive]
