"""Whether a trainer's step is captured as a whole, and what happens if it cannot be."""

from __future__ import annotations

from functools import partial

import torch

from dkdm.core.captured.graph import captured
from dkdm.core.captured.step import Make, first_step, say_why_not
from dkdm.core.denoisers.calls import offloaded_to
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.graphs import has_hooks
from dkdm.core.objectives.objective import Objective
from dkdm.core.sources.pool import Pool
from dkdm.core.sources.replay import Replayed
from dkdm.core.training.trainer import Trainer


def capture_steps(trainer: Trainer, make: Make = captured) -> None:
    """Let a trainer start each step as one CUDA graph, if its options allow it and the step fits.

    If `--accelerate graph` asks for it, a note says why it does not fit. The graph is made and
    checked in the first step, see `first_step`.
    """
    training = trainer.training
    if training.acceleration != "graph":
        return
    reason = misfit(trainer)
    if reason is None:
        trainer.replay = partial(first_step, trainer, make)
    elif training.accelerate == "graph":
        say_why_not(reason)


def misfit(trainer: Trainer) -> str | None:
    """Why a trainer's step cannot be captured as a whole; None if it can be tried."""
    accelerator, source = trainer.accelerator, trainer.source
    source = source.source if isinstance(source, Replayed) else source
    device = trainer.losses.sums.device  # the accelerator's may lack its number
    if device.type != "cuda":
        return "there is no CUDA device"
    if accelerator.num_processes > 1 or trainer.training.fsdp != "none":
        return "several processes share it"
    if accelerator.scaler is not None:
        return "fp16 scales its loss by what the gradients are"
    if trainer.training.gradient_checkpointing:
        return "activations are computed again"
    if not isinstance(source, Pool) or source.finished is not None:
        return "its source is no pool alone (--source, --keep-finished, --objective)"
    if not isinstance(trainer.objective, Objective):
        return "its objective looks at single batches"
    models = source.teacher, trainer.student_on_teacher_levels
    return next(filter(None, (_misfit_of(one, source, device) for one in models)), None)


def _misfit_of(model: Denoiser, pool: Pool, device: torch.device) -> str | None:
    """Why a model's calls have no fixed shapes on this device."""
    if type(model) is not Denoiser:
        return f"{model.name} is several models, or one of a few steps"
    if model.device != device or offloaded_to(model.network) is not None:  # type: ignore[arg-type]
        return f"{model.name} is not on {device}"
    if has_hooks(model.network.modules()):  # type: ignore[union-attr]
        return f"{model.name} has hooks, which a graph does not call"
    if getattr(model.conditioning, "null_is_absent", False):
        return f"{model.name} is called without an argument for no class"
    guided = model is pool.teacher and not pool.guidance.is_off and not model.embeds_guidance
    if guided and not bool(model.guided_levels.all()):
        return "it is guided at some levels only"
    return None
