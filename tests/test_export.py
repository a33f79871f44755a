"""The output folder: loads and samples in stock diffusers, and comes back as the same denoiser."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

import programs
from dkdm import load_teacher
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.shipping.pipeline_folder import usage_snippet, write_pipeline
from dkdm.students import student_of
from factories import denoiser, some_batch
from programs import SAMPLED


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("spec", ["unet", "dit-xs"])
def test_reloaded_folder_is_the_same_denoiser(tmp_path, classes, spec):
    model = denoiser(classes)
    if spec == "dit-xs":
        model = student_of("dit-xs", model)
        torch.nn.init.normal_(model.network.proj_out_2.weight)
        model.network.eval()
    write_pipeline(tmp_path, model)
    again = load_teacher(str(tmp_path))
    batch = some_batch(model)
    expected, found = model.predict(batch), again.predict(batch)
    assert expected.output.abs().max() > 0.01
    assert torch.equal(found.output, expected.output)
    assert torch.equal(found.x_0, expected.x_0)
    assert again.conditioning == model.conditioning
    assert again.parameterization == model.parameterization
    assert torch.equal(again.process.alpha, model.process.alpha)


@pytest.mark.parametrize(
    ("scheduler", "pipeline"),
    [("DDPMScheduler", "DDPMPipeline"), ("DDIMScheduler", "DDIMPipeline")],
)
def test_unconditional_unet_samples_in_a_stock_pipeline(tmp_path, scheduler, pipeline):
    model = denoiser(None, {"_class_name": scheduler})
    write_pipeline(tmp_path, model)
    assert not (tmp_path / "pipeline.py").exists()
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded).__name__ == pipeline
    loaded.set_progress_bar_config(disable=True)
    images = loaded(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert np.isfinite(images).all()


def test_components_load_by_themselves(tmp_path):
    write_pipeline(tmp_path, student_of("dit-xs", denoiser(3)))
    network = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert network.config.sample_size == 8
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("module", ["dkdm", "dkdm.core.diffusion.process", "programs", "factories"])
def test_a_program_of_its_own_finds_neither_dkdm_nor_the_tests(module):
    done = programs.run(f"import torch, diffusers\nprint('here')\nimport {module}")
    assert done.returncode == 1
    assert done.stdout == "here\n"
    assert "ModuleNotFoundError: " in done.stderr


@pytest.mark.parametrize(("classes", "spec"), [(3, "unet"), (3, "dit-xs"), (None, "dit-xs")])
def test_other_folders_sample_without_dkdm(tmp_path, classes, spec):
    model = denoiser(classes)
    model = model if spec == "unet" else student_of(spec, model)
    write_pipeline(tmp_path, model)
    done = programs.run(SAMPLED, tmp_path)
    assert "sampled" in done.stdout, done.stderr
    assert "trust_remote_code=True" in usage_snippet("folder", model)


def test_shipped_pipeline_draws_what_dkdm_draws(tmp_path):
    """Its scheduler steps and guidance are the same chain as ours."""
    model = denoiser(3, {"_class_name": "DDIMScheduler", "set_alpha_to_one": True})
    write_pipeline(tmp_path, model)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs = pipeline(
        class_labels=[0, 2],
        num_inference_steps=10,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    cond = ClassLabels(3, 3).of([0, 2])
    ours = model.sample(lambda _: start, cond, 10, 0.0, 1.5)
    pixels = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(theirs, pixels, atol=1e-4)


def test_folders_loaded_in_one_process_keep_their_own_values(tmp_path):
    """diffusers runs the `pipeline.py` of every folder in one and the same module."""
    small = replace(denoiser(3), sample_shape=(1, 4, 4))
    for folder, model in (("large", denoiser(3)), ("small", small)):
        write_pipeline(tmp_path / folder, model)
    pipelines = [
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / folder, trust_remote_code=True)
        for folder in ("large", "small")
    ]
    shapes = [
        pipeline(class_labels=[0], num_inference_steps=2, output_type="pt").images.shape
        for pipeline in pipelines
    ]
    assert shapes == [(1, 1, 8, 8), (1, 1, 4, 4)]


def test_a_transformer_without_null_class_comes_back_without(tmp_path):
    """Its table of labels has a row more, which nobody trained."""
    like = replace(denoiser(classes=3), conditioning=ClassLabels(3))
    write_pipeline(tmp_path, student_of("dit-tiny", like))
    assert load_teacher(str(tmp_path)).conditioning == ClassLabels(3)
