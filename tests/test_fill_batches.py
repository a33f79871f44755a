"""How many samples a fill evaluates at once: the pool is the same."""

import pytest
import torch

from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.core.shards import Shards
from dkdm.core.sources.fill import empty_pool, fill_ancestral, fill_few_step
from dkdm.core.sources.filling import Filling
from dkdm.evaluation.fastest import fastest, seconds_a_sample
from small_runs import run


def network(x, time, class_labels):
    """Elementwise, so that a sample does not depend on the batch that it is in."""
    del time
    return 0.5 * torch.tanh(x) + per_sample(class_labels / 10, x)


def filled(ancestral, together, done=0):
    process = from_betas(beta_schedule("squaredcos_cap_v2", 20))
    teacher = Denoiser(network, process, Parameterization("sample"), (2, 3), ClassLabels(3, 3))
    pool = empty_pool(teacher, 50, torch.device("cpu"), torch.float32, Shards(2), seed=3)
    filling = Filling(pool, done=done)
    if ancestral:
        fill_ancestral(pool, 4, filling, together)
    else:
        fill_few_step(pool, 3, 4, filling, together)
    return pool, filling


@pytest.mark.parametrize("ancestral", [False, True])
@pytest.mark.parametrize("together", [2, 3, 100])
def test_batches_together_fill_as_one_by_one(ancestral, together):
    expected, (pool, filling) = filled(ancestral, 1)[0], filled(ancestral, together)
    assert torch.equal(pool.x, expected.x)
    assert torch.equal(pool.t, expected.t)
    assert pool.evaluations == expected.evaluations
    assert filling.done == 14  # 25 entries in each of 2 shards, 4 in a batch


@pytest.mark.parametrize("done", [1, 5, 7, 9])
def test_a_fill_goes_on_with_other_batches(done):
    whole, part = filled(False, 1)[0], filled(False, 3, done)[0]
    first = min(done * 4, 25) if done <= 7 else 25 + (done - 7) * 4
    begun = empty_pool(part.teacher, 50, torch.device("cpu"), torch.float32, Shards(2), seed=3)
    assert torch.equal(part.x[:first], begun.x[:first])
    assert torch.equal(part.x[first:], whole.x[first:])


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ({8: 1.0, 16: 0.6, 32: 0.4, 64: 0.3}, 64),
        ({8: 1.0, 16: 0.6, 32: 0.59, 64: 0.1}, 16),
        ({8: 1.0, 16: 0.6, 32: None}, 16),
        ({8: None}, 8),
        ({8: 1.0, 16: 1.5}, 8),
    ],
)
def test_the_fastest_batch_is_doubled_while_that_pays(seconds, found):
    assert fastest(seconds.__getitem__, 8, 100) == found


def test_time_a_sample_is_measured_without_a_trace():
    teacher = filled(False, 1)[0].teacher
    state = torch.get_rng_state()
    assert seconds_a_sample(teacher, 4) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_finds_its_batch_and_learns_the_same(tmp_path, capsys):
    settings = {"evaluation_samples": 0, "max_train_steps": 2, "pool_size": 64, "shards": 1}
    (tmp_path / "auto").mkdir()
    _, plain, cost = run(tmp_path, **settings)
    _, auto, its = run(tmp_path / "auto", fill_batch_size="auto", **settings)
    assert "the fill evaluates" in capsys.readouterr().err
    assert its == cost
    assert [e["loss"] for e in auto] == pytest.approx([e["loss"] for e in plain], rel=1e-4)
