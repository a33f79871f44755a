"""The corrected line: what the user types in place of what was told wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from dkdm.calls import call_of
from dkdm.conditioning import Unconditional
from dkdm.denoiser import Denoiser
from dkdm.inspection.readings import Change, Time
from dkdm.process import rectified_flow

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
    its scheduler_config.json; a checkpoint file the flags. What these cannot say is Python too.
    """
    if Path(denoiser.name).is_file():
        return _flags(change) or _replaced(denoiser, change)
    if denoiser.bundle.pipeline is not None:
        return _entries(change) or _replaced(denoiser, change)
    return python_line(denoiser, change)


def _entries(change: Change) -> str | None:
    """Of scheduler_config.json; None where it has none for this."""
    if change.time is not None or change.negated:
        return None
    entries = {} if change.schedule is None else dict(change.schedule.config)
    if change.prediction == "flow_prediction":
        entries.setdefault("_class_name", "FlowMatchEulerDiscreteScheduler")
    elif change.prediction == "edm":
        entries.setdefault("_class_name", "EDMEulerScheduler")
    elif change.prediction is not None:
        entries["prediction_type"] = change.prediction
    shown = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in entries.items())
    return f"{shown} in scheduler_config.json"


def _flags(change: Change) -> str | None:
    """Of the original repository's scripts; None where there are none for this."""
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
    parts = [*_process(change), *_prediction(denoiser, change), *_time(denoiser, change)]
    if change.negated:
        parts.append("call=lambda network, x, time, cond: -teacher.call(network, x, time, cond)")
    loaded = f"teacher = dkdm.load_teacher({denoiser.name!r})"
    return f"{loaded}; teacher = dataclasses.replace(teacher, {', '.join(parts)})"


def _process(change: Change) -> list[str]:
    return [] if change.schedule is None else [f"process={change.schedule.code}"]


def _prediction(denoiser: Denoiser, change: Change) -> list[str]:
    return [] if change.prediction is None else [f"parameterization={_read_as(denoiser, change)}"]


def _time(denoiser: Denoiser, change: Change) -> list[str]:
    if change.time is not None:
        return [f"time={change.time.code}"]
    if change.schedule is not None and not change.schedule.same_family:
        return ["time=None"] if denoiser.time is not None else []
    return []


def python_line(denoiser: Denoiser, change: Change) -> str:
    """The whole `dkdm.Denoiser(...)` that denoises."""
    parts = [
        "network",
        change.schedule.code if change.schedule else _shown_process(denoiser),
        _read_as(denoiser, change),
        repr(tuple(denoiser.sample_shape)),
        *_beside(denoiser),
    ]
    if change.time is not None:
        parts.append(f"time={change.time.code}")
    elif denoiser.time is not None and (change.schedule is None or change.schedule.same_family):
        parts.append(f"time={_shown_time(denoiser.time)}")
    if change.negated:
        call = _shown_call(denoiser)
        parts.append(f"call=lambda network, x, time, cond: -{call}")
    elif denoiser.call is not call_of(denoiser.network):
        parts.append("call=call")
    return f"dkdm.Denoiser({', '.join(parts)})"


def _shown_process(denoiser: Denoiser) -> str:
    """A straight flow in full; any other process as the variable it is."""
    total = denoiser.process.num_levels
    flow = rectified_flow(total)
    same = torch.equal(flow.sigma, denoiser.process.sigma)
    own = denoiser.process.clipping.range is None
    same = same and own and torch.equal(flow.alpha, denoiser.process.alpha)
    return f"dkdm.rectified_flow({total})" if same else "process"


def _read_as(denoiser: Denoiser, change: Change) -> str:
    own = denoiser.parameterization
    parts = [f'"{change.prediction or own.prediction}"']
    if own.variance != "fixed_small":
        parts.append(f'variance="{own.variance}"')
    if own.sigma_data != 0.5:
        parts.append(f"sigma_data={own.sigma_data}")
    return f"dkdm.Parameterization({', '.join(parts)})"


def _beside(denoiser: Denoiser) -> list[str]:
    """Arguments that stay as they were, by their own names."""
    parts = []
    if not isinstance(denoiser.conditioning, Unconditional):
        parts.append("conditioning=conditioning")
    if denoiser.constants:
        parts.append("constants=constants")
    if denoiser.value_range != (-1.0, 1.0):
        parts.append(f"value_range={denoiser.value_range}")
    return parts


def _shown_time(time: object) -> str:
    return f'"{time}"' if isinstance(time, str) else "time"


def _shown_call(denoiser: Denoiser) -> str:
    """How the network was called so far; with a learned variance the sign is turned of half."""
    network = denoiser.network
    if denoiser.call is not call_of(network):
        return "call(network, x, time, cond)"
    if isinstance(network, nn.Module) and type(network).__module__.startswith("diffusers."):
        return "dkdm.calls.call_of(network)(network, x, time, cond)"
    return "network(x, time, **cond)"


def in_words(change: Change, reading: Denoiser) -> str:
    """What is told wrongly, in words."""
    parts = []
    if change.schedule is not None:
        parts.append(f"the noise schedule {_schedule_name(change)}")
    if change.prediction is not None:
        parts.append(f'"prediction_type": "{change.prediction}"')
    if change.time is not None:
        parts.append(_time_in_words(change.time, reading))
    if change.negated:
        parts.append("the sign of its output turned")
    return " and ".join(parts)


def _schedule_name(change: Change) -> str:
    assert change.schedule is not None
    config = change.schedule.config
    if "beta_schedule" in config:
        return f'"beta_schedule": "{config["beta_schedule"]}"'
    return str(config.get("_class_name"))


def _time_in_words(time: Time, reading: Denoiser) -> str:
    first, last = (float(reading.times[i]) for i in (0, -1))
    kind = f" ({time.of})" if isinstance(time.of, str) else ""
    return f"times {first:.4g} to {last:.4g} fed to the network{kind}"
