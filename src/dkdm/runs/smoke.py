"""`--smoke`: any run for two steps of a tiny batch, to see that the whole pipeline holds."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from dkdm.config import DistillConfig, RunConfig, TrainConfig
from dkdm.core.denoisers.conditioning import ClassLabels, Conditioning, Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.few_steps.model import usual_steps
from dkdm.core.randomness import generator
from dkdm.data.fashion import SHAPES
from dkdm.data.named import IMAGES
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.models import load_teacher
from dkdm.models.schedulers import from_scheduler_config, named_config
from dkdm.runs.distill import distill
from dkdm.runs.paper_recipes import TO_BE_GIVEN
from dkdm.runs.train import train
from dkdm.students import student_of

Settings = dict[str, Any]
CLASSES, NETWORK = 10, "unet-mini"
SMALL: Settings = {
    "max_train_steps": 2,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "lr_warmup_steps": 0,
    "checkpointing_steps": 1,
    "resume_from_checkpoint": None,
    "logging_steps": 1,
    "report_to": "none",
    "validation_steps": 0,
    "validation_metric": None,
    "ship_best": False,
    "validation_sampling_steps": 2,
    "evaluation_samples": 2,
    "push_to_hub": False,
}
SMALL_SOURCE: Settings = {
    "check": False,
    "pool_size": 8,
    "fill": "few-step",
    "fill_steps": 2,
    "keep_finished": 0,
}


@dataclass(frozen=True)
class StandIn:
    """What a model with random weights needs to take the place of a pretrained one."""

    shape: tuple[int, int, int]
    scheduler: str = "ddpm-linear"
    variance: Literal["fixed_small", "learned_range"] = "fixed_small"
    classes: int | None = None


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
}


def smoke(config: RunConfig) -> str:
    """Run the config small, in a folder that is removed; returns in words what was done.

    It trains, saves, resumes nothing, measures, writes the model's folder, reads it again and
    samples it. The student is as large as ever. A teacher, a base or images that are not there have
    stand-ins: random weights, random pixels. Raises what the run raises, and UsageError if nothing
    can stand in.
    """
    started = time.monotonic()
    with TemporaryDirectory(prefix="dkdm-smoke-") as scratch:
        small, stood_in = shrunk(config, Path(scratch))
        if isinstance(small, DistillConfig):
            teacher = stand_in_teacher(small.teacher_choice.model)
            folder = distill(teacher, None, small)
        else:
            assert isinstance(small, TrainConfig)
            folder = train(small)
        model = load_teacher(str(folder))
        sampling = Sampling(2, usual_steps(model, 2), seed=0)
        drawn = draw(model, model.conditioning.in_turns(2), sampling)
    if not bool(drawn.isfinite().all()):
        raise DkdmError("the model that was written draws samples that are not finite")
    about = f"{model.num_parameters:,} parameters, samples of {tuple(drawn.shape[1:])}"
    with_what = f" (stand-ins: {', '.join(stood_in)})" if stood_in else ""
    return f"the pipeline holds: {about}, {time.monotonic() - started:.0f} s{with_what}"


def shrunk(config: RunConfig, scratch: Path) -> tuple[RunConfig, list[str]]:
    """The config of a smoke run in a folder, and what has a stand-in."""
    changed = SMALL | {"output_dir": scratch / "run"}
    if config.training.mixed_precision == "fp16" and not torch.cuda.is_available():
        changed["mixed_precision"] = "no"
    stood_in = []
    if isinstance(config, DistillConfig):
        changed |= SMALL_SOURCE | {"rho": DistillConfig().pool.rho}  # which --pool-size rules out
        synthetic = config.pool.source == "synthetic"
        changed["synthetic_samples"] = 4 if synthetic else None
        changed |= {"synthetic_steps": 2} if synthetic else {}
        teacher, images = config.teacher_choice.model, config.images_choice.images
        shape = SHAPES[0] if lacks(teacher) is None else STAND_INS[teacher].shape
        stood_in += [] if lacks(teacher) is None else [teacher]
    else:
        assert isinstance(config, TrainConfig)
        base, images, shape = config.model.base, config.data.images, config.data.sample_shape
        if base is not None and lacks(base) is not None:
            shape = STAND_INS[base].shape
            changed |= {"base": None, "sample_shape": shape}
            stood_in.append(base)
    if stood_in:
        changed["evaluation_reference"] = "none"
    if images is not None and _no_images(images, shape):
        changed["images"] = str(stand_in_images(scratch / "images", shape))
        stood_in.append(images)
    return replace(config, **changed), stood_in


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


def stand_in_teacher(place: str) -> Denoiser | None:
    """A narrow UNet of random weights in place of a model that is not there, else None."""
    about = lacks(place)
    if about is None:
        return None
    classes: Conditioning = Unconditional()
    if about.classes is not None:
        classes = ClassLabels(about.classes + 1, null_class=about.classes)
    like = Denoiser(
        lambda x, *_, **__: x,
        from_scheduler_config(named_config(about.scheduler, 1.0)),
        Parameterization("epsilon", about.variance),
        about.shape,
        classes,
    )
    torch.manual_seed(0)
    found = replace(student_of(NETWORK, like), name="stand-in")
    assert isinstance(found.network, nn.Module)
    found.network.eval()  # as a model that is read
    return found


def stand_in_images(folder: Path, shape: tuple[int, ...]) -> Path:
    """Two images of random pixels in each of ten class folders."""
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
    return folder


def _no_images(spec: str, shape: tuple[int, ...]) -> bool:
    """Whether no images of this shape are there."""
    known = IMAGES.get(spec)
    if known is None:
        return not Path(spec).is_dir()
    try:
        known(shape)
    except DkdmError:
        return True
    return False
