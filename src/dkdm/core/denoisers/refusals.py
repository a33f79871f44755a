"""What a Denoiser refuses: arguments when it is made, networks that do not fit when it is tried."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from dkdm.config import parse_interval
from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.conditioning import Condition, Conditioning, Interval
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.process import Process
from dkdm.errors import UsageError, in_a_line
from dkdm.reading.arguments import given, instance, refuse
from dkdm.reading.arrays import tensor
from dkdm.reading.values import is_array

FUNCTIONS = {
    "call": "call(network, x, time, cond) -> output",
    "decode": "decode(latents) -> images in [-1, 1]",
}


def check_functions(**given: Any) -> None:
    """Raise UsageError for an argument that is neither a function nor None."""
    for name, value in given.items():
        if value is not None and (isinstance(value, type) or not callable(value)):
            refuse(f"Denoiser: {name}", value, f"give a function: {FUNCTIONS[name]}")


def check_network(network: Any) -> None:
    """Raise UsageError for what cannot be called as a network."""
    if hasattr(network, "sample_shape") and hasattr(network, "parameterization"):
        refuse("Denoiser: network", network, "give its .network, or use it as it is")
    if isinstance(network, type):
        refuse("Denoiser: network", network, f"make one first: {network.__name__}(...)")
    if not callable(network):
        accepted = "give a torch.nn.Module or a function (x, time, **cond) -> output"
        refuse("Denoiser: network", network, accepted)


def check_kinds(process: Any, bundle: Any, name: Any) -> None:
    """Raise UsageError unless these are a Process, a Bundle and a string."""
    instance("Denoiser: process", process, Process, _instead_of_process(process))
    instance("Denoiser: bundle", bundle, Bundle, "leave it out, or give decode=function")
    instance("Denoiser: name", name, str, "give a string")


def _instead_of_process(value: Any) -> str:
    if is_array(value) or isinstance(value, (list, tuple)):
        return "give dkdm.from_betas(betas)"
    if isinstance(value, Mapping):
        return "give dkdm.from_scheduler_config(config)"
    if hasattr(value, "config") and hasattr(value, "timesteps"):
        return "give dkdm.from_scheduler_config({**scheduler.config, '_class_name': ...})"
    return "give dkdm.from_betas(...), dkdm.rectified_flow(...), dkdm.karras(...) or a dkdm.Process"


def parameterization_given(value: Any) -> Parameterization:
    """A parameterization, or the one that a word names."""
    if isinstance(value, str):
        return Parameterization(value)  # type: ignore[arg-type]
    remedy = "give a word or dkdm.Parameterization(...), such as 'epsilon'"
    return instance("Denoiser: parameterization", value, Parameterization, remedy)


def constants_given(value: Any) -> Condition:
    """What is fed to every sample, as tensors by name."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        accepted = "give a dict of tensors, such as {'y': torch.tensor(0)}"
        refuse("Denoiser: constants", value, accepted)
    return {name: tensor(f"Denoiser: constants['{name}']", each) for name, each in value.items()}


def ends_given(name: str, value: Any) -> tuple[float, float]:
    """Two numbers, the smaller one first."""
    accepted = "give (smallest, largest), such as (0.0, 1.0)"
    low, high = given(name, value, tuple[float, float], accepted)
    if low >= high:
        refuse(name, value, f"{accepted}: the smaller one comes first")
    return low, high


def interval_given(value: Any) -> Interval | None:
    """Two shares of noise in 0..1, the smaller one first; None is everywhere."""
    if value is None:
        return None
    return parse_interval("{}:{}".format(*ends_given("Denoiser: guidance_interval", value)))


def check_output(name: str, output: Any, x: Tensor, channels: int) -> None:
    """Raise UsageError for what is no output [B, channels, ...] for an input x [B, C, ...]."""
    wanted = (len(x), channels, *x.shape[2:])
    if not isinstance(output, Tensor):
        raise UsageError(
            f"{name}: the network returned {type(output).__name__}; return a tensor {wanted}, if "
            "need be by Denoiser(..., call=...)"
        )
    if output.shape != wanted:
        raise UsageError(
            f"{name}: the network returned {tuple(output.shape)} for an input of "
            f"{tuple(x.shape)}; it must return {wanted}"
        )


class Tried(Protocol):
    """What is said of a denoiser that does not fit."""

    name: str
    sample_shape: tuple[int, ...]
    conditioning: Conditioning
    network_time: Tensor


def check_finite(tried: Tried, output: Tensor, t: Tensor) -> None:
    """Raise UsageError unless the outputs for the first level and the last, t [2], are finite."""
    if output.device.type == "meta" or output.isfinite().all():
        return
    row = int(output[0].isfinite().all())
    raise UsageError(
        f"{tried.name}: its output for noise at the {('first', 'last')[row]} level is not finite "
        f"(it is fed t = {tried.network_time[t[row]]:g}): check its weights, and that its layers "
        "and its precision can take this time"
    )


def misfit(tried: Tried, cond: Condition, error: Exception) -> UsageError:
    """Why a network could not be evaluated, and what to do."""
    refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if refused is not None and refused[1] in tried.conditioning.embed(cond):
        name = refused[1]
        return UsageError(
            f"{tried.name} takes no argument '{name}': say how it is called, such as "
            f"Denoiser(..., call=lambda network, x, time, cond: network(x, time, "
            f"YOUR_ARGUMENT=cond['{name}'])), or leave conditioning out"
        )
    return UsageError(
        f"{tried.name} does not fit samples of shape {tried.sample_shape} with conditions "
        f"{_shown(cond)}: {in_a_line(error)}{_hint(tried, str(error))}"
    )


def _hint(tried: Tried, error: str) -> str:
    """What to do about a usual mistake; nothing for any other."""
    rest, time = tried.sample_shape[1:], tried.network_time
    if len(rest) > 1 and "batched" in error:
        return f"; sample_shape is that of one sample: without the batch it would be {rest}"
    if "'indices'" in error:
        return "; times are fed as floats: call=lambda network, x, time, cond: ... time.long()"
    if "index out of range" in error:
        times = f"times are {time.min():g} to {time.max():g}"
        return f"; {times}: check the number of levels, of classes, and null_class"
    if "positional arguments but 4 were given" in error:
        return f"; give a function {FUNCTIONS['call']}"
    if "missing 1 required positional argument" in error:
        return (
            "; give everything that it is fed: conditioning=dkdm.ClassLabels(...) and, if its "
            "argument is not named class_labels, call=..."
        )
    return ""


def _shown(cond: Condition) -> str:
    shown = [f"{k} {v.tolist()}" if v.ndim == 1 else k for k, v in sorted(cond.items())]
    return ", ".join(shown) or "none"
