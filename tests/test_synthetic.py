"""Data-free training, the paper's baseline: finished samples of the teacher in place of images."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

import dkdm
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import rectified_flow
from dkdm.core.saving import checkpoint
from dkdm.core.saving.folders import MANIFEST
from dkdm.core.sources.finished import SampleShards
from dkdm.core.sources.synthetic import draw_set, empty_set
from dkdm.errors import DkdmError, UsageError
from dkdm.runs.arms import ARMS
from dkdm.runs.models import open_student
from factories import counting, denoiser

MIXTURE = GaussianMixture.of([[-1.2, -0.4], [0.8, 1.0]], std=[0.3, 0.5], classes=[0, 1])


def test_the_set_follows_the_teachers_law_and_is_counted():
    teacher, counts = counting(
        mixture_denoiser(MIXTURE, rectified_flow(100), Parameterization("flow_prediction"))
    )
    source = empty_set(teacher, teacher, 3000, seed=1)
    draw_set(source, teacher, 50, guidance_scale=1.0, batch_size=700)
    assert source.evaluations == sum(counts) == 3000 * 50
    labels = source.conditions["class_labels"]
    for label in (0, 1):
        own = source.images[labels == label].double()
        mean, covariance = MIXTURE.of_class(label).moments()
        torch.testing.assert_close(own.mean(0), mean, rtol=0, atol=0.06)
        torch.testing.assert_close(torch.cov(own.T), covariance, rtol=0, atol=0.06)
    batch = source.draw(64)
    target = source.target(batch)
    again = teacher.process.add_noise(target.x_0, target.eps, batch.t)
    torch.testing.assert_close(batch.x, again)
    assert torch.equal(target.x_0, source.images[batch.rows])


def test_samples_do_not_depend_on_what_else_was_drawn():
    teacher = mixture_denoiser(MIXTURE, rectified_flow(20), Parameterization("sample"))
    sets = [empty_set(teacher, teacher, 8, seed=seed) for seed in (1, 1, 2)]
    for source in sets:
        draw_set(source, teacher, 5, 1.0, batch_size=4)
    assert torch.equal(sets[0].images, sets[1].images)
    assert not torch.equal(sets[0].images, sets[2].images)


def drawn_in(folder, teacher, **fields):
    source = empty_set(teacher, teacher, 10, seed=1, shards=SampleShards(folder), **fields)
    draw_set(source, teacher, 5, guidance_scale=1.0, batch_size=4)
    return source


def test_a_set_that_was_cut_off_goes_on_and_is_the_same(tmp_path):
    teacher = mixture_denoiser(MIXTURE, rectified_flow(20), Parameterization("sample"))
    calls = iter(range(5 + 2))  # a batch takes 5: the second is cut off

    def failing(*arguments):
        next(calls)
        return teacher.call(*arguments)

    with pytest.raises(StopIteration):
        drawn_in(tmp_path / "set", replace(teacher, call=failing))
    assert SampleShards(tmp_path / "set").numbers() == [0]
    counted, counts = counting(teacher)
    source = drawn_in(tmp_path / "set", counted)
    whole = drawn_in(tmp_path / "whole", teacher)
    assert (sum(counts), source.evaluations) == (6 * 5, 10 * 5)
    assert torch.equal(source.images, whole.images)
    assert drawn_in(tmp_path / "set", counted).evaluations == 50 and sum(counts) == 30
    with pytest.raises(UsageError, match="holds samples with seed 1, not 2"):
        source.seed = 2
        draw_set(source, teacher, 5, 1.0, 4)
    source.seed, source.conditions = 1, {"class_labels": torch.zeros(10, dtype=torch.int64)}
    with pytest.raises(UsageError, match="other conditions: go on with the options"):
        draw_set(source, teacher, 5, 1.0, 4)


def test_a_checkpoint_does_without_the_set_that_lies_in_shards(tmp_path):
    teacher = mixture_denoiser(MIXTURE, rectified_flow(20), Parameterization("sample"))
    source = drawn_in(tmp_path / "set", teacher)
    state = source.state_dict()
    assert state.keys() == {"step", "evaluations", "size"}
    again = empty_set(teacher, teacher, 10, seed=1, shards=source.shards)
    again.load_state_dict(state)
    assert torch.equal(again.images, source.images)
    former = {"images": source.images, "evaluations": state["evaluations"], "step": state["step"]}
    former |= {f"cond.{key}": value for key, value in source.conditions.items()}
    older = empty_set(teacher, teacher, 10, seed=1)
    older.load_state_dict(former)
    assert torch.equal(older.images, source.images)
    source.shards.path(2).unlink()
    with pytest.raises(DkdmError, match="holds 8 of 10 samples"):
        again.load_state_dict(state)


def config(folder, **options):
    return dkdm.DistillConfig(
        output_dir=folder,
        source="synthetic",
        train_batch_size=4,
        fill_steps=2,
        fill_entries=1,
        lr_scheduler="constant",
        pool_size=16,
        synthetic_steps=3,
        logging_steps=1,
        checkpointing_steps=2,
        evaluation_samples=0,
        validation_steps=0,
        **options,
    )


def test_its_size_costs_what_the_dynamic_source_would(tmp_path):
    teacher = denoiser()
    plain = config(tmp_path, max_train_steps=100)

    def planned(run):
        return ARMS[run.pool.source].plan(teacher, run)

    assert planned(replace(plain, source="dynamic")) == (16, 16 * 2, 100 * 4)
    size = (16 * 2 + 100 * 4) // 3
    assert planned(plain) == (size, size * 3, 0)
    assert planned(replace(plain, guidance_scale="2")) == (size, size * 3 * 2, 0)
    assert planned(replace(plain, synthetic_samples=9)) == (9, 9 * 3, 0)


def test_a_run_resumes_exactly_without_drawing_the_set_again(tmp_path):
    ten = {"synthetic_samples": 10, "max_train_steps": 4}
    dkdm.distill(denoiser(), "dit-tiny", config(tmp_path / "whole", **ten))
    parts = config(tmp_path / "parts", **ten)
    dkdm.distill(denoiser(), "dit-tiny", replace(parts, max_train_steps=2))
    resumed = replace(parts, resume_from_checkpoint="latest")
    dkdm.distill(denoiser(), "dit-tiny", resumed)
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["teacher_evaluations"] == 30
    whole, again = (
        checkpoint.read_tensors(tmp_path / name / "transformer" / checkpoint.WEIGHTS)
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    with pytest.raises(UsageError, match="synthetic set is .*; --synthetic-samples 10 keeps its s"):
        dkdm.distill(
            denoiser(), "dit-tiny", replace(resumed, synthetic_samples=11, accept_changes=True)
        )


def test_shards_that_are_damaged_or_missing_are_drawn_again(tmp_path, capsys):
    ten = {"synthetic_samples": 10, "max_train_steps": 4}
    folder = dkdm.distill(denoiser(), "dit-tiny", config(tmp_path / "run", **ten))
    last = folder / "checkpoint-4" / MANIFEST
    shards, whole = SampleShards(folder / "synthetic"), last.read_text()
    expected = [shards.read(number)[0].clone() for number in shards.numbers()]  # not mapped
    data = bytearray(shards.path(0).read_bytes())
    data[-5] ^= 16
    shards.path(0).write_bytes(data)
    shards.path(2).unlink()
    shutil.rmtree(last.parent)
    again = replace(config(folder, **ten), resume_from_checkpoint="latest")
    capsys.readouterr()
    dkdm.distill(denoiser(), "dit-tiny", again)
    said = capsys.readouterr().err
    assert said.count("it is drawn again") == 2 and "shard-00000.safetensors is damaged" in said
    assert last.read_text() == whole
    found = [shards.read(number)[0] for number in shards.numbers()]
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected) == 3
    shards.path(1).write_bytes(b"")
    for path in folder.glob("checkpoint-*"):  # as if killed before the first
        shutil.rmtree(path)
    dkdm.distill(denoiser(), "dit-tiny", again)
    assert last.read_text() == whole


def test_nothing_teaches_a_variance(tmp_path):
    teacher = denoiser(out_channels=2, scheduler={"variance_type": "learned_range"})
    run = config(tmp_path, student="unet-tiny")
    student = open_student(teacher, run.student_choice, taught_variance=False)
    assert student.parameterization == Parameterization("v_prediction")
    assert student.network.config.out_channels == 1


def test_guidance_is_one_number(tmp_path):
    with pytest.raises(UsageError, match="--source synthetic takes one number"):
        dkdm.distill(denoiser(), "dit-tiny", config(tmp_path, guidance_scale="1:4"))


class Guided(nn.Module):
    """Told the guidance scale; remembers what it was told in training."""

    def __init__(self):
        super().__init__()
        self.scale, self.told = nn.Parameter(torch.ones(())), []

    def forward(self, x, t, class_labels, guidance):
        del t, class_labels
        self.told += guidance.tolist() if torch.is_grad_enabled() else []
        return self.scale * x


def test_a_student_that_embeds_guidance_is_told_that_of_its_samples(tmp_path):
    network, teacher = Guided(), denoiser()
    run = config(tmp_path, guidance_scale="3", condition_dropout=0.5, max_train_steps=2)
    dkdm.distill(teacher, network, run)
    assert network.told[-8:] == [3.0] * 8  # before them one batch was timed


def test_the_student_may_have_another_process(tmp_path):
    run = config(tmp_path / "run", max_train_steps=2, student_process="flow")
    dkdm.distill(denoiser(), "dit-tiny", run)
    model = dkdm.load_teacher(str(tmp_path / "run"))
    assert model.parameterization.prediction == "flow_prediction"
