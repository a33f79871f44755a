"""`--smoke`: any run for two steps of a tiny batch, to see that the whole pipeline holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dkdm.config import DistillConfig, RunConfig, TrainConfig
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.few_steps.model import usual_steps
from dkdm.data.fashion import SHAPES
from dkdm.data.named import IMAGES
from dkdm.errors import DkdmError
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.models import load_teacher
from dkdm.models.pipeline_folder import read_base
from dkdm.models.prompts import Prompts, with_prompts
from dkdm.reading.files import cache_dir
from dkdm.runs.distill import distill
from dkdm.runs.smoke_stand_ins import (
    PROMPT,
    TEXT_BASE,
    lacks,
    stand_in_images,
    stand_in_teacher,
    stand_in_text_base,
)
from dkdm.runs.train import train

Settings = dict[str, Any]
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


def smoke(config: RunConfig) -> str:
    """Run the config small, in a folder that is removed; returns in words what was done.

    It trains, saves, resumes nothing, measures, writes the model's folder, reads it again and
    samples it. The student is as large as ever. A teacher, a base or images that are not there have
    stand-ins: random weights, random pixels. Raises what the run raises, and UsageError if nothing
    can stand in.
    """
    started = time.monotonic()
    with TemporaryDirectory(prefix="dkdm-smoke-") as scratch, forgotten(Path(scratch)):
        small, stood_in = shrunk(config, Path(scratch))
        if isinstance(small, DistillConfig):
            teacher = stand_in_teacher(small.teacher_choice.model, Path(scratch))
            folder = distill(teacher, None, small)
        else:
            assert isinstance(small, TrainConfig)
            folder = train(small)
        model = with_a_prompt(load_teacher(str(folder)), small.conditions.negative_prompt)
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
        about = lacks(teacher)
        shape = SHAPES[0] if about is None else about.shape
        stood_in += [] if about is None else [teacher]
        if about is not None and about.text:
            changed["prompts"] = PROMPT
    else:
        assert isinstance(config, TrainConfig)
        base, images, shape = config.model.base, config.data.images, config.data.sample_shape
        about = None if base is None else lacks(base)
        if base is not None and about is not None:
            shape = about.shape
            own = str(stand_in_text_base(scratch)) if about.text else None
            changed |= {"base": own, "sample_shape": shape}
            stood_in.append(base)
    if stood_in:
        changed["evaluation_reference"] = "none"
    encodes_all = about is not None and about.text
    if images is not None and (encodes_all or _no_images(images, shape)):
        changed["images"] = str(stand_in_images(scratch / "images", shape))
        stood_in.append(images)
    return replace(config, **changed), stood_in


@contextmanager
def forgotten(scratch: Path) -> Iterator[None]:
    """Remove the cached prompts of a stand-in's text encoders at the end."""
    try:
        yield
    finally:
        base = scratch / TEXT_BASE
        text = read_base(base)[2] if base.is_dir() else None
        if text is not None:
            rmtree(cache_dir("prompts") / text.encoders.fingerprint, ignore_errors=True)


def with_a_prompt(model: Denoiser, negative: str) -> Denoiser:
    """A text model with a prompt to draw: the negative one, which its run has encoded."""
    text = model.conditioning
    if not isinstance(text, Prompts):
        return model
    return replace(model, conditioning=with_prompts(text, (negative,), negative))


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
