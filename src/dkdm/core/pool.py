"""Dynamic iterative distillation: a pool of noisy samples that the teacher keeps moving.

DKDM (arXiv 2409.03550), algorithm 1. Entry (x, t, cond) means: x is at noise level t and is to be
denoised at t next. Iterative and shuffled distillation are this class with a pool as large as the
batch. The pool knows nothing of the student.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.core.chains import Guidance, Stride, random_conditioning_odds
from dkdm.core.conditioning import Condition
from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.prediction import Prediction
from dkdm.core.randomness import derived_seed, generator
from dkdm.core.steps import reverse_step
from dkdm.errors import UsageError


class Finished(NamedTuple):
    """Clean samples that a move produced: x_0 [M, ...] and their conditions."""

    x_0: Tensor
    cond: Condition


@dataclass(eq=False)
class Pool:
    """A source of batches for distillation.

    x: [N, ...] states, on the storage device and in the storage dtype; t: int64 [N] on the CPU;
    cond: rows per entry. The N entries are cut into `shards` equal parts, each with random numbers
    of its own seeded by (seed, shard, step). eta: noise of a move. random_conditioning: the largest
    of `random_conditioning_odds`.
    """

    teacher: Denoiser
    x: Tensor
    t: Tensor
    cond: Condition
    stride: Stride = Stride()
    eta: float = 1.0
    guidance: Guidance = Guidance()
    condition_dropout: float = 0.0
    random_conditioning: float = 0.0
    seed: int = 0
    shards: int = 8
    step: int = 0
    finished: int = 0
    bounds: list[int] = field(init=False)

    def __post_init__(self) -> None:
        for option in ("condition_dropout", "random_conditioning"):
            if not 0 <= getattr(self, option) <= 1:
                flag = option.replace("_", "-")
                raise UsageError(f"--{flag} {getattr(self, option)}: expected 0 to 1")
        size = len(self.t)
        self.shards = min(self.shards, size)
        self.bounds = [0]
        for shard in range(self.shards):
            self.bounds.append(self.bounds[-1] + size // self.shards + (shard < size % self.shards))

    def draw(self, batch_size: int) -> Batch:
        """A batch of distinct entries, an equal part from each shard, in O(batch)."""
        rows: list[int] = []
        for shard, count in self._shares(batch_size):
            first, last = self.bounds[shard], self.bounds[shard + 1]
            if count > last - first:
                raise UsageError(
                    f"a batch of {batch_size} cannot be drawn from a pool of {len(self.t)} in "
                    f"{self.shards} shards: expected --pool-size of at least {batch_size}"
                )
            chooser = random.Random(derived_seed(self.seed, "draw", shard, self.step))
            rows += chooser.sample(range(first, last), count)
        index = torch.tensor(rows)
        x = self.x[index.to(self.x.device)].to(self.teacher.device, torch.float32)
        cond = {key: value[index] for key, value in self.cond.items()}
        return Batch(x, self.t[index], self._shown(cond, self.t[index]), index)

    def _shown(self, cond: Condition, t: Tensor) -> Condition:
        """The conditions a batch is evaluated and moved under: its own, or at times another.

        Entries keep their own. Source: Random Conditioning, arXiv 2504.02011.
        """
        if not self.random_conditioning:
            return cond
        others, luck = [], []
        for shard, count in self._shares(len(t)):
            host = generator("cpu", self.seed, "shown", shard, self.step)
            others.append(self.teacher.conditioning.draw(count, host, self.condition_dropout))
            luck.append(torch.rand(count, generator=host, dtype=torch.float64))
        levels = self.teacher.process.num_levels
        swapped = torch.cat(luck) < random_conditioning_odds(t, levels, self.random_conditioning)
        other = joined(others)
        return cond | {k: torch.where(rows(swapped, v), v, cond[k]) for k, v in other.items()}

    @torch.no_grad()
    def target(self, batch: Batch) -> Prediction:
        """The one teacher evaluation of the batch (two with guidance).

        With guidance of the chain only, it is the unguided prediction, which carries the guided one
        for `advance`.
        """
        unguided, guided = self.teacher.predict_both(batch, self.guidance.of(batch.cond))
        return unguided._replace(chain=guided) if self.guidance.chain_only else guided

    @torch.no_grad()
    def advance(self, batch: Batch, target: Prediction) -> Finished:
        """Replace the batch's entries by their next states.

        A state at t goes to s = t - k. Where s < 0 its chain is finished: x_0 is emitted and the
        entry starts again at s mod T, which keeps t uniform whatever the law of k. For k = 1 that
        is pure noise at T-1, the paper's rule.
        """
        strides, z, start, fresh = self._randomness(batch)
        s = batch.t - strides
        done = s < 0
        x = reverse_step(
            self.teacher.process,
            self.teacher.parameterization,
            batch.x,
            target.chain or target,
            batch.t,
            s.clamp(min=-1),
            z,
            self.eta,
        )
        over = done.nonzero().flatten().to(x.device)
        own = {key: value[batch.rows] for key, value in self.cond.items()}
        clean = Finished(x[over], {key: value[done] for key, value in own.items()})
        t = s % self.teacher.process.num_levels
        cond = {k: torch.where(rows(done, v), fresh[k], v) for k, v in own.items()}
        if done.any():
            again = {key: value[done] for key, value in cond.items()}
            x[over] = self._restart(start[over], z[over], t[done], again)
        self._store(batch.rows, x, t, cond)
        self.finished += len(clean.x_0)
        self.step += 1
        return clean

    def _restart(self, start: Tensor, z: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Fresh chains at levels t: pure noise at T-1, moved once by the teacher where t < T-1."""
        process, top = self.teacher.process, self.teacher.process.num_levels - 1
        x = process.start_std * start
        moved = t < top
        if moved.any():
            on = moved.nonzero().flatten().to(x.device)
            level = torch.full((int(moved.sum()),), top)
            part = Batch(x[on], level, {k: v[moved] for k, v in cond.items()}, level)
            x[on] = reverse_step(
                process,
                self.teacher.parameterization,
                part.x,
                self._of_chain(part),
                level,
                t[moved],
                z[on],
                self.eta,
            )
        return x

    def _of_chain(self, batch: Batch) -> Prediction:
        return self.teacher.predict(batch, self.guidance.of(batch.cond))

    def _shares(self, batch_size: int) -> Iterator[tuple[int, int]]:
        """How many entries of a batch each shard gives; small batches take shards in turns."""
        if batch_size < self.shards:
            for i in range(batch_size):
                yield (self.step * batch_size + i) % self.shards, 1
        else:
            for shard in range(self.shards):
                yield shard, batch_size // self.shards + (shard < batch_size % self.shards)

    def _randomness(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Condition]:
        """Strides, noise of the move, starting noise and fresh conditions for every entry."""
        parts = []
        for shard, count in self._shares(len(batch.t)):
            host = generator("cpu", self.seed, "move", shard, self.step)
            noise = generator(batch.x.device, self.seed, "noise", shard, self.step)
            shape = (2, count, *batch.x.shape[1:])
            both = torch.randn(shape, generator=noise, device=batch.x.device)
            fresh = self._fresh(count, host)
            parts.append((self.stride.draw(count, host), both[0], both[1], fresh))
        strides, z, start, conds = zip(*parts, strict=True)
        return torch.cat(strides), torch.cat(z), torch.cat(start), joined(conds)

    def _fresh(self, count: int, random: torch.Generator) -> Condition:
        """Conditions and guidance scales of new chains."""
        cond = self.teacher.conditioning.draw(count, random, self.condition_dropout)
        return cond | self.guidance.draw(count, random)

    def _store(self, rows: Tensor, x: Tensor, t: Tensor, cond: Condition) -> None:
        self.x[rows.to(self.x.device)] = x.to(self.x.device, self.x.dtype)
        self.t[rows] = t
        for key, value in cond.items():
            self.cond[key][rows] = value

    def state_dict(self) -> dict[str, Tensor]:
        """The whole pool as tensors."""
        cond = {f"cond.{key}": value for key, value in self.cond.items()}
        counts = {"step": torch.tensor(self.step), "finished": torch.tensor(self.finished)}
        return {"x": self.x, "t": self.t, **cond, **counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a pool of the same size and conditions. Raises UsageError for any other."""
        theirs, ours = _layout(state), _layout(self.state_dict())
        if theirs != ours:
            raise UsageError(
                f"the checkpoint's pool is {theirs}, this run's {ours}: expected the options it "
                f"began with; --pool-size {len(state['x'])} keeps its size, whatever else sets it"
            )
        self.x.copy_(state["x"])
        self.t.copy_(state["t"])
        for key in self.cond:
            self.cond[key].copy_(state[f"cond.{key}"])
        self.step, self.finished = int(state["step"]), int(state["finished"])


def _layout(state: dict[str, Tensor]) -> dict[str, str]:
    return {key: f"{tuple(state[key].shape)} {state[key].dtype}" for key in sorted(state)}


def rows(mask: Tensor, like: Tensor) -> Tensor:
    """Shape a [B] mask so that it selects rows of a [B, ...] tensor."""
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def joined(conds: Sequence[Condition]) -> Condition:
    """The rows of several conditions one after the other."""
    return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}
