"""A fill that is stopped or killed goes on where it was, and gives the same pool."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch

import dkdm
import small_runs
from dkdm.cli import main
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.saving import checkpoint
from dkdm.core.saving.stopping import RESUMABLE, Stopped, answering_signals
from dkdm.core.shards import ONE_PROCESS, Shards
from dkdm.core.sources.fill import empty_pool, fill_ancestral, fill_few_step
from dkdm.core.sources.filling import Filling
from dkdm.core.sources.pool import Pool
from dkdm.runs.launch import forget_fill
from factories import denoiser
from test_resume import STEPS, command, losses

FILLS = {
    "few-step": lambda pool, filling: fill_few_step(pool, 3, 4, filling),
    "several": lambda pool, filling: fill_few_step(pool, 3, 4, filling, entries=2),
    "ancestral": lambda pool, filling: fill_ancestral(pool, 4, filling),
}


def made_pool(size, shards=ONE_PROCESS):
    teacher = denoiser(scheduler={"num_train_timesteps": 10})
    return empty_pool(teacher, size, torch.device("cpu"), torch.float32, shards, seed=3)


class KilledError(Exception):
    pass


def kill_after(monkeypatch, batches):
    store, left = Pool.store, [None] * batches

    def then(self, *args):
        store(self, *args)
        if not left:
            raise KilledError
        left.pop()

    monkeypatch.setattr(Pool, "store", then)


@pytest.mark.parametrize("kind", FILLS)
def test_a_killed_fill_goes_on_from_what_was_saved(tmp_path, monkeypatch, kind):
    whole, parts = (made_pool(14, Shards(2)) for _ in range(2))
    FILLS[kind](whole, Filling(whole))
    monkeypatch.setattr("dkdm.core.sources.filling.EVERY", -1)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_after(patch, 2)
        filling = Filling(parts, tmp_path / "fill")
        with filling.kept():
            FILLS[kind](parts, filling)
    again = made_pool(14, Shards(2))
    filling = Filling(again, tmp_path / "fill")
    with filling.kept():
        assert filling.done == (1 if kind == "several" else 2)  # which stores twice a batch
        FILLS[kind](again, filling)
    assert torch.equal(again.x, whole.x) and torch.equal(again.t, whole.t)
    assert torch.equal(again.evaluated, whole.evaluated)
    assert all(torch.equal(again.cond[key], whole.cond[key]) for key in whole.cond)


@pytest.mark.parametrize("damage", ["how", "file"])
def test_a_fill_that_was_made_otherwise_or_is_damaged_begins_anew(tmp_path, capsys, damage):
    pool = made_pool(12)
    filling = Filling(pool, tmp_path / "fill", {"batch_size": 4}, done=2)
    filling.save()
    if damage == "file":
        (tmp_path / "fill" / "shard-0.safetensors").write_bytes(b"")
    other = {"batch_size": 4 + (damage == "how")}
    again = Filling(pool, tmp_path / "fill", other)
    with again.kept():
        assert again.done == 0
    said = capsys.readouterr().err
    assert ("shard-0.safetensors is damaged; the pool is filled anew" in said) == (damage == "file")


def stop_in_fill(monkeypatch, name):
    """In the second batch of the fill."""
    sample, calls = Denoiser.sample, []

    def then(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(Denoiser, "sample", then)


def test_a_signal_saves_what_is_filled(undisturbed_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_fill(patch, "SIGTERM")
        assert main(command(folder)) == RESUMABLE
    (saved,) = (folder / "fill").glob("*-0-of-1")
    assert json.loads((saved / checkpoint.STATE).read_text())["done"] == 2
    assert checkpoint.newest(folder) is None
    capsys.readouterr()
    assert main(command(folder, "--resume-from-checkpoint", "latest")) == 0
    assert "starts anew" not in capsys.readouterr().err
    assert not (folder / "fill").exists()
    last = f"checkpoint-{STEPS}/manifest.json"
    assert (folder / last).read_text() == (undisturbed_run / last).read_text()
    assert losses(folder) == losses(undisturbed_run)


def test_a_signal_in_the_fill_of_one_teacher_keeps_what_another_has_filled(tmp_path, monkeypatch):
    teachers = [denoiser(seed=seed) for seed in (0, 1)]
    config = replace(small_runs.SMALL, output_dir=tmp_path / "run", max_train_steps=1, shards=1)
    config = replace(config, fill_entries=1)
    config = replace(config, fill_batch_size=24, evaluation_samples=0, check=False)
    with monkeypatch.context() as patch, pytest.raises(Stopped), answering_signals():
        stop_in_fill(patch, "SIGTERM")  # each teacher fills its pool in one batch
        dkdm.distill(teachers, "dit-tiny", config)
    saved = (tmp_path / "run" / "fill").glob(f"*-0-of-1/{checkpoint.STATE}")
    assert [json.loads(state.read_text())["done"] for state in saved] == [3, 3]  # of a batch of 4
    monkeypatch.setattr(Filling, "batch", lambda *given: pytest.fail("a pool is filled again"))
    dkdm.distill(teachers, "dit-tiny", replace(config, resume_from_checkpoint="latest"))


def test_a_fill_does_not_go_on_with_another_teacher_or_seed(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_fill(patch, "SIGINT")
        assert main(command(folder)) == RESUMABLE
    assert main(command(folder, "--resume-from-checkpoint", "latest", "--seed", "5")) == 2
    assert "--seed was 0 and is 5" in capsys.readouterr().err
    args = command(folder, "--resume-from-checkpoint", "latest")
    assert main([arg.replace(":teacher", ":other_teacher") for arg in args]) == 2
    assert "made with another teacher: its weights differ" in capsys.readouterr().err


def test_a_fill_that_cannot_be_saved_goes_on(tmp_path, monkeypatch, capsys):
    def full(folder, fill):
        del folder, fill
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dkdm.core.sources.filling.write_folder", full)
    monkeypatch.setattr("dkdm.core.sources.filling.EVERY", -1)
    pool = made_pool(8)
    fill_few_step(pool, 1, 4, Filling(pool, tmp_path / "fill" / "0"))
    assert pool.t.unique().numel() > 4
    assert "warning: what is filled is not saved (OSError: [Errno 28]" in capsys.readouterr().err


def test_what_a_fill_left_goes_with_the_first_checkpoint(tmp_path):
    (tmp_path / "fill" / "0-0-of-1").mkdir(parents=True)
    forget_fill(tmp_path)
    assert (tmp_path / "fill").is_dir()
    (tmp_path / "checkpoint-0").mkdir()
    forget_fill(tmp_path)
    assert not (tmp_path / "fill").exists()


def test_latest_in_an_empty_folder_says_that_the_run_starts_anew(tmp_path, capsys):
    config = {"resume_from_checkpoint": "latest", "max_train_steps": 1, "evaluation_samples": 0}
    folder, _, _ = small_runs.run(tmp_path, **config)
    assert f"{folder} has no checkpoint yet: the run starts anew" in capsys.readouterr().err
    shutil.rmtree(folder)
    config = replace(small_runs.SMALL, output_dir=folder, max_train_steps=1)
    dkdm.distill(denoiser(), "dit-tiny", config)
    assert "starts anew" not in capsys.readouterr().err
