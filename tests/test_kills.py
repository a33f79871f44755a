"""A run that is killed at any moment, again and again, ends bit by bit as one that never was.

Each try is a fork of this process, which has everything imported; SIGKILL leaves nothing to tidy.
"""

import contextlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch

import dkdm
from dkdm.cli import main
from dkdm.core.saving.folders import MANIFEST
from test_resume import STEPS, command

MORE = (
    *("--validation-steps", "5", "--validation-sampling-steps", "1", "--logging-steps", "2"),
    *("--evaluation-samples", "4", "--evaluation-reference", "none", "--keep-finished", "4"),
)
MOMENTS = [  # (function, call at which it is killed, before or after its work)
    ("dkdm.core.denoisers.denoiser.Denoiser.sample", 2, "before"),
    ("dkdm.core.sources.pool.Pool.store", 2, "after"),
    ("dkdm.core.saving.folders._flush", 2, "after"),
    ("pathlib.Path.rename", 1, "before"),
    ("pathlib.Path.rename", 2, "after"),
    ("pathlib.Path.replace", 1, "before"),
    ("pathlib.Path.replace", 2, "after"),
    ("dkdm.core.saving.progress.MetricsFile.write", 3, "after"),
    ("dkdm.core.saving.checkpoint.rotate", 2, "before"),
    ("dkdm.runs.launch.write_pipeline", 1, "before"),
    ("dkdm.runs.launch.write_card", 1, "before"),
    ("dkdm.evaluation.comparison.Comparison.save", 1, "before"),
    ("dkdm.runs.launch.write_report", 1, "before"),
]
IN_EVERY_RUN = [MOMENTS[i] for i in (1, 3, 5, 7, 10)]


def forked(work, said=os.devnull):
    """Run `work` in a fork, which prints into a file, `said`; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with open(said, "w") as to:
            os.dup2(to.fileno(), 1)
            os.dup2(to.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)
        code = work()
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child):
    """The exit status of a fork; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(work):
    """The exit status of a fork, and what it said."""
    theirs, ours = os.pipe()[::-1]
    child = forked(work, theirs)
    os.close(theirs)
    with os.fdopen(ours) as said:
        text = said.read()
    return ended(child), text


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


# The phases of a run by the functions that are them. In the first a kill comes at a random line of
# Python of the first call, counted by a trace; in the others at a random time after it has begun.
WRITES = {
    "config.json": "dkdm.runs.launch.claim_output",
    "a checkpoint": "dkdm.core.saving.saver.Saver._write",
    "metrics.jsonl": "dkdm.core.saving.progress.MetricsFile._append",
    "what was measured": "dkdm.evaluation.comparison.Comparison.save",
    "the finished model": "dkdm.runs.launch.write_pipeline",
    "the card": "dkdm.runs.launch.write_card",
    "the page": "dkdm.runs.launch.write_report",
}
WORK = {
    "the fill": "dkdm.runs.objectives.prepare_source",
    "training": "dkdm.core.training.trainer.Trainer.step",
    "a validation": "dkdm.core.training.trainer.Trainer._validated",
    "the final evaluation": "dkdm.runs.objectives.compare_models",
}
PHASES = WRITES | WORK
# in the order in which a run comes to them, each as often as it is killed there
CHAIN = (
    *("config.json", "the fill", "the fill", "a checkpoint", "config.json", "training"),
    *("metrics.jsonl", "a checkpoint", "a validation", "the final evaluation"),
    *("what was measured", "the final evaluation", "the finished model", "the card"),
    *("the finished model", "the page"),
)
CALLS = {"training": 3, "a checkpoint": 2, "metrics.jsonl": 2}  # it is in one of so many calls
CHAINS, LEAST = 8, 13  # runs, and kills in each of them


def wrapped(place, then):
    """Replace a function by `then(function, *arguments)`."""
    owner, _, name = place.rpartition(".")
    owner = __import__("pkgutil").resolve_name(owner)
    function = getattr(owner, name)
    setattr(owner, name, lambda *args, **named: then(function, *args, **named))


def traced(work, line):
    """What `work` returns, and how many lines of Python it ran; killed before number `line`."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        del frame, argument
        count += event == "line"
        if event == "line" and count == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        return work(), count
    finally:
        sys.settrace(None)


def measured_phases(folder):
    """How many lines, or seconds, the first call of each phase takes in a run."""
    file = folder.parent / "phases.json"

    def work():
        found = {}

        def of_writing(name, function, *args, **named):
            result, lines = traced(lambda: function(*args, **named), 0)
            found.setdefault(name, lines)
            return result

        def of_work(name, function, *args, **named):
            began = time.monotonic()
            result = function(*args, **named)
            found.setdefault(name, time.monotonic() - began)
            return result

        for name, place in PHASES.items():
            wrapped(place, partial(of_writing if name in WRITES else of_work, name))
        code = main(resumed(folder))
        file.write_text(json.dumps(found))
        return code

    assert ended(forked(work)) == 0
    return json.loads(file.read_text())


def kill_in(phase, call, moment, where):
    """Let this process be killed in a call of a phase: before a line, or after a time.

    where: two bytes that say which phase it was in: of the run, and of the thread that writes.
    """
    calls, names = [], list(PHASES)

    def watched(number, function, *args, **named):
        own = threading.current_thread() is not threading.main_thread()
        before, where[own] = where[own], number
        try:
            return function(*args, **named)
        finally:
            where[own] = before

    def then(function, *args, **named):
        calls.append(1)
        if len(calls) != call:
            return function(*args, **named)
        if phase in WRITES:
            return traced(lambda: function(*args, **named), moment)[0]
        threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*args, **named)

    wrapped(PHASES[phase], then)
    for number, name in enumerate(names, 1):
        wrapped(PHASES[name], partial(watched, number))


def killed(folder, phase, call, moment):
    """The phases in which the run was killed, of a run that is; none if it came to its end."""
    where = mmap.mmap(-1, 2)

    def work():
        kill_in(phase, call, moment, where)
        return main(resumed(folder))

    status = ended(forked(work))
    assert status in (0, -signal.SIGKILL)
    names = ["between these", *PHASES]
    return {names[number] for number in set(where[:]) - {0} or {0}} if status else set()


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    return measured_phases(tmp_path_factory.mktemp("measured") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CHAINS))
def test_a_run_that_is_killed_in_every_phase_ends_the_same(undisturbed, lengths, tmp_path, seed):
    """More than a hundred kills in all: a phase may have been over before a few of them."""
    folder, chooser, places = tmp_path / "run", random.Random(seed), []
    for phase in CHAIN:
        length, call = lengths[phase], chooser.randint(1, CALLS.get(phase, 1))
        within = chooser.randint(1, length) if phase in WRITES else chooser.uniform(0, length)
        if found := killed(folder, phase, call, within):
            places.append(" and ".join(sorted(found)))
    assert ended(forked(partial(main, resumed(folder)))) == 0
    assert results(folder) == undisturbed
    print(f"{len(places)} kills: {'; '.join(places)}")
    assert len(places) >= LEAST


COLD = 5  # kills in each of two runs


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_processes_of_their_own_are_killed_at_any_time_of_their_life(tmp_path, seed):
    """Imports included; nothing is shared with the process of the tests."""
    place = os.pathsep.join([str(Path(dkdm.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": place, "PYTHONDONTWRITEBYTECODE": "1"}
    chooser = random.Random(seed)

    def started(folder):
        command = [sys.executable, "-m", "dkdm", *resumed(folder)]
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, env=environment, **nowhere)

    began = time.monotonic()
    assert started(tmp_path / "whole").wait() == 0
    took, times = time.monotonic() - began, []
    while len(times) < COLD:
        process = started(tmp_path / "run")
        waits = chooser.uniform(0, took)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(waits)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            times.append(round(waits, 1))
    print(f"killed after {times} of {took:.1f} seconds")
    assert started(tmp_path / "run").wait() == 0
    assert results(tmp_path / "run") == results(tmp_path / "whole")
