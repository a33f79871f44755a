"""Where the teacher is, and whether it evaluates the next batch while the student learns."""

from __future__ import annotations

import torch
from accelerate import PartialState

from dkdm.config import DistillConfig
from dkdm.core.sources.ahead import Ahead
from dkdm.core.sources.pool import Pool
from dkdm.core.sources.source import Source
from dkdm.errors import UsageError


def is_ahead(config: DistillConfig) -> bool:
    """Whether the teacher evaluates the next batch while the student learns."""
    return config.teacher_choice.device is not None or config.teacher_choice.prefetch


def teacher_device(config: DistillConfig, device: torch.device) -> torch.device:
    """Where the teacher is; device: the student's. Raises UsageError for one that is not there."""
    asked = config.teacher_choice.device
    if asked is None:
        return device
    if PartialState().num_processes > 1:
        raise UsageError(
            "--teacher-device: several processes have a device each: remove it, or start one"
        )
    try:
        found = torch.device(asked)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--teacher-device {asked}: there is no such device; give cpu, cuda:0, cuda:1, ..."
        ) from error
    return found


def check_ahead(config: DistillConfig) -> None:
    """Raise UsageError for a source whose batches cannot be made ahead; no model is needed."""
    if not is_ahead(config):
        return
    reasons = {
        "--objective": config.few_steps.objective != "dkdm",
        "--source": config.pool.source not in ("dynamic", "shuffled", "iterative"),
        "--replay": config.pool.replay > 1,
        "--feature-weight": config.loss.feature_weight > 0,
        "the further teachers": bool(config.teachers.more_teachers),
    }
    other = next((option for option, holds in reasons.items() if holds), None)
    if other:
        what = "device" if config.teacher_choice.device is not None else "prefetch"
        raise UsageError(
            f"--teacher-{what}: only the batches of one teacher's pool are made ahead: remove it, "
            f"or {other}"
        )


def ahead_of(source: Source, config: DistillConfig, device: torch.device) -> Ahead:
    """The pool one batch ahead; device: the student's."""
    assert isinstance(source, Pool)
    training = config.training
    return Ahead(source, device, training.max_train_steps * training.gradient_accumulation_steps)
