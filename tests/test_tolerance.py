"""Faults of the disk and of trackers while a run trains: a warning, and the run goes on."""

import errno
import json

import pytest
from safetensors import SafetensorError

import small_runs
from dkdm.core.progress import MetricsFile, read_metrics
from dkdm.core.tolerance import tolerated, tracked
from dkdm.errors import DkdmError

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error: No space left on device")])
def test_a_fault_of_the_disk_is_a_warning_with_the_free_space(tmp_path, capsys, error):
    with tolerated("the grid was not written", tmp_path):
        raise error
    said = capsys.readouterr().err
    assert said.startswith("\nwarning: the grid was not written (")
    assert "No space left on device; " in said and f" MB are free in {tmp_path})" in said


def test_other_errors_are_raised(tmp_path):
    with pytest.raises(ValueError, match="of ours"), tolerated("nothing", tmp_path):
        raise ValueError("of ours")


def test_lines_that_the_disk_did_not_take_are_written_later(tmp_path, monkeypatch, capsys):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1})

    def cut_off(handle, data):
        handle.write(data[: len(data) // 2])
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr("dkdm.core.progress._write_all", cut_off)
        for step in (2, 3):
            file.write({"step": step})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert capsys.readouterr().err.count("metrics.jsonl: lines wait to be written") == 2
    file.write({"step": 4})
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


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
