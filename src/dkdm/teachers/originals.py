"""Checkpoint files of the original repositories, told apart by their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dkdm.denoiser import Denoiser
from dkdm.errors import UsageError
from dkdm.teachers import dit, edm, edm2, guided_diffusion, latent_diffusion, lucidrains
from dkdm.teachers.options import LoadOptions
from dkdm.teachers.state_dict import Weights, read_weights


@dataclass(frozen=True)
class Format:
    """A checkpoint format: how to recognize it, and how to load it.

    recognizes: whether these weights are of this format. load: (weights, options) -> denoiser.
    """

    summary: str
    recognizes: Callable[[Mapping[str, Tensor]], bool]
    load: Callable[[Weights, LoadOptions], Denoiser]


FORMATS: dict[str, Format] = {
    "dit": Format("facebookresearch/DiT", dit.recognizes_dit, dit.load_dit),
    "sit": Format("willisma/SiT", dit.recognizes_sit, dit.load_sit),
    "edm": Format("NVlabs/edm", edm.recognizes, edm.load),
    "edm2": Format("NVlabs/edm2", edm2.recognizes, edm2.load),
    "lucidrains": Format(
        "lucidrains/denoising-diffusion-pytorch", lucidrains.recognizes, lucidrains.load
    ),
    "guided-diffusion": Format(
        "openai/guided-diffusion, openai/improved-diffusion, forever208/DDPM-IP",
        guided_diffusion.recognizes,
        guided_diffusion.load,
    ),
    "latent-diffusion": Format(
        "CompVis/latent-diffusion", latent_diffusion.recognizes, latent_diffusion.load
    ),
}


def load_original(path: Path, name: str | None, options: LoadOptions) -> Denoiser:
    """Load a checkpoint file. Raises UsageError where its format is not known."""
    if name is not None and name not in FORMATS:
        raise UsageError(f"--teacher-format {name}: expected one of {', '.join(FORMATS)}")
    if path.is_dir():
        raise UsageError(
            f"{path}: expected a diffusers pipeline folder (with model_index.json) or a checkpoint "
            f"file of {', '.join(FORMATS)}"
        )
    weights = read_weights(path, ema=options.ema)
    if name is None:
        name = next((key for key, one in FORMATS.items() if one.recognizes(weights.tensors)), None)
    if name is None:
        raise UsageError(
            f"{path}: the format of these weights is not known (first keys: "
            f"{', '.join(list(weights.tensors)[:4])}): expected --teacher-format with one of "
            f"{', '.join(FORMATS)}"
        )
    return FORMATS[name].load(weights, options)
