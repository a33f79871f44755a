"""The corrected line: what to type instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dkdm.checks.inspection.readings import Change, parts_of
from dkdm.core.denoiser import Denoiser
from dkdm.errors import UsageError
from dkdm.models.schedulers import from_scheduler_config, prediction_type

FLAGS = {  # of guided-diffusion's scripts
    "sample": "--predict_xstart True",
    "epsilon": "--predict_xstart False",
    "linear": "--noise_schedule linear",
    "squaredcos_cap_v2": "--noise_schedule cosine",
}


def corrected(denoiser: Denoiser, change: Change) -> str:
    """What to type instead, as a user of this kind of teacher types it.

    A folder gets the entries of its scheduler_config.json, a checkpoint file its flags. A model
    made in Python, and what these cannot say, gets a line of Python, which makes `corrected` of
    `teacher`.
    """
    given = ", ".join(f"{name}={code}" for name, (_, code) in parts_of(change, denoiser).items())
    name, code = denoiser.name, f"corrected = dataclasses.replace(teacher, {given})"
    is_file = Path(name).is_file()
    if not is_file and not _is_folder(denoiser):
        return code
    short = None
    if change.time is None and not change.negated:
        short = _flags(change) if is_file else _entries(denoiser, change)
    return short or f"teacher = dkdm.load_teacher({name!r}); {code}"


def _is_folder(denoiser: Denoiser) -> bool:
    """Whether it was read from a pipeline's folder, here or on the hub."""
    here = (Path(denoiser.name) / "model_index.json").is_file()
    return denoiser.bundle.pipeline is not None or here or denoiser.name.startswith("builtin:")


def _entries(denoiser: Denoiser, change: Change) -> str | None:
    """The entries for scheduler_config.json; None if no entries say this."""
    entries = {} if change.schedule is None else dict(change.schedule.config)
    kind = change.prediction or denoiser.parameterization.prediction
    if kind in ("edm", "edm_v"):
        entries.setdefault("_class_name", "EDMEulerScheduler")
        entries["prediction_type"] = "v_prediction" if kind == "edm_v" else "epsilon"
    elif kind == "flow_prediction":
        entries.setdefault("_class_name", "FlowMatchEulerDiscreteScheduler")
    elif change.prediction is not None:
        entries["prediction_type"] = change.prediction
    if not _says(entries, denoiser, change):
        return None
    scheduler = denoiser.process.scheduler
    entries = {key: value for key, value in entries.items() if scheduler.get(key) != value}
    shown = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in entries.items())
    return f"write {shown} in {_scheduler_file(denoiser)}"


def _says(entries: Mapping[str, Any], denoiser: Denoiser, change: Change) -> bool:
    """Whether a scheduler's config with these entries is read as the change wants it."""
    config = {**denoiser.process.scheduler, **entries}
    wanted = change.schedule.process if change.schedule else denoiser.process
    try:
        found = from_scheduler_config(config)
        kind = prediction_type(config)
    except UsageError:
        return False
    same = found.num_levels == wanted.num_levels and torch.allclose(found.sigma, wanted.sigma)
    return same and kind == (change.prediction or denoiser.parameterization.prediction)


def _scheduler_file(denoiser: Denoiser) -> str:
    """The file that the entries belong to."""
    file = Path(denoiser.name) / "scheduler" / "scheduler_config.json"
    return str(file) if file.is_file() else f"the scheduler_config.json of {denoiser.name}"


def _flags(change: Change) -> str | None:
    """Flags of the original repository's scripts; None if there are none for this."""
    names: list[object] = [change.prediction] if change.prediction else []
    if change.schedule is not None:
        names.append(change.schedule.config.get("beta_schedule"))
    if not all(name in FLAGS for name in names):
        return None
    return f'--flags "{" ".join(FLAGS[str(name)] for name in names)}" (distill: --teacher-flags)'


def in_words(change: Change, reading: Denoiser) -> str:
    """What is wrong, in words."""
    parts = [] if change.schedule is None else [change.schedule.words]
    if change.prediction is not None:
        parts.append(f'"prediction_type": "{change.prediction}"')
    if change.time is not None:
        first, last = reading.network_time[[0, -1]].tolist()
        kind = f" ({change.time})" if isinstance(change.time, str) else ""
        parts.append(f"times {first:.4g} to {last:.4g} fed to the network{kind}")
    if change.negated:
        parts.append("the opposite sign of its output")
    return " and ".join(parts)
