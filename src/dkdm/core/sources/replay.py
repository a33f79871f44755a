"""Replay: a student learns from every evaluation of a teacher several times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.diffusion.process import Process
from dkdm.core.diffusion.steps import not_finite
from dkdm.core.randomness import generator
from dkdm.core.saving.checkpoint import Part
from dkdm.core.shards import Shards, this_process
from dkdm.core.sources.source import Source

RECENT = 64  # batches whose evaluations are kept


@dataclass(eq=False)
class Replayed:
    """A source between whose batches `times - 1` batches are drawn from its last evaluations.

    Those are random subsets of what `RECENT` batches held, and cost the teacher nothing.
    teacher: whose evaluations they are. kept: states x and raw outputs [n, ...], t [n] and the rows
    of each condition, a batch after the other, the newest in the place of the oldest. step: batches
    so far, new ones and others. drawn_by: the process that draws; each keeps what all were told,
    and has its part of the batches between.
    """

    source: Source
    teacher: Denoiser
    times: int
    seed: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    drawn_by: Shards = field(default_factory=this_process)
    _last: tuple[Tensor | slice, int] = field(default=(slice(None), 0), init=False, repr=False)

    @property
    def process(self) -> Process:
        """The source's."""
        return self.source.process

    @property
    def evaluations(self) -> int | None:
        """The source's."""
        return self.source.evaluations

    @property
    def is_new(self) -> bool:
        """Whether the next batch is the source's."""
        return self.step % self.times == 0

    def draw(self, batch_size: int) -> Batch:
        """The source's next batch, or evaluated states; the outputs there are its `rows`."""
        if self.is_new:
            self._last = self.source.places(batch_size), batch_size
            return self.source.draw(batch_size)
        random = generator("cpu", self.seed, "replay", self.step)
        rows = torch.randperm(len(self.kept["t"]), generator=random)[:batch_size]
        rows = rows[self.drawn_by.part(batch_size)]
        found = {key: value[rows.to(value.device)] for key, value in self.kept.items()}
        cond = {k.removeprefix("cond."): v for k, v in found.items() if k.startswith("cond.")}
        return Batch(found["x"], found["t"], cond, found["output"])

    def places(self, batch_size: int) -> Tensor:
        """The source's, or this process's part in order."""
        if self.is_new:
            return self.source.places(batch_size)
        return torch.arange(batch_size)[self.drawn_by.part(batch_size)]

    def target(self, batch: Batch) -> Prediction:
        """The source's target, or what the teacher said before."""
        if not self.is_new:
            return self.teacher.read(batch.rows, batch)
        target = self.source.target(batch)
        self.keep(batch, target)
        return target

    def keep(self, batch: Batch, target: Prediction) -> None:
        """Keep what the teacher said of the source's batch, for others; together."""
        cond = {f"cond.{key}": value for key, value in batch.cond.items()}
        own = {"x": batch.x, "t": batch.t, "output": target.raw, **cond}
        new = {key: processes.whole_of(value, *self._last) for key, value in own.items()}
        count = len(new["t"])
        first = self.step // self.times % RECENT * count
        for key, value in new.items():
            # fewer or more than so many batches of this size, if a run goes on with another size
            old = self.kept.get(key, value[:0])[: RECENT * count].to(value.device)
            if len(old) >= first + count:
                old[first : first + count] = value
            self.kept[key] = old if len(old) >= first + count else torch.cat([old[:first], value])

    def advance(self, batch: Batch, target: Prediction) -> None:
        """Move the states of a new batch on; others stay."""
        if self.is_new:
            self.source.advance(batch, target)
        self.step += 1

    def mend(self) -> int:
        """Mend the source, and show evaluations that are not finite no more; returns the former."""
        if self.kept:
            bad = torch.cat([not_finite(self.kept[name]) for name in ("x", "output")]).unique()
            good = [n for n in range(len(self.kept["t"])) if n not in set(bad.tolist())]
            if len(bad) and good:
                for value in self.kept.values():
                    value[bad.to(value.device)] = value[good[0]].clone()
        return self.source.mend()

    def parts(self) -> Mapping[str, Part]:
        """The source's, and the evaluations that are kept."""
        return {**self.source.parts(), "replay": self}

    def state_dict(self) -> dict[str, Tensor]:
        """The step and the evaluations that are kept."""
        return {"step": torch.tensor(self.step), **self.kept}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.step = int(state["step"])
        device = self.teacher.device
        self.kept = {
            key: value.to(device) if key in ("x", "output") else value
            for key, value in state.items()
            if key != "step"
        }
