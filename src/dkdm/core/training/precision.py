"""In what a run computes: its teacher under the run's autocast, matrix products in TF32."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.graphs import Replayed, unreplayed
from dkdm.core.denoisers.teachers import Teachers
from dkdm.core.training.learning import autocasting


def in_precision(model: Denoiser, accelerator: Accelerator) -> Denoiser:
    """The same model, evaluated under the autocast of the run.

    Times are fed in float32, and outputs read in it, so that what autocast rounds is inside of the
    network. Weights in another precision than float32 say themselves what is computed in, and a
    function without weights computes as it does.
    """
    if accelerator.mixed_precision == "no":
        return model
    if isinstance(model, Teachers):
        members = tuple(in_precision(one, accelerator) for one in model.members)
        return replace(model, members=members)
    if model.dtype != torch.float32:
        return model
    call = autocasting(accelerator, unreplayed(model.call))
    made = type(model.call) if isinstance(model.call, Replayed) else None
    return replace(model, call=made(call) if made else call)


def allow_tf32(device: torch.device) -> None:
    """Let float32 matrix products of a CUDA device round their factors to 10 bits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
