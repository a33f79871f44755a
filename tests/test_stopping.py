"""A run that a signal stops saves what it has, and ends bit by bit as if nothing had come."""

import json
import os
import pkgutil
import signal

import pytest

from dkdm.cli import main
from dkdm.core.saving import checkpoint
from dkdm.core.saving.folders import MANIFEST
from dkdm.core.saving.progress import MetricsFile
from dkdm.core.saving.stopping import RESUMABLE, Stopped, answering_signals, whole
from dkdm.core.training.trainer import Trainer
from dkdm.runs import launch
from test_filling import stop_in_fill
from test_resume import STEPS, command, losses

SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1"]
MORE = ("--validation-steps", "7", "--validation-sampling-steps", "1", "--logging-steps", "2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(folder, *MORE)) == 0
    return folder


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


def once(name):
    """Sends the signal when it is called first: a second one ends the process."""
    left = [name]
    return lambda: left and send(left.pop())


def in_step(monkeypatch, name):
    """While the seventh step moves its batch on: after the update, before the pool's."""
    interrupt, update = once(name), Trainer._update

    def then(self, loss):
        update(self, loss)
        if self.step_number == 6:
            interrupt()

    monkeypatch.setattr(Trainer, "_update", then)


def in_validation(monkeypatch, name):
    """While the seventh step is validated; its line of metrics is not written yet."""
    interrupt, averaged = once(name), Trainer.averaged

    def then(self):
        if self.step_number == 7:
            interrupt()
        return averaged(self)

    monkeypatch.setattr(Trainer, "averaged", then)


def in_save(monkeypatch, name):
    """While checkpoint-6 is written by its thread."""
    interrupt, write = once(name), Trainer._write_more

    def then(self, folder):
        write(self, folder)
        if "checkpoint-6" in folder.name:
            interrupt()

    monkeypatch.setattr(Trainer, "_write_more", then)


def in_metrics(monkeypatch, name):
    interrupt, write = once(name), MetricsFile.write

    def then(self, entry):
        write(self, entry)
        if entry["step"] == 8:
            interrupt()

    monkeypatch.setattr(MetricsFile, "write", then)


def in_the_end(monkeypatch, name):
    """While the finished model is described, after the last step."""
    interrupt, write = once(name), launch.write_card

    def then(*given, **named):
        interrupt()
        return write(*given, **named)

    monkeypatch.setattr(launch, "write_card", then)


def before_work(place):
    """Before a function does its work."""

    def phase(monkeypatch, name):
        interrupt, work = once(name), pkgutil.resolve_name(place)

        def then(*given, **named):
            interrupt()
            return work(*given, **named)

        monkeypatch.setattr(place, then)

    phase.__name__ = place.rpartition(".")[2]
    return phase


PHASES = [(in_step, 7), (in_validation, 7), (in_save, None), (in_metrics, 8), (in_the_end, STEPS)]
LESS_OFTEN = [
    (before_work("dkdm.runs.distill.opened_teachers"), None),  # at the start: nothing is done yet
    (before_work("dkdm.runs.launch.claim_output"), None),
    (before_work("dkdm.runs.source.fill_few_step"), None),
    (stop_in_fill, None),
    (before_work("dkdm.runs.objectives.compare_models"), STEPS),
    (before_work("dkdm.runs.launch.write_pipeline"), STEPS),
    (before_work("dkdm.runs.launch.write_report"), STEPS),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize(("phase", "step"), PHASES + LESS_OFTEN)
def test_each_signal_in_each_phase(undisturbed, tmp_path, capsys, phase, step, name, monkeypatch):
    check(undisturbed, tmp_path / "run", capsys, phase, step, name, monkeypatch)


@pytest.mark.parametrize(("phase", "step"), PHASES)
def test_a_stopped_run_goes_on_as_if_nothing_had_come(
    undisturbed, tmp_path, capsys, phase, step, monkeypatch
):
    name = SIGNALS[(step or 6) % len(SIGNALS)]
    check(undisturbed, tmp_path / "run", capsys, phase, step, name, monkeypatch)


def check(undisturbed, folder, capsys, phase, step, name, monkeypatch):
    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        phase(patch, name)
        assert main(command(folder, *MORE)) == RESUMABLE == 75
    assert signal.getsignal(getattr(signal, name)) is before
    said = capsys.readouterr().err
    assert f"stopped by {name}; the same command with --resume-from-checkpoint latest" in said
    assert step is None or checkpoint.newest(folder).name == f"checkpoint-{step}"
    assert main(command(folder, *MORE, "--resume-from-checkpoint", "latest")) == 0
    last = f"checkpoint-{STEPS}/{MANIFEST}"
    assert (folder / last).read_text() == (undisturbed / last).read_text()
    assert losses(folder) == losses(undisturbed)
    assert per_level(folder) == per_level(undisturbed)


def per_level(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss_per_level"] for line in lines]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_block_ends_before_a_signal_does(name):
    done = []
    with pytest.raises(Stopped, match=f"stopped by {name}"), answering_signals():
        with whole():
            with whole():
                send(name)
            done.append("inner")
            done.append("outer")
        done.append("never")
    assert done == ["inner", "outer"]


def test_a_second_signal_ends_the_process_at_once():
    child = os.fork()
    if child == 0:
        try:
            os.close(2)
            with answering_signals(), whole():
                send("SIGTERM")
                send("SIGTERM")
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_a_signal_that_a_launcher_passes_on_is_no_second_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = []
    with pytest.raises(Stopped), answering_signals(), whole():
        send("SIGTERM")
        send("SIGTERM")
        done.append("the block")
    assert done == ["the block"]


def test_a_later_run_in_the_same_process_is_not_stopped_by_an_earlier_signal():
    with pytest.raises(Stopped), answering_signals():
        send("SIGUSR1")
    with answering_signals(), whole():
        pass
