"""Checkpoints are written by a thread from a copy; a disk that does not take one ends nothing."""

import errno
import json
import os
import re
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch

import dkdm
import small_runs
from dkdm.cli import main
from dkdm.config import CheckpointOptions
from dkdm.core.saving import checkpoint
from dkdm.core.saving import saver as saving
from dkdm.core.saving.folders import MANIFEST
from dkdm.core.saving.saver import Saver
from dkdm.errors import DkdmError, UsageError
from test_kills import ended, forked
from test_resume import STEPS, command


class Part:
    def __init__(self, value):
        self.value, self.groups = torch.full((3,), float(value)), [{"lr": value}]

    def state_dict(self):
        return {"value": self.value, "groups": self.groups}


def saver(folder, **fields):
    return Saver(folder, 2, lambda partial: None, **fields)


def value_in(folder):
    return checkpoint.read_tensors(folder / "part.safetensors")["value"].tolist()


def test_what_is_written_is_what_was_there(tmp_path, monkeypatch):
    part, may = Part(1), threading.Event()
    write = checkpoint.write_parts

    def later(*args):
        assert may.wait(30)
        write(*args)

    monkeypatch.setattr(checkpoint, "write_parts", later)
    saves = saver(tmp_path)
    saves.save(4, {"part": part}, {"step": 4})
    part.value.fill_(2)
    part.groups[0]["lr"] = 2
    assert checkpoint.checkpoints(tmp_path) == []
    may.set()
    saves.wait()
    assert value_in(tmp_path / "checkpoint-4") == [1, 1, 1]
    state = json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())
    assert state["parts"]["part"]["groups"] == [{"lr": 1}]


def test_without_memory_for_a_copy_the_step_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "usable_memory", lambda: 20)
    monkeypatch.setattr(saving.Copied, "of", None)
    saves = saver(tmp_path)
    saves.save(4, {"part": Part(1)}, {"step": 4})
    assert value_in(tmp_path / "checkpoint-4") == [1, 1, 1]


def test_an_error_in_the_thread_is_raised_where_it_is_waited_for(tmp_path):
    def fails(partial):
        raise ZeroDivisionError(str(partial))

    saves = Saver(tmp_path, 2, fails)
    saves.save(4, {"part": Part(1)}, {"step": 4})
    with pytest.raises(ZeroDivisionError):
        saves.save(5, {"part": Part(1)}, {"step": 5})
    assert checkpoint.checkpoints(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_takes_nothing_keeps_the_old_checkpoint_and_is_tried_again(
    tmp_path, monkeypatch, capsys, number
):
    clock = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: clock[0])
    saves, full = saver(tmp_path, began=0.0), [False]

    def more(partial):
        del partial
        if full[0]:
            raise OSError(number, os.strerror(number))

    saves.more = more
    saves.save(4, {"part": Part(1)}, {"step": 4})
    saves.wait()
    full[0] = True
    saves.save(5, {"part": Part(2)}, {"step": 5})
    saves.wait()
    said = capsys.readouterr().err
    assert "warning: checkpoint-5 could not be written: it needs 0 MB, and " in said
    assert f"[Errno {number}] {os.strerror(number)}); the last checkpoint is checkpoint-4" in said
    assert "training goes on" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4"]
    assert not saves.is_due()
    clock[0] += saving.AGAIN + 1
    assert saves.is_due()
    with pytest.raises(DkdmError, match=r"checkpoint-5 could not be written: .* Make room, and go"):
        saves.finish()
    full[0] = False
    saves.save(6, {"part": Part(3)}, {"step": 6})
    saves.finish()
    assert not saves.is_due()
    assert value_in(tmp_path / "checkpoint-6") == [3, 3, 3]


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_fault_of_the_new_one(
    tmp_path, monkeypatch, capsys
):
    def kept(*given):
        del given
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "rotate", kept)
    saves = saver(tmp_path)
    saves.save(4, {"part": Part(1)}, {"step": 4})
    saves.finish()
    assert value_in(tmp_path / "checkpoint-4") == [1, 1, 1]
    said = capsys.readouterr().err
    assert "older checkpoints are not deleted" in said and "could not be written" not in said


def test_a_checkpoint_that_is_not_whole_deletes_none(tmp_path, monkeypatch):
    saves = saver(tmp_path)
    for step in (1, 2):
        saves.save(step, {"part": Part(step)}, {"step": step})
    saves.wait()

    def damaged(folder):
        raise DkdmError(f"{folder} is damaged")

    monkeypatch.setattr(checkpoint, "verify_checkpoint", damaged)
    saves.save(3, {"part": Part(3)}, {"step": 3})
    with pytest.raises(DkdmError, match="checkpoint-3 is damaged"):
        saves.wait()
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize(("given", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_times_between_checkpoints(tmp_path, monkeypatch, given, seconds):
    assert CheckpointOptions(checkpoint_every=given).seconds == seconds
    clock = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: clock[0])
    saves = saver(tmp_path, every=float(seconds), began=0.0)
    clock[0] = seconds - 1
    assert not saves.is_due()
    clock[0] = seconds + 1
    assert saves.is_due()


@pytest.mark.parametrize("given", ["10", "m", "0s", "-1m", "10 m", "1d", "1e3s"])
def test_what_is_no_time_is_refused(given):
    with pytest.raises(UsageError, match="--checkpoint-every .*: give a time such as 90s"):
        CheckpointOptions(checkpoint_every=given)


def test_nothing_but_the_history_reads_the_clock_on_the_wall():
    """Which may jump: intervals are of time.monotonic."""
    sources = {path.name: path.read_text() for path in Path(dkdm.__file__).parent.rglob("*.py")}
    asked = re.compile(r"time\.time\(|datetime\.now\(|\.utcnow\(|localtime\(")
    assert [name for name, text in sources.items() if asked.search(text)] == ["resume.py"]


def test_a_run_saves_by_the_clock_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Saver, "is_due", lambda self: self.saved < 2)
    folder, _, _ = small_runs.run(tmp_path, evaluation_samples=0, checkpoints_total_limit=None)
    names = [path.name for path in checkpoint.checkpoints(folder)]
    assert names == ["checkpoint-0", "checkpoint-1", "checkpoint-2", "checkpoint-4"]


def limited(folder, size):
    """The run in a process whose files may not grow beyond `size` bytes."""

    def work():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return main(command(folder, "--resume-from-checkpoint", "latest"))

    return ended(forked(work))


def test_a_run_whose_files_may_not_grow_keeps_what_it_has(undisturbed_run, tmp_path):
    """As on a full disk: the limit fails every write that is larger, wherever it is."""
    whole, folder = undisturbed_run, tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in checkpoint.checkpoints(folder)[2:]:
        shutil.rmtree(path)
    kept = checkpoint.checkpoints(folder)[-1]
    before = (kept / MANIFEST).read_text()
    assert limited(folder, 1000) == 1  # not even config.json
    assert limited(folder, 4000) == 1
    assert (kept / MANIFEST).read_text() == before
    assert checkpoint.newest(folder) == kept
    assert not list(folder.glob(".*.partial"))
    assert limited(folder, resource.RLIM_INFINITY) == 0
    last = f"checkpoint-{STEPS}/{MANIFEST}"
    assert (folder / last).read_text() == (whole / last).read_text()
