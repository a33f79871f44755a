"""Whether a trainer's step is captured as a whole, and what happens if it cannot be."""

from __future__ import annotations

import torch
from torch import Tensor

from dkdm.core.calls import offloaded_to
from dkdm.core.captured.step import WholeStep
from dkdm.core.denoiser import Denoiser
from dkdm.core.objective import Objective
from dkdm.core.pool import Pool
from dkdm.core.replay import Replayed
from dkdm.core.trainer import Trainer
from dkdm.reading.notes import say


def capture_steps(trainer: Trainer) -> None:
    """Let a trainer start each step as one CUDA graph; say why, if it cannot be.

    The graph is made in the first step. If that fails, steps are as usual.
    """
    reason = misfit(trainer)
    if reason is not None:
        _say(reason)
        return

    def first() -> Tensor:
        trainer.replay = None
        try:
            whole = WholeStep(trainer)
            whole.prepare()
            trainer.replay = whole
        except Exception as error:
            _say(str(error))
        return trainer.step()

    trainer.replay = first


def misfit(trainer: Trainer) -> str | None:
    """Why a trainer's step cannot be captured as a whole; None if it can be tried."""
    accelerator, source = trainer.accelerator, trainer.source
    source = source.source if isinstance(source, Replayed) else source
    if accelerator.device.type != "cuda":
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
    return next(filter(None, (_misfit_of(one, source, accelerator.device) for one in models)), None)


def _misfit_of(model: Denoiser, pool: Pool, device: torch.device) -> str | None:
    """Why a model's calls have no fixed shapes on this device."""
    if type(model) is not Denoiser:
        return f"{model.name} is several models, or one of a few steps"
    if model.device != device or offloaded_to(model.network) is not None:  # type: ignore[arg-type]
        return f"{model.name} is not on {device}"
    if getattr(model.conditioning, "null_is_absent", False):
        return f"{model.name} is called without an argument for no class"
    guided = model is pool.teacher and not pool.guidance.is_off and not model.embeds_guidance
    if guided and not bool(model.guided_levels.all()):
        return "it is guided at some levels only"
    return None


def _say(reason: str) -> None:
    say(f"note: the step is not captured as one CUDA graph: {reason}")
