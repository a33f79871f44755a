"""What a run takes is arithmetic on measured speeds, and measuring leaves no trace."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import dkdm
import pipelines
from dkdm.core.saving.checkpoint import read_tensors
from dkdm.core.saving.progress import read_metrics
from dkdm.evaluation.numbers import duration
from dkdm.models import with_texts
from dkdm.models.prompts import Prompts
from dkdm.runs import cost
from dkdm.runs.cost import Speeds, advice, estimated, in_words, measured
from dkdm.runs.distill import describe
from dkdm.runs.models import teacher_warning
from dkdm.runs.source import SourcePlan
from dkdm.students import student_of
from factories import denoiser

pytestmark = pytest.mark.measures

CONFIG = dkdm.DistillConfig(
    max_train_steps=3,
    train_batch_size=8,
    pool_size=16,
    fill_steps=2,
    logging_steps=1,
    validation_steps=0,
    evaluation_samples=0,
)


def test_seconds_are_evaluations_and_steps_at_their_speeds():
    found = estimated(SourcePlan(0, 1000, 400), 10, 0, Speeds(evaluation=0.5, step=3.0))
    assert (found.preparing, found.training) == (500.0, 400 * 0.5 + 10 * 3.0)
    assert (found.evaluations, found.steps) == ((1000, 400), 10)


def test_a_resumed_run_has_its_rest_ahead_and_nothing_to_prepare():
    found = estimated(SourcePlan(0, 1000, 400), 10, 4, Speeds(0.5, 3.0))
    assert (found.preparing, found.training) == (0.0, 240 * 0.5 + 6 * 3.0)
    assert estimated(SourcePlan(0, 1000, 400), 10, 10, Speeds(0.5, 3.0)).training == 0


class Clock:
    """A clock that goes on only while a batch is at work, by these seconds, one after the other."""

    def __init__(self, monkeypatch, *seconds, world=1):
        self.now, self.left = 0.0, list(seconds)
        for clock in ("perf_counter", "thread_time"):
            monkeypatch.setattr(cost.time, clock, lambda: self.now)
        monkeypatch.setattr(cost.processes, "world", lambda: world)

    def work(self, size):
        if size > 2:
            self.now += self.left.pop(0)


def test_a_batch_that_is_held_up_does_not_make_the_estimate(monkeypatch):
    held_up = Clock(monkeypatch, *[0.3, 0.25, 0.5, 0.125, 0.25, 0.25, 0.125, 0.125, 9.0])
    assert cost._seconds(held_up.work, 32) == 0.125 and held_up.left == [9.0]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="devices are timed by the wall")
def test_waiting_for_a_core_is_not_counted():
    """What this machine gives to others meanwhile: a thread that sleeps computes nothing."""
    assert cost._seconds(lambda _: time.sleep(0.005), 32) < 0.004


def test_slow_models_are_timed_once_and_several_processes_take_equally_many(monkeypatch):
    slow = Clock(monkeypatch, 20.0, 19.0)
    assert cost._seconds(slow.work, 32) == 20.0 and slow.left == [19.0]
    together = Clock(monkeypatch, 20.0, 19.0, 18.0, world=2)
    assert cost._seconds(together.work, 32) == 19.0 and together.left == [18.0]


def test_words_say_both_parts():
    text = in_words(estimated(SourcePlan(0, 1_024_000, 128_000), 1000, 0, Speeds(0.001, 0.1)))
    assert "21 min in total" in text
    assert "17 min to prepare (1,024,000 teacher evaluations)" in text
    assert "3.8 min to train (1,000 steps, 128,000 teacher evaluations)" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.25, "0.25 s"),
        (40, "40 s"),
        (90, "1.5 min"),
        (3000, "50 min"),
        (36_000, "10 h"),
        (1_000_000, "12 days"),
    ],
)
def test_durations_are_readable(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({}, "--fill-steps"),
        ({"fill": "ancestral"}, "--fill few-step"),
        ({"source": "synthetic"}, "--synthetic-samples"),
    ],
)
def test_a_preparation_longer_than_training_is_advised_against(changes, flag):
    config = replace(CONFIG, **changes)
    long = estimated(SourcePlan(0, 1000, 100), 10, 0, Speeds(1.0, 1.0))
    assert flag in advice(long, config.pool)
    assert "--max-train-steps" in advice(long, config.pool)
    assert advice(estimated(SourcePlan(0, 50, 100), 10, 0, Speeds(1.0, 1.0)), config.pool) == ""


class Tracked(nn.Module):
    """A student with statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(1), nn.Dropout(0.5)
        self.last = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, class_labels=None):
        del t, class_labels
        return self.last(self.drop(self.norm(x)))


def test_measuring_leaves_both_models_and_the_random_state_as_they_were():
    teacher = denoiser()
    student = replace(teacher, network=Tracked().train())
    student.network.last.bias.grad = torch.ones(1)
    before = {key: value.clone() for key, value in student.network.state_dict().items()}
    random = torch.random.get_rng_state()
    speeds = measured(teacher, student, CONFIG.training)
    assert speeds.evaluation > 0
    assert speeds.step > 0
    assert torch.equal(torch.random.get_rng_state(), random)
    for key, value in student.network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert student.network.last.weight.grad is None
    assert torch.equal(student.network.last.bias.grad, torch.ones(1))


def distilled(folder, **changes):
    teacher = denoiser()
    config = replace(CONFIG, output_dir=folder, **changes)
    dkdm.distill(teacher, student_of("dit-tiny", teacher), config)
    losses = [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")]
    counts = [entry["teacher_evaluations"] for entry in read_metrics(folder / "metrics.jsonl")]
    weights = read_tensors(folder / "checkpoint-3" / "source" / "shard-0.safetensors")
    return losses, counts, weights


@pytest.mark.teacher_check
def test_check_and_estimate_change_no_result(tmp_path, monkeypatch, capsys):
    speeds = []
    monkeypatch.setattr(
        "dkdm.runs.distill.measured",
        lambda *args: speeds.append(measured(*args)) or Speeds(2e-3, 1e-2),
    )
    with_both = distilled(tmp_path / "a")
    text = capsys.readouterr().err
    assert "to prepare (16 teacher evaluations)" in text
    assert "the teacher does not denoise as it is read" in text
    plain = distilled(tmp_path / "b", check=False)
    assert "does not denoise" not in capsys.readouterr().err
    monkeypatch.setattr("dkdm.runs.distill.measured", lambda *_: Speeds(2e-3, 1e-2))
    neither = distilled(tmp_path / "c", check=False)
    assert len(speeds) == 2
    for found in (plain, neither):
        assert found[:2] == with_both[:2]
        assert all(torch.equal(value, with_both[2][key]) for key, value in found[2].items())


@pytest.mark.teacher_check
def test_a_teacher_that_denoises_is_passed_in_silence_and_a_crash_is_a_warning():
    teacher = dkdm.load_teacher("builtin:fashion")
    assert teacher_warning(teacher, 1e-4) == ""
    assert "too slow" in teacher_warning(teacher, 100.0)

    def crash(x, time, class_labels):
        del x, time, class_labels
        raise ValueError("no")

    broken = replace(teacher, network=crash, call=None)
    assert "could not be checked: ValueError: no" in teacher_warning(broken, 1e-4)


@pytest.mark.teacher_check
@pytest.mark.parametrize("make", [pipelines.ldm_vq, pipelines.stable_diffusion])
def test_teachers_of_latents_and_text_are_looked_at(tmp_path, make):
    """Untrained ones do not denoise, and nothing fails on the way."""
    make().save_pretrained(tmp_path / "teacher")
    teacher = dkdm.load_teacher(str(tmp_path / "teacher"))
    if isinstance(teacher.conditioning, Prompts):
        teacher = with_texts(teacher, "a shoe and a bag")
    warning = teacher_warning(teacher, 0.015)
    assert warning.startswith("warning: the teacher does not denoise as it is read")


def test_dry_run_says_minutes():
    text = describe(replace(CONFIG, teacher="builtin:fashion", student="dit-tiny"))
    assert "to prepare (16 teacher evaluations)" in text
