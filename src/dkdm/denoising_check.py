"""Does a model denoise as it is read? Its own samples, noised and predicted again.

A model read with the wrong prediction type, schedule or time scale still gives samples, and errors
that look like losses. What it cannot do is beat the blind guess: the best linear guess from nothing
but the mean and the variance of those samples. A working model is below it at every level, and far
below in the middle. What may pass: a schedule that is only a little off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from dkdm.conditioning import Condition
from dkdm.denoiser import Batch, Denoiser
from dkdm.errors import UsageError
from dkdm.evaluation.cost import undisturbed
from dkdm.evaluation.same_noise import balanced_condition
from dkdm.prediction import Prediction, PredictionType
from dkdm.process import Process, from_scheduler_config
from dkdm.progress import track
from dkdm.randomness import generator
from dkdm.steps import sample

# Levels between these values of SNR times variance decide: outside, every guess is as good.
DECISIVE = (0.01, 100.0)
INNER_LEVELS = 10
# A working model's largest and smallest ratio to the blind guess. Seen: 0.5 and 0.2 after training
# for minutes, 1.0 and 0.1 for the exact model of ten points; random weights 1.2 and 1.0 or more.
WORST_RATIO = 1.2
BEST_RATIO = 0.85
# Share of the chain's values that clipping cuts by more than a tenth. Seen: 0.01 where it is right,
# 0.04 where the data is 1.5 times too wide for it.
CLIPPED_SHARE = 0.03
# Values, so that the ratios are known to a few percent: more samples are drawn where they are small.
MIN_VALUES = 2048


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


@dataclass(frozen=True)
class Spread:
    """Range, mean and standard deviation of all values of a set of samples."""

    low: float
    high: float
    mean: float
    std: float


@dataclass(frozen=True)
class Concern:
    """Something that looks wrong: what was seen, what was expected, what to try."""

    seen: str
    expected: str
    remedy: str


@dataclass(frozen=True)
class DenoisingCheck:
    """The verdict and what it rests on: levels from least to most noise, the model's own samples,
    and concerns, gravest first."""

    denoises: bool
    levels: tuple[LevelError, ...]
    samples: Spread
    concerns: tuple[Concern, ...]


class _Request(NamedTuple):
    num_samples: int
    num_steps: int
    seed: int
    images: Tensor | None


class _Samples(NamedTuple):
    x_0: Tensor
    cond: Condition
    clipped_share: float


@torch.no_grad()
def check_denoising(
    denoiser: Denoiser,
    *,
    num_samples: int = 8,
    num_steps: int = 50,
    seed: int = 0,
    images: Tensor | None = None,
) -> DenoisingCheck:
    """Sample from a model, noise the samples to about 12 levels and predict them.

    num_samples: at least 2; more are drawn where one is small. num_steps: sampler steps. images:
    [N, ...] to be noised instead of the samples, in the model's own range and shape; a conditional
    model sees them under its null condition. Where it does not denoise, other readings of the same
    network are tried. Evaluations are not counted. Raises UsageError for fewer than two samples and
    for images of another shape.
    """
    request = _Request(num_samples, num_steps, seed, images)
    _check(denoiser, request)
    with undisturbed(denoiser):
        own = _own_samples(denoiser, request, "denoising check")
        spread = _spread(own.x_0)
        if not own.x_0.isfinite().all():
            return DenoisingCheck(False, (), spread, (_NOT_FINITE,))
        levels = _level_errors(denoiser, own if images is None else _given(denoiser, images), seed)
        if _denoises(levels):
            return DenoisingCheck(True, levels, spread, _concerns(denoiser, own, spread, images))
        mismatch = () if images is None else _image_concerns(spread, images)
        failure = _failure(levels, _better_reading(denoiser, request))
    return DenoisingCheck(False, levels, spread, (failure, *mismatch))


def _check(denoiser: Denoiser, request: _Request) -> None:
    if request.num_samples < 2 or request.num_steps < 1:
        raise UsageError(
            "denoising check: expected at least 2 samples and 1 step, found "
            f"{request.num_samples} and {request.num_steps}"
        )
    images, shape = request.images, tuple(denoiser.sample_shape)
    if images is not None and (tuple(images.shape[1:]) != shape or len(images) < 2):
        raise UsageError(
            f"denoising check: expected at least 2 images of shape {shape}, "
            f"found {tuple(images.shape)}"
        )


def _own_samples(denoiser: Denoiser, request: _Request, label: str) -> _Samples:
    process, shape = denoiser.process, tuple(denoiser.sample_shape)
    count = max(request.num_samples, math.ceil(MIN_VALUES / math.prod(shape)))
    cond = balanced_condition(denoiser.conditioning, count, request.seed)
    noise = generator("cpu", request.seed, "denoising check", "start")
    start = process.start_std * torch.randn(count, *shape, generator=noise)
    steps = process.timesteps(min(request.num_steps, process.num_levels))
    clipped: list[float] = []
    with track(len(steps), 0, label) as show:

        def predict(x: Tensor, t: Tensor) -> Prediction:
            prediction = denoiser.predict(Batch(x, t, cond, t))
            clipped.extend(_clipped_share(process, int(t[0]), prediction.x_0))
            show(steps.index(int(t[0])) + 1)
            return prediction

        start = start.to(denoiser.device)
        x_0 = sample(
            predict, process, denoiser.parameterization, start, steps, lambda _: torch.zeros(())
        )
    return _Samples(x_0, cond, sum(clipped) / max(1, len(clipped)))


def _clipped_share(process: Process, t: int, x_0: Tensor) -> list[float]:
    """Share of values cut by more than a tenth; nothing where clipping is off, or the noise so
    strong that any prediction overshoots."""
    limit = process.clipping.range
    if limit is None or process.clipping.quantile is not None or process.snr()[t] < 0.1:
        return []
    return [(x_0.abs() > 1.1 * limit).double().mean().item()]


def _given(denoiser: Denoiser, images: Tensor) -> _Samples:
    try:
        cond = denoiser.conditioning.null(len(images))
    except UsageError:
        cond = balanced_condition(denoiser.conditioning, len(images), 0)
    return _Samples(images.to(denoiser.device, torch.float32), cond, 0.0)


def _spread(values: Tensor) -> Spread:
    low, high = values.min().item(), values.max().item()
    return Spread(low, high, values.double().mean().item(), values.double().std().item())


def _level_errors(denoiser: Denoiser, samples: _Samples, seed: int) -> tuple[LevelError, ...]:
    process, x_0 = denoiser.process, samples.x_0
    var = max(x_0.double().var(dim=0).mean().item(), 1e-12)
    noise = generator("cpu", seed, "denoising check", "noise")
    errors = []
    for level in _levels(process.snr() * var):
        t = torch.full((len(x_0),), level)
        eps = torch.randn(x_0.shape, generator=noise).to(x_0.device)
        prediction = denoiser.predict(Batch(process.add_noise(x_0, eps, t), t, samples.cond, t))
        errors.append(_level_error(level, process.snr()[level].item(), var, prediction, x_0, eps))
    return tuple(errors)


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
    """Compare with the blind guess, whose squared error of x_0 is var / (1 + SNR var) (Bishop,
    Pattern Recognition and Machine Learning, Eq. 2.117, for one Gaussian)."""
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


def _ratios(levels: tuple[LevelError, ...]) -> list[float]:
    return [level.blind_ratio for level in levels if level.decisive]


def _denoises(levels: tuple[LevelError, ...]) -> bool:
    ratios = _ratios(levels)
    return bool(ratios) and max(ratios) <= WORST_RATIO and min(ratios) <= BEST_RATIO


def _better_reading(denoiser: Denoiser, request: _Request) -> str | None:
    """What would have to be set for the model to denoise best, if anything makes it denoise.

    Each reading is tried on its own samples, unless images were given: the samples of a wrong
    reading are states the network was never trained on.
    """
    found = {}
    for setting, reading in _readings(denoiser):
        if request.images is None:
            samples = _own_samples(reading, request, f"read with {setting}")
        else:
            samples = _given(reading, request.images)
        if samples.x_0.isfinite().all():
            levels = _level_errors(reading, samples, request.seed)
            if _denoises(levels):
                found[setting] = sum(math.log(max(r, 1e-12)) for r in _ratios(levels))
    return min(found, key=found.__getitem__, default=None)


def _readings(denoiser: Denoiser) -> Iterator[tuple[str, Denoiser]]:
    """Other ways to read the same network, each with the setting it stands for."""
    own = denoiser.parameterization
    for kind in _prediction_types(denoiser.process):
        if kind != own.prediction:
            other = replace(own, prediction=kind)
            yield f'"prediction_type": "{kind}"', replace(denoiser, parameterization=other)
    for setting, process in _processes(denoiser.process):
        yield setting, replace(denoiser, process=process)


def _prediction_types(process: Process) -> list[PredictionType]:
    """Those that are used with such a process."""
    if (process.alpha == 1).all():
        return ["edm", "epsilon", "sample"]
    if (process.alpha + process.sigma - 1).abs().max() < 1e-6:
        return ["flow_prediction", "sample"]
    usable = ["epsilon", "sample", "v_prediction"]
    start = 1 if (process.alpha == 0).any() else 0
    return [kind for kind in get_args(PredictionType) if kind in usable[start:]]


_SCHEDULES = (
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
)


def _processes(process: Process) -> Iterator[tuple[str, Process]]:
    """Other time scales, and the usual beta schedules where the scheduler has one."""
    for factor in (process.num_levels, 1 / process.num_levels):
        times = process.network_time * factor
        yield (
            f"times {times[0].item():.4g} to {times[-1].item():.4g} fed to the network",
            replace(process, network_time=times),
        )
    for betas in _SCHEDULES if "beta_schedule" in process.scheduler else ():
        setting = ", ".join(f'"{key}": {value!r}' for key, value in betas.items())
        yield setting.replace("'", '"'), from_scheduler_config({**process.scheduler, **betas})


_NOT_FINITE = Concern(
    "its samples are not finite",
    "finite numbers",
    "load it with --teacher-dtype float32; if they still are not, its weights are damaged",
)


def _failure(levels: tuple[LevelError, ...], setting: str | None) -> Concern:
    remedy = (
        f"it denoises when read with {setting}: correct this, usually in scheduler_config.json"
        if setting
        else "no other prediction type, time scale or usual schedule makes it denoise: check that "
        "its weights are the trained ones, and how its input and time are scaled"
    )
    return Concern(_seen(levels), _expected(), remedy)


def _expected() -> str:
    return f"at most {WORST_RATIO} times at every level, less than {BEST_RATIO} times at the best"


def _seen(levels: tuple[LevelError, ...]) -> str:
    decisive = [level for level in levels if level.decisive]
    if not decisive:
        return "its samples are all alike, or far too small or large for its noise levels"
    worst = max(decisive, key=lambda level: level.blind_ratio)
    best = min(decisive, key=lambda level: level.blind_ratio)
    return (
        f"it does not denoise: its error is {worst.blind_ratio:.3g} times that of the blind guess "
        f"at t = {worst.t} and {best.blind_ratio:.3g} times at the best, t = {best.t}"
    )


def _concerns(
    denoiser: Denoiser, own: _Samples, spread: Spread, images: Tensor | None
) -> tuple[Concern, ...]:
    """What looks wrong about a model that denoises."""
    clipping = _clipping_concerns(denoiser.process, own.clipped_share)
    scale = _scale_concerns(denoiser, spread)
    return (*clipping, *scale, *(() if images is None else _image_concerns(spread, images)))


def _clipping_concerns(process: Process, share: float) -> tuple[Concern, ...]:
    if share <= CLIPPED_SHARE:
        return ()
    limit = process.clipping.range
    concern = Concern(
        f"clipping to {limit:g} cuts {share:.0%} of the predicted values by more than a tenth",
        f"at most {CLIPPED_SHARE:.0%}: values that lie within -{limit:g}..{limit:g}",
        'set "clip_sample": false in scheduler_config.json if the model works on latents or on '
        "data of another range",
    )
    return (concern,)


def _scale_concerns(denoiser: Denoiser, spread: Spread) -> tuple[Concern, ...]:
    shown = f"{spread.low:.2f}..{spread.high:.2f}, standard deviation {spread.std:.2f}"
    if denoiser.process.clipping.range is not None and -0.05 < spread.low and spread.high < 1.05:
        concern = Concern(
            f"its samples lie in {shown}",
            "-1..1, the range of pictures",
            "it was trained on data in 0..1; it can be distilled, but pictures will look pale",
        )
        return (concern,)
    if (denoiser.process.alpha < 1).any() and not 0.05 < spread.std < 3:
        concern = Concern(
            f"its samples lie in {shown}",
            "a standard deviation near 1, or near 0.5 for pictures",
            "check the scaling factor of its latents",
        )
        return (concern,)
    return ()


def _image_concerns(own: Spread, images: Tensor) -> tuple[Concern, ...]:
    given = _spread(images)
    ratio = given.std / max(own.std, 1e-12)
    if 2 / 3 < ratio < 3 / 2 and abs(given.mean - own.mean) < own.std:
        return ()
    concern = Concern(
        f"the images have mean {given.mean:.2f} and standard deviation {given.std:.2f}",
        f"about those of its own samples, {own.mean:.2f} and {own.std:.2f}",
        "bring the images to the range the model was trained on (-1..1, or scaled latents)",
    )
    return (concern,)
