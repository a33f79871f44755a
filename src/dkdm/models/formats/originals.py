"""Checkpoint files of the original repositories, told apart by their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.errors import DkdmError, UsageError
from dkdm.models.formats import dit, edm, edm2, guided_diffusion, latent_diffusion, lucidrains
from dkdm.models.formats.single_file import SingleFile, load_single_file, part_of_a_model, recognize
from dkdm.models.formats.state_dict import Weights, read_shapes, read_weights, views
from dkdm.models.options import LoadOptions
from dkdm.reading.sizes import building


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
    """Load a checkpoint file. Raises UsageError if its format is not known."""
    if name is not None and name not in FORMATS:
        raise UsageError(f"--teacher-format {name}: use one of {', '.join(FORMATS)}")
    if path.is_dir():
        raise UsageError(f"--teacher-format {name}: {path} is a folder: give a checkpoint file")
    if name is None and path.suffix == ".safetensors" and path.is_file():
        known = recognize(read_shapes(path))
        if known is not None:
            return _single_file(path, known, options)
    weights = read_weights(path, ema=options.ema)
    shapes = {key: tuple(value.shape) for key, value in weights.tensors.items()}
    known = recognize(shapes) if name is None else None
    if known is not None:
        return _single_file(path, known, options)
    name, weights = _format_of(weights, name, options.ema)
    if name is None:
        raise _unknown(weights, part_of_a_model(path, shapes))
    _refuse_unused(path, name, options)
    with building({}, str(path), FORMATS[name].summary, path):
        try:
            return FORMATS[name].load(weights, options)
        except KeyError as error:
            raise DkdmError(
                f"{path}: not a whole checkpoint of {FORMATS[name].summary}: {error} is missing. "
                f"Its weights begin with {', '.join(list(weights.tensors)[:3])}"
            ) from error


def _single_file(path: Path, known: SingleFile | str, options: LoadOptions) -> Denoiser:
    if isinstance(known, str):
        raise UsageError(f"{path}: {known}")
    return load_single_file(path, known, options)


def _format_of(weights: Weights, name: str | None, ema: bool) -> tuple[str | None, Weights]:
    """The format that knows the weights, and these by the names that it knows them by.

    name: the only one that is asked; it gets them as they are if it does not know them.
    """
    for view in views(weights, ema):
        for key in FORMATS if name is None else (name,):
            if FORMATS[key].recognizes(view.tensors):
                return key, view
    return name, weights


def _refuse_unused(path: Path, name: str, options: LoadOptions) -> None:
    if options.scheduler is not None:
        raise UsageError(
            f"--teacher-scheduler: {path} is a checkpoint of {FORMATS[name].summary}, which has "
            "its own noise process: remove this option"
        )
    if options.lora:
        raise UsageError(
            f"--teacher-lora: {path} is a checkpoint of {FORMATS[name].summary}, which takes no "
            "LoRA: remove this option"
        )


def _unknown(weights: Weights, part: str | None) -> UsageError:
    """What to do with weights of a network that only the user knows."""
    if part is not None:
        return UsageError(f"{weights.path}: {part}")
    file = repr(str(weights.path))
    reader = "safetensors.torch.load_file({0})"
    if weights.path.suffix != ".safetensors":
        reader = "torch.load({0}, weights_only=True)"
    return UsageError(
        f"{weights.path}: the format of these weights is not known (they begin with "
        f"{', '.join(list(weights.tensors)[:4])}). If it is one of {', '.join(FORMATS)}, give "
        "--teacher-format. If the network is yours, write teacher.py, with your own betas, "
        "prediction and shape, and give teacher:load in place of the file:\n"
        "    import dkdm, torch; from yours import YourNetwork\n"
        "    def load():\n"
        f"        network = YourNetwork(); network.load_state_dict({reader.format(file)})\n"
        "        return dkdm.Denoiser(network, dkdm.from_betas(torch.linspace(1e-4, 0.02, 1000)), "
        'dkdm.Parameterization("epsilon"), (3, 32, 32))'
    )
