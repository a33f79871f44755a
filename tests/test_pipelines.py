"""Every pipeline format of diffusers: what the real pipeline computes is what its denoiser computes.

The real pipeline is run for a few steps, and everything that goes into and comes out of its
scheduler, its text encoders and its autoencoder is recorded. All these states then make one batch
in which each sample has its own t.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import pipelines
from dkdm import load_teacher
from dkdm.denoiser import Batch
from dkdm.prompts import Prompts
from dkdm.steps import reverse_step
from dkdm.teachers import LoadOptions, with_texts

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning",
    "ignore:.*:FutureWarning",  # of diffusers and transformers
)
STEPS = 4
PROMPTS = ["a red cat", "a blue dog"]
NEGATIVE = "blurry"


def as_ddim(config):
    """The one-step rule for a solver's betas. Its moves are its grid with leading spacing only."""
    return DDIMScheduler.from_config(config, clip_sample=False, timestep_spacing="leading")


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
LUMINA = {  # the levels that the other pipelines visit by themselves
    "sigmas": np.linspace(1, 6 / 1005, STEPS).tolist(),
    "cfg_normalization": False,
}
CASES = {
    "ddpm": Case(pipelines.ddpm, call=UNCONDITIONAL, eta=1.0),
    "ddim": Case(pipelines.ddim, call=UNCONDITIONAL),
    "ldm-vq": Case(pipelines.ldm_vq, call=UNCONDITIONAL),
    "ldm-kl": Case(pipelines.ldm_kl, call=UNCONDITIONAL),
    "dit": Case(pipelines.dit, call={"class_labels": [1, 4], "guidance_scale": 1.0}),
    "stable-diffusion": text(pipelines.stable_diffusion, swap=as_ddim),
    "stable-diffusion-v": text(pipelines.stable_diffusion_v),
    "sdxl": text(pipelines.sdxl, None, swap=as_ddim),
    "pixart": text(pipelines.pixart, swap=as_ddim, spacing="leading", call=CAPTIONS),
    "pixart-sigma": text(pipelines.pixart_sigma, swap=as_ddim, spacing="leading", call=CAPTIONS),
    "sd3": text(pipelines.sd3, spacing="linspace"),
    "flux": text(pipelines.flux, None, size=(8, 8)),
    "sana": text(
        pipelines.sana,
        "",
        size=(16, 16),
        swap=as_flow,
        spacing="linspace",
        call={**CAPTIONS, "height": 32, "width": 32},
    ),
    "lumina": text(pipelines.lumina, "", spacing="linspace", call=LUMINA),
    "wan": text(pipelines.wan, size=(2, 2, 2), spacing="linspace", call={"num_frames": 5}),
    "dance": Case(pipelines.dance, call=UNCONDITIONAL, skip=1),
}
TEXT_CASES = [name for name, case in CASES.items() if "prompt" in case.call]


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


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Pipelines by name; each is made, saved, run and loaded once."""
    root, known = tmp_path_factory.mktemp("pipelines"), {}
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def open_one(name):
        if name in known:
            return known[name]
        case, folder = CASES[name], root / name
        torch.manual_seed(0)
        case.build().save_pretrained(folder)
        absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
        pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
        if case.swap:
            pipeline.scheduler = case.swap(pipeline.scheduler.config)
        recording = Recording().record(pipeline, case.call)
        denoiser = load_teacher(str(folder), options=LoadOptions(sample_size=case.size))
        if "prompt" in case.call:
            negative = case.call.get("negative_prompt", [""])[0]
            denoiser = with_texts(denoiser, str(prompts), negative)
        known[name] = Opened(case, folder, pipeline, recording, denoiser)
        return known[name]

    return open_one


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DKDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def assert_close(ours, theirs, tolerance=1e-5):
    """Every sample agrees, relative to its own largest value."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().flatten(1).amax(1) / theirs.abs().flatten(1).amax(1)
    assert error.isfinite().all()
    assert error.max() <= tolerance, error


@pytest.mark.parametrize("name", CASES)
def test_the_network_is_evaluated_as_in_the_pipeline(name, opened):
    found = opened(name)
    batch, _, times, outputs, _ = found.together()
    prediction = found.denoiser.predict(batch, found.case.guidance)
    torch.testing.assert_close(found.denoiser.times[batch.t].float(), times, rtol=1e-5, atol=0)
    assert_close(prediction.output, outputs)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_step_of_the_pipeline(name, opened):
    found = opened(name)
    batch, s, _, _, following = found.together()
    prediction = found.denoiser.predict(batch, found.case.guidance)
    random = torch.Generator().manual_seed(1)
    z = torch.cat([torch.randn(2, *batch.x.shape[1:], generator=random) for _ in range(STEPS + 1)])
    process, parameterization = found.denoiser.process, found.denoiser.parameterization
    ours = reverse_step(
        process, parameterization, batch.x, prediction, batch.t, s, z[2:], found.case.eta
    )
    first = 2 * found.case.skip
    assert_close(ours[first:], following[first:])


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("ddpm", "ddim", "dance")])
def test_latents_are_decoded_as_by_the_pipeline(name, opened):
    found = opened(name)
    latents = found.latents(found.recording.steps[-1][3])
    assert_close(found.denoiser.to_pixels(latents), found.recording.pixels)
