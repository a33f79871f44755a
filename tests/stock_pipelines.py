"""Pipelines of diffusers, run with everything recorded that goes in and out of their parts."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import dkdm
from dkdm.core.denoisers.denoiser import Batch
from dkdm.models.prompts import Prompts

STEPS = 4


PROMPTS = ["a red cat", "a blue dog"]


NEGATIVE = "blurry"


def as_ddim(config):
    """The one-step rule for a solver's betas. Its moves are its grid with leading spacing only."""
    given = {key: value for key, value in config.items() if key != "_use_default_values"}
    return DDIMScheduler.from_config(given, clip_sample=False, timestep_spacing="leading")


def as_flow(config):
    return FlowMatchEulerDiscreteScheduler(shift=config.flow_shift)


@dataclass(frozen=True)
class Case:
    """A pipeline, how it is run, and how its denoiser is run likewise.

    build: makes it. size: what its network's config does not say. call: arguments of the pipeline.
    guidance: scale of both. swap: scheduler in place of one with a memory. spacing: that of the
    pipeline's own steps. eta: of the scheduler. skip: first steps whose moves are no reference.
    """

    build: Any
    size: tuple[int, ...] | None = None
    call: dict[str, Any] = field(default_factory=dict)
    guidance: float = 1.0
    swap: Any = None
    spacing: str | None = None
    eta: float = 0.0
    skip: int = 0


def text(build, negative=NEGATIVE, **options):
    call = {"prompt": PROMPTS, "guidance_scale": 3.0, "height": 16, "width": 16}
    call |= {} if negative is None else {"negative_prompt": [negative] * 2}
    return Case(build, call=call | options.pop("call", {}), guidance=3.0, **options)


UNCONDITIONAL = {"batch_size": 2}


CAPTIONS = {"use_resolution_binning": False, "clean_caption": False}


@dataclass
class Recording:
    """What a pipeline did: (output, t, x, next x) of each step, embeddings, latents and pixels."""

    steps: list[Any] = field(default_factory=list)
    embeddings: Any = None
    latents: Any = None
    pixels: Any = None

    def record(self, pipeline, call):
        """Run the pipeline with everything recorded."""
        scheduler, coder = pipeline.scheduler, getattr(pipeline, "vae", None)
        coder = coder or getattr(pipeline, "vqvae", None)
        step = scheduler.step

        def recorded_step(output, t, x, *arguments, **options):
            if hasattr(scheduler, "ets"):
                scheduler.ets.clear()  # its memory of earlier steps
            result = step(output, t, x, *arguments, **options)
            self.steps.append((output, t, x, result[0]))
            return result

        scheduler.step = recorded_step
        if coder is not None:
            decode = coder.decode

            def recorded_decode(latents, *arguments, **options):
                result = decode(latents, *arguments, **options)
                self.pixels = result[0]
                return result

            coder.decode = recorded_decode
        if "prompt" in call:
            encode = pipeline.encode_prompt

            def recorded_encode(*arguments, **options):
                self.embeddings = encode(*arguments, **options)
                return self.embeddings

            pipeline.encode_prompt = recorded_encode
        pipeline.set_progress_bar_config(disable=True)
        pipeline(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1))
        return self


@dataclass
class Opened:
    """A saved pipeline, what it did, and the denoiser that dkdm makes of its folder."""

    case: Case
    folder: Any
    pipeline: Any
    recording: Recording
    denoiser: Any

    @property
    def cond(self):
        """The conditions of the two samples that the pipeline drew."""
        conditioning = self.denoiser.conditioning
        if isinstance(conditioning, Prompts):
            return conditioning.of(PROMPTS)
        labels = self.case.call.get("class_labels")
        return {} if labels is None else conditioning.of(labels)

    def latents(self, x):
        """States as dkdm has them: Flux's pipeline packs them; DiT's doubles them for guidance."""
        if x.ndim == 3 and "prompt" in self.case.call:
            x = self.pipeline._unpack_latents(x, 16, 16, self.pipeline.vae_scale_factor)
        return x[:2]

    def together(self):
        """All recorded steps as one batch, with outputs and next states; each sample has its t."""
        levels = self.denoiser.process.timesteps(STEPS, self.case.spacing)
        t = torch.tensor(levels).repeat_interleave(2)
        s = torch.tensor([*levels[1:], -1]).repeat_interleave(2)
        outputs, times, x, following = zip(*self.recording.steps, strict=True)
        outputs, x, following = (
            torch.cat([self.latents(value) for value in values])
            for values in (outputs, x, following)
        )
        times = torch.tensor([float(time) for time in times]).repeat_interleave(2)
        cond = {key: value.repeat(STEPS) for key, value in self.cond.items()}
        return Batch(x, t, cond, t), s, times, outputs, following


def assert_close(ours, theirs, tolerance=1e-5):
    """Every sample agrees, relative to its own largest value."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().flatten(1).amax(1) / theirs.abs().flatten(1).amax(1)
    assert error.isfinite().all()
    assert error.max() <= tolerance, error


SMALL = dkdm.DistillConfig(
    max_train_steps=3,
    train_batch_size=2,
    pool_size=8,
    fill_steps=2,
    logging_steps=1,
    validation_steps=0,
    validation_sampling_steps=2,
    evaluation_samples=0,
)
