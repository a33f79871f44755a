"""What is promised of a CPU: the same bits with the same threads, nearly the same with others."""

import pytest
import torch

from small_runs import begun, state_of

STEPS = 3
LARGE = {"train_batch_size": 64, "pool_size": 96}  # threads share what is large


@pytest.fixture
def settings():
    """Threads and algorithms, which a test changes for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def trained(folder, threads=1, **changes):
    """Losses of a few steps in so many threads, and all that a checkpoint would keep."""
    torch.set_num_threads(threads)
    trainer = begun(folder, stride="random:9", lr_warmup_steps=0, fill="none", **changes)
    losses = [float(trainer.step()) for _ in range(STEPS)]
    return losses, state_of(trainer)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_run_has_the_same_bits_every_time(tmp_path, optimizer):
    losses, expected = trained(tmp_path / "once", optimizer=optimizer)
    for name, more in {"again": {}, "deterministic": {"deterministic": True}}.items():
        again, found = trained(tmp_path / name, optimizer=optimizer, **more)
        assert torch.are_deterministic_algorithms_enabled() == bool(more)
        assert again == losses
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.usefixtures("settings")
@pytest.mark.slow  # two threads wait for each other, and for whatever else is computed
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_other_threads_draw_the_same_and_round_otherwise(tmp_path, optimizer):
    losses, expected = trained(tmp_path / "one", optimizer=optimizer, **LARGE)
    others, found = trained(tmp_path / "two", 2, optimizer=optimizer, **LARGE)
    assert others == pytest.approx(losses, rel=1e-5)
    for key, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)
        else:  # levels, conditions, counts
            assert torch.equal(found[key], value), key
