"""Comparisons of exact and small models: same noise, zero gaps, files that read back."""

import json
import os
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

from dkdm.config import Sampler
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import beta_schedule, from_betas, rectified_flow
from dkdm.data.fashion import CLASS_NAMES
from dkdm.data.named import load_reference
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.circumstances import circumstances_of
from dkdm.evaluation.comparison import compare, level_gaps
from dkdm.evaluation.cost import evaluations_per_step
from dkdm.evaluation.energy import energy_distance
from dkdm.evaluation.results import EVALUATION, SAMPLES, read_evaluation, read_samples
from dkdm.evaluation.rows import ENERGY, comparison_rows
from dkdm.evaluation.same_noise import Sampling, draw
from factories import counting

PROCESS = from_betas(beta_schedule("squaredcos_cap_v2", 50))
SHAPE = (1, 16, 16)
FASHION = load_reference("fashion-test")
pytestmark = pytest.mark.measures


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch):
    """Speed is measured in test_cost; here it would only take time."""
    monkeypatch.setattr("dkdm.evaluation.comparison.evaluations_per_second", lambda *_: 100.0)


class Small(nn.Module):
    """A convolution that adds its class; `scale` sets two of them apart."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.constant_(self.convolution.weight, 0.1 * scale)
        nn.init.zeros_(self.convolution.bias)

    def forward(self, x, time, class_labels):
        del time
        return self.convolution(x) + 0.05 * class_labels.reshape(-1, 1, 1, 1)


def small(scale: float = 1.0) -> Denoiser:
    conditioning = ClassLabels(10, null_class=10)
    return Denoiser(Small(scale), PROCESS, Parameterization("v_prediction"), SHAPE, conditioning)


def toy(process=PROCESS) -> Denoiser:
    mixture = GaussianMixture.of([[-1.0, 0.0], [1.0, 0.5]], std=0.3)
    return mixture_denoiser(mixture, process, Parameterization("v_prediction"))


def test_a_model_beside_itself_shows_no_difference():
    model = small()
    found = compare(model, model, num_samples=30, num_steps=3, seed=1)
    assert torch.equal(found.samples["teacher"], found.samples["student"])
    assert found.same_noise_difference == 0
    assert found.other_noise_difference > 0.1
    assert [gap.gap for gap in found.gaps] == pytest.approx([0.0] * 16, abs=1e-12)
    assert (found.gaps[0].t, found.gaps[-1].t) == (0, 49)


def test_another_model_shows_a_difference_at_every_level():
    found = compare(small(), small(3.0), num_samples=20, num_steps=3, seed=1)
    assert found.same_noise_difference > 0
    assert all(gap.gap > 0 and gap.relative > 0 for gap in found.gaps)


def test_samples_are_compared_with_the_teachers_of_other_noise():
    """0 for the mixture itself; for another as far as by independent samples, which spread more."""
    elsewhere = GaussianMixture.of([[-1.0, 3.0], [1.0, 3.0]], std=0.3)
    student = mixture_denoiser(elsewhere, PROCESS, Parameterization("v_prediction"))
    same, other = (
        compare(toy(), each, num_samples=400, num_steps=10, seed=0).teacher_distance
        for each in (toy(), student)
    )
    assert same.num_samples == other.num_samples == 400
    assert same.distance == pytest.approx(0, abs=1e-9) and other.share > 0.5
    cond = student.conditioning.in_turns(400)
    first, second = (
        draw(model, cond, Sampling(400, 10, seed), 1.0)
        for model, seed in ((student, 0), (toy(), 1))
    )
    assert other.distance == pytest.approx(energy_distance(first, second).distance, rel=0.05)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_one_sample_has_no_distance_to_the_teachers(num_samples):
    found = compare(toy(), toy(), num_samples=num_samples, num_steps=2, seed=0)
    rows = [row.label for row in comparison_rows(found)]
    how = [name for name, _ in circumstances_of(found).in_words()]
    assert (found.teacher_distance is not None) == (ENERGY in rows) == (num_samples == 2)
    assert ("energy distance" in how) == (num_samples == 2)


def test_samples_that_are_not_finite_have_no_distance_to_the_teachers():
    found = compare(small(), small(float("nan")), num_samples=4, num_steps=2, seed=0)
    assert found.teacher_distance is None


def test_the_gap_is_the_mean_square_of_the_outputs_apart():
    mirrored = small()
    with torch.no_grad():
        mirrored.network.convolution.weight.neg_()
    cond = {"class_labels": torch.zeros(4, dtype=torch.int64)}
    gaps = level_gaps(small(), mirrored, torch.randn(4, *SHAPE), cond, seed=0)
    assert [gap.relative for gap in gaps] == pytest.approx([4.0] * 16)


def test_models_of_different_processes_are_compared_at_the_same_signal_to_noise_ratios():
    found = compare(toy(), toy(rectified_flow(50)), num_samples=4, num_steps=3, seed=0)
    assert len(found.gaps) == 16
    assert found.gaps[0].relative < 0.01
    assert set(found.samples) == {"teacher", "student"}


def test_models_stay_as_they_were():
    teacher, student = small(), small(2.0)
    student.network.train()
    compare(teacher, student, num_samples=4, num_steps=2, seed=0, guidance_student=2.0)
    assert student.network.training


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_samples_do_not_depend_on_the_batch_size(sampler):
    model = small()
    cond = model.conditioning.in_turns(7)
    whole, parts = (draw(model, cond, Sampling(7, 4, 0, sampler, size)) for size in (7, 3))
    torch.testing.assert_close(whole, parts)
    assert not torch.equal(whole[0], whole[1])


class Embedding(Small):
    """A network that is fed the guidance scale."""

    def forward(self, x, time, class_labels, guidance):
        return super().forward(x, time, class_labels) * guidance.reshape(-1, 1, 1, 1)


def test_speed_counts_the_evaluations_that_guidance_takes():
    guided, embedding = small(), replace(small(), network=Embedding())
    at_times = replace(guided, guidance_interval=(0.0, 0.5))
    assert [evaluations_per_step(model, 10, 1.0) for model in (guided, embedding)] == [1, 1]
    assert [evaluations_per_step(model, 10, 2.0) for model in (guided, embedding)] == [2, 1]
    assert 1 < evaluations_per_step(at_times, 10, 2.0) < 2
    for model in (guided, at_times, embedding):
        counted, counts = counting(model)
        draw(counted, model.conditioning.in_turns(3), Sampling(3, 10, 0), 2.0)
        assert evaluations_per_step(model, 10, 2.0) == pytest.approx(sum(counts) / (3 * 10))


def test_images_a_second_count_the_evaluations_of_a_step():
    found = compare(
        small(),
        replace(small(), network=Embedding()),
        num_samples=2,
        num_steps=4,
        seed=0,
        guidance_teacher=2.0,
        guidance_student=2.0,
    )
    assert found.teacher.images_per_second(4) == pytest.approx(100 / 8)
    assert found.student.images_per_second(4) == pytest.approx(100 / 4)
    earlier = replace(found.teacher, evaluations_per_step=None)
    assert earlier.images_per_second(4) == pytest.approx(100 / 8)


def test_classes_are_balanced_and_come_in_turns():
    labels = ClassLabels(5, classes=(1, 4)).in_turns(5)["class_labels"]
    assert labels.tolist() == [1, 4, 1, 4, 1]


def test_fashion_samples_are_measured_and_named():
    found = compare(small(), small(2.0), num_samples=20, num_steps=2, seed=0, reference=FASHION)
    assert found.student.metrics.num_samples == 20
    assert found.student.metrics.get("class_accuracy") is not None
    assert found.class_names == CLASS_NAMES
    assert (found.measurement.reference_images, found.measurement.real_images) == (10_000, 60_000)
    assert found.measurement.real_distance == pytest.approx(0.0123, abs=1e-4)


def test_the_models_own_class_names_come_first():
    named = replace(small(), conditioning=ClassLabels(2, names=("cat", "dog")))
    assert compare(named, named, num_samples=4, num_steps=2, seed=0).class_names == ("cat", "dog")


class Prompted(ClassLabels):
    """Classes that are asked for by the key of prompts."""

    def draw(self, *args):
        return {"prompt": super().draw(*args)["class_labels"]}

    def in_turns(self, count):
        return {"prompt": super().in_turns(count)["class_labels"]}

    def embed(self, cond):
        return super().embed({"class_labels": cond["prompt"]})


def test_what_samples_were_drawn_for_is_kept(tmp_path):
    prompted = replace(small(), conditioning=Prompted(10, null_class=10))
    for model, asked_for in ((small(), "class"), (prompted, "prompt")):
        found = compare(model, model, num_samples=4, num_steps=2, seed=0)
        found.save(tmp_path)
        assert (found.asked_for, read_evaluation(tmp_path).asked_for) == (asked_for, asked_for)
    written = json.loads((tmp_path / EVALUATION).read_text())
    del written["asked_for"]  # as earlier versions wrote it
    (tmp_path / EVALUATION).write_text(json.dumps(written))
    assert read_evaluation(tmp_path).asked_for == "class"


def test_what_was_saved_reads_back(tmp_path):
    found = compare(small(), small(2.0), num_samples=20, num_steps=2, seed=0, reference=FASHION)
    found.save(tmp_path)
    read = replace(read_evaluation(tmp_path), samples=read_samples(tmp_path))
    assert read.as_dict() == found.as_dict()
    assert isinstance(read.sample_shape, tuple)
    assert all(torch.equal(read.samples[key], found.samples[key]) for key in found.samples)
    assert json.loads((tmp_path / EVALUATION).read_text())["samples"] == SAMPLES


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_saved_files_have_the_mode_of_the_umask_and_nothing_is_left_beside(tmp_path, umask):
    before = os.umask(umask)
    try:
        compare(toy(), toy(), num_samples=2, num_steps=2, seed=0).save(tmp_path)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path)) for path in files} == {EVALUATION, SAMPLES}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_class_accuracy_keeps_the_key_that_it_was_published_under(tmp_path):
    found = compare(small(), small(), num_samples=20, num_steps=2, seed=0, reference=FASHION)
    found.save(tmp_path)
    file = tmp_path / EVALUATION
    metrics = json.loads(file.read_text())["student"]["metrics"]
    assert metrics["class_agreement"] == found.student.metrics["class_accuracy"]
    assert "class_accuracy" not in metrics
    file.write_text(file.read_text().replace("class_agreement", "class_accuracy"))
    assert read_evaluation(tmp_path).student.metrics == found.student.metrics


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DkdmError, match=r"evaluation.json is missing"):
        read_evaluation(tmp_path)
    with pytest.raises(DkdmError, match=r"comparison.safetensors is missing"):
        read_samples(tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / SAMPLES).write_bytes(b"x" * 40)
    for text in ("{", "[]", '{"teacher": {}}'):
        (tmp_path / EVALUATION).write_text(text)
        with pytest.raises(DkdmError, match=r"evaluation.json cannot be read"):
            read_evaluation(tmp_path)
    with pytest.raises(DkdmError, match=r"comparison.safetensors cannot be read"):
        read_samples(tmp_path)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UsageError, match="models of one shape"):
        compare(small(), toy(), num_samples=4, num_steps=2, seed=0)
    with pytest.raises(UsageError, match="num_samples is 0: give 1 or more"):
        compare(toy(), toy(), num_samples=0, num_steps=2, seed=0)
