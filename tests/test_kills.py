"""A run that is killed at any moment, again and again, ends bit by bit as one that never was.

Each try is a fork of this process, which has everything imported; SIGKILL leaves nothing to tidy.
"""

import contextlib
import json
import os
import random
import signal
import time

import pytest
import torch

from dkdm.cli import main
from dkdm.core.folders import MANIFEST
from test_resume import STEPS, command

MORE = (
    *("--validation-steps", "5", "--validation-sampling-steps", "1", "--logging-steps", "2"),
    *("--evaluation-samples", "4", "--evaluation-reference", "none", "--keep-finished", "4"),
)
MOMENTS = [  # (function, call at which it is killed, before or after its work)
    ("dkdm.core.denoiser.Denoiser.sample", 2, "before"),
    ("dkdm.core.pool.Pool.store", 2, "after"),
    ("dkdm.core.folders._flush", 2, "after"),
    ("pathlib.Path.rename", 1, "before"),
    ("pathlib.Path.rename", 2, "after"),
    ("pathlib.Path.replace", 1, "before"),
    ("pathlib.Path.replace", 2, "after"),
    ("dkdm.core.progress.MetricsFile.write", 3, "after"),
    ("dkdm.core.checkpoint.rotate", 2, "before"),
    ("dkdm.runs.launch.write_pipeline", 1, "before"),
    ("dkdm.runs.launch.write_card", 1, "before"),
    ("dkdm.evaluation.comparison.Comparison.save", 1, "before"),
    ("dkdm.runs.launch.write_report", 1, "before"),
]
IN_EVERY_RUN = [MOMENTS[i] for i in (1, 3, 5, 7, 10)]


def forked(work):
    """Run `work` in a fork, silently; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            torch.set_num_threads(1)
            code = work()
    finally:
        os._exit(code)


def ended(child):
    """The exit status of a fork; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(moment):
    """Let this process kill itself at a moment."""
    name, call, when = moment
    place, _, function = name.rpartition(".")
    owner = __import__("pkgutil").resolve_name(place)
    work, calls = getattr(owner, function), []

    def then(*args, **named):
        calls.append(1)
        if when == "before" and len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        result = work(*args, **named)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, function, then)


def resumed(folder):
    """The command that starts the run or goes on with it."""
    return command(folder, *MORE, "--resume-from-checkpoint", "latest")


def results(folder):
    """All that the end of a run says: hashes of its last checkpoint, metrics, measurements."""
    last = json.loads((folder / f"checkpoint-{STEPS}" / MANIFEST).read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("steps_per_second", None)
    measured = json.loads((folder / "evaluation.json").read_text())
    return last, lines, {name: measured[name]["metrics"] for name in ("teacher", "student")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert ended(forked(lambda: main(resumed(folder)))) == 0
    return results(folder)


def test_a_run_killed_at_chosen_moments_ends_the_same(undisturbed, tmp_path):
    folder = tmp_path / "run"
    for moment in IN_EVERY_RUN:
        die_once(folder, moment)
    assert ended(forked(lambda: main(resumed(folder)))) == 0
    assert results(folder) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_run_killed_at_any_of_these_moments_ends_the_same(undisturbed, tmp_path, moment):
    folder = tmp_path / "run"
    die_once(folder, moment)
    assert ended(forked(lambda: main(resumed(folder)))) == 0
    assert results(folder) == undisturbed


def die_once(folder, moment):
    def work():
        kill_at(moment)
        return main(resumed(folder))

    assert ended(forked(work)) == -signal.SIGKILL, moment


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_run_killed_at_random_moments_ends_the_same(undisturbed, tmp_path, seed):
    """About a hundred kills in all; the seeds decide when."""
    folder, chooser, kills = tmp_path / "run", random.Random(seed), 0
    longest = 0.1
    while kills < 60:
        child = forked(lambda: main(resumed(folder)))
        time.sleep(chooser.uniform(0, longest))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills, longest = kills + 1, longest * 1.25
    assert kills >= 5
    assert results(folder) == undisturbed
