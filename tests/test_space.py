"""Students of another space than their teacher's are refused; fewer classes are not."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch

import dkdm
from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.conditioning import restrict_classes
from dkdm.errors import UsageError
from dkdm.models.components import Autoencoder, Component
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import student_of
from factories import denoiser, tiny_unet

CODER = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "scaling_factor": 0.18,
    "block_out_channels": [8, 8],
}


def coder(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CODER | changes))
    return Autoencoder(Component(folder, "diffusers", "AutoencoderKL"))


def latent_teacher(tmp_path):
    network = tiny_unet()
    teacher = denoiser(classes=None)
    bundle = Bundle("LDMPipeline", {}, coder(tmp_path / "teacher" / "vae"))
    return replace(teacher, network=network, bundle=bundle)


def student_folder(tmp_path, **changes):
    tiny_unet().save_config(tmp_path / "student" / "unet")
    coder(tmp_path / "student" / "vae", **changes)
    return str(tmp_path / "student")


def config_file(tmp_path, **changes):
    path = tmp_path / "config.json"
    tiny_unet(classes=4).save_config(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(path)


def test_a_pipelines_folder_gives_its_architecture(tmp_path):
    student = student_of(student_folder(tmp_path), latent_teacher(tmp_path))
    assert student.num_parameters == sum(p.numel() for p in tiny_unet().parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 16}, "latent_channels 16 against 4"),
        ({"scaling_factor": 0.5}, r"scaling_factor 0.5 against 0.18; use a student"),
        ({"block_out_channels": [8, 8, 8]}, "levels 3 against 2"),
        ({"_class_name": "AutoencoderDC"}, "class AutoencoderDC against AutoencoderKL"),
    ],
)
def test_latents_of_another_autoencoder_are_refused(tmp_path, changes, message):
    folder = student_folder(tmp_path, **changes)
    with pytest.raises(UsageError, match=message):
        student_of(folder, latent_teacher(tmp_path))


def test_a_latent_student_of_a_pixel_teacher_is_refused(tmp_path):
    with pytest.raises(UsageError, match="works on the latents of vae, the teacher on pixels"):
        student_of(student_folder(tmp_path), denoiser(classes=None))


def test_a_folder_without_a_network_is_refused(tmp_path):
    with pytest.raises(UsageError, match="give a diffusers pipeline or a network's folder"):
        student_of(str(tmp_path), denoiser())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 3}, r"have 3 channels, the teacher's 1: the student learns from the"),
        ({"sample_size": 16}, "is for samples of 16x16, the teacher's are 8x8"),
        ({"sample_size": [8, 16]}, "is for samples of 8x16, the teacher's are 8x8"),
    ],
)
def test_a_config_for_other_samples_is_refused(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        student_of(config_file(tmp_path, **changes), denoiser())


def test_a_config_for_sounds_is_refused_by_a_teacher_of_images(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet1DModel", "in_channels": 1}')
    with pytest.raises(UsageError, match=r"UNet1DModel is not for samples of shape \(1, 8, 8\)"):
        student_of(str(tmp_path / "config.json"), denoiser())


def test_channels_of_latents_are_said_to_be_latents(tmp_path):
    with pytest.raises(UsageError, match=r"the teacher's 1 \(latents of its AutoencoderKL\)"):
        student_of(config_file(tmp_path, in_channels=4), latent_teacher(tmp_path))


def test_a_student_object_of_another_shape_is_refused(tmp_path):
    config = dkdm.DistillConfig(output_dir=tmp_path / "run", max_train_steps=1)
    other = replace(denoiser(), sample_shape=(1, 16, 16))
    with pytest.raises(UsageError, match=r"have shape \(1, 16, 16\), the teacher's \(1, 8, 8\)"):
        dkdm.distill(denoiser(), other, config)


@pytest.fixture
def of_two_classes(tmp_path):
    teacher = denoiser()
    teacher.conditioning = restrict_classes(teacher.conditioning, (0, 2))
    write_pipeline(tmp_path, student_of("unet-tiny", teacher))
    return tmp_path


def test_a_student_of_fewer_classes_says_so_when_loaded(of_two_classes):
    model = dkdm.load_teacher(str(of_two_classes))
    assert model.conditioning.drawn == (0, 2)
    assert model.conditioning.null_class == 3
    with pytest.raises(UsageError, match="class 1 was not taught to this model: use 0, 2"):
        restrict_classes(model.conditioning, (0, 1))
    assert restrict_classes(model.conditioning, (2,)).drawn == (2,)


def test_its_pipeline_draws_the_classes_it_learnt_and_refuses_others(of_two_classes):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(of_two_classes, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    drawn = pipeline._labels(None, 50, random)
    assert set(drawn.tolist()) == {0, 2}
    assert torch.equal(pipeline._labels(None, 50, random.manual_seed(0)), drawn)
    assert pipeline._labels(2, 3, None).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="batch_size 3: give one label or as many, not 2"):
        pipeline._labels([0, 2], 3, None)
    with pytest.raises(ValueError, match=r"use some of \[0, 2\]"):
        pipeline(class_labels=[1], num_inference_steps=1)
    images = pipeline(class_labels=[2], num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 1, 8, 8)
