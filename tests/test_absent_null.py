""" "No label" as an absent argument, a guidance interval, and a decoder of the user's own."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import dkdm
from dkdm.cli import main
from dkdm.config import SamplingOptions, parse_interval
from dkdm.core.denoisers.conditioning import ABSENT
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.runs.outputs import sample_to_file
from factories import counting

PROCESS = dkdm.from_betas(torch.linspace(1e-4, 0.02, 100))
LABELS = torch.tensor([0, 1, 2, 1, 2, 0])  # 2 is the null class of the twin
QUICK = {"train_batch_size": 4, "pool_size": 8, "fill_steps": 2, "validation_sampling_steps": 2}


def twins(**changed):
    """The exact denoiser with a null class, and the same whose null is an absent argument."""
    means = torch.stack([torch.full((1, 8, 8), 0.7), torch.full((1, 8, 8), -0.7)])
    mixture = GaussianMixture.of(means, 0.2, classes=[0, 1])
    twin = mixture_denoiser(mixture, PROCESS, dkdm.Parameterization("v_prediction"))
    own = replace(twin, conditioning=dkdm.ClassLabels(2, null="absent"))
    return replace(twin, **changed), replace(own, **changed)


def batch(labels, levels=(0, 10, 30, 50, 80, 99)):
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(levels)
    return Batch(x, t, {"class_labels": labels}, t)


@pytest.mark.parametrize("scale", [1.0, 3.0, torch.linspace(1, 6, 6)], ids=["1", "3", "each"])
def test_an_absent_label_is_the_null_class_of_the_closed_form(scale):
    (twin, of_twin), (own, of_own) = map(counting, twins())
    labels = LABELS.where(LABELS != 2, ABSENT)
    expected, found = twin.predict(batch(LABELS), scale), own.predict(batch(labels), scale)
    torch.testing.assert_close(found.output, expected.output, rtol=0, atol=1e-6)
    assert sum(of_own) == sum(of_twin)


def test_absent_labels_are_drawn_by_dropout():
    labels = dkdm.ClassLabels(2, null="absent")
    drawn = labels.draw(400, torch.Generator().manual_seed(0), dropout=0.5)["class_labels"]
    assert 150 < int((drawn == ABSENT).sum()) < 250
    with pytest.raises(dkdm.UsageError, match="null is 'absent' and null_class too"):
        dkdm.ClassLabels(2, null_class=2, null="absent")


def test_a_student_of_an_absent_null_has_a_row_for_it(tmp_path):
    """Dropped conditions train the last row, which the shipped pipeline guides with."""
    _, own = twins()
    config = dkdm.DistillConfig(
        output_dir=tmp_path / "run",
        max_train_steps=3,
        condition_dropout=0.5,
        evaluation_samples=0,
        **QUICK,
    )
    dkdm.distill(own, "unet-tiny", config)
    student = dkdm.load_teacher(str(tmp_path / "run"))
    assert student.conditioning == dkdm.ClassLabels(2, null_class=2)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "run", trust_remote_code=True)
    stock.set_progress_bar_config(disable=True)
    images = stock([0, 1], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 8, 8, 1)


def test_guidance_acts_inside_its_interval_alone():
    """Inside it equals the guided closed form, outside the unguided one; rows are counted."""
    plain, _ = twins()
    model, counts = counting(replace(plain, guidance_interval=(0.3, 0.7)))
    share = PROCESS.sigma / (PROCESS.alpha + PROCESS.sigma)
    levels = (0, 5, 30, 50, 80, 99)
    inside = ((share >= 0.3) & (share <= 0.7))[torch.tensor(levels)]
    assert 0 < int(inside.sum()) < 6
    asked = batch(LABELS % 2, levels)
    guided, unguided = plain.predict(asked, 4.0).output, plain.predict(asked).output
    both = model.predict_both(asked, 4.0)
    expected = torch.where(inside.reshape(-1, 1, 1, 1), guided, unguided)
    torch.testing.assert_close(both[1].output, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(both[0].output, unguided, rtol=0, atol=1e-6)
    assert sum(counts) == 6 + int(inside.sum())
    assert model.evaluations_at(asked.t, guided=True).tolist() == (1 + inside.long()).tolist()
    scales = torch.linspace(2, 5, 6)
    each = torch.where(inside.reshape(-1, 1, 1, 1), plain.predict(asked, scales).output, unguided)
    torch.testing.assert_close(model.predict(asked, scales).output, each, rtol=0, atol=1e-6)


def test_an_interval_of_everything_is_plain_guidance():
    plain, _ = twins()
    asked = batch(LABELS % 2)
    found = replace(plain, guidance_interval=(0.0, 1.0)).predict(asked, 4.0).output
    torch.testing.assert_close(found, plain.predict(asked, 4.0).output, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("interval", "scale"), [((0.9, 1.0), 4.0), ((0.0, 1.0), 1.0)])
def test_what_is_not_guided_is_evaluated_once(interval, scale):
    plain, _ = twins()
    model, counts = counting(replace(plain, guidance_interval=interval))
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = {"class_labels": torch.tensor([0, 1])}
    drawn = model.sample(lambda _: noise, cond, 5, guidance_scale=scale)
    assert torch.equal(drawn, plain.sample(lambda _: noise, cond, 5))
    assert sum(counts) == 10


def test_a_network_that_is_fed_the_scale_is_fed_1_outside():
    fed = []

    def network(x, t, guidance):
        fed.append(guidance)
        return x + 0 * t.reshape(-1, 1, 1, 1)

    model = dkdm.Denoiser(network, PROCESS, "epsilon", (1, 8, 8), guidance_interval=(0.3, 0.7))
    model.predict(batch(LABELS)._replace(cond={}), 3.5)
    inside = model.guided_levels[torch.tensor((0, 10, 30, 50, 80, 99))]
    assert fed[0].tolist() == torch.where(inside, 3.5, 1.0).tolist()


@pytest.mark.parametrize("text", ["0.3", "0.7:0.3", "-1:0.5", "0:2", "a:b", "nan:1", "0.1:0.2:0.3"])
def test_what_is_no_interval_is_refused(text):
    with pytest.raises(dkdm.UsageError, match="--guidance-interval .*such as 0.3:0.7"):
        parse_interval(text)


@pytest.mark.parametrize("on", ["target", "chain"])
def test_a_run_with_an_interval(tmp_path, on):
    plain, _ = twins()
    config = dkdm.DistillConfig(
        output_dir=tmp_path / "run",
        max_train_steps=2,
        guidance_scale="2:4",
        guidance_interval="0.3:0.7",
        guidance_on=on,
        sampling_guidance_scale=1.0 if on == "target" else 3.0,
        evaluation_samples=2,
        validation_steps=0,
        **QUICK,
    )
    dkdm.distill(plain, "unet-tiny", config)
    said = {
        "target": "Guidance of 2:4 (at shares of noise 0.3 to 0.7) is baked in: sample it without",
        "chain": "evaluated with guidance of 3 (at shares of noise 0.3 to 0.7). `pipeline.py`",
    }
    assert said[on] in (tmp_path / "run" / "README.md").read_text()
    output = tmp_path / "x.png"
    arguments = ["sample", str(tmp_path / "run"), "--guidance-scale", "3", "--steps", "2"]
    assert main([*arguments, "--guidance-interval", "0.3:0.7", "--output", str(output)]) == 0
    assert output.is_file()


def test_a_decoder_of_ones_own_shows_latents_and_is_not_shipped(tmp_path, capsys):
    shown = []

    def decode(latents):
        shown.append(tuple(latents.shape))
        return latents.repeat(1, 3, 2, 2).clamp(-1, 1)

    plain, _ = twins(decode=decode)
    assert plain.to_pixels(torch.zeros(2, 1, 8, 8)).shape == (2, 3, 16, 16)
    config = dkdm.DistillConfig(
        output_dir=tmp_path / "run", max_train_steps=1, evaluation_samples=2, **QUICK
    )
    dkdm.distill(plain, "unet-tiny", config)
    assert shown
    assert "custom autoencoder" in capsys.readouterr().err
    student = dkdm.load_teacher(str(tmp_path / "run"))
    with pytest.raises(dkdm.UsageError, match="latents .*give --output x.safetensors"):
        sample_to_file(student, SamplingOptions(tmp_path / "x.png", num_samples=2, steps=1))
    sample_to_file(student, SamplingOptions(tmp_path / "x.safetensors", num_samples=2, steps=1))
    assert load_file(tmp_path / "x.safetensors")["samples"].shape == (2, 1, 8, 8)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "run", trust_remote_code=True)
    stock.set_progress_bar_config(disable=True)
    drawn = stock(batch_size=2, num_inference_steps=1).images
    assert isinstance(drawn, torch.Tensor)
    assert drawn.shape == (2, 1, 8, 8)


def test_a_decoder_that_returns_no_pictures_is_refused():
    plain, _ = twins(decode=lambda latents: latents[0])
    with pytest.raises(dkdm.UsageError, match=r"decode returned \(1, 8, 8\) for latents"):
        plain.to_pixels(torch.zeros(2, 1, 8, 8))
    wrong = {
        "failed for latents .*ZeroDivisionError": lambda latents: 1 / 0,
        "returned list for latents": lambda latents: [latents],
        r"channels last: add .permute\(0, 3, 1, 2\)": lambda latents: latents.permute(0, 2, 3, 1),
    }
    for message, decode in wrong.items():
        with pytest.raises(dkdm.UsageError, match=f"decode .*{message}"):
            twins(decode=decode)[0].check()


def test_an_autoencoder_in_training_mode_keeps_its_statistics():
    own = torch.nn.BatchNorm2d(1)
    plain, _ = twins(decode=lambda latents: own(latents))
    plain.check()
    assert own.num_batches_tracked == 0
    assert own.training
