"""Consistency on pairs: a state and the one that the teacher's evaluation there leads to.

x_s is the move of x_t by one DDIM step, which costs nothing beside the evaluation. Both lie on one
trajectory, so that a jump from x_t ends where one from x_s does, which an average of the student
says (consistency distillation, arXiv 2303.01469, on the pool's states). In flow coordinates the
target of the mean velocity is u* = (d / tau) v + (1 - d / tau) u(x_s, s) with d = tau - tau_s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.devices import to_device
from dkdm.core.diffusion.prediction import Prediction, clip_x_0
from dkdm.core.diffusion.process import Process, per_sample
from dkdm.core.few_steps.tasks import tasks_of
from dkdm.core.objectives.objective import Objective, simple_loss
from dkdm.core.randomness import generator
from dkdm.core.saving.checkpoint import Part
from dkdm.core.shards import Shards, this_process
from dkdm.core.sources.chains import Guidance
from dkdm.core.sources.source import Source

SPREAD = (0.5, 1.5)  # of the length of a pair, uniform, times its mean


def averaged_network(network: nn.Module, decay: float, device: torch.device) -> AveragedModel:
    """The average of a network that learns, as it begins."""
    averaged = AveragedModel(network, device, multi_avg_fn=get_ema_multi_avg_fn(decay))
    averaged.eval().requires_grad_(False)
    averaged.n_averaged = averaged.n_averaged.cpu()  # asked at each step: nothing waits for it
    return averaged


@dataclass(eq=False)
class Pairs:
    """A source whose batches are those of another, and states at T-1 beside them.

    Each sample has an s, where the other state of its pair lies. inner: a pool of the teacher's
    states. network: that of the student; averaged: its average, which `advance` moves on. length:
    mean of tau - tau_s. start_share: states at T-1 for each of a batch. drawn_by: the process that
    draws, which has a part of them. saved: the average as checkpoints keep it, if that differs.
    """

    inner: Source
    teacher: Denoiser
    network: nn.Module
    averaged: AveragedModel
    length: float = 0.125
    start_share: float = 0.25
    guidance: Guidance = Guidance()
    condition_dropout: float = 0.0
    seed: int = 0
    step: int = 0
    started: int = 0
    drawn_by: Shards = field(default_factory=this_process)
    saved: Part | None = None

    @property
    def process(self) -> Process:
        """The teacher's."""
        return self.inner.process

    @property
    def evaluations(self) -> int:
        """Of the pool, and of the states at T-1."""
        return (self.inner.evaluations or 0) + self.started

    def draw(self, batch_size: int) -> Batch:
        """States of the pool, then new ones at T-1; their `rows` are both batches."""
        places, host = self.places(batch_size), generator("cpu", self.seed, "pair", self.step)
        first, count = self.inner.draw(batch_size), round(self.start_share * batch_size)
        second = self._starts(count, first, host)
        x, t = torch.cat([first.x, second.x]), torch.cat([first.t, second.t])
        cond = {key: torch.cat([value, second.cond[key]]) for key, value in first.cond.items()}
        length = torch.empty(batch_size + count, dtype=torch.float64)
        length = self.length * length.uniform_(*SPREAD, generator=host)
        ends = pair_ends(self.process, t, length[places])
        return Batch(x, t, cond, (first, second), ends)

    def places(self, batch_size: int) -> Tensor:
        """Of the pool's states, then of this process's part of the others."""
        starts = torch.arange(round(self.start_share * batch_size))
        own = batch_size + starts[self.drawn_by.share(len(starts))]
        return torch.cat([self.inner.places(batch_size), own])

    def _starts(self, count: int, like: Batch, host: torch.Generator) -> Batch:
        """This process's part of `count` new states of pure noise, with new conditions."""
        cond = self.teacher.conditioning.draw(count, host, self.condition_dropout)
        cond = cond | self.guidance.draw(count, host)
        noise = generator(like.x.device, self.seed, "starts", self.step)
        shape = count, *like.x.shape[1:]
        x = self.process.start_std * torch.randn(shape, generator=noise, device=like.x.device)
        t, part = torch.full((count,), self.process.num_levels - 1), self.drawn_by.share(count)
        return Batch(x[part], t[part], {key: value[part] for key, value in cond.items()})

    @torch.no_grad()
    def target(self, batch: Batch) -> Prediction:
        """The teacher's one evaluation of each state (two with guidance)."""
        first, second = batch.rows
        target = self.inner.target(first)
        if not len(second.t):
            return target
        guided = not self.guidance.is_off
        self.started += int(self.teacher.evaluations_at(second.t, guided).sum())
        more = self.teacher.predict(second, self.guidance.of(second.cond))
        values = zip(target[:4], more[:4], strict=True)
        joined = [None if a is None or b is None else torch.cat([a, b]) for a, b in values]
        return Prediction(*joined)  # type: ignore[arg-type]

    def advance(self, batch: Batch, target: Prediction) -> None:
        """Move the pool's states on, and the average of the student, which has learnt by now."""
        first, _ = batch.rows
        own = [None if value is None else value[: len(first.t)] for value in target[:4]]
        self.inner.advance(first, Prediction(*own))  # type: ignore[arg-type]
        self.averaged.update_parameters(self.network)
        self.step += 1

    def mend(self) -> int:
        """Mend the pool; returns how many entries."""
        return self.inner.mend()

    def parts(self) -> dict[str, Part]:
        """The pool's, the counts, and the average."""
        return {**self.inner.parts(), "pairs": self, "averaged": self.saved or self.averaged}

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, of all processes; together."""
        started = processes.total(torch.tensor(self.started))
        return {"step": torch.tensor(self.step), "started": started}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.step, self.started = int(state["step"]), int(state["started"]) * processes.is_main()


def pair_ends(process: Process, t: Tensor, lengths: Tensor) -> Tensor:
    """The level below each t that lies nearest to tau - length, int64 [B]; -1 is the clean end.

    t: int64 [B]; lengths: float64 [B] in tau = sigma / (alpha + sigma).
    """
    alpha, sigma = process.at(torch.arange(-1, process.num_levels))
    tau = sigma / (alpha + sigma)
    wanted = tau[t + 1] - lengths
    nearest = (tau.unsqueeze(1) - wanted).abs().argmin(0) - 1
    return torch.minimum(nearest, t - 1)


class PairsObjective:
    """The plain loss where the student is asked to denoise and, where to jump, that of jumps.

    Both are of one evaluation of the student. plain: whose terms are taken, and which says by its
    weights which levels count. teacher: whose process and clipping move a state. averaged: the
    averaged student, on the levels of the source.
    """

    def __init__(self, plain: Objective, teacher: Denoiser, averaged: Denoiser) -> None:
        self.plain, self.teacher, self.averaged = plain, teacher, tasks_of(averaged).both(averaged)
        self._last: tuple[Denoiser, Denoiser] | None = None

    def __call__(self, student: Denoiser, batch: Batch, target: Prediction) -> Tensor:
        """The loss of every sample, [B]."""
        count, levels = len(batch.t), student.process.num_levels
        x, t = torch.cat([batch.x, batch.x]), torch.cat([batch.t, batch.t + levels])
        cond = {key: torch.cat([value, value]) for key, value in batch.cond.items()}
        found = self._both(student).predict(Batch(x, t, cond))
        direct, jump = _split(found, count)
        terms = [term(student, direct, batch, target) for term in self.plain.terms]
        wanted = self.end(batch, target)
        counts = to_device(self.plain.weights[batch.t] > 0, batch.x.device, batch.x.dtype)
        return counts * simple_loss(student, jump, wanted, batch.t) + torch.stack(terms).sum(0)

    def _both(self, student: Denoiser) -> Denoiser:
        if self._last is None or self._last[0] is not student:
            self._last = student, tasks_of(student).both(student)
        return self._last[1]

    @torch.no_grad()
    def end(self, batch: Batch, target: Prediction) -> Prediction:
        """Where a jump should end: where the averaged student's does, from the pair's other state.

        At the clean end, and without noise, it is the teacher's x_0.
        """
        assert batch.s is not None
        process, levels = self.teacher.process, self.teacher.process.num_levels
        (alpha, sigma), (alpha_s, sigma_s) = process.at(batch.t), process.at(batch.s)
        clipping = replace(process.clipping, rederive_eps=True)
        said = clip_x_0(target, batch.x, alpha, sigma, clipping)
        x_s = per_sample(alpha_s, batch.x) * said.x_0 + per_sample(sigma_s, batch.x) * said.eps
        led = self.averaged.predict(Batch(x_s, batch.s.clamp(min=0) + levels, batch.cond)).x_0
        ended = per_sample((batch.s < 0).double(), batch.x).bool()
        x_0 = torch.where(ended, said.x_0, led)
        eps = (batch.x - per_sample(alpha, x_0) * x_0) / per_sample(sigma, x_0)
        return Prediction(x_0, x_0, eps)


def _split(found: Prediction, count: int) -> tuple[Prediction, Prediction]:
    values = [(None, None) if v is None else (v[:count], v[count:]) for v in found[:4]]
    first, second = (Prediction(*part) for part in zip(*values, strict=True))
    return first, second
