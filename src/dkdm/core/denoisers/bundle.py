"""What comes with a denoiser: its pipeline's other components, the autoencoder among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Coder(Protocol):
    """An autoencoder: between pixels in [-1, 1] and the standardized latents of a denoiser.

    component: the `models.components.Component` it is loaded from.
    """

    component: Any

    @property
    def config(self) -> dict[str, Any]:
        """Its config as the loaded object has it: `latents_mean`, `scale_factor_temporal`, ..."""

    @property
    def latent_channels(self) -> int | None:
        """Channels of its latents; None if unknown."""

    def standard(self, pipeline: str | None = None) -> tuple[list[float], list[float]]:
        """(shift, scale) as a diffusers pipeline reads them, one number each or one a channel."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, C, H, W] (or [B, C, F, H, W]) of standardized latents."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Standardized latents of pixels; generator: on their device; None takes the mean."""

    def idle(self) -> None:
        """Leave the device until it is used again."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """The rest of a pipeline: what a student ships beside its network.

    pipeline: class name of the diffusers pipeline it came from; None if it came from no pipeline.
    components: by their names in model_index.json, without denoiser and scheduler, each a
        `models.components.Component`.
    autoencoder: None in pixel space.
    entries: further entries of model_index.json, for the same pipeline's use.
    """

    pipeline: str | None = None
    components: Mapping[str, Any] = field(default_factory=dict)
    autoencoder: Coder | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)
