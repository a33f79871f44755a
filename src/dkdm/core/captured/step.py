"""A step of training as one CUDA graph, and what the host does beside it.

The host plans the next step (`Pool.plan`), sends it, and starts the graph; while the device works
it goes on to the next. So nobody waits for the other, up to the steps that `Inputs` holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dkdm.core.captured.check import check, outcome
from dkdm.core.captured.graph import captured, fresh
from dkdm.core.captured.inputs import Inputs
from dkdm.core.captured.optimizers import count_on
from dkdm.core.captured.part import DevicePart, Values
from dkdm.core.captured.placed import fed, placed, placed_objective
from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.objectives.objective import Objective
from dkdm.core.sources.chains import Stride
from dkdm.core.sources.moves import Moves
from dkdm.core.sources.pool import Pool
from dkdm.core.sources.replay import Replayed
from dkdm.reading.notes import say

if TYPE_CHECKING:
    from dkdm.core.training.trainer import Trainer

Run = Callable[[], None]
Sections = Mapping[str, Sequence[Run]]
Make = Callable[[Sections], Mapping[str, Run]]


def as_they_are(sections: Sections) -> dict[str, Run]:
    """Sections whose functions are called one after the other, without a graph."""

    def run(section: Sequence[Run]) -> None:
        for function in section:
            function()

    return {name: partial(run, section) for name, section in sections.items()}


def first_step(trainer: Trainer, make: Make = captured) -> Tensor:
    """A step that is made by graphs from now on, if they can be made and give the right results.

    Otherwise a note says why, and this and further steps are as usual.
    """
    trainer.replay = None
    try:
        whole = WholeStep(trainer, make)
        whole.prepare()
        trainer.replay = whole
    except Exception as error:
        cause = error.__context__ or error  # leaving a capture that has failed raises another one
        say_why_not(str(cause).partition("\n")[0])
    return trainer.step()


def say_why_not(reason: str) -> None:
    """Note that steps are as usual."""
    say(f"note: the step is not captured as one CUDA graph: {reason}")


class WholeStep:
    """An optimizer step of a trainer whose source is a pool, in fixed shapes.

    make: how the sections of the device's part are run: `captured` as graphs.
    """

    def __init__(self, trainer: Trainer, make: Make = captured) -> None:
        objective, device = trainer.objective, trainer.accelerator.device
        self.replayed = trainer.source if isinstance(trainer.source, Replayed) else None
        pool = trainer.source if self.replayed is None else self.replayed.source
        assert isinstance(pool, Pool) and isinstance(objective, Objective)
        self.trainer, self.pool, self.make = trainer, pool, make
        self.batch_size = trainer.training.batch_size
        self.accumulates = trainer.training.gradient_accumulation_steps
        self.spare = spare_rows(pool.stride, pool.process.num_levels, self.batch_size)
        moves = pool.plan(self.batch_size)
        self.given = Inputs(self._given(moves.t, moves.s, moves.shown), device)
        self.new = Inputs(self._new(moves, torch.arange(0)), device)
        teacher = placed(pool.teacher, device)
        self.part = DevicePart(
            pool.guidance,
            pool.eta,
            pool.process.start_std,
            teacher,
            placed(trainer.student_on_teacher_levels, device),
            placed_objective(objective, teacher, device),
            trainer.network,
            trainer.optimizer.optimizer,
            trainer.ema,
            trainer.losses,
            trainer.optimizing.max_grad_norm,
            self.accumulates,
            self.given.values,
            self.new.values,
            torch.zeros(self.batch_size, *pool.x.shape[1:], device=device),
            torch.zeros(2, self.batch_size, *pool.x.shape[1:], device=device),
            trainer.features,
        )
        self._runs: Mapping[str, Run] | None = None

    def __call__(self) -> Tensor:
        """One optimizer step; returns the mean loss, still on the device."""
        if self._runs is None:
            self.prepare()
        if self._state is not self.part.optimizer.state:  # a run went back
            return first_step(self.trainer, self.make)
        trainer, losses = self.trainer, []
        for _ in range(self.accumulates):
            losses.append(self._learn() if self._is_new else self._again())
            trainer.bad_steps.see(self.part.x, self.part.output, self.part.loss)
        if self.accumulates > 1:
            self._run("update")
        trainer.bad_steps.note(self.part.norm)
        trainer.schedule.step()
        trainer.step_number += 1
        return torch.stack(losses).mean()

    def prepare(self) -> None:
        """Make the sections, and check them. The run's state is as before.

        Raises whatever a capture raises, and DkdmError if graphs of the sections give something
        else than the sections, called one by one.
        """
        part, moves, sections = self.part, self.pool.plan(self.batch_size), self._sections()
        others = moves.only(torch.arange(self.batch_size).flip(0))
        count_on(part.optimizer, part.x.device)
        self._state = part.optimizer.state
        try:
            self._tell_all(moves)
            expected = outcome(part, as_they_are(sections))
            self._tell_all(others)  # what a graph keeps of its first batch shall be seen
            with fresh(part):
                self._runs = self.make(sections)
            self._tell_all(moves)
            check(outcome(part, self._runs), expected, self._dtypes)
        except Exception:
            part.optimizer.zero_grad(set_to_none=True)
            count_on(part.optimizer, torch.device("cpu"))
            raise

    def _sections(self) -> dict[str, Sequence[Run]]:
        """The functions of the device's part that run one after the other, in a possible order."""
        part = self.part
        at_once = (part.update,) if self.accumulates == 1 else ()
        sections: dict[str, Sequence[Run]] = {"learn": (part.learn, *at_once)}
        if self.pool.stride.high > 1:
            sections["restart"] = (part.restart,)
        if self.replayed is not None:
            sections["again"] = (part.again, *at_once)
        if self.accumulates > 1:
            sections["update"] = (part.update,)
        return sections

    def _tell_all(self, moves: Moves) -> None:
        """Send a batch, and chains that could begin below the top in it."""
        self._tell(moves)
        top = self.pool.process.num_levels - 1
        lower = (moves.following < top).nonzero().flatten()
        self.new.send(self._new(moves, lower[: self.spare]))

    def _tell(self, moves: Moves) -> None:
        """Send a batch, its noise, and what the update needs."""
        self.given.send(self._given(moves.t, moves.s, moves.shown))
        self.part.x.copy_(self.pool.gather(moves.rows))
        self.pool.noise(moves.rows, out=self.part.noise)

    def _run(self, name: str) -> None:
        assert self._runs is not None
        self._runs[name]()

    def _learn(self) -> Tensor:
        """One batch; returns its mean loss."""
        pool, moves = self.pool, self.pool.plan(self.batch_size)
        self._tell(moves)
        self._run("learn")
        pool.count(moves.rows, moves.t)
        self._restart(moves)
        pool.write(moves.rows, self.part.next)
        pool.commit(moves)
        if self.replayed is not None:
            channels, output = self.part.x.shape[1], self.part.output
            variance = output[:, channels:] if output.shape[1] > channels else None
            said = Prediction(output[:, :channels], self.part.x, self.part.x, variance)
            self.replayed.keep(moves.batch(self.part.x), said)
            self.replayed.step += 1
        return self.part.loss.clone()

    def _again(self) -> Tensor:
        """One batch that the teacher has evaluated before; returns its mean loss."""
        assert self.replayed is not None
        batch = self.replayed.draw(self.batch_size)
        self.given.send(self._given(batch.t, batch.t - 1, batch.cond))
        self.part.x.copy_(batch.x)
        self.part.output.copy_(batch.rows)
        self._run("again")
        self.replayed.step += 1
        return self.part.loss.clone()

    @property
    def _dtypes(self) -> list[torch.dtype]:
        """What both networks compute in."""
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}
        found = [model.dtype or torch.float32 for model in self._models]
        return [*found, autocast.get(self.trainer.accelerator.mixed_precision, torch.float32)]

    @property
    def _is_new(self) -> bool:
        return self.replayed is None or self.replayed.is_new

    def _restart(self, moves: Moves) -> None:
        """Move the chains that begin below T-1, `spare` of them at once."""
        top = self.pool.process.num_levels - 1
        below = moves.begin_below(top).nonzero().flatten()
        for at in below.split(self.spare) if len(below) else ():
            self.new.send(self._new(moves, at))
            self._run("restart")
        rows = moves.rows[below]
        self.pool.count(rows, torch.full_like(rows, top))

    def _given(self, t: Tensor, s: Tensor, cond: Condition) -> Values:
        """What the device reads of a batch, and for the update."""
        trainer, (teacher, student) = self.trainer, self._models
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        share = 0.0 if trainer.ema is None else trainer.ema.share(trainer.step_number + 1)
        shown = fed(teacher, cond)
        same = teacher.conditioning is student.conditioning
        return {
            "t": t,
            "s": s,
            "rates": torch.tensor(rates, dtype=torch.float32),
            "share": torch.tensor(share, dtype=torch.float32),
            **_under("teacher", shown),
            **_under("student", shown if same else fed(student, cond)),
        }

    def _new(self, moves: Moves, at: Tensor) -> Values:
        """The chains at these places of a batch, at most `spare`, and others that fill it up."""
        others = torch.ones(len(moves.rows), dtype=torch.bool)
        others[at] = False
        every = torch.cat([at, others.nonzero().flatten()])[: self.spare]
        some, valid = moves.only(every), torch.arange(self.spare) < len(at)
        return {
            "s": torch.where(valid, some.following, 0),
            "at": every,
            "valid": valid,
            **_under("teacher", fed(self.pool.teacher, some.next)),
        }

    @property
    def _models(self) -> tuple[Denoiser, Denoiser]:
        return self.pool.teacher, self.trainer.student_on_teacher_levels


def _under(group: str, cond: Condition) -> Condition:
    return {f"{group}.{key}": value for key, value in cond.items()}


def spare_rows(stride: Stride, num_levels: int, batch_size: int) -> int:
    """Chains that a batch can begin at once below T-1: a little more than end on average."""
    mean = batch_size * (stride.low + stride.high) / 2 / num_levels
    return min(batch_size, math.ceil(mean + math.sqrt(mean)))
