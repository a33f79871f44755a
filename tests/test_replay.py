"""A student learns from an evaluation several times; no evaluation is invented."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.saving import checkpoint
from dkdm.core.sources import replay
from dkdm.core.sources.replay import Replayed
from dkdm.errors import UsageError
from dkdm.evaluation.pool_state import read_pool_state
from dkdm.runs.arms import ARMS, make_source, prepare_source
from dkdm.runs.outputs import save_pool
from factories import counting, denoiser
from small_runs import SMALL

CPU = torch.device("cpu")
LEARNED = {"variance_type": "learned_range"}


def source(teacher, tmp_path, **changes):
    given = {"output_dir": tmp_path, "replay": 2, "stride": "random:8", "condition_dropout": 0.2}
    config = replace(SMALL, **(given | changes))
    made = make_source(teacher, teacher, config, CPU)
    prepare_source(made, teacher, config)
    return made


def step(found, count=8):
    batch = found.draw(count)
    target = found.target(batch)
    found.advance(batch, target)
    return batch, target


def states(batch):
    return {tuple(x.flatten().tolist()) for x in batch.x}


def test_batches_between_are_evaluations_seen_before_and_cost_nothing(tmp_path):
    teacher, counts = counting(denoiser())
    found, seen = source(teacher, tmp_path, replay=3), set()
    for number in range(12):
        before = sum(counts)
        batch, _ = step(found)
        if number % 3 == 0:
            assert sum(counts) > before
            seen |= states(batch)
        else:
            assert sum(counts) == before
            assert len(states(batch)) == 8
            assert states(batch) <= seen
    assert found.evaluations == sum(counts)


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": "1:3"}])
def test_the_target_is_what_the_teacher_says_of_the_state(tmp_path, guidance):
    teacher = denoiser(scheduler=LEARNED, out_channels=2)
    found = source(teacher, tmp_path, **guidance)
    for _ in range(6):
        batch, target = step(found)
        scale = batch.cond["guidance"] if guidance else 1.0
        with torch.no_grad():
            expected = teacher.predict(Batch(batch.x, batch.t, batch.cond), scale)
        for own, wanted in zip(target[:4], expected[:4], strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


def test_between_them_the_pool_is_as_without(tmp_path):
    plain, found = (source(denoiser(), tmp_path, replay=times) for times in (1, 2))
    for _ in range(4):
        (batch, target), (same, equal) = step(plain), step(found)
        step(found)
        assert torch.equal(batch.x, same.x)
        assert torch.equal(target.eps, equal.eps)


def test_the_oldest_batch_gives_way(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "RECENT", 3)
    found, new = source(denoiser(), tmp_path), []
    for _ in range(5):
        new.append(states(step(found)[0]))
        between = states(step(found)[0])
        assert between <= set().union(*new[-3:])
    assert {tuple(x.flatten().tolist()) for x in found.kept["x"]} == set().union(*new[-3:])


@pytest.mark.parametrize(
    "changes", [{"shards": 2}, {"source": "shuffled", "pool_size": 16}, {"source": "iterative"}]
)
def test_it_goes_on_exactly(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(replay, "RECENT", 2)
    teacher = denoiser()
    first = source(teacher, tmp_path, **changes)
    for _ in range(7):
        step(first)
    for name, part in first.parts().items():
        checkpoint.write_tensors(tmp_path / f"{name}.safetensors", part.state_dict())
    again = source(teacher, tmp_path, **changes)
    for name, part in again.parts().items():
        part.load_state_dict(checkpoint.read_tensors(tmp_path / f"{name}.safetensors"))
    for _ in range(7):
        (batch, target), (same, equal) = step(first), step(again)
        assert torch.equal(batch.x, same.x)
        assert torch.equal(batch.cond["class_labels"], same.cond["class_labels"])
        assert torch.equal(target.eps, equal.eps)
    assert again.evaluations == first.evaluations


def test_the_plan_counts_new_batches(tmp_path):
    config = replace(SMALL, output_dir=tmp_path, replay=3, max_train_steps=7, fill="none")
    plan = ARMS["dynamic"].plan(denoiser(), config)
    assert plan.training == 3 * 8  # steps 0, 3 and 6
    found = source(denoiser(), tmp_path, replay=3, fill="none", stride="1")
    for _ in range(7):
        step(found)
    assert found.evaluations == plan.training


def test_without_replay_nothing_is_wrapped(tmp_path):
    assert not isinstance(source(denoiser(), tmp_path, replay=1), Replayed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "synthetic", "synthetic_samples": 9}, "the teacher evaluates no batches"),
        ({"feature_weight": 0.1}, "remove --replay or --feature-weight"),
    ],
)
def test_what_cannot_be_replayed_is_refused(tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        source(denoiser(), tmp_path, **changes)


def test_a_run_may_go_on_with_batches_of_another_size(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "RECENT", 3)
    for sizes in ((4, 7), (7, 4)):
        found, new = source(denoiser(), tmp_path), []
        for number in range(12):
            size = sizes[number // 6]
            new.append(states(step(found, size)[0]))
            assert states(step(found, size)[0]) <= set().union(*new)
        assert {tuple(x.flatten().tolist()) for x in found.kept["x"]} == set().union(*new[-3:])


def test_what_it_goes_on_from_lies_where_new_batches_lie(tmp_path):
    first = source(denoiser(), tmp_path)
    batch, _ = step(first)
    elsewhere = SimpleNamespace(device=torch.device("meta"))
    again = Replayed(first.source, elsewhere, 2)
    again.load_state_dict(first.state_dict())
    found = {key: value.device.type for key, value in again.kept.items()}
    conditions = {f"cond.{key}": value.device.type for key, value in batch.cond.items()}
    assert found == {"x": "meta", "output": "meta", "t": "cpu", **conditions}


def test_the_pool_at_the_end_is_that_of_the_source(tmp_path):
    found = source(denoiser(), tmp_path)
    step(found)
    save_pool(found, tmp_path)
    assert read_pool_state(tmp_path).entries == 24
