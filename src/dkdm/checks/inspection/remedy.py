"""The corrected line: what to type instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dkdm.checks.inspection.readings import Change, code_of
from dkdm.core.calls import call_of
from dkdm.core.denoiser import Denoiser
from dkdm.core.kinds import kind_of
from dkdm.core.schedules import rectified_flow
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

    A Python teacher gets the whole `dkdm.Denoiser(...)`, in the names `network`, `process` and
    `conditioning` of its first argument, its process and its conditions; a folder the entries of
    its scheduler_config.json; a checkpoint file the flags. If these cannot say it, the line is
    Python too.
    """
    if Path(denoiser.name).is_file():
        return _flags(change) or _replaced(denoiser, change)
    if _is_folder(denoiser):
        return _entries(denoiser, change) or _replaced(denoiser, change)
    return python_line(denoiser, change)


def _is_folder(denoiser: Denoiser) -> bool:
    """Whether it was read from a pipeline's folder, here or on the hub."""
    here = (Path(denoiser.name) / "model_index.json").is_file()
    return denoiser.bundle.pipeline is not None or here or denoiser.name.startswith("builtin:")


def _entries(denoiser: Denoiser, change: Change) -> str | None:
    """The entries for scheduler_config.json; None if no entries say this."""
    if change.time is not None or change.negated:
        return None
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
    if change.time is not None or change.negated:
        return None
    names: list[object] = [change.prediction] if change.prediction else []
    if change.schedule is not None:
        names.append(change.schedule.config.get("beta_schedule"))
    if not all(name in FLAGS for name in names):
        return None
    return f'--flags "{" ".join(FLAGS[str(name)] for name in names)}" (distill: --teacher-flags)'


def _replaced(denoiser: Denoiser, change: Change) -> str:
    """The teacher loaded in Python, with other parts."""
    parts = _changed(denoiser, change, "teacher.call(network, x, time, cond)")
    if not change.keeps_family and change.time is None and denoiser.time is not None:
        parts["time"] = "None"
    loaded = f"teacher = dkdm.load_teacher({denoiser.name!r})"
    return f"{loaded}; teacher = dataclasses.replace(teacher, {_arguments(parts)})"


def python_line(denoiser: Denoiser, change: Change) -> str:
    """The whole `dkdm.Denoiser(...)` that denoises."""
    parts = _kept(denoiser, change) | _changed(denoiser, change, _shown_call(denoiser))
    first = [parts.pop("process"), parts.pop("parameterization")]
    given = ["network", *first, repr(tuple(denoiser.sample_shape))]
    return f"dkdm.Denoiser({', '.join(given)}{', ' if parts else ''}{_arguments(parts)})"


def _arguments(parts: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={code}" for name, code in parts.items())


def _changed(denoiser: Denoiser, change: Change, call: str) -> dict[str, str]:
    """The arguments that a change replaces, as code; call: how the network was called so far."""
    parts = {}
    if change.schedule is not None:
        parts["process"] = change.schedule.code
    if change.prediction is not None:
        parts["parameterization"] = _read_as(denoiser, change)
    if change.time is not None:
        parts["time"] = code_of(change.time)
    if change.negated:
        parts["call"] = _turned(call, denoiser)
    return parts


def _kept(denoiser: Denoiser, change: Change) -> dict[str, str]:
    """The arguments as they were, as code or by their names; those with their defaults left out."""
    parts = {"process": _shown_process(denoiser), "parameterization": _read_as(denoiser, change)}
    if kind_of(denoiser.conditioning).asks is not None:
        parts["conditioning"] = "conditioning"
    if denoiser.constants:
        parts["constants"] = "constants"
    if denoiser.value_range != (-1.0, 1.0):
        parts["value_range"] = str(denoiser.value_range)
    if denoiser.time is not None and change.keeps_family:
        parts["time"] = f'"{denoiser.time}"' if isinstance(denoiser.time, str) else "time"
    if denoiser.call is not call_of(denoiser.network):
        parts["call"] = "call"
    return parts


def _shown_process(denoiser: Denoiser) -> str:
    """A straight flow in full; any other process as the variable it is."""
    total = denoiser.process.num_levels
    flow, process = rectified_flow(total), denoiser.process
    same = torch.equal(flow.sigma, process.sigma) and torch.equal(flow.alpha, process.alpha)
    straight = same and process.clipping.range is None
    return f"dkdm.rectified_flow({total})" if straight else "process"


def _read_as(denoiser: Denoiser, change: Change) -> str:
    meaning = denoiser.parameterization
    parts = [f'"{change.prediction or meaning.prediction}"']
    if meaning.variance != "fixed_small":
        parts.append(f'variance="{meaning.variance}"')
    if meaning.sigma_data != 0.5:
        parts.append(f"sigma_data={meaning.sigma_data}")
    return f"dkdm.Parameterization({', '.join(parts)})"


def _turned(call: str, denoiser: Denoiser) -> str:
    """The argument that turns the sign of a call's output; variance channels keep theirs."""
    channels = denoiser.sample_shape[0]
    if denoiser.parameterization.learns_variance:
        ones = f"[-1] * {channels} + [1] * {channels}"
        sides = ", ".join(["-1", *["1"] * len(denoiser.sample_shape[1:])])
        return f"lambda network, x, time, cond: {call} * x.new_tensor({ones}).reshape({sides})"
    return f"lambda network, x, time, cond: -{call}"


def _shown_call(denoiser: Denoiser) -> str:
    """How the network was called so far."""
    network = denoiser.network
    if denoiser.call is not call_of(network):
        return "call(network, x, time, cond)"
    if isinstance(network, nn.Module) and type(network).__module__.startswith("diffusers."):
        return "dkdm.core.calls.call_of(network)(network, x, time, cond)"
    return "network(x, time, **cond)"


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
