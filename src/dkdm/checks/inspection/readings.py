"""Other ways to read a network that does not denoise: what is probably wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dkdm.checks.inspection.denoising import (
    Samples,
    cures,
    follows_noise,
    level_errors,
    mean_ratio,
)
from dkdm.core.denoisers.calls import Call
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.modes import modules_behind
from dkdm.core.diffusion.clipping import Clipping
from dkdm.core.diffusion.prediction import PredictionType
from dkdm.core.diffusion.process import Process
from dkdm.core.diffusion.schedules import karras, rectified_flow
from dkdm.core.diffusion.time import Time, network_time
from dkdm.core.saving.progress import track
from dkdm.errors import UsageError
from dkdm.models.schedulers import from_scheduler_config

ProcessKind = Literal["variance preserving", "variance exploding", "flow", "other"]
BETAS: tuple[Mapping[str, Any], ...] = (
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
)


MAX_TRIALS = 300
TIMES: tuple[Time, ...] = (  # the code of a function is shown as it stands here: one on a line
    "index",
    "fraction",
    "data_fraction",
    "sigma",
    "log_snr",
    "c_noise",
    lambda process: 1000 * process.sigma / (process.alpha + process.sigma),
    lambda process: 1000 * process.alpha / (process.alpha + process.sigma),
    lambda process: process.network_time * process.num_levels,
    lambda process: process.network_time / process.num_levels,
    lambda process: process.network_time.flip(0),
    lambda process: 1 - process.network_time / process.num_levels,
    lambda process: torch.arange(1, process.num_levels + 1),
    lambda process: torch.arange(process.num_levels).flip(0),
    lambda process: (process.sigma / process.alpha).log(),
    lambda process: 2 * (process.sigma / process.alpha).log(),
    lambda process: process.alpha,
    lambda process: process.alpha**2,
)


def code_of(time: Time) -> str:
    """One of TIMES as an argument `time=` in Python."""
    if isinstance(time, str):
        return f'"{time}"'
    return inspect.getsource(time).strip().removesuffix(",")


@dataclass(frozen=True, eq=False)
class Schedule:
    """Another noise process.

    code, words: what it is, in Python and in a sentence. config: in scheduler_config.json.
    """

    process: Process
    code: str
    words: str
    config: Mapping[str, Any]
    same_family: bool


@dataclass(frozen=True)
class Change:
    """What is read differently; None and False leave a part as it is."""

    schedule: Schedule | None = None
    prediction: PredictionType | None = None
    time: Time | None = None
    negated: bool = False

    @property
    def count(self) -> int:
        """How many parts are read differently."""
        parts = (self.schedule, self.prediction, self.time)
        return sum(part is not None for part in parts) + self.negated

    @property
    def keeps_family(self) -> bool:
        """Whether the process stays of its kind, so that the same time may be fed."""
        return self.schedule is None or self.schedule.same_family


def applied(denoiser: Denoiser, change: Change) -> Denoiser:
    """The same network, read as the change says. Raises UsageError if the parts do not fit."""
    parts = parts_of(change, denoiser)
    return replace(denoiser, **{name: value for name, (value, _) in parts.items()})


def parts_of(change: Change, teacher: Denoiser) -> dict[str, tuple[Any, str]]:
    """The fields of `teacher` that a change replaces: each one's value, and its code in Python."""
    parts: dict[str, tuple[Any, str]] = {}
    if change.schedule is not None:
        parts["process"] = change.schedule.process, change.schedule.code
    if change.prediction is not None:
        meaning = replace(teacher.parameterization, prediction=change.prediction)
        code = f'dataclasses.replace(teacher.parameterization, prediction="{change.prediction}")'
        parts["parameterization"] = meaning, code
    if change.time is not None:
        parts["time"] = change.time, code_of(change.time)
    elif not change.keeps_family and teacher.time is not None:
        parts["time"] = None, "None"
    if change.negated:
        parts["call"] = _negated(teacher)
    return parts


def _negated(teacher: Denoiser) -> tuple[Call, str]:
    """The call with the sign of what is predicted turned; variance channels keep theirs."""
    call, channels = teacher.call, teacher.sample_shape[0]
    assert call is not None

    def turned(network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output = call(network, x, time, cond)
        return torch.cat([-output[:, :channels], output[:, channels:]], dim=1)

    code = "-teacher.call(network, x, time, cond)"
    if teacher.parameterization.learns_variance:
        sides = ", ".join(["-1", *["1"] * len(teacher.sample_shape[1:])])
        signs = f"x.new_tensor([-1] * {channels} + [1] * {channels}).reshape({sides})"
        code = f"{signs} * teacher.call(network, x, time, cond)"
    return turned, f"lambda network, x, time, cond: {code}"


def cure_of(
    denoiser: Denoiser,
    samples_of: Callable[[Denoiser], Samples],
    seed: int,
    max_trials: int = MAX_TRIALS,
) -> Change | None:
    """The change under which the same network denoises, or None.

    Single changes are tried first, then two at once, then three; among as many changes, the one
    that denoises best is taken. samples_of: reading -> samples to noise, drawn by that reading or
    real: a wrong reading draws states that the network was not trained on, and no reading denoises
    those. A reading that the network cannot take is skipped.
    """
    every = list(_combinations(denoiser))
    for count in (1, 2, 3):
        tried = [change for change in every if _tier(change) == count][:max_trials]
        max_trials, ratios = max_trials - len(tried), dict[Change, float]()
        with track(len(tried), 0, "trying other readings") as show:
            for number, change in enumerate(tried, 1):
                ratio = _ratio(denoiser, change, samples_of, seed)
                show(number)
                if ratio is not None:
                    ratios[change] = ratio
        if ratios:
            return min(ratios, key=ratios.__getitem__)
    return None


def _ratio(
    denoiser: Denoiser, change: Change, samples_of: Callable[[Denoiser], Samples], seed: int
) -> float | None:
    """How well a reading denoises (see `mean_ratio`); None if it does not."""
    try:
        reading = applied(denoiser, change)
        if not _fits_tables(reading):
            return None
        samples = samples_of(reading)
        if not samples.x_0.isfinite().all():
            return None
        levels = []
        for error in level_errors(reading, samples, seed):
            if not error.may_denoise:
                return None
            levels.append(error)
        found = cures(levels) and follows_noise(reading, seed)
    except Exception:  # a network that is read wrongly may raise anything
        return None
    return mean_ratio(levels) if found else None


def _fits_tables(reading: Denoiser) -> bool:
    """Whether times stay inside tables of T rows: outside, a GPU would fail for good."""
    total, times = reading.process.num_levels, reading.network_time
    tables = [
        module.num_embeddings
        for module in modules_behind(reading.network, reading.call)
        if isinstance(module, nn.Embedding) and module.num_embeddings in (total, total + 1)
    ]
    return all(float(times.min()) >= 0 and float(times.max()) < rows for rows in tables)


def _tier(change: Change) -> int:
    """How many mistakes a change corrects: another family implies its prediction and time."""
    if change.keeps_family:
        return change.count
    return 1 + max(1, change.count - 1) if change.time or change.negated else 2


def _combinations(denoiser: Denoiser) -> Iterator[Change]:
    current = denoiser.parameterization.prediction
    for schedule in (None, *_schedules(denoiser)):
        kinds = prediction_types(schedule.process if schedule else denoiser.process)
        predictions = [None if kind == current else kind for kind in kinds]
        if current not in kinds and (schedule is None or schedule.same_family):
            predictions.append(None)
        times = (None, *_other_times(denoiser, schedule))
        for prediction, time, sign in product(predictions, times, (False, True)):
            change = Change(schedule, prediction, time, sign)
            if 0 < change.count <= 3:
                yield change


def _other_times(denoiser: Denoiser, schedule: Schedule | None) -> list[Time]:
    """The kinds of time that differ from what is fed already, and from one another."""
    process = schedule.process if schedule else denoiser.process
    same = schedule is None or schedule.same_family
    seen = [denoiser.network_time if same else process.network_time]
    found = []
    for time in TIMES:
        try:
            times = network_time(process, time)
        except UsageError:  # infinite if a flow ends in pure noise
            continue
        if times.isfinite().all() and not any(_same(times, other) for other in seen):
            seen.append(times)
            found.append(time)
    return found


def _same(times: Tensor, others: Tensor) -> bool:
    return times.shape == others.shape and torch.allclose(times, others, rtol=1e-6, atol=1e-9)


def _schedules(denoiser: Denoiser) -> Iterator[Schedule]:
    given = denoiser.process
    if given.clipping.range is not None:
        yield _unclipped(given)
    for schedule in (*_beta_schedules(given), *_other_families(given)):
        process = schedule.process
        if not (_same(process.alpha, given.alpha) and _same(process.sigma, given.sigma)):
            yield schedule


def _unclipped(given: Process) -> Schedule:
    off = {"clip_sample": False, "thresholding": False}
    entries = {key: value for key, value in off.items() if given.scheduler.get(key, True)}
    process = replace(given, clipping=Clipping(), scheduler={**given.scheduler, **entries})
    code = "dataclasses.replace(teacher.process, clipping=dkdm.Clipping())"
    return Schedule(process, code, "samples that are not clipped", {"clip_sample": False}, True)


def _beta_schedules(given: Process) -> Iterator[Schedule]:
    same = process_kind(given) == "variance preserving"
    named = given.scheduler.get("_class_name") in ("DDPMScheduler", "DDIMScheduler")
    base = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": given.num_levels,
        "clip_sample": False,
    }
    kept = dict(given.scheduler) if same and named else base
    for betas in BETAS:
        config = {**kept, "trained_betas": None, "rescale_betas_zero_snr": False, **betas}
        process = from_scheduler_config(config)
        shown = {**base, **betas, "clip_sample": config.get("clip_sample", True)}
        code = f"dkdm.from_scheduler_config({shown})"
        words = f'the noise schedule "beta_schedule": "{betas["beta_schedule"]}"'
        yield Schedule(process, code, words, betas, same)


def _other_families(given: Process) -> Iterator[Schedule]:
    for make in (rectified_flow, karras):
        process = make(given.num_levels)
        if process_kind(process) != process_kind(given):
            code = f"dkdm.{make.__name__}({given.num_levels})"
            words = f"the noise schedule {process.scheduler.get('_class_name')}"
            yield Schedule(process, code, words, process.scheduler, False)


def process_kind(process: Process) -> ProcessKind:
    """What the tables alpha and sigma amount to."""
    alpha, sigma = process.alpha, process.sigma
    if (alpha == 1).all():
        return "variance exploding"
    if (alpha + sigma - 1).abs().max() < 1e-6:
        return "flow"
    if (alpha**2 + sigma**2 - 1).abs().max() < 1e-6:
        return "variance preserving"
    return "other"


def prediction_types(process: Process) -> tuple[PredictionType, ...]:
    """The kinds in use with such a process; epsilon says nothing of x_0 if alpha = 0."""
    if process_kind(process) == "variance exploding":
        return ("edm", "edm_v", "epsilon", "sample")
    if process_kind(process) == "flow":
        return ("flow_prediction", "sample")
    others: tuple[PredictionType, ...] = ("sample", "v_prediction")
    return others if (process.alpha == 0).any() else ("epsilon", *others)
