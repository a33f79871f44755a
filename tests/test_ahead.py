"""A teacher ahead of its student, a pool apart from its teacher: results are the same."""

from dataclasses import replace

import pytest
import torch

import dkdm
from dkdm.core.sources.ahead import Ahead
from dkdm.core.sources.states import States, Travelling
from dkdm.core.training.bad_steps import mended
from dkdm.errors import UsageError
from factories import denoiser
from small_runs import SMALL, begun, state_of

STRIDES = {"stride": "random:20", "condition_dropout": 0.2, "max_train_steps": 8}


def walk(trainer, steps):
    return [float(trainer.step()) for _ in range(steps)]


def same(trainer, other):
    found, expected = state_of(trainer), state_of(other)
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], value) for key, value in expected.items()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_prefetch": True, "guidance_scale": "2:8"},
        pytest.param(
            {"teacher_device": "cpu", "gradient_accumulation_steps": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"teacher_prefetch": True, "source": "iterative", "pool_size": None},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_what_is_made_ahead_is_what_would_be_made(tmp_path, changes):
    usual = {k: v for k, v in changes.items() if not k.startswith("teacher")}
    plain, ahead = begun(tmp_path, **STRIDES, **usual), begun(tmp_path, **STRIDES, **changes)
    assert isinstance(ahead.source, Ahead)
    for _ in range(2):
        assert walk(ahead, 4) == walk(plain, 4)
        assert same(ahead, plain)
        assert ahead.source.evaluations == plain.source.evaluations


def test_a_run_with_a_teacher_ahead_is_resumed_exactly(tmp_path):
    settings = {**STRIDES, "teacher_prefetch": True}
    whole, part = begun(tmp_path / "whole", **settings), begun(tmp_path / "part", **settings)
    walk(part, 4)
    part.save()
    part.saver.finish()
    resumed = begun(tmp_path / "resumed", **settings)
    resumed.resume(part.output_dir / "checkpoint-4")
    assert walk(whole, 8)[4:] == walk(resumed, 4)
    assert same(resumed, whole)


def test_after_the_last_batch_the_teacher_is_not_asked(tmp_path):
    trainer, asked = begun(tmp_path, teacher_prefetch=True, max_train_steps=3), []
    model = trainer.source.source.teacher
    call = model.call
    model.call = lambda *a: asked.append(len(a[1])) or call(*a)
    walk(trainer, 3)
    assert sum(asked) == 3 * 8


def test_what_was_made_of_a_bad_entry_is_forgotten(tmp_path):
    trainer = begun(tmp_path, **STRIDES, teacher_prefetch=True)
    walk(trainer, 1)
    pool = trainer.source.source
    rows = pool.plan(8).rows
    pool.x[rows[0]] = torch.nan
    trainer.source._coming = None
    trainer.source._make(8)
    assert mended(trainer.source) == 1
    batch = trainer.source.draw(8)
    assert batch.x.isfinite().all()
    assert torch.equal(batch.rows, rows)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"replay": 2}, "--replay"),
        ({"feature_weight": 0.1}, "--feature-weight"),
        ({"source": "synthetic"}, "--source"),
        ({"objective": "few-step"}, "--objective"),
    ],
)
def test_what_cannot_be_made_ahead_is_refused(tmp_path, changes, named):
    config = replace(SMALL, output_dir=tmp_path / "run", teacher_prefetch=True, **changes)
    with pytest.raises(UsageError, match=f"--teacher-prefetch: .* remove it, or {named}"):
        dkdm.distill(denoiser(), denoiser(seed=1), config)
    assert not (tmp_path / "run").exists()


def test_a_pool_beside_its_teacher_has_no_way_to_travel(tmp_path):
    with pytest.raises(UsageError, match="--pool-pinned: the pool lies beside the models"):
        begun(tmp_path, pool_pinned=True)
    assert type(begun(tmp_path, pool_pinned=True, pool_device="cpu").source.states) is States


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "cpu:x"])
def test_a_device_that_is_not_there_is_named(tmp_path, device):
    with pytest.raises(UsageError, match=f"--teacher-device {device}: there is no such device"):
        begun(tmp_path, teacher_device=device)


def test_travelling_states_are_those_of_states_that_lie_there():
    random, device = torch.Generator().manual_seed(0), torch.device("cpu")
    start = torch.randn(40, 3, generator=random).half()
    lying, travelling = States(start.clone(), device), Travelling(start.clone(), device)
    for _ in range(30):
        rows = torch.randperm(40, generator=random)[:16]
        found = travelling.gather(rows)
        assert torch.equal(found, lying.gather(rows))
        x = torch.tanh(found + torch.randn(16, 3, generator=random))
        for states in (lying, travelling):
            states.write(rows, x)
        x.zero_()
    assert not torch.equal(travelling.x, lying.x)
    travelling.settle()
    assert torch.equal(travelling.x, lying.x)


def test_a_pool_saves_what_was_still_on_its_way(tmp_path):
    plain, apart = begun(tmp_path, **STRIDES), begun(tmp_path, **STRIDES)
    apart.source.states = Travelling(apart.source.x, torch.device("cpu"))
    assert walk(apart, 5) == walk(plain, 5)
    assert same(apart, plain)
