"""The loop: draw, target, loss, update, advance."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dkdm.config import CheckpointOptions, OptimizerOptions, TrainingOptions
from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.faster import WAYS
from dkdm.core.denoisers.modes import without_label_dropout
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.distributed.sharded import by_parameter, own_state
from dkdm.core.distributed.sharded import whole as whole_tensor
from dkdm.core.distributed.spread import Learner, spread_of
from dkdm.core.saving import checkpoint
from dkdm.core.saving.progress import LossPerLevel, MetricsFile, track
from dkdm.core.saving.saver import Saver
from dkdm.core.saving.stopping import Stopped, agree, stopping_together, whole
from dkdm.core.saving.tolerance import tracked, warn
from dkdm.core.sources.source import Source
from dkdm.core.training.bad_steps import ROLL_BACKS, BadSteps, mended, norm_of_all, unchanged
from dkdm.core.training.learning import (
    Ema,
    ScheduleState,
    autocasting,
    check_finite,
    optimizer_of,
    prepare,
)
from dkdm.core.training.selection import Selection
from dkdm.reading.fields import Fields


@dataclass(eq=False)
class Trainer:
    """A student, its source, and all that changes while one learns from the other.

    output_dir: of the run; checkpoints and metrics lie in it. student: as it is saved and
        sampled. student_on_teacher_levels: the same as it looks from the levels of the source,
        which is what learns.
    features: projections of hidden features, which learn with the network.
    name: the network's folder in checkpoints and in the output, "unet" or "transformer".
    validate: called every `validation_steps` with the step and a student carrying the averaged
        weights; gives what it measured, by names. It does not change the run.
    selection: the best weights so far; a checkpoint says which they are.
    frozen: names of the parameters that are not trained, because adapters are.
    replay: what a step is instead of the usual calls, one after the other, see `core.captured`.
    merge: makes a plain network of one with adapters, in place; None for networks without.
    unnoted: mean loss of the last step until it is written down.
    about: facts that every checkpoint repeats, as JSON.
    samples: losses of a batch, over all processes; None: as many as its samples.
    align: called after each batch, so that all processes have asked the teacher as often.
    """

    output_dir: Path
    training: TrainingOptions
    optimizing: OptimizerOptions
    checkpoints: CheckpointOptions
    student: Denoiser
    student_on_teacher_levels: Denoiser
    source: Source
    objective: Callable[[Denoiser, Batch, Prediction], Tensor]
    accelerator: Accelerator
    name: str = "unet"
    validate: Callable[[int, Denoiser], Mapping[str, float]] | None = None
    validation_steps: int = 0
    selection: Selection | None = None
    features: nn.Module | None = None
    frozen: frozenset[str] = frozenset()
    merge: Callable[[nn.Module], nn.Module] | None = None
    step_number: int = 0
    replay: Callable[[], Tensor] | None = None
    unnoted: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    samples: int | None = None
    align: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        options, device = self.optimizing, self.accelerator.device
        self.network: nn.Module = self.student.network  # type: ignore[assignment]
        recompute = self.training.gradient_checkpointing
        self.spread = spread_of(self.training.fsdp, device)
        for module in filter(None, (self.network, self.features)):
            module.to(device)
        self.spread.place(self.student, self.features)
        learnt = prepare(self.network, self.frozen, recompute)
        self.ema = Ema(self.network, options.ema_decay) if options.use_ema else None
        if self.features is not None:
            learnt += self.features.parameters()
        optimizer, self.schedule = optimizer_of(
            self.network, learnt, options, self.training.max_train_steps
        )
        wrapped = self.accelerator.prepare_model(self.network, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.learner = self.spread.learner(Learner(wrapped, self.features, self.objective))
        seen = self.student_on_teacher_levels
        call = autocasting(self.accelerator, seen.call)
        if processes.world() == 1:
            call = WAYS[self.training.of_student](call)
        self.student_on_teacher_levels = replace(seen, network=wrapped, call=call)
        self.losses = LossPerLevel(self.source.process.num_levels, device)
        self.since = self.step_number, time.monotonic()  # where the speed is measured from
        every = self.checkpoints.logging_steps
        self.metrics = MetricsFile(self.output_dir / "metrics.jsonl", every)
        self.rates = ScheduleState(self.schedule)
        self.bad_steps = BadSteps(options.max_bad_steps, device)
        self.saver = Saver(
            self.output_dir,
            self.checkpoints.checkpoints_total_limit,
            self._write_more,
            self.checkpoints.seconds,
        )

    def step(self) -> Tensor:
        """One optimizer step; returns the mean loss of this process, still on the device."""
        if self.replay is not None:
            return self.replay()
        losses = [self.learn() for _ in range(self.training.gradient_accumulation_steps)]
        self.step_number += 1
        if self.ema is not None:
            self.ema.update(self.network, self.step_number)
        return torch.stack(losses).mean()

    def learn(self) -> Tensor:
        """One batch: draw, target, loss, update, advance. Returns its mean loss."""
        student = self.student_on_teacher_levels
        size = self.training.batch_size
        samples = self.samples or size
        with self.accelerator.accumulate(self.learner):
            batch = self.source.draw(size)
            target = self.source.target(batch)
            loss = self.learner(student, batch, target)
            mean = loss.mean() * processes.part_of_mean(len(loss), samples)
            self.accelerator.backward(mean)
            self.bad_steps.see(batch.x, target.output, loss)
            self._update(mean.detach())
            self.source.advance(batch, target)
            self.align()
        self.losses.add(batch.t, loss.detach())
        return mean.detach()

    def _update(self, loss: Tensor) -> None:
        if self.accelerator.sync_gradients:
            limit = self.optimizing.max_grad_norm
            norm = whole_tensor(self.accelerator.clip_grad_norm_(self.network.parameters(), limit))
            if self.accelerator.scaler is not None:  # which leaves a step out, and tries scales
                self.bad_steps.note(processes.mean(loss))
            elif unchanged(self.optimizer, self.bad_steps.note(norm_of_all(norm, self.features))):
                self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()
        if self.accelerator.sync_gradients:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self) -> None:
        """Train to the last step, with metrics, checkpoints and sample grids on the way.

        A signal stops it between two steps, or while it validates: it saves, and raises Stopped.
        """
        last, first = self.training.max_train_steps, self.step_number
        self.metrics.drop_after(first, self.unnoted is None)
        self.since = first, time.monotonic()
        quiet = without_label_dropout(self.network)
        with track(last, first) as progress, quiet, stopping_together():
            try:
                while self.step_number < last or self.unnoted is not None:
                    with whole():
                        loss = self.unnoted = self.step() if self.unnoted is None else self.unnoted
                    self._note(loss)
                    progress(self.step_number, loss)
                    agree()
            except Stopped:
                if self.saver.saved < self.step_number or self.unnoted is not None:
                    self.save()
                self.saver.finish()
                raise
            finally:
                self.saver.wait()
            self.saver.finish()
            self.metrics.finish()

    def _note(self, loss: Tensor) -> None:
        """Write down a step: validation, a line of metrics, a checkpoint, where they are due."""
        found = self._validated()
        with whole():
            if found:
                self.metrics.write({"step": self.step_number, "validation": found})
                shown = {f"validation/{name}": value for name, value in found.items()}
                tracked(self.accelerator.log, shown, step=self.step_number)
            self.unnoted = None
            if self._due(self.checkpoints.logging_steps):
                self.metrics.write(self._metrics(loss))
                if self._mind_bad_steps():
                    self.metrics.drop_after(self.step_number)
                    return
            if self._due(self.checkpoints.checkpointing_steps) or self.saver.is_due():
                self.save()

    def _validated(self) -> dict[str, float]:
        """What was measured, if it is due, before the step's own line and checkpoint, which thus
        knows it."""
        if not self.validate or not self.validation_steps or not self._due(self.validation_steps):
            return {}
        with torch.random.fork_rng():
            model, validate = self.averaged(), partial(self.validate, self.step_number)
            return dict(processes.by_main(lambda: validate(model)) or {})

    def _mind_bad_steps(self) -> bool:
        """Mend the source after bad steps, and go back after too many; whether it did. Together."""
        count = self.bad_steps.news()
        if not count:
            return False
        said = (
            f"{count} of the last steps had a gradient that was not finite, and changed no weight"
        )
        warn("; ".join([said, *self.bad_steps.new_causes()]))
        self._mend()
        if self.bad_steps.too_many:
            self._go_back()
            return True
        return False

    def _mend(self) -> None:
        """Begin entries of the source anew that are not finite; together."""
        if fresh := int(processes.total(torch.tensor(mended(self.source)))):
            self.bad_steps.fresh += fresh
            warn(f"{fresh} entries of the source were not finite, and begin anew")

    def _go_back(self) -> None:
        """To the last checkpoint whose numbers are all finite, with half the learning rate."""
        self.saver.wait()
        before, folder = copy.copy(self.bad_steps), checkpoint.newest_finite(self.output_dir)
        if folder is None or before.rolled_back == ROLL_BACKS:
            raise before.given_up(self.step_number, folder, before.by_cause())
        self.resume(folder)
        self.since = self.step_number, time.monotonic()
        processes.by_main(partial(checkpoint.set_aside_later, self.output_dir, self.step_number))
        self.bad_steps.after_going_back(before)
        self.rates.at_pace(self.bad_steps.pace)
        warn(
            f"{before.most} steps in a row were bad: back to {folder.name}, with half the learning "
            "rate"
        )

    def _due(self, every: int) -> bool:
        last = self.step_number == self.training.max_train_steps
        return last or (every > 0 and self.step_number % every == 0)

    def _metrics(self, loss: Tensor) -> dict[str, Any]:
        evaluations, (first, started) = self.source.evaluations, self.since
        steps_per_second = (self.step_number - first) / (time.monotonic() - started)
        entry = {
            "step": self.step_number,
            "loss": _number(float(processes.mean(loss))),
            "learning_rate": self.schedule.get_last_lr()[0],
            "steps_per_second": round(steps_per_second, 3),
            "loss_per_level": self.losses.take(),
        }
        entry |= self.bad_steps.counted()
        if (spike := self.bad_steps.spike(entry["loss"])) is not None:
            entry["loss_spike"] = round(spike, 2)
            warn(f"the loss of step {self.step_number} is {spike:.1f} times the usual")
        if evaluations is not None:
            entry["teacher_evaluations"] = int(processes.total(torch.tensor(evaluations)))
        shown = ("loss", "learning_rate", "steps_per_second", "teacher_evaluations")
        known = {k: entry[k] for k in shown if k in entry}
        tracked(self.accelerator.log, known, step=self.step_number)
        return entry

    def averaged(self) -> Denoiser:
        """A copy of the student with the averaged weights (the plain ones without EMA), merged.

        In the main process, together; the student itself in the others.
        """
        weights = self.network.state_dict() if self.ema is None else self.ema.weights
        network = self.spread.copied(self.network, weights)
        if not processes.is_main():
            return self.student
        if self.merge is not None:
            network = self.merge(network)
        return replace(self.student, network=network.eval().requires_grad_(False))

    def parts(self) -> dict[str, checkpoint.Part]:
        """All that changes while training, by its file in a checkpoint."""
        weights = checkpoint.WEIGHTS.removesuffix(".safetensors")
        optimizer, part = checkpoint.OptimizerState(self.optimizer), self.spread.part
        learnt = {
            f"{self.name}/{weights}": self.network,
            f"{self.name}_ema/{weights}": self.ema,
            "features": self.features,
        }
        parts = {
            **{
                name: part(each, own_state(each))
                for name, each in learnt.items()
                if each is not None
            },
            "optimizer": part(optimizer, partial(by_parameter, self.optimizer)),
            "schedule": self.rates,
            "scaler": self.accelerator.scaler,
            checkpoint.random_of(processes.rank()): checkpoint.RandomState(),
            checkpoint.LOSSES: self.losses,
            checkpoint.BAD_STEPS: self.bad_steps,
        }
        parts |= {f"{checkpoint.SOURCE}{name}": part for name, part in self.source.parts().items()}
        return {name: part for name, part in parts.items() if part is not None}

    def save(self) -> None:
        """Begin a checkpoint of everything that changes; together.

        Raises DkdmError, and writes nothing, if a loss or a weight is not finite.
        """
        check_finite(self.network, self.step_number, self.output_dir)
        self._mend()
        about: dict[str, Any] = {"step": self.step_number, "frozen": sorted(self.frozen)}
        about |= self.metrics.kept()
        if self.unnoted is not None:
            about["unnoted"] = float(processes.mean(self.unnoted))
        if self.selection is not None:
            about["best"] = self.selection.state_dict()
        self.saver.save(self.step_number, self.parts(), about)

    def _write_more(self, folder: Path) -> None:
        """What a checkpoint has beside its parts: facts of the run, configs of networks."""
        self.metrics.flush()
        (folder / checkpoint.RUN).write_text(json.dumps(self.about, indent=2) + "\n")
        for copies in (self.name, f"{self.name}_ema"):
            if (folder / copies).is_dir():
                checkpoint.save_config(self.spread.plain(self.network), folder / copies)

    def resume(self, folder: Path) -> None:
        """Go on exactly from a checkpoint that is whole. Raises DkdmError if it does not fit."""
        with checkpoint.restoring(folder):
            parts = self.parts()
            about = checkpoint.read_parts(folder, parts, processes.owners(parts))
            state = Fields(about, str(folder / checkpoint.STATE))
            self.step_number, loss = state.whole("step"), state.number("unnoted", None)
            self.metrics.restore(about)
        self.unnoted = None if loss is None else torch.tensor(loss, device=self.accelerator.device)
        self.rates.at_pace(self.bad_steps.pace)
        if self.selection is not None and processes.is_main():
            self.selection.load_state_dict(about.get("best", {}))


def _number(value: float) -> float | None:
    """A number that JSON knows; None for one that is not finite."""
    return value if math.isfinite(value) else None
