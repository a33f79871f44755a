"""The denoising check: the verdict, what it rests on, and what to try where it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dkdm.checks.inspection.denoising import (
    BEST_RATIO,
    INNER_LEVELS,
    WORST_RATIO,
    LevelError,
    Samples,
    denoises,
    given_samples,
    level_errors,
    own_samples,
    samples_needed,
)
from dkdm.checks.inspection.readings import Cure, applied, cure_of
from dkdm.checks.inspection.remedy import corrected, in_words
from dkdm.core.denoiser import Denoiser
from dkdm.core.given import denoiser_given
from dkdm.core.modes import say_if
from dkdm.core.process import Process
from dkdm.errors import UsageError
from dkdm.evaluation.cost import undisturbed
from dkdm.reading.arrays import tensor as as_tensor

# Measured: 0.01 of the values after minutes of training, 0.1 where the data is 1.5 times too wide.
CLIPPED_SHARE = 0.04
# Signal-to-noise ratio at T-1 beyond which pure noise is no state that the network was trained on.
NOISY_END = 0.01
# Samples of fewer steps are far from what even a good network was trained on.
MIN_STEPS = 10
TRIAL_STEPS = 10
MAX_TRIALS = 300
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
class Concern:
    """Something that looks wrong: what was seen, what was expected, what to try."""

    seen: str
    expected: str
    remedy: str


@dataclass(frozen=True)
class DenoisingCheck:
    """The verdict, the errors by rising noise, the model's own samples, gravest concerns first.

    denoises: None if it cannot be judged by these samples. cure: what to type instead, where
    another reading of the network denoises.
    """

    denoises: bool | None
    levels: tuple[LevelError, ...]
    samples: Spread
    concerns: tuple[Concern, ...]
    cure: str | None = None


NOT_FINITE = Concern(
    "its samples are not finite",
    "finite numbers",
    "load it in float32; if its samples still are not finite, the weights are damaged",
)


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

    num_samples: at least 2; more are drawn where one has few values. num_steps: sampler steps.
    images: [N, ...] to be noised instead of the samples, in the model's own range and shape. Where
    it does not denoise, up to max_trials other readings of the same network are tried. Where the
    schedule does not end in noise, or there are fewer than ten steps, the samples say nothing
    against the model, and without images there is no verdict then. What may pass: a schedule that
    is only a little off. Mode and evaluation counter are restored.
    Raises UsageError for fewer than two samples or images, and for images of another shape.
    """
    denoiser = denoiser_given("check_denoising: denoiser", denoiser)
    real = None if images is None else as_tensor("check_denoising: images", images).float()
    _check_request(denoiser, num_samples, num_steps, real)

    def samples_of(reading: Denoiser) -> Samples:
        if real is not None:
            return given_samples(reading, real)
        return own_samples(reading, num_samples, min(TRIAL_STEPS, max(1, num_steps // 2)), seed)

    with undisturbed(denoiser) as changed:
        say_if(changed)
        own = own_samples(denoiser, num_samples, num_steps, seed, "denoising check")
        spread = _spread(own.x_0)
        if real is None and not own.x_0.isfinite().all():
            cure = cure_of(denoiser, samples_of, seed, max_trials)
            line = None if cure is None else corrected(denoiser, cure.change)
            concern = (
                NOT_FINITE if cure is None else replace(NOT_FINITE, remedy=_with(denoiser, cure))
            )
            return DenoisingCheck(False, (), spread, (concern,), line)
        used = own if real is None else given_samples(denoiser, real)
        levels = level_errors(denoiser, used, seed)
        concerns = _noisy_end_concerns(denoiser.process, real)
        if real is not None and not concerns:
            concerns = _image_concerns(spread, _spread(real))
        if denoises(levels):
            concerns += _clipping_concerns(denoiser.process, own.clipped_share)
            concerns += _scale_concerns(denoiser.process, spread)
            return DenoisingCheck(True, levels, spread, concerns)
        if real is None and num_steps < min(MIN_STEPS, denoiser.process.num_levels):
            return DenoisingCheck(None, levels, spread, (*concerns, _few_steps(num_steps)))
        cure = cure_of(denoiser, samples_of, seed, max_trials)
    if real is None and _ends_in_signal(denoiser.process) and not _is_sure(denoiser, cure):
        return DenoisingCheck(None, levels, spread, concerns)
    line = None if cure is None else corrected(denoiser, cure.change)
    failure = _failure(denoiser, levels, cure, max_trials)
    return DenoisingCheck(False, levels, spread, (*concerns, failure), line)


def _few_steps(num_steps: int) -> Concern:
    return Concern(
        f"its samples were drawn in {num_steps} steps, too few to judge it by",
        f"at least {MIN_STEPS} steps",
        f"--steps {MIN_STEPS} or more (in Python: num_steps=)",
    )


def _is_sure(denoiser: Denoiser, cure: Cure | None) -> bool:
    """Whether a cure was found on chains that begin with a state the network knows."""
    return cure is not None and not _ends_in_signal(applied(denoiser, cure.change).process)


def _ends_in_signal(process: Process) -> bool:
    return process.snr()[-1].item() > NOISY_END


def _noisy_end_concerns(process: Process, images: Tensor | None) -> tuple[Concern, ...]:
    if not _ends_in_signal(process):
        return ()
    remedy = "sampling and distillation begin with pure noise, which it was not trained on"
    if images is None:
        remedy += ": give real samples to judge it by, with --samples FILE (in Python: images=)"
    concern = Concern(
        f"its noise schedule does not end in noise: SNR {process.snr()[-1].item():.3g} at t = T-1",
        f"at most {NOISY_END}",
        remedy,
    )
    return (concern,)


def affordable_trials(denoiser: Denoiser, speed: float, seconds: float) -> int:
    """How many other readings can be tried in a time. speed: evaluations a second."""
    a_trial = samples_needed(denoiser, 2) * (TRIAL_STEPS + 2)
    return max(MIN_TRIALS, min(MAX_TRIALS, int(seconds * speed / a_trial)))


def quick_check(denoiser: Denoiser, speed: float, seed: int = 0) -> DenoisingCheck | None:
    """The check in about five seconds by a measured speed (evaluations a second).

    None where even its smallest form takes longer. Where time is short, few other readings are
    tried.
    """
    count = samples_needed(denoiser, 2)
    steps = min(QUICK_STEPS, denoiser.process.num_levels)
    needed = count * (steps + INNER_LEVELS + 2)
    if needed > QUICK_SECONDS * speed:
        return None
    left = (QUICK_SECONDS * speed - needed) / (count * (TRIAL_STEPS + 2))
    trials = min(MAX_TRIALS, int(left))
    return check_denoising(denoiser, num_samples=2, num_steps=steps, seed=seed, max_trials=trials)


def _check_request(
    denoiser: Denoiser, num_samples: int, num_steps: int, images: Tensor | None
) -> None:
    if num_samples < 2 or num_steps < 1:
        raise UsageError(
            f"denoising check: expected at least 2 samples and 1 step, "
            f"found {num_samples} and {num_steps}"
        )
    shape = tuple(denoiser.sample_shape)
    if images is not None and (tuple(images.shape[1:]) != shape or len(images) < 2):
        raise UsageError(
            f"denoising check: expected at least 2 images of shape {shape}, "
            f"found {tuple(images.shape)}"
        )


def _spread(values: Tensor) -> Spread:
    exact = values.double()
    return Spread(exact.min().item(), exact.max().item(), exact.mean().item(), exact.std().item())


def _failure(
    denoiser: Denoiser,
    levels: tuple[LevelError, ...],
    cure: Cure | None,
    max_trials: int,
) -> Concern:
    expected = f"at most {WORST_RATIO} times at every level, below {BEST_RATIO} times at the best"
    if cure is not None:
        return Concern(_seen(levels), expected, _with(denoiser, cure))
    return Concern(
        _seen(levels),
        expected,
        f"no reading works: it does not denoise with any of {max_trials} other combinations of "
        "prediction type, time, sign and schedule. Check that these are trained weights, and how "
        "the network's input is scaled",
    )


def _with(denoiser: Denoiser, cure: Cure) -> str:
    words = in_words(cure.change, applied(denoiser, cure.change))
    return f"with {words} it denoises: {corrected(denoiser, cure.change)}"


def _seen(levels: tuple[LevelError, ...]) -> str:
    decisive = [level for level in levels if level.decisive]
    if not decisive:
        return "its samples are all alike, or far too small or large for its noise levels"
    worst = max(decisive, key=lambda level: level.blind_ratio)
    best = min(decisive, key=lambda level: level.blind_ratio)
    return (
        f"its error is {worst.blind_ratio:.3g} times that of a blind guess at t = {worst.t}, and "
        f"{best.blind_ratio:.3g} times at the best, t = {best.t}"
    )


def _clipping_concerns(process: Process, share: float) -> tuple[Concern, ...]:
    if share <= CLIPPED_SHARE:
        return ()
    limit = process.clipping.range
    concern = Concern(
        f"clipping to -{limit:g}..{limit:g} cuts {share:.0%} of the predicted values by more than "
        "a tenth",
        f"at most {CLIPPED_SHARE:.0%}",
        'if it was trained on latents or on another range, set "clip_sample": false in '
        "scheduler_config.json; if on pictures in -1..1, check its beta schedule",
    )
    return (concern,)


def _scale_concerns(process: Process, own: Spread) -> tuple[Concern, ...]:
    seen = f"its samples lie in {own.low:.2f}..{own.high:.2f}, standard deviation {own.std:.2f}"
    if process.clipping.range is not None and own.low > -0.05 and own.high < 1.05:
        concern = Concern(
            seen,
            "-1..1, the range of pictures",
            "it was trained on data in 0..1: it can be distilled, but pictures will look pale",
        )
        return (concern,)
    if (process.alpha < 1).any() and not 0.05 < own.std < 3:
        concern = Concern(
            seen,
            "a standard deviation near 1 for latents, near 0.5 for pictures",
            "check the scaling factor its latents were trained with",
        )
        return (concern,)
    return ()


def _image_concerns(own: Spread, given: Spread) -> tuple[Concern, ...]:
    ratio = given.std / max(own.std, 1e-12)
    if 2 / 3 < ratio < 3 / 2 and abs(given.mean - own.mean) < own.std:
        return ()
    concern = Concern(
        f"the images have mean {given.mean:.2f} and standard deviation {given.std:.2f}",
        f"about those of the model's own samples, {own.mean:.2f} and {own.std:.2f}",
        "bring the images to the range it was trained on (-1..1, or scaled latents)",
    )
    return (concern,)
