"""Images from latents, by a function that the user gives."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dkdm.core.denoisers.modes import evaluating
from dkdm.errors import UsageError, in_a_line, raised_as


def no_decoder(latents: Tensor) -> Tensor:
    """The `decode` of a model whose autoencoder is not in its folder: raises UsageError."""
    raise UsageError(
        f"the samples are latents {tuple(latents.shape[1:])} of an autoencoder that is not in the "
        "model's folder: give --output x.safetensors, or in Python dataclasses.replace(denoiser, "
        "decode=function)"
    )


_DECODES = "give a function of latents [B, ...] that returns images [B, 1 or 3, height, width]"


def decoded(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """Images [B, ...] of latents, detached, in float32. Raises UsageError for anything else."""

    def explained(error: Exception) -> UsageError:
        what = f"decode failed for latents {tuple(latents.shape)}: {in_a_line(error)}"
        return UsageError(f"{what}; {_DECODES}")

    with raised_as(explained), evaluating(decode):
        found = decode(latents)
    if not isinstance(found, Tensor) or found.ndim < 3 or len(found) != len(latents):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(f"decode returned {what} for latents {tuple(latents.shape)}; {_DECODES}")
    if found.ndim == 4 and found.shape[1] not in (1, 3) and found.shape[3] in (1, 3):
        raise UsageError(
            f"decode returned {tuple(found.shape)}, channels last: add .permute(0, 3, 1, 2)"
        )
    return found.detach().float()
