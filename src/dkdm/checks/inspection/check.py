"""The denoising check: the verdict, what it rests on, and what to try if it fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dkdm.checks.findings import Finding
from dkdm.checks.inspection.denoising import (
    BEST_RATIO,
    INNER_LEVELS,
    WORST_RATIO,
    LevelError,
    Samples,
    denoises,
    drawn_samples,
    given_samples,
    level_errors,
    samples_needed,
)
from dkdm.checks.inspection.readings import MAX_TRIALS, applied, cure_of
from dkdm.checks.inspection.remedy import corrected, in_words
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.given import denoiser_given
from dkdm.core.denoisers.modes import say_if
from dkdm.core.diffusion.process import Process
from dkdm.core.few_steps.model import FewStep
from dkdm.errors import UsageError
from dkdm.evaluation.cost import undisturbed
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.reading.arrays import tensor as as_tensor

# Measured: 0.01 of the values after minutes of training, 0.1 where the data is 1.5 times too wide.
CLIPPED_SHARE = 0.04
# Signal-to-noise ratio at T-1 beyond which pure noise is no state that the network was trained on.
NOISY_END = 0.01
# Samples of fewer steps are far from what even a good network was trained on.
MIN_STEPS = 10
TRIAL_STEPS = 10
MIN_TRIALS = 24
TRIAL_SECONDS = 30.0
QUICK_STEPS = 10
QUICK_SECONDS = 5.0


@dataclass(frozen=True)
class Spread:
    """Range, mean and standard deviation of all values of a set of samples."""

    low: float
    high: float
    mean: float
    std: float


@dataclass(frozen=True)
class DenoisingCheck:
    """The verdict, the errors by rising noise, the model's samples, and what is wrong, worst last.

    denoises: None if these samples cannot decide it. cure: what to type instead, if another
    reading of the network denoises.
    """

    denoises: bool | None
    levels: tuple[LevelError, ...]
    samples: Spread
    warnings: tuple[Finding, ...]
    cure: str | None = None


@torch.no_grad()
def check_denoising(
    denoiser: Denoiser,
    *,
    num_samples: int = 8,
    num_steps: int = 50,
    seed: int = 0,
    images: Tensor | np.ndarray | Sequence[Any] | None = None,
    max_trials: int = MAX_TRIALS,
) -> DenoisingCheck:
    """Sample from a model, noise the samples to about 12 levels and predict them.

    num_samples: at least 2; more are drawn if a sample has few values. num_steps: sampler steps.
    images: [N, ...] to noise instead of the samples, in the model's range and shape. max_trials:
    how many other readings of the same network are tried if it does not denoise. If the schedule
    does not end in noise, or with fewer than ten steps, samples say nothing against the model, and
    without images there is no verdict. A schedule that is only a little off may pass. The mode is
    restored. Raises UsageError for fewer than two samples or images, and for other shapes.
    """
    denoiser = denoiser_given("check_denoising: denoiser", denoiser)
    real = None if images is None else as_tensor("check_denoising: images", images).float()
    _check_request(denoiser, num_samples, num_steps, real)
    if isinstance(denoiser, FewStep):
        return _of_few_steps(denoiser, num_samples, seed)

    def samples_of(reading: Denoiser) -> Samples:
        if real is not None:
            return given_samples(reading, real)
        return drawn_samples(reading, num_samples, min(TRIAL_STEPS, max(1, num_steps // 2)), seed)

    with undisturbed(denoiser) as changed:
        say_if(changed)
        drawn = drawn_samples(denoiser, num_samples, num_steps, seed, "denoising check")
        used = drawn if real is None else given_samples(denoiser, real)
        diverged = real is None and not bool(drawn.x_0.isfinite().all())
        levels = () if diverged else tuple(level_errors(denoiser, used, seed))
        warnings = () if diverged else (*_about_samples(denoiser.process, drawn.x_0, real),)
        result = partial(DenoisingCheck, levels=levels, samples=_spread(drawn.x_0))
        if denoises(levels):
            return result(True, warnings=(*warnings, *_about_values(denoiser.process, drawn)))
        may_mislead = real is None and not diverged
        if may_mislead and num_steps < min(MIN_STEPS, denoiser.process.num_levels):
            return result(None, warnings=(*warnings, _few_steps(num_steps)))
        cure = cure_of(denoiser, samples_of, seed, max_trials)
    reading = denoiser if cure is None else applied(denoiser, cure)
    # Chains that begin with a state which the network does not know prove nothing.
    if may_mislead and all(_ends_in_signal(each.process) for each in (denoiser, reading)):
        return result(None, warnings=warnings)
    failure = _failure(levels, max_trials)
    if cure is None:
        return result(False, warnings=(*warnings, failure))
    line = corrected(denoiser, cure)
    remedy = f"with {in_words(cure, reading)} it denoises: {line}"
    return result(False, warnings=(*warnings, replace(failure, remedy=remedy)), cure=line)


def _of_few_steps(denoiser: FewStep, num_samples: int, seed: int) -> DenoisingCheck:
    """What can be said of a few-step model, whose outputs are no predictions of x_0."""
    steps = denoiser.intervals.steps
    cond = denoiser.conditioning.in_turns(num_samples)
    drawn = draw(denoiser, cond, Sampling(num_samples, max(steps), seed))
    what = (
        f"a few-step model, which draws in {', '.join(map(str, steps))} steps, denoises no levels"
    )
    remedy = (
        "measure its samples with dkdm evaluate --steps, or inspect the folder plain/ in its run"
    )
    usual = "a model for many steps"
    finding = Finding("denoising", "warning", what, remedy, usual)
    return DenoisingCheck(None, levels=(), samples=_spread(drawn), warnings=(finding,))


def _few_steps(num_steps: int) -> Finding:
    what = f"{num_steps} steps are too few to judge a model by its samples"
    remedy = f"use --steps {MIN_STEPS} or more (in Python: num_steps=)"
    return Finding("steps", "warning", what, remedy, f"at least {MIN_STEPS} steps")


def _ends_in_signal(process: Process) -> bool:
    return process.snr()[-1].item() > NOISY_END


def affordable_trials(
    denoiser: Denoiser, speed: float, seconds: float, least: int = MIN_TRIALS
) -> int:
    """How many other readings can be tried in a time. speed: evaluations a second."""
    a_trial = samples_needed(denoiser, 2) * (TRIAL_STEPS + 2)
    return max(least, min(MAX_TRIALS, int(seconds * speed / a_trial)))


def quick_check(denoiser: Denoiser, speed: float, seed: int = 0) -> DenoisingCheck | None:
    """The check in about five seconds by a measured speed (evaluations a second).

    None if even its smallest form takes longer. Other readings are tried as time is left.
    """
    steps = min(QUICK_STEPS, denoiser.process.num_levels)
    left = QUICK_SECONDS - samples_needed(denoiser, 2) * (steps + INNER_LEVELS + 2) / speed
    if left < 0:
        return None
    trials = affordable_trials(denoiser, speed, left, least=0)
    return check_denoising(denoiser, num_samples=2, num_steps=steps, seed=seed, max_trials=trials)


def _check_request(
    denoiser: Denoiser, num_samples: int, num_steps: int, images: Tensor | None
) -> None:
    if num_samples < 2 or num_steps < 1:
        asked = f"{num_samples} samples in {num_steps} steps"
        raise UsageError(f"the denoising check of {asked}: give at least 2 samples and 1 step")
    shape = tuple(denoiser.sample_shape)
    if images is not None and (tuple(images.shape[1:]) != shape or len(images) < 2):
        found = tuple(images.shape)
        raise UsageError(f"the denoising check of images of shape {found}: give 2 or more {shape}")


def _spread(values: Tensor) -> Spread:
    exact = values.double()
    return Spread(exact.min().item(), exact.max().item(), exact.mean().item(), exact.std().item())


def _failure(levels: tuple[LevelError, ...], max_trials: int) -> Finding:
    """What is wrong with a model that no other reading cures."""
    if not levels:
        remedy = "load it in float32; if they still are not finite, the weights are damaged"
        what = "its samples are not finite"
        return Finding("denoising", "problem", what, remedy, "finite numbers")
    usual = f"at most {WORST_RATIO} times at every level, below {BEST_RATIO} times at the best"
    remedy = "check that these are trained weights, and how the input is scaled"
    if max_trials:
        tried = f"other prediction types, times, signs and schedules (combinations: {max_trials})"
        remedy = f"{tried} do not denoise either: {remedy}"
    return Finding("denoising", "problem", _seen(levels), remedy, usual)


def _seen(levels: tuple[LevelError, ...]) -> str:
    decisive = [level for level in levels if level.decisive]
    if not decisive:
        return "its samples are all alike, or far too small or large for its noise levels"
    worst = max(decisive, key=lambda level: level.blind_ratio)
    best = min(decisive, key=lambda level: level.blind_ratio)
    return (
        f"its error is {worst.blind_ratio:.3g} times that of a blind guess at t = {worst.t}, and "
        f"{best.blind_ratio:.3g} times at the best level, t = {best.t}"
    )


def _about_samples(process: Process, drawn: Tensor, real: Tensor | None) -> Iterator[Finding]:
    """Whether the network was trained on samples like those that are noised."""
    if _ends_in_signal(process):
        remedy = "sampling and distillation start from pure noise, which it was not trained on"
        if real is None:
            remedy += ": give real samples to judge it by, with --samples FILE (in Python: images=)"
        snr = f"SNR {process.snr()[-1].item():.3g} at t = T-1"
        what = f"its noise schedule does not end in noise: {snr}"
        yield Finding("schedule", "warning", what, remedy, f"at most {NOISY_END}")
    elif real is not None:
        mine, given = _spread(drawn), _spread(real)
        alike = 2 / 3 < given.std / max(mine.std, 1e-12) < 3 / 2
        if not alike or abs(given.mean - mine.mean) >= mine.std:
            what = f"the given ones have mean {given.mean:.2f}, standard deviation {given.std:.2f}"
            remedy = "bring them to the range it was trained on (-1..1, or scaled latents)"
            usual = f"about {mine.mean:.2f} and {mine.std:.2f}, as the samples that it draws"
            yield Finding("samples", "warning", what, remedy, usual)


def _about_values(process: Process, drawn: Samples) -> Iterator[Finding]:
    """Whether a working model's samples lie in the usual range."""
    spread, limit = _spread(drawn.x_0), process.clipping.range
    if drawn.clipped_share > CLIPPED_SHARE:
        what = (
            f"clipping to -{limit:g}..{limit:g} cuts {drawn.clipped_share:.0%} of the predicted "
            "values by more than a tenth"
        )
        remedy = (
            'if it was trained on latents or another range, set "clip_sample": false in '
            "scheduler_config.json; if on images in -1..1, check its beta schedule"
        )
        yield Finding("clipping", "warning", what, remedy, f"at most {CLIPPED_SHARE:.0%}")
    where = f"{spread.low:.2f}..{spread.high:.2f}"
    what = f"its samples lie in {where}, standard deviation {spread.std:.2f}"
    if limit is not None and spread.low > -0.05 and spread.high < 1.05:
        remedy = "it was trained on data in 0..1: it can be distilled, but images will look pale"
        yield Finding("range", "warning", what, remedy, "-1..1, the range of images")
    elif (process.alpha < 1).any() and not 0.05 < spread.std < 3:
        remedy = "check the scaling factor of its latents"
        usual = "a standard deviation near 1 for latents, near 0.5 for images"
        yield Finding("range", "warning", what, remedy, usual)
