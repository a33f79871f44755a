"""Vectors and signals the whole way: distilled, measured, drawn, shipped, loaded and sampled."""

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import dkdm
from dkdm import DistillConfig, UsageError, load_teacher
from dkdm.config import SamplingOptions
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.objectives.feature_loss import match_features
from dkdm.models.schedulers import from_scheduler_config
from dkdm.report.plots import HEIGHT, WIDTH
from dkdm.runs.outputs import sample_to_file
from dkdm.students import student_of
from factories import SCHEDULER

SHAPES = {"vector": (5,), "signal": (2, 24)}


def teacher_of(kind):
    """The exact denoiser of three points; of vectors each is a class."""
    means = torch.randn(3, *SHAPES[kind], generator=torch.Generator().manual_seed(0))
    classes = [0, 1, 2] if kind == "vector" else None
    mixture = GaussianMixture.of(means, 0.2, classes=classes)
    process = from_scheduler_config(SCHEDULER)
    return mixture_denoiser(mixture, process, Parameterization("epsilon"))


@pytest.fixture(scope="module", params=SHAPES)
def run(request, tmp_path_factory):
    """Ten steps with all that a run draws and measures."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    config = DistillConfig(
        output_dir=folder,
        max_train_steps=10,
        train_batch_size=8,
        pool_size=16,
        fill="none",
        evaluation_samples=12,
        validation_steps=5,
        validation_sampling_steps=3,
    )
    dkdm.distill(teacher_of(request.param), "mlp-tiny", config)
    return request.param, folder


@pytest.mark.parametrize("name", ["step-000005", "step-000010", "comparison", "grid"])
def test_grids_show_ten_plots_a_row(run, name):
    with Image.open(run[1] / "samples" / f"{name}.png") as picture:
        assert picture.size == (10 * (WIDTH + 1) - 1, 2 * (HEIGHT + 1) - 1)


def test_the_report_and_the_card_are_whole(run):
    _, folder = run
    page = (folder / "report.html").read_text()
    assert "not complete" not in page
    assert page.count("data:image/png") == 2 * 10 + 1 + 2 + 4  # pairs, the others, stages, ways
    card = (folder / "README.md").read_text()
    assert "samples/comparison.png" in card
    assert "image" not in card.partition("## Use")[0].replace("No image was read", "")


def test_the_student_comes_back_and_is_sampled(run, tmp_path):
    kind, folder = run
    again = load_teacher(str(folder))
    assert again.sample_shape == SHAPES[kind]
    for name in ("x.png", "x.safetensors"):
        sample_to_file(again, SamplingOptions(tmp_path / name, num_samples=4, steps=2))
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (4 * (WIDTH + 1) - 1, HEIGHT)
    assert load_file(tmp_path / "x.safetensors")["samples"].shape == (4, *SHAPES[kind])


def test_the_folder_samples_as_its_card_says(run):
    kind, folder = run
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"class_labels": [0, 1, 2]} if kind == "vector" else {"batch_size": 3}
    drawn = pipeline(**asked, num_inference_steps=2).images
    assert drawn.shape == (3, *SHAPES[kind])
    assert drawn.isfinite().all()


def test_a_vectors_features_can_be_matched(run):
    kind, folder = run
    layers = "first=first" if kind == "vector" else "auto"
    again = load_teacher(str(folder))
    if kind == "signal":
        with pytest.raises(UsageError, match="feature"):
            match_features(again, student_of("mlp-tiny", again), layers)
        return
    found = match_features(again, student_of("mlp-s", again), layers)
    assert [tuple(p.weight.shape) for p in found.projections] == [(128, 512)]


def test_samples_of_more_dimensions_than_a_videos_are_refused_as_pictures(tmp_path):
    means = torch.zeros(2, 1, 2, 2, 2, 2)
    process = from_scheduler_config(SCHEDULER)
    odd = mixture_denoiser(GaussianMixture.of(means), process, Parameterization("epsilon"))
    with pytest.raises(
        UsageError, match=r"cannot be drawn as an image: give --output .*x\.safetensors"
    ):
        sample_to_file(odd, SamplingOptions(tmp_path / "x.png", num_samples=1, steps=2))
