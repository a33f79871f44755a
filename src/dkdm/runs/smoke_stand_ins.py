"""What takes the place of pretrained models and images that are not there, for `--smoke`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.conditioning import ClassLabels, Conditioning, Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.randomness import generator
from dkdm.data.fashion.text_base import (
    LATENT_CHANNELS,
    make_autoencoder,
    make_encoder,
    make_tokenizer,
    write_text_base,
)
from dkdm.errors import DkdmError, UsageError
from dkdm.models.pipeline_folder import read_base
from dkdm.models.prompts import with_prompts
from dkdm.models.schedulers import from_scheduler_config, named_config, prediction_type
from dkdm.runs.paper_recipes import TO_BE_GIVEN
from dkdm.students import student_of

CLASSES, NETWORK, TEXT_NETWORK = 10, "unet-mini", "mmdit-tiny"
PROMPT = "a white sneaker"
TEXT_BASE = "text-base"


@dataclass(frozen=True)
class StandIn:
    """What a model with random weights needs to take the place of a pretrained one.

    text: it reads prompts, and has the autoencoder and the text encoders of `text_base`.
    """

    shape: tuple[int, int, int]
    scheduler: str = "ddpm-linear"
    variance: Literal["fixed_small", "learned_range"] = "fixed_small"
    classes: int | None = None
    text: bool = False


STAND_INS: dict[str, StandIn] = {
    "(CIFAR-10 teacher)": StandIn((3, 32, 32), "ddpm-cosine", "learned_range"),
    "(CelebA-64 teacher)": StandIn((3, 64, 64), "ddpm-cosine", "learned_range"),
    "(ImageNet-32 teacher)": StandIn((3, 32, 32), "ddpm-cosine", "learned_range"),
    "(CelebA-HQ teacher)": StandIn((3, 64, 64)),
    "(FFHQ teacher)": StandIn((3, 64, 64)),
    "runs/cifar10-teacher": StandIn((3, 32, 32)),
    "runs/fashion-dit-teacher": StandIn((1, 16, 16), classes=CLASSES),
    "runs/fashion-latent": StandIn((4, 8, 8)),
    "runs/fashion-latent-base": StandIn((1, 8, 8)),
    "runs/fashion-text": StandIn((LATENT_CHANNELS, 7, 7), "flow", text=True),
    "runs/fashion-text-base": StandIn((1, 28, 28), "flow", text=True),
}


def lacks(place: str) -> StandIn | None:
    """What stands in for a pretrained model; None for one that is there.

    Raises UsageError if nothing does.
    """
    if place not in TO_BE_GIVEN and (Path(place).exists() or not place.startswith("runs/")):
        return None
    if place not in STAND_INS:
        raise UsageError(
            f"--smoke: there is no {place}, and nothing stands in for it: make it first, "
            "docs/teachers.md says how"
        )
    return STAND_INS[place]


def stand_in_teacher(place: str, scratch: Path) -> Denoiser | None:
    """A narrow network of random weights in place of a model that is not there, else None.

    scratch: holds what comes with a text model.
    """
    about = lacks(place)
    if about is None:
        return None
    scheduler, bundle, conditioning = _surroundings(about, scratch)
    like = Denoiser(
        lambda x, *_, **__: x,
        from_scheduler_config(scheduler),
        Parameterization(prediction_type(scheduler), about.variance),
        about.shape,
        conditioning,
        bundle=bundle,
    )
    torch.manual_seed(0)
    found = replace(student_of(TEXT_NETWORK if about.text else NETWORK, like), name="stand-in")
    assert isinstance(found.network, nn.Module)
    found.network.eval()  # as a model that is read
    return found


def _surroundings(about: StandIn, scratch: Path) -> tuple[Mapping[str, Any], Bundle, Conditioning]:
    """Scheduler config, other components and conditions of a stand-in."""
    if about.text:
        scheduler, bundle, text = read_base(stand_in_text_base(scratch))
        assert scheduler is not None and text is not None  # as it was written
        return scheduler, bundle, with_prompts(text, (PROMPT,))
    classes = about.classes
    labels = None if classes is None else ClassLabels(classes + 1, null_class=classes)
    return named_config(about.scheduler, 1.0), Bundle(), labels or Unconditional()


def stand_in_text_base(scratch: Path) -> Path:
    """What a text model has beside its denoiser, with random weights.

    Raises DkdmError without transformers.
    """
    if find_spec("transformers") is None:
        raise DkdmError("--smoke: prompts need transformers: pip install 'dkdm[text]'")
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    autoencoder.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    tokenizer = make_tokenizer()
    encoders = [make_encoder(len(tokenizer), seed) for seed in range(2)]
    write_text_base(scratch / TEXT_BASE, autoencoder, tokenizer, encoders)
    return scratch / TEXT_BASE


def stand_in_images(folder: Path, shape: tuple[int, ...]) -> Path:
    """Two images of random pixels, with captions, in each of ten class folders."""
    random = generator("cpu", 0, "smoke")
    channels, height, width = shape
    for label in range(CLASSES):
        (folder / f"{label}").mkdir(parents=True)
        for number in range(2):
            size = (height, width, channels)
            pixels = torch.randint(256, size, generator=random, dtype=torch.uint8)
            mode = "L" if channels == 1 else "RGB"
            picture = Image.frombytes(mode, (width, height), bytes(pixels.flatten().tolist()))
            picture.save(folder / f"{label}" / f"{number}.png")
            (folder / f"{label}" / f"{number}.txt").write_text(PROMPT, encoding="utf-8")
    return folder
