"""The loop: draw, predict, match, advance."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from dkdm.config import RunConfig
from dkdm.core import checkpoint
from dkdm.core.denoiser import Denoiser
from dkdm.core.ema import Ema
from dkdm.core.feature_loss import Features
from dkdm.core.modes import silence_label_dropout
from dkdm.core.objective import Objective
from dkdm.core.progress import LossPerLevel, MetricsFile, track
from dkdm.core.sources import Source
from dkdm.errors import DkdmError, UsageError
from dkdm.reading.fields import Fields, read_json


@dataclass(eq=False)
class Trainer:
    """A student, its source, and all that changes while one learns from the other.

    student: as it looks from the source's levels. shipped: the same as it is saved and sampled,
        where its own process is another; None is `student`. teacher: whose evaluations are counted.
    features: hidden features to match beside the objective; their projections learn with the
        network.
    name: the network's folder in checkpoints and in the output, "unet" or "transformer".
    validate: called with the step and a student carrying the averaged weights.
    frozen: names of the parameters that are not trained, because adapters are.
    merge: makes a plain network of one with adapters, in place; None for networks without.
    """

    config: RunConfig
    student: Denoiser
    source: Source
    objective: Objective
    accelerator: Accelerator
    name: str = "unet"
    validate: Callable[[int, Denoiser], None] | None = None
    shipped: Denoiser | None = None
    teacher: Denoiser | None = None
    features: Features | None = None
    frozen: frozenset[str] = frozenset()
    merge: Callable[[nn.Module], nn.Module] | None = None
    step_number: int = 0
    first_bad_step: Tensor = field(default_factory=lambda: torch.tensor(-1))

    def __post_init__(self) -> None:
        config = self.config
        self.network: nn.Module = self.student.network  # type: ignore[assignment]
        make_trainable(self.network.train())
        silence_label_dropout(self.network)
        for name in self.frozen:
            self.network.get_parameter(name).requires_grad_(False)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.network)
        self.ema = Ema(self.network.to(self.accelerator.device), config.ema_decay)
        learnt = [p for p in self.network.parameters() if p.requires_grad]
        if self.features is not None:
            learnt += self.features.to(self.accelerator.device).parameters()
        optimizer = torch.optim.AdamW(
            learnt, config.learning_rate, weight_decay=config.weight_decay
        )
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        wrapped, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.shipped = self.shipped or self.student
        self.student = replace(self.student, network=wrapped)
        self.objective = replace(self.objective, student=self.student)
        self.levels = LossPerLevel(self.student.process.num_levels, self.accelerator.device)

    def step(self) -> Tensor:
        """One optimizer step; returns the mean loss, still on the device."""
        losses = []
        for _ in range(self.config.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.student.network):
                batch = self.source.draw(self.config.train_batch_size)
                with self._watched():
                    target = self.source.target(batch)
                    with self.accelerator.autocast():
                        prediction = self.student.predict(batch)
                per_sample = self.objective(prediction, target, batch.x, batch.t)
                further = 0.0 if self.features is None else self.features.loss().mean()
                self.accelerator.backward(per_sample.mean() + further)
                self._update()
                self.source.advance(batch, target)
            self.levels.add(batch.t, per_sample.detach())
            losses.append(per_sample.detach().mean())
        self.step_number += 1
        self.ema.update(self.network)
        return torch.stack(losses).mean()

    def _watched(self) -> AbstractContextManager[None]:
        return nullcontext() if self.features is None else self.features.watch()

    def _update(self) -> None:
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        if self.accelerator.sync_gradients:
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self) -> None:
        """Train to the last step, with metrics, checkpoints and sample grids on the way."""
        config = self.config
        metrics = MetricsFile(config.output_dir / "metrics.jsonl", self.step_number)
        with track(config.max_train_steps, self.step_number) as progress:
            started, first = time.monotonic(), self.step_number
            while self.step_number < config.max_train_steps:
                loss = self.step()
                self._note_bad(loss)
                if self._due(config.logging_steps):
                    self._check_finite()
                    elapsed = time.monotonic() - started
                    metrics.write(self._metrics(loss, (self.step_number - first) / elapsed))
                progress(self.step_number, loss)
                if self._due(config.checkpointing_steps):
                    self.save()
                if self.validate and config.validation_steps and self._due(config.validation_steps):
                    self.validate(self.step_number, self.averaged())

    def _due(self, every: int) -> bool:
        last = self.step_number == self.config.max_train_steps
        return last or (every > 0 and self.step_number % every == 0)

    def _note_bad(self, loss: Tensor) -> None:
        """Remember the first step whose loss is not finite, without waiting for the device."""
        known = self.first_bad_step.to(loss.device)
        bad = ~loss.isfinite() & (known < 0)
        self.first_bad_step = torch.where(bad, self.step_number, known)

    def _check_finite(self) -> None:
        bad = int(self.first_bad_step)
        if bad >= 0:
            raise self._not_finite(f"the loss became NaN or infinite at step {bad}")

    def _not_finite(self, what: str) -> DkdmError:
        kept = checkpoint.checkpoints(self.config.output_dir)
        return DkdmError(
            f"{what}. The last good checkpoint is {kept[-1] if kept else '(none yet)'}. Try a "
            "lower --learning-rate, a lower --max-grad-norm or --mixed-precision no, with "
            "--resume-from-checkpoint latest"
        )

    def _metrics(self, loss: Tensor, steps_per_second: float) -> dict[str, Any]:
        entry = {
            "step": self.step_number,
            "loss": float(loss),
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "steps_per_second": round(steps_per_second, 3),
            "loss_per_level": self.levels.take(),
        }
        if self.teacher is not None:
            entry["teacher_evaluations"] = self.teacher.evaluations
        shown = ("loss", "learning_rate", "steps_per_second", "teacher_evaluations")
        self.accelerator.log({k: entry[k] for k in shown if k in entry}, step=self.step_number)
        return entry

    def averaged(self) -> Denoiser:
        """A copy of the student with the averaged weights (the plain ones without EMA), merged."""
        network = copy.deepcopy(self.network)
        if self.config.use_ema:
            network.load_state_dict(self.ema.weights)
        if self.merge is not None:
            network = self.merge(network)
        assert self.shipped is not None
        return replace(self.shipped, network=network.eval().requires_grad_(False))

    def save(self) -> None:
        """Write a checkpoint of everything that changes, and delete those beyond the limit.

        Raises DkdmError, and writes nothing, where a loss or a weight is not finite.
        """
        self._check_finite()
        weights = [p for p in self.network.parameters() if p.is_floating_point()]
        if not bool(torch.stack([p.isfinite().all() for p in weights]).all()):
            raise self._not_finite(f"the weights became NaN or infinite by step {self.step_number}")
        if self.accelerator.is_main_process:
            folder = self.config.output_dir / f"checkpoint-{self.step_number}"
            checkpoint.write_folder(folder, self._fill)
            checkpoint.rotate(self.config.output_dir, self.config.checkpoints_total_limit)

    def _fill(self, folder: Path) -> None:
        tensors, groups = checkpoint.split_optimizer(self.optimizer.state_dict())
        checkpoint.save_network(self.network, folder / self.name)
        checkpoint.save_network(self.network, folder / f"{self.name}_ema", self.ema.weights)
        checkpoint.write_tensors(folder / "optimizer.safetensors", tensors)
        checkpoint.write_tensors(folder / "source.safetensors", self.source.state_dict())
        checkpoint.write_tensors(folder / "random.safetensors", checkpoint.random_state())
        if self.features is not None:
            checkpoint.write_tensors(folder / FEATURES, self.features.state_dict())
        scaler = self.accelerator.scaler
        state = {
            "step": self.step_number,
            "frozen": sorted(self.frozen),
            "ema_updates": self.ema.updates,
            "optimizer": groups,
            "lr_scheduler": _plain(self.lr_scheduler.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "teacher_evaluations": getattr(self.teacher, "evaluations", 0),
        }
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    def resume(self, folder: Path) -> None:
        """Go on exactly from a checkpoint. Raises DkdmError where it is damaged."""
        checkpoint.verify_folder(folder)
        with checkpoint.restoring(folder):
            self._restore(folder)

    def _restore(self, folder: Path) -> None:
        state = read_json(folder / "state.json", "a checkpoint's state")
        checkpoint.load_network_weights(self.network, folder / self.name)
        if (self.features is not None) != (folder / FEATURES).is_file():
            began = "with" if self.features is None else "without"
            raise UsageError(
                f"--feature-weight: {folder} is of a run {began} feature distillation; expected "
                "the options it began with"
            )
        averaged = checkpoint.read_tensors(folder / f"{self.name}_ema" / checkpoint.WEIGHTS)
        self.ema.weights = {k: v.to(self.accelerator.device) for k, v in averaged.items()}
        self.ema.updates = state["ema_updates"]
        tensors = checkpoint.read_tensors(folder / "optimizer.safetensors")
        self.optimizer.load_state_dict(checkpoint.join_optimizer(tensors, state["optimizer"]))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if state["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.source.load_state_dict(checkpoint.read_tensors(folder / "source.safetensors"))
        if self.features is not None:
            weights = checkpoint.read_tensors(folder / FEATURES)
            checkpoint.load_strict(self.features, weights, str(folder / FEATURES))
        checkpoint.set_random_state(checkpoint.read_tensors(folder / "random.safetensors"))
        if self.teacher is not None:
            self.teacher.evaluations = state["teacher_evaluations"]
        self.step_number = Fields(state, str(folder / "state.json")).whole("step")


FEATURES = "features.safetensors"


def make_trainable(network: nn.Module) -> None:
    """Let every parameter learn, but for those that a network's own code holds fixed."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        network.requires_grad_(True)


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Recompute activations in the backward pass. Raises UsageError where a network cannot."""
    enable: Callable[[], None] | None = getattr(network, "enable_gradient_checkpointing", None)
    if enable is None or not getattr(network, "_supports_gradient_checkpointing", True):
        raise UsageError(
            f"--gradient-checkpointing: {type(network).__name__} has no "
            "enable_gradient_checkpointing(), as diffusers' models do; expected to go without"
        )
    enable()


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a scheduler's state; its functions are rebuilt from the config."""
    return {k: v for k, v in state.items() if k != "lr_lambdas"} | {"lr_lambdas": [None]}
