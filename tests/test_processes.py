"""A run in several processes computes what it does in one."""

import json
import shutil
import signal

import pytest
import torch

from dkdm.core.saving.checkpoint import checkpoints, read_tensors
from dkdm.core.saving.stopping import RESUMABLE
from ranks import launch

STEPS = 4
PARTS = ("--student-steps", "1,2,4", "--few-step-share", "0.5")
CONSISTENCY = ("--objective", "consistency", "--eta", "0", *PARTS)
FEW_STEPS = (
    *("--objective", "few-step", "--few-step-heads", "4", "--few-step-pool", "16"),
    *("--few-step-batch-size", "4", *PARTS),
)
KILLED = """
import os, signal
from dkdm.core.training.trainer import Trainer
step = Trainer.step
def step_and_die(self):
    if self.step_number == 3 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Trainer.step = step_and_die
"""
STOPPED = """
import os, signal
from dkdm.core.training.trainer import Trainer
step = Trainer.step
def step_and_signal(self):
    if self.step_number == 2 and rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(self)
Trainer.step = step_and_signal
"""
NOT_FINITE = """
from dkdm.core.objectives.objective import Objective
simple = Objective._simple
def broken(self, *given):
    return simple(self, *given) * (float("nan") if rank == 1 else 1.0)
Objective._simple = broken
"""
FULL = """
from dkdm.core.saving import checkpoint
write = checkpoint.write_tensors
def full(path, *given):
    if rank == {} and any(f"checkpoint-{{n}}" in str(path) for n in {}):
        raise OSError(28, "No space left on device")
    return write(path, *given)
checkpoint.write_tensors = full
"""


def command(folder, *more):
    return [
        *("distill", "--output-dir", str(folder), "--teacher", "factories:teacher"),
        *("--student", "factories:plain_student", "--max-train-steps", str(STEPS)),
        *("--train-batch-size", "8", "--report-to", "none"),
        *("--pool-size", "19", "--stride", "random:20", "--fill-steps", "2"),
        *("--checkpointing-steps", "2", "--logging-steps", "1", "--validation-steps", "0"),
        *("--checkpoints-total-limit", "9", "--evaluation-samples", "0", "--no-check"),
        *("--gradient-accumulation-steps", "2", "--condition-dropout", "0.2", *more),
    ]


def resumed(folder):
    return command(folder, "--resume-from-checkpoint", "latest")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What was printed by a run in one process, in two of which one is killed without warning, and
    by others that fail; each with its exit code."""
    root = tmp_path_factory.mktemp("runs")
    orders = {
        "one": (1, "", command(root / "one")),
        "two": (2, KILLED, command(root / "two")),
        "resumed": (2, "", resumed(root / "two")),
        "sharded": (2, STOPPED, command(root / "sharded", "--fsdp", "both")),
        "replicated": (2, "", resumed(root / "sharded")),
        "refused": (2, "", command(root / "refused", "--shards", "1")),
        "not finite": (2, NOT_FINITE, command(root / "not-finite", "--max-bad-steps", "1")),
        "full": (2, FULL.format(1, [2]), command(root / "full")),
    }
    return root, dict(zip(orders, launch(root, *orders.values()), strict=True))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(folder):
    files = {path.relative_to(folder): path for path in folder.rglob("*.safetensors")}
    return {str(name): read_tensors(file) for name, file in sorted(files.items())}


def assert_same_run(one, other, steps=STEPS):
    """The same draws; losses and weights to rounding."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for expected, found in zip(
            [a["loss"], *a["loss_per_level"]], [b["loss"], *b["loss_per_level"]], strict=True
        ):
            assert found == (expected and pytest.approx(expected, rel=1e-5))
        assert b["teacher_evaluations"] == a["teacher_evaluations"]
    last = f"checkpoint-{steps}"
    expected, found = tensors(one / last), tensors(other / last)
    for name, parts in expected.items():
        for key, value in parts.items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-4, atol=1e-4, msg=name)


def test_two_processes_prepare_what_one_does(said):
    root, _ = said
    expected, found = (tensors(root / name / "checkpoint-0") for name in ("one", "two"))
    assert set(found) - set(expected) == {"random-1.safetensors"}
    for name, parts in expected.items():
        assert all(torch.equal(found[name][key], parts[key]) for key in parts), name


def test_a_run_of_two_that_was_killed_ends_as_that_of_one(said):
    root, found = said
    assert found["one"][0] == 0, found["one"]
    assert found["two"][0] == -signal.SIGKILL, found["two"]
    assert found["resumed"][0] == 0, found["resumed"]
    assert found["two"][1].count("computes on") == 1
    assert_same_run(root / "one", root / "two")


def test_sharded_models_compute_what_replicated_ones_do_and_checkpoints_are_whole(said):
    """A signal to one process stops both in the same step; the run goes on with replicated ones."""
    root, found = said
    assert found["sharded"][0] == RESUMABLE, found["sharded"]
    assert found["sharded"][1].count("--resume-from-checkpoint latest goes on") == 1
    assert (root / "sharded" / "checkpoint-3").is_dir()
    assert found["replicated"][0] == 0, found["replicated"]
    assert_same_run(root / "one", root / "sharded")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_another_number_of_processes_goes_on(said, world, tmp_path):
    root, _ = said
    folder = tmp_path / "run"
    shutil.copytree(root / "two", folder)
    for name in ("checkpoint-4", "README.md"):
        (folder / name).rename(tmp_path / name)
    assert launch(tmp_path, (world, "", resumed(folder)))[0][0] == 0
    assert_same_run(root / "one", folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--source", "synthetic", "--synthetic-samples", "40", "--synthetic-steps", "2"],
        [
            "--source",
            "iterative",
            "--fsdp",
            "both",
            "--optimizer",
            "adamw",
            "--guidance-scale",
            "3",
        ],
        ["--feature-weight", "0.5", "--student", "unet-tiny"],
        ["--feature-weight", "0.5", "--student", "unet-tiny", "--fsdp", "student"],
        ["--student", "thin-50", "--student-init", "teacher", "--lora-rank", "2"],
        ["--train-batch-size", "3", "--mixed-precision", "bf16"],
        ["--validation-steps", "2", "--evaluation-samples", "4", "--validation-metric", "gap"],
        ["--validation-steps", "2", "--evaluation-samples", "4", "--fsdp", "student"],
        ["--teacher", "factories:teacher", "--pool-size", "32", "--student", "dit-tiny"],
        ["--replay", "3", "--keep-finished", "512"],
        [
            *("--teacher", "factories:teacher", "--pool-size", "32", "--student", "dit-tiny"),
            "--replay=2",
        ],
        [*FEW_STEPS, "--few-step-targets", "2"],
        [*FEW_STEPS, "--fsdp", "both"],
        [*CONSISTENCY],
        [*CONSISTENCY, "--fsdp", "student", "--start-share", "0.2"],
        [*CONSISTENCY, "--fsdp", "student", "--student", "uvit-tiny"],  # jumps by a flag
    ],
    ids=lambda options: "-".join(options).replace("--", ""),
)
def test_other_runs_are_those_of_one_process(options, tmp_path):
    orders = [(n, "", command(tmp_path / str(n), *options)) for n in (1, 2)]
    found = launch(tmp_path, *orders)
    assert [code for code, _ in found] == [0, 0], found
    tolerance = 1e-2 if "bf16" in options else 1e-4
    one, two = ([line for line in metrics(tmp_path / str(n)) if "loss" in line] for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
        assert b["teacher_evaluations"] == a["teacher_evaluations"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [FEW_STEPS, CONSISTENCY], ids=lambda options: options[1])
def test_the_last_part_of_a_run_goes_on_with_another_number_of_processes(options, tmp_path):
    killed = KILLED.replace("self.step_number == 3", "self.output_dir.name != 'plain'")
    one, two = tmp_path / "one", tmp_path / "two"
    orders = (1, "", command(one, *options)), (2, killed, command(two, *options))
    found = launch(tmp_path, *orders, (1, "", resumed(two) + list(options)))
    assert [code for code, _ in found] == [0, -signal.SIGKILL, 0], found
    assert_same_run(one / "plain", two / "plain", 2)
    assert_same_run(one, two, max(line["step"] for line in metrics(one)))


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("refused", 2, "2 processes cannot share 1 shards and batches"),
        ("not finite", 1, "the gradient is not finite (NaN or infinite) by step 1"),
    ],
)
def test_an_error_ends_all_with_one_message(said, name, code, message):
    root, found = said
    check_one_message(found[name], code, message.format(root / name))


def check_one_message(found, code, message):
    assert (found[0], found[1].count("dkdm: ")) == (code, 1), found[1]
    assert f"dkdm: {message}" in found[1]
    assert "Traceback" not in found[1]


def test_a_disk_that_is_full_for_one_is_a_warning_of_all(said):
    root, found = said
    code, words = found["full"]
    assert code == 0 and words.count("warning: checkpoint-2 could not be written: it needs ") == 1
    assert "[Errno 28] No space left on device" in words and "training goes on" in words
    assert not (root / "full" / "checkpoint-2").exists()
    assert not list((root / "full").glob(".*.partial"))
    assert_same_run(root / "one", root / "full")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_stays_full_for_one_costs_the_work_since(said, rank, tmp_path):
    folder = tmp_path / "run"
    program = FULL.format(rank, [2, STEPS])
    full, resumes = launch(tmp_path, (2, program, command(folder))), resumed(folder)
    check_one_message(full[0], 1, f"checkpoint-{STEPS} could not be written: it needs ")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-0"]
    assert launch(tmp_path, (2, "", resumes))[0][0] == 0
    assert_same_run(said[0] / "one", folder)
