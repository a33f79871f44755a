"""The source of parallel-head distillation: states that the student itself rolls on.

An entry (x~, n, cond) is a state in flow coordinates at the beginning of interval n. One evaluation
of the student there gives all heads; they roll the state to interval k, where the teacher is asked
once: its velocity there is the target of head k. Then the state moves on by its own roll.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dkdm.core import processes
from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.devices import to_device
from dkdm.core.diffusion.prediction import Prediction, clip_x_0
from dkdm.core.diffusion.process import Process, per_sample
from dkdm.core.diffusion.steps import not_finite
from dkdm.core.few_steps.heads import ParallelHeads
from dkdm.core.randomness import derived_seed, generator
from dkdm.core.saving.checkpoint import Part
from dkdm.core.shards import Shards, this_process
from dkdm.core.sources.chains import Guidance, row_mask
from dkdm.errors import UsageError

UNGUIDED = Guidance()


class Roll(NamedTuple):
    """What the student said of drawn states, with its gradient.

    drawn: int64 [W] entries of all processes; part: which of them, B in number, this one has; x:
    their states [B, ...] in the student's scale; first: int64 [B] intervals that they are at;
    outputs: [B, N, C, ...]; velocities: the same as velocities, without gradient; asked: int64
    [B, M] heads that are taught; reached: [B M, ...] the states there in the student's scale;
    by_teacher: bool [W], which the teacher moves.
    """

    drawn: Tensor
    part: slice
    x: Tensor
    first: Tensor
    outputs: Tensor
    velocities: Tensor
    asked: Tensor
    reached: Tensor
    by_teacher: Tensor

    @property
    def rows(self) -> Tensor:
        """This process's entries, int64 [B]."""
        return self.drawn[self.part]


@dataclass(eq=False)
class RolledPool:
    """A source of batches for a student with parallel heads.

    levels: int64 [N + 1], the teacher's levels of the grid, the last -1. x: [P, ...] states in flow
    coordinates; first: int64 [P] on the CPU, the interval that each is at; cond: P rows. targets:
    M, heads that are taught at each state, one teacher evaluation each. on_policy: share of the
    states that move by the student's own roll; the teacher moves the others, and is asked at them
    alone. drawn_by: the process that draws. Each has the whole pool, rolls its part of a batch, and
    is sent where the others have rolled theirs.
    """

    teacher: Denoiser
    student: ParallelHeads
    levels: Tensor
    x: Tensor
    cond: Condition
    first: Tensor = field(init=False)
    targets: int = 1
    on_policy: float = 1.0
    guidance: Guidance = Guidance()
    seed: int = 0
    step: int = 0
    evaluations: int = 0
    drawn_by: Shards = field(default_factory=this_process)

    def __post_init__(self) -> None:
        self.first = torch.zeros(len(self.x), dtype=torch.int64)

    @property
    def process(self) -> Process:
        """The teacher's."""
        return self.teacher.process

    def draw(self, batch_size: int) -> Batch:
        """States that the student has rolled to where the teacher is asked, `targets` of each.

        Their `rows` are the `Roll`, whose outputs carry the student's gradient.
        """
        chooser = random.Random(derived_seed(self.seed, "draw", self.step))
        drawn = torch.tensor(chooser.sample(range(len(self.x)), batch_size))
        asked, by_teacher = self._laws(self.first[drawn])
        part = self.drawn_by.part(batch_size)
        rows, asked = drawn[part], asked[part]
        first, cond = self.first[rows], {key: value[rows] for key, value in self.cond.items()}
        place, grid = self.x[to_device(rows, self.x.device)], self.student.intervals
        x = per_sample(grid.scale[first], place) * place
        outputs = self.student.heads(x, first, cond)
        velocities = self.student.velocities(outputs.detach(), x, first)
        ways = [rolled(place, velocities, grid.widths, first, k) for k in asked.T]
        at, which = torch.stack(ways, 1).flatten(0, 1), asked.flatten()
        t, reached = self.levels[which], per_sample(grid.scale[which], at) * at
        alpha, sigma = self.process.at(t)
        every = {key: value.repeat_interleave(self.targets, 0) for key, value in cond.items()}
        roll = Roll(drawn, part, x, first, outputs, velocities, asked, reached, by_teacher)
        return Batch(per_sample(alpha + sigma, at) * at, t, every, roll)

    def _laws(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Which heads are taught at each state [B, M], and which states the teacher moves [B]."""
        host, grid = generator("cpu", self.seed, "asked", self.step), self.student.intervals
        by_teacher = torch.rand(len(first), generator=host) >= self.on_policy
        ahead = (grid.num_heads - first).clamp(max=grid.longest).unsqueeze(1)
        luck = torch.rand(len(first), self.targets, generator=host, dtype=torch.float64)
        beyond = (luck * ahead).long().where(~by_teacher.unsqueeze(1), 0)
        return first.unsqueeze(1) + beyond, by_teacher

    def places(self, batch_size: int) -> Tensor:
        """Of this process's targets, `targets` of each state."""
        each = torch.arange(batch_size * self.targets).unflatten(0, (batch_size, self.targets))
        return each[self.drawn_by.part(batch_size)].flatten()

    @torch.no_grad()
    def target(self, batch: Batch) -> Prediction:
        """The teacher's one evaluation of the batch (two if guided), x_0 clipped as in a chain."""
        guided = not self.guidance.is_off
        self.evaluations += int(self.teacher.evaluations_at(batch.t, guided).sum())
        found = self.teacher.predict(batch, self.guidance.of(batch.cond))
        alpha, sigma = self.process.at(batch.t)
        clipping = replace(self.process.clipping, rederive_eps=True)
        return clip_x_0(found, batch.x, alpha, sigma, clipping)

    @torch.no_grad()
    def advance(self, batch: Batch, target: Prediction) -> None:
        """Move the states on by whole blocks; those that become clean start anew as noise.

        Together: what all processes have rolled is everywhere afterwards.
        """
        roll: Roll = batch.rows
        grid, part, first = self.student.intervals, roll.part, self.first[roll.drawn]
        rows, drawn = (to_device(each, self.x.device) for each in (roll.rows, roll.drawn))
        host = generator("cpu", self.seed, "move", self.step)
        most = grid.longest // grid.shortest
        blocks = torch.randint(1, most + 1, (len(first),), generator=host)
        last = first + grid.shortest * blocks.where(~roll.by_teacher, 1)
        last = last.clamp(max=grid.num_heads)
        taught = (target.eps - target.x_0).unflatten(0, (-1, self.targets))[:, :1]
        by_teacher = to_device(row_mask(roll.by_teacher[part], taught), taught.device)
        along = taught.where(by_teacher, roll.velocities)
        x = rolled(self.x[rows], along, grid.widths, roll.first, last[part])
        x = processes.whole_of(x, part, len(first))
        done = last == grid.num_heads
        on, count = to_device(done.nonzero().flatten(), x.device), int(done.sum())
        noise = generator(self.x.device, self.seed, "noise", self.step)
        fresh = torch.randn(x.shape, generator=noise, device=x.device)
        x[on] = self.started(fresh)[on]
        self.x[drawn] = x
        self.first[roll.drawn] = last.where(~done, 0)
        for key, value in self.new_conditions(count, host).items():
            self.cond[key][roll.drawn[done]] = value
        self.step += 1

    def started(self, noise: Tensor) -> Tensor:
        """Flow coordinates of chains that begin with this standard normal noise."""
        alpha, sigma = self.process.at(self.levels[:1])
        return noise * (self.process.start_std / float(alpha + sigma))

    def new_conditions(self, count: int, host: torch.Generator) -> Condition:
        """Conditions and guidance scales of new chains."""
        drawn = self.teacher.conditioning.draw(count, host)
        return drawn | self.guidance.draw(count, host)

    def mend(self) -> int:
        """Begin states anew that are not finite, in all processes; the main one counts them."""
        rows = not_finite(self.x)
        host = generator("cpu", self.seed, "mend", self.step)
        noise = torch.randn(len(rows), *self.x.shape[1:], generator=host)
        self.x[to_device(rows, self.x.device)] = to_device(self.started(noise), self.x.device)
        self.first[rows] = 0
        return len(rows) * processes.is_main()

    def parts(self) -> dict[str, Part]:
        """The whole source."""
        return {"rolled": self}

    def state_dict(self) -> dict[str, Tensor]:
        """States, conditions and counts, of all processes; together."""
        cond = {f"cond.{key}": value for key, value in self.cond.items()}
        evaluations = processes.total(torch.tensor(self.evaluations))
        counts = {"step": torch.tensor(self.step), "evaluations": evaluations}
        return {"x": self.x, "first": self.first, **cond, **counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there. Raises UsageError for a pool of another size."""
        if len(state["x"]) != len(self.x):
            raise UsageError(
                f"the checkpoint's pool holds {len(state['x'])} states, this run's {len(self.x)}: "
                f"resume with --few-step-pool {len(state['x'])}"
            )
        self.x = state["x"].to(self.x)
        self.first = state["first"]
        self.cond = {key: state[f"cond.{key}"] for key in self.cond}
        self.step = int(state["step"])
        self.evaluations = int(state["evaluations"]) * processes.is_main()


def rolled(x: Tensor, velocities: Tensor, widths: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Roll states x~ [B, ...] over the intervals first..last-1, by Euler steps of their velocities.

    velocities: [B, N, ...], or [B, 1, ...] if all are the same; widths: float64 [N]; first, last:
    int64 [B].
    """
    number = torch.arange(len(widths))
    inside = (first.unsqueeze(1) <= number) & (number < last.unsqueeze(1))
    each = to_device(inside * widths, velocities.device, velocities.dtype)
    each = each.sum(1, keepdim=True) if velocities.shape[1] == 1 else each
    return x + torch.einsum("bn,bn...->b...", each, velocities)


def empty_rolled(
    teacher: Denoiser,
    student: ParallelHeads,
    levels: Tensor,
    size: int,
    device: torch.device,
    seed: int = 0,
    guidance: Guidance = UNGUIDED,
    **laws: Any,
) -> RolledPool:
    """A pool of pure noise, every state before the first interval; laws: fields of `RolledPool`."""
    random = generator(device, seed, "start")
    noise = torch.randn(size, *teacher.sample_shape, generator=random, device=device)
    pool = RolledPool(teacher, student, levels, noise, {}, guidance=guidance, seed=seed, **laws)
    pool.x = pool.started(noise)
    pool.cond = pool.new_conditions(size, generator("cpu", seed, "condition"))
    return pool
