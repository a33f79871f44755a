"""Several teachers as one denoiser: each answers for the conditions that are its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition, Conditioning
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.matching import Matched, on_levels_of
from dkdm.core.diffusion.prediction import Prediction, from_x_0_eps
from dkdm.core.diffusion.process import Process, Spacing
from dkdm.core.diffusion.solvers import Solver
from dkdm.errors import UsageError

UNKNOWN = -2  # in place of a number that a teacher does not know


@dataclass(frozen=True, eq=False)
class Place:
    """Where a teacher's conditions lie among those of all teachers.

    key: name of the condition among all, such as class_labels. shared: the number of each of the
    teacher's own among all, int64 [n + 1], the last for -1 (`ABSENT`). own: the inverse, int64 [N],
    `UNKNOWN` for those of other teachers. blank: whether the teacher is asked for nothing; all of
    its samples then have the one number of `shared`.
    """

    key: str
    shared: Tensor
    own: Tensor
    blank: bool = False

    @classmethod
    def of(cls, key: str, pairs: dict[int, int], total: int, blank: bool = False) -> Place:
        """The place that puts each own number, perhaps -1, at one of `total` numbers."""
        shared = torch.full((max(pairs) + 2,), UNKNOWN)
        own = torch.full((total,), UNKNOWN)
        for mine, among_all in pairs.items():
            shared[mine] = among_all
            own[among_all] = mine
        return cls(key, shared, own, blank)

    def to_all(self, cond: Condition, count: int) -> Condition:
        """The teacher's conditions, `count` rows, by the numbers among all."""
        own = torch.zeros(count, dtype=torch.int64) if self.blank else cond[self.key]
        return {**cond, self.key: self.shared[own]}

    def to_own(self, cond: Condition) -> Condition:
        """Conditions that the teacher knows, by its own numbers."""
        rest = {key: value for key, value in cond.items() if key != self.key}
        return rest if self.blank else {**rest, self.key: self.own[cond[self.key].cpu()]}

    def knows(self, cond: Condition) -> Tensor:
        """Which rows the teacher knows, bool [B]."""
        return self.own[cond[self.key].cpu()] != UNKNOWN


@dataclass(eq=False)
class Teachers(Denoiser):
    """Several teachers as one, on the noise levels of the first.

    Each row of a batch is evaluated by the first teacher that knows its condition, at the same
    signal-to-noise ratio, and each sample is drawn on its teacher's own levels. members: each with
    its own process and conditions; seats: the places of these in a conditioning of all.
    """

    members: tuple[Denoiser, ...] = ()
    seats: Callable[[Conditioning], Sequence[Place]] = lambda _: ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.places = tuple(self.seats(self.conditioning))
        interval = self.guidance_interval
        if interval is not None:
            self.members = tuple(replace(one, guidance_interval=interval) for one in self.members)
        self._on_levels = tuple(on_levels_of(one, self.process) for one in self.members)

    @property
    def device(self) -> torch.device:
        """The device of the first."""
        return self.members[0].device

    def predict_both(
        self, batch: Batch, guidance_scale: float | Tensor = 1.0
    ) -> tuple[Prediction, Prediction]:
        """(unguided, guided) predictions, each row by its teacher."""
        found, order = [], []
        for number, rows, cond in self._routed(batch.cond, len(batch.t)):
            x = batch.x[rows.to(batch.x.device)]
            own, scale = Batch(x, batch.t[rows], cond), _rows_of(guidance_scale, rows)
            found.append(self._on_levels[number].predict_both(own, scale))
            order.append(rows)
        at = torch.cat(order).argsort()
        unguided, guided = (joined_predictions(each, at) for each in zip(*found, strict=True))
        return self._read(unguided, batch.t), self._read(guided, batch.t)

    def _read(self, found: Prediction, t: Tensor) -> Prediction:
        """The same x_0 and eps as an output of this denoiser."""
        alpha, sigma = self.process.at(t)
        own = self.parameterization
        output = from_x_0_eps(own.prediction, found.x_0, found.eps, alpha, sigma, own.sigma_data)
        return found._replace(output=output)

    def _routed(self, cond: Condition, count: int) -> Iterator[tuple[int, Tensor, Condition]]:
        """The teachers of a batch: number, rows int64 [n] on the CPU, their own conditions."""
        left = torch.ones(count, dtype=torch.bool)
        for number, place in enumerate(self.places):
            mine = left & place.knows(cond)
            left &= ~mine
            rows = mine.nonzero().flatten()
            if len(rows):
                those = {key: value[rows.to(value.device)] for key, value in cond.items()}
                yield number, rows, place.to_own(those)
        if bool(left.any()):
            raise UsageError(f"{self.name}: no teacher knows some of these conditions")

    @torch.no_grad()
    def sample(
        self,
        noise: Callable[[int], Tensor],
        cond: Condition,
        num_steps: int,
        eta: float = 0.0,
        guidance_scale: float | Tensor = 1.0,
        spacing: Spacing | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """Draw samples as `Denoiser.sample` does, each by its teacher on its own levels."""
        drawn, order = [], []
        count = len(next(iter(cond.values())))
        for number, rows, own in self._routed(cond, count):

            def part(step: int, rows: Tensor = rows) -> Tensor:
                return noise(step)[rows.to(self.device)]

            member, scale = self.members[number], _rows_of(guidance_scale, rows)
            drawn.append(member.sample(part, own, num_steps, eta, scale, spacing, solver))
            order.append(rows)
        at = torch.cat(order).argsort()
        return torch.cat(drawn)[at.to(self.device)]


def _rows_of(scale: float | Tensor, rows: Tensor) -> float | Tensor:
    return scale[rows.to(scale.device)] if isinstance(scale, Tensor) else scale


def joined_predictions(parts: Sequence[Prediction], at: Tensor | None = None) -> Prediction:
    """The rows of several predictions one after the other, or in the order `at`; no variance."""
    names = ("output", "x_0", "eps")
    output, x_0, eps = (torch.cat([getattr(part, name) for part in parts]) for name in names)
    if at is not None:
        at = at.to(x_0.device)
        output, x_0, eps = output[at], x_0[at], eps[at]
    return Prediction(output, x_0, eps)


def parts_of(teacher: Denoiser) -> tuple[Denoiser, ...]:
    """The teachers that a teacher is made of: itself, unless it is several."""
    return teacher.members if isinstance(teacher, Teachers) else (teacher,)


def pattern_of(teacher: Denoiser) -> Denoiser:
    """What a student is made after: the teacher, or the first of several for the conditions of all.

    Of several, no variance is learnt.
    """
    if not isinstance(teacher, Teachers):
        return teacher
    first = teacher.members[0]
    return replace(
        first,
        parameterization=teacher.parameterization,
        conditioning=teacher.conditioning,
        name=teacher.name,
    )


def network_name(denoiser: Denoiser) -> str:
    """The class of a model's network, or of each of several teachers'."""
    names = [type(part.network).__name__ for part in parts_of(denoiser)]
    return " and ".join(dict.fromkeys(names))


class CommonLevels(NamedTuple):
    """The noise levels of several processes on one axis, the least noise first.

    process: all of them, each with the alpha and sigma of its own process; levels of equal noise
    stand beside each other. positions: of each process's levels on it, int64 [T] each.
    """

    process: Process
    positions: tuple[Tensor, ...]

    def spread(self, tables: Sequence[Tensor | None]) -> Tensor:
        """A table of each process's levels as one of all, float64 [T]; None is 1 everywhere."""
        found = torch.ones(self.process.num_levels, dtype=torch.float64)
        for at, table in zip(self.positions, tables, strict=True):
            found[at] = 1.0 if table is None else table.double()
        return found


def common_levels(processes: Sequence[Process]) -> CommonLevels:
    """All levels of several processes in the order of their noise, sigma / alpha."""
    alpha = torch.cat([process.alpha for process in processes])
    sigma = torch.cat([process.sigma for process in processes])
    order = (sigma / alpha).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    times = torch.arange(len(order), dtype=torch.float64)
    levels = Matched(alpha[order], sigma[order], times)
    return CommonLevels(levels, place.split([process.num_levels for process in processes]))
