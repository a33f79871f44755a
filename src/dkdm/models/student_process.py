"""A student on another noise process or with another parameterization than its teacher."""

from __future__ import annotations

from dataclasses import replace

import torch

from dkdm.config import ProcessName
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.matching import ratio_range
from dkdm.core.diffusion.clipping import Clipping
from dkdm.core.diffusion.prediction import EDM, Parameterization, PredictionType
from dkdm.errors import UsageError
from dkdm.models.schedulers import (
    BETA_PREDICTIONS,
    NAMED,
    from_scheduler_config,
    named_config,
    prediction_type,
    within,
)
from dkdm.models.stand_ins import EDM_SCHEDULERS, ON_BETAS, Config


def with_process(
    teacher: Denoiser, prediction: PredictionType | None = None, process: ProcessName = "teacher"
) -> Denoiser:
    """The teacher's description with another parameterization or noise process, for a student.

    prediction: None is the teacher's, if the process's scheduler takes it, and otherwise the
    scheduler's. process: "teacher", one of `schedulers.NAMED`, or the path of a
    scheduler_config.json; it keeps the levels whose signal-to-noise ratio the teacher has. A
    learned variance stays with the teacher's process only. Raises UsageError if no scheduler of
    diffusers takes the two together.
    """
    own = teacher.parameterization
    if process == "teacher":
        return _with_prediction(teacher, prediction)
    config = _scheduler_of(process, teacher.process.clipping)
    given = prediction_type(config) if process not in NAMED else None
    prediction = prediction or given or _default_prediction(own, config)
    check_scheduler_takes(prediction, config)
    kept = from_scheduler_config(within(config, *ratio_range(teacher.process)))
    sigma_data = config.get("sigma_data", own.sigma_data)
    other = Parameterization(prediction, "fixed_small", sigma_data)
    return replace(teacher, process=kept, parameterization=other, time=None)


def _with_prediction(teacher: Denoiser, prediction: PredictionType | None) -> Denoiser:
    """The teacher's description with another parameterization, which its scheduler must take."""
    own, config = teacher.parameterization, teacher.process.scheduler
    if prediction is None:
        prediction = _default_prediction(own, config) if config else own.prediction
    elif config:
        check_scheduler_takes(prediction, config)
    if prediction == own.prediction:
        return teacher
    return replace(teacher, parameterization=replace(own, prediction=prediction))


def _scheduler_of(process: ProcessName, clipping: Clipping) -> Config:
    """A scheduler's config by its name or path; a named one clips as the teacher does."""
    fixed = clipping.quantile is None and clipping.center == 0
    config = named_config(process, clipping.range if fixed else None)
    trails = process in NAMED and _is_beta(config)
    return {**config, "timestep_spacing": "trailing"} if trails else config


def _default_prediction(teacher: Parameterization, config: Config) -> PredictionType:
    """What the scheduler is made for; of those that take several, the teacher's if among them."""
    if teacher.prediction in BETA_PREDICTIONS and _is_beta(config):
        return teacher.prediction
    return "v_prediction" if _is_beta(config) else prediction_type(config)


def _is_beta(config: Config) -> bool:
    return str(config["_class_name"]) in ON_BETAS and not config.get("use_flow_sigmas")


def check_scheduler_takes(prediction: PredictionType, config: Config) -> None:
    """Raise UsageError if a scheduler cannot sample a network of this parameterization."""
    allowed = _predictions(config)
    if prediction not in allowed:
        raise UsageError(
            f"--student-prediction {prediction}: {config['_class_name']} samples "
            f"{' and '.join(allowed)} only; give one of these, or another --student-process "
            f"({', '.join(NAMED)})"
        )


def _predictions(config: Config) -> tuple[PredictionType, ...]:
    """What a scheduler can sample."""
    if config["_class_name"] in EDM_SCHEDULERS:
        return EDM
    return BETA_PREDICTIONS if _is_beta(config) else (prediction_type(config),)


def check_is_sampled(student: Denoiser) -> None:
    """Raise UsageError if its process's scheduler reads or feeds a network in another way."""
    config = student.process.scheduler
    if not config:
        return
    own = student.parameterization.prediction
    reads = own in _predictions(config)
    times = student.network_time, student.process.network_time  # fed in float32
    if reads and torch.allclose(*times, rtol=1e-5, atol=1e-5):
        return
    what = f"a network is fed other times than its `time`, {student.time!r}"
    what = what if reads else f"a network that predicts {own} is misread"
    raise UsageError(
        f"{student.name}: {what}, by {config['_class_name']}, with which it would be saved; "
        "give another student, or a process without a scheduler "
        "(`dataclasses.replace(process, scheduler={})`), whose network is saved alone"
    )
