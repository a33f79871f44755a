"""Models whose tables lie on the device, so that levels are looked up there without a wait.

A batch's levels are then int64 [B] on the device too, its conditions what networks are fed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition, Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.graphs import unreplayed
from dkdm.core.denoisers.kinds import null_or_none
from dkdm.core.diffusion.process import Process
from dkdm.core.objectives.objective import Objective


class PlacedProcess(Process):
    """A process with its tables on a device; levels are not checked, since that waits for them."""

    def __post_init__(self) -> None:
        """Nothing is checked again; the tables stay where they are."""
        self._to_the_end  # noqa: B018 made now, since a capture may not copy from the host

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """As `Process.at`, for t on the device; float64 [B] there."""
        alpha, sigma = self._to_the_end
        return alpha[t], sigma[t]


def placed_process(process: Process, device: torch.device) -> PlacedProcess:
    """The same process with its tables on a device."""
    values = _fields(process)
    tables = {name: values[name].to(device) for name in ("alpha", "sigma", "network_time")}
    return PlacedProcess(**(values | tables))


@dataclass(frozen=True)
class Embedded(Unconditional):
    """Conditions that are embedded already, on the device. nothing: the null one, one row."""

    nothing: Condition | None = None

    def null(self, count: int) -> Condition:
        """The null condition, `count` rows."""
        assert self.nothing is not None
        return {key: value.expand(count, *value.shape[1:]) for key, value in self.nothing.items()}


@dataclass(eq=False)
class Placed(Denoiser):
    """A denoiser with its tables on a device, guided at all levels or at none."""

    levels: Tensor = field(default_factory=lambda: torch.empty(0))
    embeds_guidance: bool = False

    def __post_init__(self) -> None:
        """Nothing is checked again."""
        self.network_time = self.levels

    def _inside(self, t: Tensor) -> Tensor:
        return torch.arange(len(t), device=t.device)


def fed(model: Denoiser, cond: Condition) -> Condition:
    """What the network is fed for drawn conditions, on the host, beside the scale of guidance."""
    own = model.conditioning.embed(cond) if cond.keys() - {"guidance"} else {}
    return own | {key: value for key, value in cond.items() if key == "guidance"}


def placed(model: Denoiser, device: torch.device) -> Placed:
    """The same model with its tables on a device, given embedded conditions."""
    values = _fields(model)
    null = null_or_none(model.conditioning, 1)
    nothing = None if null is None else _on(fed(model, null), device)
    found = Placed(
        **values
        | {
            "process": placed_process(model.process, device),
            "conditioning": Embedded(nothing),
            "constants": _on(model.constants, device),
            "rescale": None if model.rescale is None else model.rescale.to(device),
            "call": unreplayed(model.call),
            "levels": model.network_time.to(device),
            "embeds_guidance": model.embeds_guidance,
        }
    )
    found.guided_levels = model.guided_levels.to(device)
    return found


def placed_objective(objective: Objective, teacher: Placed, device: torch.device) -> Objective:
    """The same objective with its weights on a device."""
    found = copy.copy(objective)
    found.teacher = None if objective.teacher is None else teacher
    found.weights = objective.weights.to(device)
    return found


def _on(cond: Condition, device: torch.device) -> Condition:
    return {key: value.to(device) for key, value in cond.items()}


def _fields(value: Any) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in fields(value) if each.init}
