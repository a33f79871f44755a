"""The autoencoder of a latent model whose checkpoint file does not hold it."""

from __future__ import annotations

from pathlib import Path

from dkdm.core.bundle import Bundle
from dkdm.errors import UsageError
from dkdm.models.components import Autoencoder, Component
from dkdm.reading.places import check_folder


def latent_bundle(folder: str | None, channels: int, pipeline: str | None = None) -> Bundle:
    """A diffusers AutoencoderKL in `folder` as a bundle; None is no autoencoder.

    channels: of the latents. pipeline: the diffusers pipeline that takes both. Raises UsageError
    where there is no autoencoder, or one of other latents.
    """
    if folder is None:
        return Bundle()
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise UsageError(
            f"--vae {folder}: give the folder of a diffusers AutoencoderKL, with config.json"
        )
    component = Component(check_folder(path), "diffusers", "AutoencoderKL")
    autoencoder = Autoencoder(component)
    if autoencoder.latent_channels != channels:
        raise UsageError(
            f"--vae {folder}: its latents have {autoencoder.latent_channels} channels, the "
            f"network's samples {channels}: they do not belong together"
        )
    return Bundle(pipeline, {"vae": component}, autoencoder)
