"""Faults of the disk and of trackers while a run trains: a warning, and the run goes on."""

import errno
import json

import pytest
import torch
from safetensors import SafetensorError

import small_runs
from dkdm.core.saving.checkpoint import STATE
from dkdm.core.saving.progress import MetricsFile, read_metrics
from dkdm.core.saving.tolerance import named_faults, tolerated, tracked
from dkdm.core.sources.finished import SHARD, Finished, SampleShards
from dkdm.errors import DkdmError
from dkdm.runs.resume import note_start

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error: No space left on device")])
def test_a_fault_of_the_disk_is_a_warning_with_the_free_space(tmp_path, capsys, error):
    with tolerated("the grid was not written", tmp_path):
        raise error
    said = capsys.readouterr().err
    assert said.startswith("\nwarning: the grid was not written (")
    assert "No space left on device; " in said and f" MB are free in {tmp_path})" in said


@pytest.mark.parametrize("error", [FULL, PermissionError(errno.EACCES, "Permission denied")])
def test_what_needs_the_disk_ends_in_one_line(tmp_path, error):
    refused = pytest.raises(DkdmError, match=r"cannot be written to .* MB are free.*Make room")
    with refused as said, named_faults(tmp_path):
        raise error
    assert "\n" not in str(said.value)
    with pytest.raises(ConnectionError), named_faults(tmp_path):
        raise ConnectionError("not of the disk")


def test_finished_samples_wait_for_the_disk(tmp_path, monkeypatch, capsys):
    finished = Finished(SampleShards(tmp_path / "finished"), 1024)
    x = torch.arange(2.0 * SHARD).reshape(-1, 1)

    def full(shards, number, samples):
        del shards, number, samples
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(SampleShards, "write", full)
        finished.add(x[:SHARD], {})
    assert "finished samples wait to be written" in capsys.readouterr().err
    finished.add(x[SHARD:], {})
    assert finished.shards.numbers() == [0, 1]
    assert torch.equal(finished.shards.read(1)[0], x[SHARD:])


def test_lines_that_wait_are_dropped_with_those_of_the_file(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1})
    file.waiting = b'{"step": 2}\n{"step": 3}\n'
    file.drop_after(2)
    assert [entry["step"] for entry in read_metrics(file.path)] == [1, 2] and not file.waiting


def test_other_errors_are_raised(tmp_path):
    with pytest.raises(ValueError, match="of ours"), tolerated("nothing", tmp_path):
        raise ValueError("of ours")


def test_lines_that_the_disk_did_not_take_are_written_later(tmp_path, monkeypatch, capsys):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1})

    def cut_off(handle, data):
        handle.write(data[: len(data) // 2])
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr("dkdm.core.saving.progress._write_all", cut_off)
        for step in (2, 3):
            file.write({"step": step})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert capsys.readouterr().err.count("metrics.jsonl: lines wait to be written") == 2
    file.write({"step": 4})
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def refused_by_the_disk(handle, data):
    del handle, data
    raise FULL


def test_lines_that_still_wait_at_the_end_are_in_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    options = {"max_train_steps": 3, "checkpointing_steps": 2, "evaluation_samples": 0}
    with monkeypatch.context() as patch:
        patch.setattr("dkdm.core.saving.progress._write_all", refused_by_the_disk)
        with pytest.raises(IndexError):  # the helper looks for the last line
            small_runs.run(tmp_path, **options)
    assert "metrics.jsonl lacks 3 lines, which the last checkpoint keeps" in capsys.readouterr().err
    folder, metrics, _ = small_runs.run(tmp_path, resume_from_checkpoint="latest", **options)
    assert [entry["step"] for entry in metrics] == [1, 2, 3]
    whole, expected, _ = small_runs.run(tmp_path / "whole", **options)
    for entry in (*metrics, *expected):
        del entry["steps_per_second"]
    assert metrics == expected
    assert "waiting_metrics" not in json.loads((whole / "checkpoint-3" / STATE).read_text())
    assert not MetricsFile(folder / "metrics.jsonl").waiting


def test_lines_of_a_checkpoint_are_not_written_twice(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 1)
    file.write({"step": 1})
    file.write({"step": 2})
    file.restore({"waiting_metrics": '{"step": 2}\n{"step": 3}\n'})
    file.drop_after(3)
    assert [entry["step"] for entry in read_metrics(file.path)] == [1, 2, 3]
    with pytest.raises(DkdmError, match="are no lines of metrics"):
        file.restore({"waiting_metrics": "[]"})


def test_lines_that_are_lost_are_said(tmp_path, capsys):
    file = MetricsFile(tmp_path / "metrics.jsonl", 2)
    file.path.write_text('{"step": 2}\n{"ste\n{"step": 6}\n{"st')
    file.drop_after(9)
    said = capsys.readouterr().err
    assert f"1 lines of {file.path} cannot be read, and are left out" in said
    assert f"{file.path} ends at step 6, and the run goes on from step 9" in said
    file.drop_after(7)
    file.drop_after(8, noted=False)  # a signal came before the line of step 8
    assert capsys.readouterr().err == ""
    file.drop_after(8)
    assert "ends at step 6" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["start", "end"])
def test_a_start_that_the_history_lacks_is_added_at_the_end(tmp_path, monkeypatch, capsys, when):
    noted = []

    def note(folder, start):
        noted.append(start)
        if when == "end" or len(noted) == 1:
            raise FULL
        note_start(folder, start)

    monkeypatch.setattr("dkdm.runs.launch.note_start", note)
    folder, _, _ = small_runs.run(tmp_path, max_train_steps=1, evaluation_samples=0)
    said = capsys.readouterr().err
    assert said.count("history.jsonl lacks this start") == (2 if when == "end" else 1)
    there = (folder / "history.jsonl").is_file()
    assert there == (when == "start")
    if there:
        (line,) = (folder / "history.jsonl").read_text().splitlines()
        assert json.loads(line) == json.loads(json.dumps(noted[0]))


def test_a_history_that_was_cut_off_loses_no_later_start(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n{"st')
    note_start(tmp_path, {"step": 4})
    note_start(tmp_path, {"step": 4})
    assert (tmp_path / "history.jsonl").read_text() == '{"step": 0}\n{"st\n{"step": 4}\n'


class TrackerError(Exception):
    pass


def test_a_tracker_that_raises_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    def broken(*args, **named):
        del args, named
        raise TrackerError("the server is gone")

    for name in ("init_trackers", "log", "end_training"):
        monkeypatch.setattr(f"accelerate.Accelerator.{name}", broken)
    folder, metrics, _ = small_runs.run(tmp_path, max_train_steps=2, evaluation_samples=0)
    assert len(metrics) == 2
    said = capsys.readouterr().err
    assert said.count("a tracker failed, and the run goes on without it (TrackerError: the") == 1
    assert json.loads((folder / "config.json").read_text())["max_train_steps"] == 2


def test_what_a_tracker_takes_is_called(capsys):
    seen = []
    tracked(seen.append, 3)
    assert seen == [3] and capsys.readouterr().err == ""


def test_a_hub_that_is_gone_stops_a_new_run_but_not_one_that_goes_on(tmp_path, monkeypatch, capsys):
    small_runs.run(tmp_path, max_train_steps=1, evaluation_samples=0)

    def gone(hub, folder):
        del hub, folder
        raise DkdmError("the hub cannot be reached")

    monkeypatch.setattr("dkdm.runs.launch.reserve", gone)
    on = {"max_train_steps": 2, "evaluation_samples": 0}
    with pytest.raises(DkdmError, match="cannot be reached"):
        small_runs.run(tmp_path / "new", **on)
    _, metrics, _ = small_runs.run(tmp_path, resume_from_checkpoint="latest", **on)
    assert [entry["step"] for entry in metrics] == [1, 2]
    assert "the hub cannot be reached; the run goes on, and is uploaded" in capsys.readouterr().err
