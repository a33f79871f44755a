"""The command line: one clear message on stderr, exit code 2 for usage and 1 for failure."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from dkdm.cli import COMMANDS, main
from dkdm.core.objectives.objective import Objective
from dkdm.reading.command_line import description, parse
from dkdm.runs.recipes import recipe
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import PRESETS
from factories import denoiser

SMALL = (
    *("--student", "factories:student", "--max-train-steps", "3", "--train-batch-size", "8"),
    *("--pool-size", "16", "--fill-steps", "2", "--evaluation-samples", "12"),
    *("--validation-steps", "2", "--validation-sampling-steps", "2", "--logging-steps", "1"),
)


def fails(capsys, code, *args):
    assert main([str(arg) for arg in args]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_no_command_and_unknown_command(capsys):
    assert "unknown command 'fly'" in fails(capsys, 2, "fly")
    assert fails(capsys, 2).endswith("dkdm: name a command\n")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"dkdm {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_good_ones(name, capsys):
    kind, _ = COMMANDS[name]
    found = re.findall(rf"^  dkdm {name}\b(.*)$", description(kind), re.MULTILINE)
    assert found
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    for arguments in found:
        assert f"\n  dkdm {name}{arguments}\n" in shown
        words = shlex.split(arguments)
        if words[:1] == ["--recipe"]:
            recipe(words[1], kind)
        else:
            parse(kind, words)


def test_help_says_which_options_take_no_value_and_what_may_be_none(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    shown = capsys.readouterr().out
    for said in ("--smoke  ", "--dry-run  ", "--checkpoints-total-limit INT|None"):
        assert said in shown
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert "RUN ...  " in shown and "(default: )" not in shown


def test_output_that_nobody_reads_ends_quietly():
    unread, written = os.pipe()
    os.close(unread)
    with os.fdopen(written, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "dkdm", "push", "--help"], stdout=pipe, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_unknown_option_is_usage():
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--no-such-option", "1"])
    assert stopped.value.code == 2


def distill(folder, *more, teacher="factories:teacher"):
    return ("distill", "--teacher", teacher, "--output-dir", folder, *SMALL, *more)


def test_whole_run_then_sample_report_and_refusal(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([str(arg) for arg in distill(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["teacher", "student"]
    assert lines[-1] == f"{folder}/report.html"
    for name in ("model_index.json", "report.html", "README.md", "metrics.jsonl", "config.json"):
        assert (folder / name).is_file(), name
    assert sorted(p.name for p in (folder / "samples").glob("step-*.png")) == [
        "step-000002.png",
        "step-000003.png",
    ]
    before = (folder / "config.json").read_text()
    assert "already holds a run" in fails(capsys, 2, *distill(folder, "--seed", "5"))
    assert (folder / "config.json").read_text() == before
    output = tmp_path / "s.png"
    sample = ("sample", folder, "--num-samples", "4", "--steps", "2", "--output", output)
    assert main([str(arg) for arg in sample]) == 0
    assert output.is_file()
    assert "exists" in fails(capsys, 2, *sample)
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()


def test_a_training_prints_its_numbers_and_where_its_page_is(tmp_path, capsys):
    for name in "ab":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    wanted = "--max-train-steps 2 --train-batch-size 2 --network dit-tiny --sample-shape 1 8 8"
    few = "--validation-sampling-steps 2 --evaluation-samples 4 --validation-steps 0"
    folder = tmp_path / "run"
    args = ["--images", str(tmp_path), "--output-dir", str(folder), *wanted.split(), *few.split()]
    assert main(["train", *args]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model"] and lines[-1] == f"{folder}/report.html"
    assert any(line.startswith("parameters ") for line in lines)


def test_underscores_are_accepted(tmp_path, capsys):
    args = [str(arg) for arg in distill(tmp_path / "run")]
    args = [
        arg.replace("-", "_").replace("__", "--", 1) if arg[:2] == "--" else arg for arg in args
    ]
    assert "--max_train_steps" in args
    assert main([*args, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "source" in said and "optimizer muon, learning rate 0.02" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--student", "no-such-preset"), "unknown student"),
        (("--student", "factories:wide_student"), "it must return (2, 1, 8, 8)"),
        (("--student", "factories:not_a_model"), "returned list: return an nn.Module"),
        (("--classes", "7"), "class id 7 out of range: use 0..2"),
        (("--stride", "fast"), "--stride 'fast'"),
        (("--recipe", "no-such-recipe"), "--recipe 'no-such-recipe': give one of demo"),
        (("--dry-run", "--smoke"), "--dry-run and --smoke exclude each other: remove one"),
        (("--recipe", "demo", "--config", "c.json"), "--recipe and --config exclude each other"),
        (("--pool-size", "2"), "--pool-size 2 is smaller than a batch of 8"),
        (("--pool-size", "1000000000000"), "GiB"),
        (("--resume-from-checkpoint", "checkpoint-7"), "there is no checkpoint"),
    ],
)
def test_bad_input_is_usage_and_leaves_no_run(more, said, tmp_path, capsys):
    assert said in fails(capsys, 2, *distill(tmp_path / "run", *more))
    assert not list(tmp_path.iterdir())


def test_failing_factory_is_a_failure(tmp_path, capsys):
    args = distill(tmp_path / "run", "--student", "factories:raising")
    assert "no luck" in fails(capsys, 1, *args)


def test_debug_shows_the_traceback(tmp_path):
    args = [str(arg) for arg in distill(tmp_path / "run", "--student", "factories:raising")]
    with pytest.raises(Exception, match="no luck"):
        main([*args, "--debug"])


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    simple, calls = Objective._simple, []

    def broken(self, *given):
        calls.append(1)
        return simple(self, *given) * (1.0 if len(calls) < 3 else float("nan"))

    monkeypatch.setattr(Objective, "_simple", broken)
    folder = tmp_path / "run"
    args = distill(folder, "--checkpointing-steps", "1", "--max-bad-steps", "1")
    message = fails(capsys, 1, *args)
    assert "not finite (NaN or infinite) by step 3" in message
    assert f"The last good checkpoint is {folder}/checkpoint-2" in message
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert not (folder / "model_index.json").exists()


def test_config_file_of_a_run_is_a_starting_point(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"max_train_steps": 77}))
    args = ["distill", "--teacher", "factories:teacher", "--student", "factories:student"]
    assert main([*args, "--config", str(path), "--dry-run"]) == 0
    assert f"{77 * 128:,} to train" in capsys.readouterr().out
    path.write_text(json.dumps({"max_trian_steps": 77}))
    assert "no 'max_trian_steps' (given as 77): use max_train_steps" in fails(
        capsys, 2, "distill", "--config", path
    )


def test_teacher_folder_and_inspect_as_json(tmp_path, capsys, monkeypatch):
    """Of other readings, only as many are tried as every speed allows."""
    monkeypatch.setattr("dkdm.checks.inspection.facts.TRIAL_SECONDS", 0.0)
    write_pipeline(tmp_path, denoiser(3))
    asked = ["inspect", str(tmp_path), "--json", "--num-samples", "2", "--steps"]
    assert main([*asked, "3"]) == 0  # too few steps to say anything against it
    assert json.loads(capsys.readouterr().out)["check"]["denoises"] is None
    assert main([*asked, "10"]) == 1
    assert json.loads(capsys.readouterr().out)["check"]["denoises"] is False


def test_students_and_doctor_as_json(tmp_path, capsys, monkeypatch):
    write_pipeline(tmp_path, denoiser(3))
    few = {name: PRESETS[name] for name in ("dit-tiny", "dit-xs")}
    monkeypatch.setattr("dkdm.checks.student_table.PRESETS", few)
    asked = ["students", "--teacher", str(tmp_path), "--json"]
    assert main([*asked, "--no-measure"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["dit-xs"]["samples_per_second"] is None
    options = ["--measure-below", "0.5", "--measure-batch-size", "1", "--steps", "10"]
    assert main([*asked, *options]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["dit-tiny"]["samples_per_second"] > 0
    assert rows["dit-tiny"]["speed_ratio"] > 0
    assert rows["dit-xs"]["samples_per_second"] is None
    assert main(["doctor", "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train", "interrupted; go on with --resume-from-checkpoint latest"),
        ("harvest", "interrupted; the same command goes on"),
        ("doctor", "interrupted\n"),
    ],
)
def test_an_interrupted_command_says_how_it_goes_on(monkeypatch, capsys, command, said):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dkdm.cli._dispatch", interrupted)
    assert main([command]) == 130
    assert said in capsys.readouterr().err
