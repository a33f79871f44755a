"""Dynamic iterative distillation: a pool of noisy samples that the teacher keeps moving.

DKDM (arXiv 2409.03550), algorithm 1. Entry (x, t, cond) means: x is at noise level t and is to be
denoised at t next. Iterative and shuffled distillation are kinds of it, see `ladder`. The pool does
not know the student.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.devices import to_device
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.diffusion.process import Process
from dkdm.core.diffusion.steps import check_move, not_finite
from dkdm.core.mapped import read_in_order
from dkdm.core.randomness import derived_seed, generator
from dkdm.core.saving.checkpoint import Part
from dkdm.core.shards import Entries, Shards, ShardState
from dkdm.core.sources.chains import Guidance, Stride, joined, random_conditioning_odds, row_mask
from dkdm.core.sources.finished import Finished
from dkdm.core.sources.moves import Moves, answer, moved, rows_of
from dkdm.core.sources.states import States, states_of
from dkdm.errors import UsageError


@dataclass(eq=False)
class Pool:
    """A source of batches for distillation.

    x: [N, ...] states, on the storage device and in the storage dtype; t: int64 [N] on the CPU;
    cond: N rows: the entries of this process's shards, one shard after the other. The random
    numbers of a shard are seeded by (seed, purpose, shard, step).
    eta: noise of a move. random_conditioning: the largest of `random_conditioning_odds`.
    size: entries over all processes; None: all are here. finished: keeps the samples whose chains
    end; None keeps none. pinned: whether states travel through pinned memory. evaluated: teacher
    evaluations so far, int64 [shards of this process].
    born: int64 [N], batches moved when each entry's chain began; 0 is as filled, -1 not known.
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
    shards: Shards = Shards()
    size: int | None = None
    finished: Finished | None = None
    pinned: bool = False
    entries: Entries = field(init=False)
    evaluated: Tensor = field(init=False)
    born: Tensor = field(init=False)
    states: States = field(init=False)

    def __post_init__(self) -> None:
        size = self.size = len(self.t) if self.size is None else self.size
        self.shards = replace(self.shards, total=min(self.shards.total, size))
        self.states = states_of(self.x, self.teacher.device, self.pinned)
        self.entries = Entries.of(self.shards.sizes(size))
        self.evaluated = torch.zeros(len(self.entries.slices), dtype=torch.int64)
        self.born = torch.zeros(len(self.t), dtype=torch.int64)
        self._step = torch.zeros((), dtype=torch.int64)
        self._planned: tuple[int, Moves] | None = None

    @property
    def step(self) -> int:
        """Batches that were moved so far."""
        return int(self._step)

    @step.setter
    def step(self, step: int) -> None:
        self._step.fill_(step)

    @property
    def process(self) -> Process:
        """The teacher's."""
        return self.teacher.process

    @property
    def evaluations(self) -> int:
        """Samples that the teacher has evaluated for this pool; guidance counts two a sample."""
        return int(self.evaluated.sum())

    def draw(self, batch_size: int) -> Batch:
        """A batch of distinct entries, an equal part from each shard, in O(batch)."""
        moves = self.plan(batch_size)
        self._planned = self.step, moves
        return moves.batch(self.gather(moves.rows))

    def places(self, batch_size: int) -> Tensor:
        """Where the entries of this process's shards lie in the next batch, int64 [part]."""
        return self.shards.places(batch_size, self.step)

    def gather(self, rows: Tensor) -> Tensor:
        """The states of entries, beside the teacher, in float32."""
        return self.states.gather(rows)

    def plan(self, batch_size: int) -> Moves:
        """What the next step does with which entries. Changes nothing."""
        chosen: list[int] = []
        for shard, count in self.shards.shares(batch_size, self.step).items():
            here = self.entries.slices[shard]
            if count > here.stop - here.start:
                raise UsageError(
                    f"a batch of {batch_size} cannot be drawn from a pool of {self.size} in "
                    f"{self.shards.total} shards: give --pool-size {batch_size} or more"
                )
            chosen += self._chosen(shard, here, count)
        return self._moves(torch.tensor(chosen))

    def _moves(self, rows: Tensor) -> Moves:
        """What the next step does with these entries.

        A state at t goes to t - k. Below 0 its chain is finished, and the entry starts again at
        (t - k) mod T, which keeps t uniform for any law of k that does not depend on t. For k = 1
        that is pure noise at T-1, the paper's rule.
        """
        t, own = self.t[rows], rows_of(self.cond, rows)
        strides, fresh = self._laws(rows)
        done = t < strides
        cond = {k: torch.where(row_mask(done, v), fresh[k], v) for k, v in own.items()}
        s, following = (t - strides).clamp(min=-1), (t - strides) % self.process.num_levels
        return Moves(rows, t, s, following, own, cond, self._shown(rows, t))

    def _moves_of(self, batch: Batch) -> Moves:
        """What was planned when the batch was drawn."""
        planned = self._planned
        if planned and planned[0] == self.step and planned[1].rows is batch.rows:
            return planned[1]
        return self._moves(batch.rows)

    def _chosen(self, shard: int, here: slice, count: int) -> list[int]:
        """Which of a shard's entries this step draws: a random subset (DKDM, algorithm 1)."""
        return self._shuffled(shard, range(here.start, here.stop), count)

    def _shuffled(self, shard: int, entries: Sequence[int], count: int) -> list[int]:
        """`count` of these entries in random order."""
        chooser = random.Random(derived_seed(self.seed, "draw", shard, self.step))
        return chooser.sample(entries, count)

    def _shown(self, rows: Tensor, t: Tensor) -> Condition:
        """The entries' conditions or, at random, others to show in a batch (arXiv 2504.02011)."""
        cond = rows_of(self.cond, rows)
        if not self.random_conditioning:
            return cond
        others, luck = [], []
        for shard, count in self.entries.by_shard(rows):
            host = generator("cpu", self.seed, "shown", shard, self.step)
            others.append(self.teacher.conditioning.draw(count, host, self.condition_dropout))
            luck.append(torch.rand(count, generator=host, dtype=torch.float64))
        levels = self.process.num_levels
        swapped = torch.cat(luck) < random_conditioning_odds(t, levels, self.random_conditioning)
        other = joined(others)
        return cond | {k: torch.where(row_mask(swapped, v), v, cond[k]) for k, v in other.items()}

    @torch.no_grad()
    def target(self, batch: Batch) -> Prediction:
        """The one teacher evaluation of the batch (two with guidance)."""
        self.count(batch.rows, batch.t)
        return answer(self.teacher, self.guidance, batch)

    def count(self, rows: Tensor, t: Tensor) -> None:
        """Note an evaluation of entries at levels t."""
        each = self.teacher.evaluations_at(t, guided=not self.guidance.is_off)
        self.evaluated.index_add_(0, self.entries.places(rows), each)

    def move(self, batch: Batch, target: Prediction, z: Tensor) -> Tensor:
        """The batch's states at their next levels s; those at s = -1 are clean.

        z: [B, ...] standard normal noise. Changes nothing in the pool.
        """
        assert batch.s is not None
        check_move(self.teacher.parameterization, batch.t, batch.s, self.eta)
        return moved(self.teacher, batch, target, z, self.eta)

    @torch.no_grad()
    def advance(self, batch: Batch, target: Prediction) -> None:
        """Replace the batch's entries by their next states.

        Where a chain is finished, the move's result is a clean sample, kept if `finished` is given,
        and its noise serves the new chain.
        """
        moves, (z, start) = self._moves_of(batch), self.noise(batch.rows)
        x, ended = self.move(batch, target, z), moves.only(moves.done)
        on = to_device(moves.done.nonzero().flatten(), x.device)
        if self.finished is not None:
            self.finished.end_step(self.step, x[on], ended.own, ended.rows)
        if len(on):
            x[on] = self._restart(ended, start[on], z[on])
        self.write(moves.rows, x)
        self.commit(moves)

    def _restart(self, moves: Moves, start: Tensor, z: Tensor) -> Tensor:
        """Begin chains anew: pure noise at T-1, moved once by the teacher if they begin lower."""
        x, lower = self.process.start_std * start, moves.begin_below(self.process.num_levels - 1)
        if lower.any():
            on = to_device(lower.nonzero().flatten(), x.device)
            batch = moves.only(lower).restarts(x[on], self.process.num_levels - 1)
            x[on] = self.move(batch, self.target(batch), z[on])
        return x

    def commit(self, moves: Moves) -> None:
        """Note the levels, conditions and births of entries that have moved: the end of a step."""
        self.note(moves.rows, moves.following, moves.next)
        self.born[moves.rows[moves.done]] = self.step + 1
        self.step += 1

    def mend(self) -> int:
        """Begin chains anew whose states are not finite, as pure noise; returns how many."""
        self.states.settle()
        read_in_order(self.x)
        rows = not_finite(self.x)
        if not len(rows):
            return 0
        noise = generator("cpu", self.seed, "mend", self.shards.rank, self.step)
        x = self.process.start_std * torch.randn(len(rows), *self.x.shape[1:], generator=noise)
        cond = self.new_conditions(len(rows), noise)
        self.store(rows, x, torch.full_like(rows, self.process.num_levels - 1), cond)
        self.born[rows] = self.step
        return len(rows)

    def _laws(self, rows: Tensor) -> tuple[Tensor, Condition]:
        """What this step draws for the chains of entries: strides, and conditions if they end."""
        strides, conds = [], []
        for shard, count in self.entries.by_shard(rows):
            host = generator("cpu", self.seed, "move", shard, self.step)
            conds.append(self.new_conditions(count, host))
            strides.append(self._strides(count, host))
        return torch.cat(strides), joined(conds)

    def _strides(self, count: int, random: torch.Generator) -> Tensor:
        """How far the entries of a shard move, int64 [count]; each by itself."""
        return self.stride.draw(count, random)

    def noise(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Noise of this step for the moves of entries, and for chains that begin: [2, B, ...]."""
        parts, device = [], self.teacher.device
        for shard, count in self.entries.by_shard(rows):
            noise = generator(device, self.seed, "noise", shard, self.step)
            shape = (2, count, *self.x.shape[1:])
            parts.append(torch.randn(shape, generator=noise, device=device))
        return torch.cat(parts, dim=1, out=out)

    def new_conditions(self, count: int, random: torch.Generator) -> Condition:
        """Conditions and guidance scales of new chains."""
        cond = self.teacher.conditioning.draw(count, random, self.condition_dropout)
        return cond | self.guidance.draw(count, random)

    def store(self, rows: Tensor, x: Tensor, t: Tensor, cond: Condition) -> None:
        """Overwrite entries."""
        self.write(rows, x)
        self.note(rows, t, cond)

    def write(self, rows: Tensor, x: Tensor) -> None:
        """Overwrite the states of entries."""
        self.states.write(rows, x)

    def note(self, rows: Tensor, t: Tensor, cond: Condition) -> None:
        """Overwrite levels and conditions of entries."""
        self.t[rows] = t
        for key, value in cond.items():
            self.cond[key][rows] = value

    def parts(self) -> dict[str, Part]:
        """What is saved: each shard by itself, under its number over all processes."""
        self.states.settle()
        sizes = {"size": torch.tensor(self.size), "shards": torch.tensor(self.shards.total)}
        found: dict[str, Part] = {} if self.finished is None else {"finished": self.finished}
        slices = self.entries.slices.items()
        for evaluations, (number, here) in zip(self.evaluated, slices, strict=True):
            cond = {f"cond.{key}": value[here] for key, value in self.cond.items()}
            counts = {"step": self._step, "evaluations": evaluations, **sizes}
            views = {"x": self.x[here], "t": self.t[here], "born": self.born[here]}
            found[f"shard-{number}"] = ShardState(number, here, views | cond | counts)
        return found
