"""`dkdm doctor RUN`, and that nobody else writes to a run meanwhile."""

import json
import os
import shutil

import pytest
import torch

import small_runs
from dkdm.cli import main
from dkdm.core.saving.checkpoint import read_tensors, write_tensors
from dkdm.errors import UsageError
from dkdm.reading.lock import LOCK, holder, locked
from dkdm.runs.health import examine_run
from dkdm.runs.resume import HISTORY
from factories import denoiser

COMMAND = [
    *("distill", "--teacher", "builtin:fashion", "--student", "dit-tiny", "--pool-size", "8"),
    *("--train-batch-size", "4", "--max-train-steps", "2", "--checkpointing-steps", "1"),
    *("--fill-steps", "1", "--evaluation-samples", "0", "--validation-steps", "0", "--no-check"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main([*COMMAND, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def statuses(folder):
    return {each.name: (each.status, each.what) for each in examine_run(folder)}


def test_a_sound_run_is_found_sound(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["doctor", str(finished), "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert {each["status"] for each in found.values()} == {"ok"}
    names = {"config.json", "checkpoint-1", "checkpoint-2", "metrics.jsonl", "model", "teacher"}
    assert names == set(found)
    assert found["teacher"]["what"] == "the one that the run was made with"
    assert found["checkpoint-2"]["what"].startswith("whole, after step 2, ")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def damage_checkpoint(run):
    (run / "checkpoint-2" / "optimizer.safetensors").write_bytes(b"0")


def damage_config(run):
    (run / "config.json").write_text("{")


def damage_whole(run):
    (run / "whole.json").write_text("[]")


def lose_config(run):
    (run / "config.json").unlink()


def lose_model(run):
    next((run / "transformer").glob("*.safetensors")).unlink()


def spoil_model(run):
    (file,) = (run / "transformer").glob("*.safetensors")
    weights = read_tensors(file)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    write_tensors(file, weights)


def change_teacher(run):
    path = run / "checkpoint-2" / "run.json"
    facts = json.loads(path.read_text())
    facts["teacher"]["weights"] = "0" * 64
    path.write_text(json.dumps(facts))


def cut_metrics(run):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')


FAULTS = {
    damage_checkpoint: ("checkpoint-2", "problem", "optimizer.safetensors is damaged"),
    damage_config: ("config.json", "problem", "config.json"),
    damage_whole: ("config.json", "problem", "whole.json"),
    lose_config: ("config.json", "problem", "missing"),
    lose_model: ("model", "problem", "no weights in"),
    spoil_model: ("model", "problem", "not finite: diffusion_pytorch_model.safetensors: "),
    change_teacher: ("teacher", "problem", "its weights differ"),
    cut_metrics: ("metrics.jsonl", "warning", "1 of 2 lines cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_fault_is_named(run, fault, capsys):
    fault(run)
    name, status, what = FAULTS[fault]
    found = statuses(run)
    assert found[name][0] == status and what in found[name][1]
    others = {key for key, (state, _) in found.items() if state != "ok"} - {name}
    assert others <= ({"checkpoint-2"} if fault is change_teacher else set())
    assert main(["doctor", str(run)]) == int(status == "problem")
    assert "Traceback" not in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is no run: give the --output-dir" in capsys.readouterr().err


def test_a_second_writer_is_refused_before_any_work(run, capsys):
    history = (run / HISTORY).read_text()
    with locked(run, "dkdm distill"):
        who = holder(run)
        assert who.startswith(f"process {os.getpid()} on ") and who.endswith(" (dkdm distill)")
        args = ["--output-dir", str(run), "--resume-from-checkpoint", "latest"]
        assert main([*COMMAND, *args]) == 2
        assert statuses(run)["lock"][0] == "ok"
    said = f"--output-dir {run} is being written by {who}: wait for its end"
    assert said in capsys.readouterr().err
    assert (run / HISTORY).read_text() == history
    assert holder(run) is None


def test_a_run_holds_its_folder_to_the_end(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("dkdm.runs.launch.write_report", lambda folder: seen.append(holder(folder)))
    folder, _, _ = small_runs.run(tmp_path, max_train_steps=1, evaluation_samples=0)
    assert seen[0].endswith("(dkdm distill)")
    assert holder(folder) is None


def test_a_lock_that_a_killed_process_left_is_no_lock(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "there", "what": "dkdm distill"}))
    assert holder(tmp_path) is None
    refused = pytest.raises(UsageError, match="is being written by process")
    with locked(tmp_path, "first"), refused, locked(tmp_path, "second"):
        pass


def test_the_teacher_of_a_fill_before_any_checkpoint_is_compared(run):
    (run / "fill").mkdir()
    shutil.copy(run / "checkpoint-2" / "run.json", run / "fill")
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert statuses(run)["teacher"] == ("ok", "the one that the run was made with")


def test_both_parts_of_a_run_are_looked_at(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run" / "plain")
    found = statuses(tmp_path / "run")
    assert set(found) == {f"plain/{name}" for name in statuses(finished)}


def test_a_teacher_that_is_gone_is_a_warning(tmp_path):
    folder, _, _ = small_runs.run(
        tmp_path, denoiser(), max_train_steps=1, evaluation_samples=0, checkpointing_steps=1
    )
    status, what = statuses(folder)["teacher"]
    assert status == "warning" and what.startswith("could not be checked: ")
    assert torch.is_grad_enabled()
