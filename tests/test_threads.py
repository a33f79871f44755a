"""Threads that wait give up their core soon, and a run says how many there are."""

import os

import torch

from dkdm.__main__ import yield_cores
from small_runs import run


def test_the_user_decides_how_threads_wait(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    yield_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "3000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    yield_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    yield_cores()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_a_run_says_what_it_computes_on(tmp_path, capsys):
    run(tmp_path, max_train_steps=1, evaluation_samples=0, check=False)
    threads = torch.get_num_threads()
    wanted = f"computes on CPU, {threads} thread{'s' * (threads > 1)}"
    assert torch.cuda.is_available() or wanted in capsys.readouterr().err
