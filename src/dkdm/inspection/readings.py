"""Other ways to read a network that does not denoise: the setting that is probably wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from dkdm.denoiser import Denoiser
from dkdm.inspection.denoising import Samples, denoises, level_errors, mean_ratio
from dkdm.prediction import PredictionType
from dkdm.process import Process
from dkdm.schedulers import from_scheduler_config

ProcessKind = Literal["variance preserving", "variance exploding", "flow", "other"]
SCHEDULES = (
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
)


def better_reading(
    denoiser: Denoiser, samples_of: Callable[[Denoiser, str], Samples], seed: int
) -> str | None:
    """The setting under which the same network denoises, or None.

    Prediction types are tried first, then time scales, then schedules; of one kind the best is
    taken. samples_of: (reading, label) -> samples to noise. They should be the reading's own, or
    real images: samples of a wrong reading are states the network was never trained on, and no
    reading denoises those.
    """
    for readings in (_predictions, _time_scales, _schedules):
        found = {}
        for setting, reading in readings(denoiser):
            samples = samples_of(reading, f"trying {setting}")
            if samples.x_0.isfinite().all():
                levels = level_errors(reading, samples, seed)
                if denoises(levels):
                    found[setting] = mean_ratio(levels)
        if found:
            return min(found, key=found.__getitem__)
    return None


def _predictions(denoiser: Denoiser) -> Iterator[tuple[str, Denoiser]]:
    own = denoiser.parameterization
    for kind in _prediction_types(denoiser.process):
        if kind != own.prediction:
            other = replace(own, prediction=kind)
            yield f'"prediction_type": "{kind}"', replace(denoiser, parameterization=other)


def _time_scales(denoiser: Denoiser) -> Iterator[tuple[str, Denoiser]]:
    process = denoiser.process
    if process_kind(process) == "variance exploding":
        return
    for factor in (process.num_levels, 1 / process.num_levels):
        times = process.network_time * factor
        setting = f"times {times[0].item():.4g} to {times[-1].item():.4g} fed to the network"
        yield setting, replace(denoiser, process=replace(process, network_time=times))


def _schedules(denoiser: Denoiser) -> Iterator[tuple[str, Denoiser]]:
    own = denoiser.process.scheduler
    if own.get("_class_name") not in ("DDPMScheduler", "DDIMScheduler"):
        return
    for betas in SCHEDULES:
        setting = f'"beta_schedule": "{betas["beta_schedule"]}"'
        yield setting, replace(denoiser, process=from_scheduler_config({**own, **betas}))


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


def _prediction_types(process: Process) -> list[PredictionType]:
    """Those in use with such a process; epsilon is refused where alpha = 0."""
    if process_kind(process) == "variance exploding":
        return ["edm", "edm_v", "epsilon", "sample"]
    if process_kind(process) == "flow":
        return ["flow_prediction", "sample"]
    if (process.alpha == 0).any():
        return ["sample", "v_prediction"]
    return ["epsilon", "sample", "v_prediction"]
