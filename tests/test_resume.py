"""A run that is killed and resumed ends bit by bit where the uninterrupted one ends."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dkdm
import programs
import small_runs
from dkdm.cli import main
from dkdm.config import OptimizerOptions
from dkdm.core.saving import checkpoint, folders
from dkdm.core.training.learning import ScheduleState, optimizer_of
from dkdm.errors import DkdmError, UsageError
from factories import denoiser

STEPS = 14
TESTS = Path(__file__).parent


def command(folder, *more):
    return [
        *("distill", "--output-dir", str(folder)),
        *("--teacher", "factories:teacher", "--student", "factories:student"),
        *("--max-train-steps", str(STEPS), "--train-batch-size", "10", "--pool-size", "24"),
        *("--stride", "random:6", "--fill-steps", "2", "--checkpointing-steps", "3"),
        *("--logging-steps", "1", "--evaluation-samples", "0", "--validation-steps", "0"),
        *("--checkpoints-total-limit", "9", "--lr-scheduler", "cosine", "--lr-warmup-steps", "4"),
        *("--condition-dropout", "0.2", "--gradient-accumulation-steps", "2", "--no-check"),
        *more,
    ]


KILLED = """
import os, signal, sys
from dkdm.cli import main
from dkdm.core.saving.progress import MetricsFile
write = MetricsFile.write
def write_and_die(self, entry):
    write(self, entry)
    if entry["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.write = write_and_die
main(sys.argv[1:])
"""


def finish(folder, *more):
    """The same command in this process; the one that is killed has a process of its own."""
    assert main(command(folder, *more)) == 0


@pytest.fixture
def whole(undisturbed_run):
    return undisturbed_run


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Killed without warning after step 7, when checkpoint-6 is the last."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    done = programs.run(KILLED, *command(folder), path=TESTS, absent=())
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(losses(folder)) == 7
    return folder


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def test_resumed_run_equals_the_uninterrupted_one(whole, killed):
    finish(killed, "--resume-from-checkpoint", "latest")
    last = f"checkpoint-{STEPS}"
    resumed = json.loads((killed / last / "manifest.json").read_text())
    expected = json.loads((whole / last / "manifest.json").read_text())
    assert {"optimizer.safetensors", "source/shard-0.safetensors", "state.json"} <= resumed.keys()
    assert resumed == expected  # SHA-256 of weights, EMA, optimizer, pool, random and step state
    assert losses(killed) == losses(whole)


def as_formerly(folder):
    """Rewrite a checkpoint as it was before parts: the source in one file, values at the top."""
    state = json.loads((folder / "state.json").read_text())
    parts = state.pop("parts")
    files = sorted((folder / "source").glob("*.safetensors"))
    shards = [checkpoint.read_tensors(file) for file in files]
    rows = {k: torch.cat([s[k] for s in shards]) for k in shards[0] if shards[0][k].ndim}
    counts = {"step": shards[0]["step"], "finished": torch.tensor(0)}
    shutil.rmtree(folder / "source")
    for later in (checkpoint.LOSSES, checkpoint.BAD_STEPS):
        (folder / f"{later}.safetensors").unlink()
    (folder / folders.MANIFEST).unlink()
    state |= {
        "ema_updates": state["step"],
        "optimizer": parts["optimizer"],
        "lr_scheduler": parts["schedule"] | {"lr_lambdas": [None]},
        "scaler": None,
        "teacher_evaluations": sum(int(s["evaluations"]) for s in shards),
    }

    def fill(partial):
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        checkpoint.write_tensors(partial / "source.safetensors", rows | counts)
        (partial / "state.json").write_text(json.dumps(state))

    folders.write_folder(folder, fill)


def test_a_checkpoint_of_the_former_layout_is_resumed_exactly(whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "metrics.jsonl", "checkpoint-6"):
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, folder / name)
    as_formerly(folder / "checkpoint-6")
    assert main(command(folder, "--resume-from-checkpoint", "latest")) == 0
    expected, resumed = (
        checkpoint.read_tensors(run / f"checkpoint-{STEPS}" / file)
        for run in (whole, folder)
        for file in ["unet_ema/diffusion_pytorch_model.safetensors"]
    )
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert losses(folder) == losses(whole)
    counts = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["teacher_evaluations"]
        for run in (whole, folder)
    ]
    assert counts[0] == counts[1]


def test_without_an_average_none_is_kept(tmp_path):
    config = dkdm.DistillConfig(
        output_dir=tmp_path / "run",
        max_train_steps=2,
        train_batch_size=4,
        pool_size=8,
        fill_steps=1,
        evaluation_samples=0,
        validation_steps=0,
        use_ema=False,
    )
    dkdm.distill(denoiser(), "unet-tiny", config)
    saved = config.output_dir / "checkpoint-2"
    assert (saved / "unet").is_dir()
    assert not (saved / "unet_ema").exists()
    resumed = replace(config, max_train_steps=3, resume_from_checkpoint="latest")
    with pytest.raises(UsageError, match="was written by a run without an average"):
        dkdm.distill(denoiser(), "unet-tiny", replace(resumed, use_ema=True))
    dkdm.distill(denoiser(), "unet-tiny", resumed)


def test_a_run_goes_on_with_the_learning_rate_that_is_given_anew(tmp_path):
    small_runs.run(tmp_path, max_train_steps=2, evaluation_samples=0)
    further = {"max_train_steps": 3, "resume_from_checkpoint": "latest", "learning_rate": 2e-4}
    _, metrics, _ = small_runs.run(tmp_path, evaluation_samples=0, **further)
    assert [entry["learning_rate"] for entry in metrics] == [1e-3, 1e-3, 2e-4]


def test_a_run_keeps_the_defaults_that_it_began_with(tmp_path):
    """Those of an earlier version, if they are left open now."""
    before = {"lr_scheduler": "constant_with_warmup", "fill_entries": 1, "rho": 0.4}
    shared = {"evaluation_samples": 0, "pool_size": None}
    small_runs.run(tmp_path, max_train_steps=2, **shared, **before)
    now = {"lr_scheduler": "auto", "fill_entries": None, "rho": None}
    further = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    folder, metrics, _ = small_runs.run(tmp_path, **shared, **now, **further)
    assert [entry["learning_rate"] for entry in metrics] == [1e-3] * 4
    kept = json.loads((folder / "config.json").read_text())
    assert (kept["lr_scheduler"], kept["pool_size"]) == ("constant_with_warmup", 16)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_goes_on_with_the_weight_decay_that_is_given_anew(kind):
    def made(decay):
        network = torch.nn.Linear(16, 16)
        options = OptimizerOptions(optimizer=kind, weight_decay=decay)
        return optimizer_of(network, [*network.parameters()], options, 10)[0]

    resumed = made(0.3)
    checkpoint.OptimizerState(resumed).load_state_dict(
        checkpoint.OptimizerState(made(0.1)).state_dict()
    )
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.3] * len(
        resumed.param_groups
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_schedule_goes_on_where_it_was_under_other_peaks(kind):
    network = torch.nn.Linear(16, 16)

    def after(steps, rate):
        options = OptimizerOptions(optimizer=kind, learning_rate=rate, lr_scheduler="cosine")
        optimizer, schedule = optimizer_of(network, [*network.parameters()], options, 10)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return optimizer, schedule

    before, position = after(4, 0.02)
    optimizer, schedule = after(0, 0.01)
    optimizer.load_state_dict(before.state_dict())
    ScheduleState(schedule).load_state_dict(ScheduleState(position).state_dict())
    for steps in (4, 5):
        expected = after(steps, 0.01)[0].param_groups
        for own, wanted in zip(optimizer.param_groups, expected, strict=True):
            assert own["lr"] == pytest.approx(wanted["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()


def test_checkpoint_loads_in_diffusers_by_itself(whole):
    from diffusers import UNet2DModel

    network = UNet2DModel.from_pretrained(whole / f"checkpoint-{STEPS}", subfolder="unet")
    assert network.config.num_class_embeds == 4


def test_damaged_checkpoint_is_refused(whole, tmp_path):
    copy = tmp_path / "checkpoint-3"
    shutil.copytree(whole / "checkpoint-3", copy)
    folders.verify_folder(copy)
    path = copy / "source" / "shard-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DkdmError, match=r"shard-0\.safetensors is damaged"):
        folders.verify_folder(copy)
    path.unlink()
    with pytest.raises(DkdmError, match=r"shard-0\.safetensors is missing"):
        folders.verify_folder(copy)


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def without_hashes(folder):
    (folder / folders.MANIFEST).write_text("{}")


def cut_off(folder):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def flipped(folder):
    path = folder / "unet" / checkpoint.WEIGHTS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def without_source(folder):
    shutil.rmtree(folder / "source")


def without_step(folder):
    """As a writer with a fault would leave it: what is missing was never written."""
    state = json.loads((folder / checkpoint.STATE).read_text())
    del state["step"]

    def fill(partial):
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        (partial / folders.MANIFEST).unlink()
        (partial / checkpoint.STATE).write_text(json.dumps(state))

    folders.write_folder(folder, fill)


DAMAGES = [emptied, without_hashes, cut_off, flipped, without_source, without_step]


@pytest.fixture
def some(whole, tmp_path):
    """A run with its last three checkpoints."""
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(whole / name, tmp_path / name)
    for path in checkpoint.checkpoints(whole)[-3:]:
        shutil.copytree(path, tmp_path / path.name)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_used(some, capsys, damage):
    before, last = checkpoint.checkpoints(some)[-2:]
    damage(last)
    assert checkpoint.resolve(some, "latest") == before
    said = capsys.readouterr().err
    assert f"warning: {last}" in said
    assert said.endswith(f"; {before.name} is used\n")
    with pytest.raises(DkdmError, match=last.name):
        checkpoint.resolve(some, str(last))


def test_a_run_whose_last_two_checkpoints_are_damaged_ends_bit_by_bit_the_same(whole, some):
    for path in checkpoint.checkpoints(some)[-2:]:
        flipped(path)
    finish(some, "--resume-from-checkpoint", "latest")
    last = f"checkpoint-{STEPS}"
    own, expected = ((run / last / folders.MANIFEST).read_text() for run in (some, whole))
    assert own == expected
    assert losses(some) == losses(whole)


def test_without_a_whole_checkpoint_the_run_says_so(some):
    for path in checkpoint.checkpoints(some):
        flipped(path)
    with pytest.raises(DkdmError, match=r"no checkpoint in .* is whole: .* Start the run anew"):
        checkpoint.resolve(some, "latest")


def test_a_checkpoint_of_a_later_step_is_not_kept_in_place_of_a_new_one(tmp_path):
    for step in (3, 6, 9, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.rotate(tmp_path, 2, 9)
    kept = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert kept == ["checkpoint-6", "checkpoint-9", "checkpoint-100"]


def test_what_killed_writes_leave_is_removed_or_brought_back(tmp_path):
    for name in (".checkpoint-6.partial", ".checkpoint-3.former", ".checkpoint-9.former"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-9", "samples"):
        (tmp_path / name).mkdir()
    for name in (".config.0123abcd.json", "samples/.step-000006.0123abcd.png", ".note"):
        (tmp_path / name).touch()
    folders.remove_leftovers(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".note", "checkpoint-3", "checkpoint-9", "samples"]


def test_loss_per_level_is_the_same_after_a_kill_between_two_lines(tmp_path):
    wholly, cut = tmp_path / "whole", tmp_path / "cut"
    finish(wholly, "--logging-steps", "5")
    cut.mkdir()
    shutil.copy(wholly / "config.json", cut)
    shutil.copytree(wholly / "checkpoint-6", cut / "checkpoint-6")
    first = (wholly / "metrics.jsonl").read_text().splitlines()[0]
    (cut / "metrics.jsonl").write_text(f"{first}\n")
    finish(cut, "--logging-steps", "5", "--resume-from-checkpoint", "latest")

    def levels(run):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss_per_level"]) for line in lines]

    assert levels(cut) == levels(wholly)
    assert [step for step, _ in levels(cut)] == [5, 10, STEPS]


def test_checkpoints_of_another_past_are_set_aside(tmp_path, capsys):
    for step in (3, 6, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-9.aside").mkdir()
    (tmp_path / "checkpoint-12").write_text("no folder")
    checkpoint.set_aside_later(tmp_path, 3)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3"]
    assert {"checkpoint-6.aside", "checkpoint-9.aside", "checkpoint-9.aside1"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert "checkpoint-9 is set aside as checkpoint-9.aside1" in capsys.readouterr().err


def test_a_run_that_goes_back_by_hand_does_not_return_to_what_it_left(some):
    first, *later = checkpoint.checkpoints(some)
    given = ("--resume-from-checkpoint", first.name, "--max-train-steps", "10")
    finish(some, *given, "--checkpoints-total-limit", "9")
    names = [path.name for path in checkpoint.checkpoints(some)]
    assert names == [first.name, "checkpoint-10"]
    assert all((some / f"{path.name}.aside").is_dir() for path in later)


def test_rotation_keeps_the_newest(tmp_path):
    for step in (0, 5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.rotate(tmp_path, 2, 100)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-100",
    ]
