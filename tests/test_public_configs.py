"""Configs as public repositories have them: read, one step beside the stock pipeline, ten trained.

Schedulers, autoencoder scales, entries of the index, class names, versions and layouts are those of
the repositories; networks are shrunk and have random weights.
"""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EDMEulerScheduler

import dkdm
import pipelines
from dkdm import load_teacher
from dkdm.core.diffusion.steps import reverse_step
from dkdm.models import LoadOptions, with_texts
from small_runs import student_parameterization
from stock_pipelines import (
    CAPTIONS,
    PROMPTS,
    SMALL,
    STEPS,
    UNCONDITIONAL,
    Case,
    Opened,
    Recording,
    as_ddim,
    as_flow,
    assert_close,
    text,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own, of old files

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE = {**SCALED, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
NULLS = {"trained_betas": None}


def as_ddim_to_the_end(config):
    """Euler's steps end without noise, whatever `set_alpha_to_one` its file says."""
    return DDIMScheduler.from_config(
        config, clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True
    )


@dataclass(frozen=True)
class Repository:
    """A public repository's files.

    case: the shrunk pipeline, and how it is run. version: of diffusers, in every config. scheduler:
    its whole config. fields: of other files, by path; a field that is `GONE` is not in the file.
    vae: fields that its autoencoder is made with. in_root: files of components lie beside the
    index. student: what makes the student another network than its teacher.
    """

    case: Case
    version: str
    scheduler: dict[str, Any]
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    vae: dict[str, Any] | None = None
    in_root: bool = False
    student: dict[str, Any] = field(default_factory=dict)


GONE = object()
NO_SCALE = {"vae/config.json": {"scaling_factor": GONE, "force_upcast": GONE, "shift_factor": GONE}}
FLOW = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 3.0,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "solver_order": 2,
    "num_train_timesteps": 1000,
}
REPOSITORIES = {
    "google/ddpm-cifar10-32": Repository(
        Case(pipelines.ddpm, call=UNCONDITIONAL, eta=1.0),
        "0.1.1",
        {
            "_class_name": "DDPMScheduler",
            **LINEAR,
            **NULLS,
            "clip_sample": True,
            "num_train_timesteps": 1000,
            "variance_type": "fixed_large",
        },
        in_root=True,
        student={"block_out_channels": [4, 8]},
    ),
    "CompVis/ldm-celebahq-256": Repository(
        Case(pipelines.ldm_vq, call=UNCONDITIONAL),
        "0.1.2",
        {
            "_class_name": "DDIMScheduler",
            "beta_start": 0.0015,
            "beta_end": 0.0195,
            "beta_schedule": "scaled_linear",
            **NULLS,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "timestep_values": None,
        },
        {"vqvae/config.json": {"scaling_factor": GONE}},
        student={"block_out_channels": [4, 8]},
    ),
    "facebook/DiT-XL-2-256": Repository(
        Case(
            partial(pipelines.dit, 1000),
            call={"class_labels": [1, 4], "guidance_scale": 3.0},
            guidance=3.0,
        ),
        "0.12.0.dev0",
        {
            "_class_name": "DDIMScheduler",
            **LINEAR,
            **NULLS,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "set_alpha_to_one": True,
            "steps_offset": 0,
        },
        {
            **NO_SCALE,
            "transformer/config.json": {
                "_class_name": "Transformer2DModel",
                "cross_attention_dim": None,
                "num_vector_embeds": None,
                "only_cross_attention": False,
                "use_linear_projection": False,
            },
            "model_index.json": {
                "transformer": ["diffusers", "Transformer2DModel"],
                "id2label": {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus"},
            },
        },
        student={"num_layers": 1},
    ),
    "runwayml/stable-diffusion-v1-5": Repository(
        text(pipelines.stable_diffusion, size=(8, 8), swap=as_ddim),
        "0.6.0",
        {
            "_class_name": "PNDMScheduler",
            **STABLE,
            **NULLS,
            "clip_sample": False,
            "num_train_timesteps": 1000,
        },
        {**NO_SCALE, "unet/config.json": {"sample_size": 64}},
        student={"block_out_channels": [4, 8]},
    ),
    "stabilityai/stable-diffusion-2-1": Repository(
        text(pipelines.stable_diffusion, size=(8, 8)),
        "0.10.0.dev0",
        {
            "_class_name": "DDIMScheduler",
            **STABLE,
            **NULLS,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
        },
        {
            **NO_SCALE,
            "unet/config.json": {"sample_size": 96, "upcast_attention": True},
            "model_index.json": {"feature_extractor": [None, None]},
        },
        student={"block_out_channels": [4, 8]},
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Repository(
        text(pipelines.sdxl, None, size=(8, 8), swap=as_ddim_to_the_end),
        "0.19.0.dev0",
        {
            "_class_name": "EulerDiscreteScheduler",
            **STABLE,
            **NULLS,
            "clip_sample": False,
            "interpolation_type": "linear",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
        {
            "unet/config.json": {"sample_size": 128},
            "model_index.json": {"force_zeros_for_empty_prompt": True, "add_watermarker": GONE},
        },
        vae={"scaling_factor": 0.13025, "force_upcast": True},
    ),
    "playgroundai/playground-v2.5-1024px-aesthetic": Repository(
        text(
            pipelines.sdxl,
            None,
            size=(8, 8),
            swap=EDMEulerScheduler.from_config,
            spacing="linspace",
        ),
        "0.27.0.dev0",
        {
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "dynamic_thresholding_ratio": 0.995,
            "euler_at_final": False,
            "final_sigmas_type": "zero",
            "lower_order_final": True,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "rho": 7.0,
            "sample_max_value": 1.0,
            "sigma_data": 0.5,
            "sigma_max": 80.0,
            "sigma_min": 0.002,
            "solver_order": 2,
            "solver_type": "midpoint",
            "thresholding": False,
        },
        {"unet/config.json": {"sample_size": 128}},
        vae={
            "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
            "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
            "scaling_factor": 0.5,
        },
    ),
    "PixArt-alpha/PixArt-XL-2-1024-MS": Repository(
        text(pipelines.pixart_1024, size=(8, 8), swap=as_ddim, spacing="leading", call=CAPTIONS),
        "0.22.0.dev0",
        {
            "_class_name": "DPMSolverMultistepScheduler",
            **LINEAR,
            **NULLS,
            "algorithm_type": "dpmsolver++",
            "dynamic_thresholding_ratio": 0.995,
            "lambda_min_clipped": -float("inf"),
            "lower_order_final": True,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "solver_order": 2,
            "solver_type": "midpoint",
            "steps_offset": 0,
            "thresholding": False,
            "timestep_spacing": "linspace",
            "use_karras_sigmas": False,
            "variance_type": None,
        },
        {
            "transformer/config.json": {
                "_class_name": "Transformer2DModel",
                "use_additional_conditions": GONE,
                "interpolation_scale": GONE,
            },
            "model_index.json": {"transformer": ["diffusers", "Transformer2DModel"]},
        },
        vae={"scaling_factor": 0.18215},
        student={"num_layers": 1},
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": Repository(
        text(partial(pipelines.sd3, True), spacing="linspace"),
        "0.29.0.dev0",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
        vae={
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        student={"num_layers": 1},
    ),
    "black-forest-labs/FLUX.1-dev": Repository(
        text(pipelines.flux, None, size=(8, 8)),
        "0.30.0.dev0",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
        },
        vae={
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        student={"num_single_layers": 0},
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": Repository(
        text(
            pipelines.sana,
            "",
            size=(16, 16),
            swap=as_flow,
            spacing="linspace",
            call={**CAPTIONS, "height": 32, "width": 32},
        ),
        "0.32.0.dev0",
        {
            "_class_name": "DPMSolverMultistepScheduler",
            **LINEAR,
            **NULLS,
            **FLOW,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "timestep_spacing": "linspace",
        },
        {"vae/config.json": {"scaling_factor": 0.41407}},
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Repository(
        text(
            pipelines.wan,
            size=(2, 2, 2),
            swap=as_flow,
            spacing="linspace",
            call={"num_frames": 5},
        ),
        "0.33.0.dev0",
        {
            "_class_name": "UniPCMultistepScheduler",
            **LINEAR,
            **NULLS,
            **FLOW,
            "disable_corrector": [],
            "predict_x0": True,
            "rescale_betas_zero_snr": False,
            "solver_p": None,
            "solver_type": "bh2",
            "thresholding": False,
            "timestep_spacing": "linspace",
        },
        student={"ffn_dim": 8},
    ),
}
WITH_TEXT = [name for name, found in REPOSITORIES.items() if "prompt" in found.case.call]
QUICK = ("google/ddpm-cifar10-32", "CompVis/ldm-celebahq-256", "facebook/DiT-XL-2-256")


def write(repository, folder):
    """The repository's files, with random weights."""
    torch.manual_seed(0)
    pipeline = repository.case.build()
    if repository.vae is not None:
        pipeline.register_modules(vae=pipelines.kl(4, **repository.vae))
    pipeline.save_pretrained(folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(repository.scheduler))
    _change(folder / "model_index.json", scheduler=["diffusers", scheduler_class(repository)])
    for path, fields in repository.fields.items():
        _change(folder / path, **fields)
    for path in folder.rglob("*.json"):
        if "_class_name" in path.read_text():
            _change(path, _diffusers_version=repository.version)
    if repository.in_root:
        for path in [*folder.glob("*/*")]:
            path.rename(folder / path.name)
            path.parent.rmdir() if not any(path.parent.iterdir()) else None


def scheduler_class(repository):
    return repository.scheduler["_class_name"]


def _change(path, **fields):
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not GONE}))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Repositories by name; each is written, loaded and run once."""
    root, known = tmp_path_factory.mktemp("repositories"), {}
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def open_one(name):
        if name not in known:
            repository = REPOSITORIES[name]
            folder = root / name.partition("/")[2]
            write(repository, folder)
            known[name] = _opened(repository.case, folder, prompts)
        return known[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DKDM_CACHE", str(root / "cache"))
        yield open_one


def _opened(case, folder, prompts):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    if case.swap:
        pipeline.scheduler = case.swap(pipeline.scheduler.config)
    recording = Recording().record(pipeline, case.call)
    denoiser = load_teacher(str(folder), options=LoadOptions(sample_size=case.size))
    if "prompt" in case.call:
        negative = case.call.get("negative_prompt", [""])[0]
        denoiser = with_texts(denoiser, str(prompts), negative)
    return Opened(case, folder, pipeline, recording, denoiser)


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_step_is_that_of_the_stock_pipeline(name, opened):
    found = opened(name)
    batch, s, times, outputs, following = found.together()
    prediction = found.denoiser.predict(batch, found.case.guidance)
    torch.testing.assert_close(
        found.denoiser.network_time[batch.t].float(), times, rtol=1e-5, atol=0
    )
    assert_close(prediction.output, outputs)
    random = torch.Generator().manual_seed(1)
    z = torch.cat([torch.randn(2, *batch.x.shape[1:], generator=random) for _ in range(STEPS + 1)])
    process, parameterization = found.denoiser.process, found.denoiser.parameterization
    ours = reverse_step(
        process, parameterization, batch.x, prediction, batch.t, s, z[2:], found.case.eta
    )
    assert_close(ours, following)


@pytest.mark.parametrize("name", [name for name in REPOSITORIES if "ddpm" not in name])
def test_latents_are_decoded_at_the_stock_pipelines_scale(name, opened):
    found = opened(name)
    latents = found.latents(found.recording.steps[-1][3])
    assert_close(found.denoiser.to_pixels(latents), found.recording.pixels)


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in REPOSITORIES],
)
def test_a_student_trains_three_steps_and_is_loaded_again(name, opened, tmp_path):
    found, repository = opened(name), REPOSITORIES[name]
    network, student = found.denoiser.network, tmp_path / "student.json"
    config = {key: value for key, value in network.config.items() if key != "_name_or_path"}
    named = {"_class_name": type(network).__name__}
    student.write_text(json.dumps({**config, **named, **repository.student}))
    changes: dict[str, Any] = {"teacher_size": found.case.size, "output_dir": tmp_path / "run"}
    if name in WITH_TEXT:
        changes["prompts"] = str(found.folder.parent / "prompts.txt")
    if found.denoiser.embeds_guidance:
        changes["guidance_scale"] = "3"
    dkdm.distill(str(found.folder), str(student), replace(SMALL, **changes))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 3
    again = load_teacher(str(tmp_path / "run"))
    assert again.sample_shape == found.denoiser.sample_shape
    assert again.parameterization == student_parameterization(found.denoiser)
    torch.testing.assert_close(again.process.alpha, found.denoiser.process.alpha, atol=1e-2, rtol=0)
