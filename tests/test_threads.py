"""Threads that wait give up their core soon, and a run says how many there are."""

import os
import sys

import pytest
import torch

import dkdm.cli  # noqa: F401
from small_runs import run

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_the_user_decides_how_threads_wait(monkeypatch, given, wanted):
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the command changes
    others = {k: v for k, v in os.environ.items() if k not in NAMES}
    monkeypatch.setattr(os, "environ", others | given)
    sys.modules.pop("dkdm.__main__", None)
    import dkdm.__main__  # noqa: F401

    assert os.environ.get("GOMP_SPINCOUNT") == wanted


def test_a_run_says_what_it_computes_on(tmp_path, capsys):
    run(tmp_path, max_train_steps=1, evaluation_samples=0, check=False)
    threads = torch.get_num_threads()
    wanted = f"computes on CPU, {threads} thread{'s' * (threads > 1)}"
    assert torch.cuda.is_available() or wanted in capsys.readouterr().err
