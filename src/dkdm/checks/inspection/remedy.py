"""The corrected line: what to type instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dkdm.checks.inspection.readings import Change, applied, parts_of
from dkdm.core.denoisers.calls import call_of
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.graphs import unreplayed
from dkdm.core.denoisers.kinds import kind_of
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.process import Process
from dkdm.core.diffusion.schedules import rectified_flow
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

    A model made in Python gets the whole `dkdm.Denoiser(...)`, in the names of its arguments, such
    as `network`, `process` and `conditioning`. A folder gets the entries of its
    scheduler_config.json, a checkpoint file its flags; if these cannot say it, a line of Python.
    """
    name, changed = denoiser.name, {k: code for k, (_, code) in parts_of(change, denoiser).items()}
    is_file = Path(name).is_file()
    if not is_file and not _is_folder(denoiser):
        meaning = applied(denoiser, change).parameterization
        return _in_full(_shown(denoiser, changed) | {"parameterization": _shown_meaning(meaning)})
    short = None
    if change.time is None and not change.negated:
        short = _flags(change) if is_file else _entries(denoiser, change)
    code = f"corrected = dataclasses.replace(teacher, {_arguments(changed)})"
    return short or f"teacher = dkdm.load_teacher({name!r}); {code}"


def _arguments(parts: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={code}" for name, code in parts.items())


def _in_full(parts: dict[str, str]) -> str:
    """The whole `dkdm.Denoiser(...)`, without the arguments that are None."""
    first = [parts.pop(name) for name in ("process", "parameterization", "sample_shape")]
    rest = {name: code for name, code in parts.items() if code != "None"}
    return f"dkdm.Denoiser({', '.join(['network', *first, *filter(None, [_arguments(rest)])])})"


def _shown(denoiser: Denoiser, changed: Mapping[str, str]) -> dict[str, str]:
    """The arguments of a denoiser as code or by their names, those with their defaults left out."""
    shown = {"process": _shown_process(denoiser.process)}
    shown["sample_shape"] = repr(tuple(denoiser.sample_shape))
    if kind_of(denoiser.conditioning).asks is not None:
        shown["conditioning"] = "conditioning"
    if denoiser.constants:
        shown["constants"] = "constants"
    if denoiser.value_range != (-1.0, 1.0):
        shown["value_range"] = str(denoiser.value_range)
    if denoiser.time is not None:
        shown["time"] = f'"{denoiser.time}"' if isinstance(denoiser.time, str) else "time"
    if unreplayed(denoiser.call) is not call_of(denoiser.network):
        shown["call"] = "call"
    for name, code in changed.items():
        code = code.replace("teacher.call(network, x, time, cond)", _shown_call(denoiser))
        shown[name] = code.replace("teacher.", "")
    return shown


def _shown_call(denoiser: Denoiser) -> str:
    """How the network was called so far."""
    if unreplayed(denoiser.call) is not call_of(denoiser.network):
        return "call(network, x, time, cond)"
    if type(denoiser.network).__module__.startswith("diffusers."):
        return "dkdm.core.denoisers.calls.call_of(network)(network, x, time, cond)"
    return "network(x, time, **cond)"


def _shown_process(process: Process) -> str:
    """A straight flow in full; any other process as the variable it is."""
    flow = rectified_flow(process.num_levels)
    same = torch.equal(flow.sigma, process.sigma) and torch.equal(flow.alpha, process.alpha)
    straight = same and process.clipping.range is None
    return f"dkdm.rectified_flow({process.num_levels})" if straight else "process"


def _shown_meaning(meaning: Parameterization) -> str:
    parts = [f'"{meaning.prediction}"']
    if meaning.variance != "fixed_small":
        parts.append(f'variance="{meaning.variance}"')
    if meaning.sigma_data != 0.5:
        parts.append(f"sigma_data={meaning.sigma_data}")
    return f"dkdm.Parameterization({', '.join(parts)})"


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
