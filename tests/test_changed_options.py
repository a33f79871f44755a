"""A run that goes on with other options: refused, or applied, and always written down."""

import json
import math
import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import small_runs
from dkdm.cli import main
from dkdm.config import DistillConfig, TrainConfig, to_json
from dkdm.core.saving.checkpoint import RUN
from dkdm.core.saving.folders import MANIFEST, write_folder
from dkdm.errors import UsageError
from dkdm.models.identity import hash_of_weights, identity_of, kind_of
from dkdm.reading.options import places
from dkdm.runs.resume import FREE, FREE_GROUPS, OF_THE_TEACHER, UNSAID, changes_of, check_changes
from dkdm.students import student_of
from factories import denoiser

# one other value of every option of a distillation that is not a whole number, a share or a flag
OTHER = {
    "stride": "random:6",
    "guidance_scale": "2",
    "guidance_on": "chain",
    "classes": (1, 2),
    "seed": 7,
    "loss_weighting": "snr",
    "source": "shuffled",
    "pool_dtype": "float16",
}
REFUSED = {
    *("student", "student_process", "lora_rank", "seed", "train_batch_size", "classes", "prompts"),
    *("guidance_scale", "guidance_on", "source", "rho", "pool_size", "pool_dtype", "stride", "eta"),
    *("fill", "fill_steps", "shards", "replay", "images", "loss_weighting", "vlb_weight"),
    *("objective", "feature_weight", "condition_dropout", "gradient_accumulation_steps"),
    *("student_prediction", "random_conditioning", "images_share", "mixed_share"),
}
APPLIED = {
    *("learning_rate", "lr_scheduler", "weight_decay", "max_train_steps", "logging_steps"),
    *("checkpointing_steps", "validation_steps", "report_to", "max_grad_norm", "ema_decay"),
    *("hub_model_id", "license", "evaluation_samples", "pool_device"),
}


@pytest.fixture
def begun(tmp_path):
    """A checkpoint of a run by default options."""
    (tmp_path / "config.json").write_text(to_json(DistillConfig()))
    (tmp_path / "checkpoint-1").mkdir()
    return tmp_path / "checkpoint-1"


def test_every_option_is_known_to_be_one_or_the_other():
    groups = places(DistillConfig)
    free = {name for name, (group, _) in groups.items() if group in FREE_GROUPS or name in FREE}
    assert free >= APPLIED
    assert not REFUSED & (free | OF_THE_TEACHER | UNSAID)
    assert groups.keys() >= REFUSED | APPLIED
    assert {*places(TrainConfig), *groups} >= FREE | OF_THE_TEACHER | UNSAID


@pytest.mark.parametrize(("name", "value"), OTHER.items())
def test_a_change_of_meaning_is_refused_unless_insisted(begun, name, value):
    config = replace(DistillConfig(), **{name: value})
    with pytest.raises(UsageError, match=r"this changes what the run means\..* --accept-changes"):
        check_changes(config, begun)
    found = check_changes(replace(config, accept_changes=True), begun)
    assert [(change.option, change.takes_effect) for change in found] == [(name, False)]


def test_all_changes_of_meaning_are_in_one_message(begun):
    with pytest.raises(UsageError, match=r"--seed was 0 and is 7; --stride was 1 and is random"):
        check_changes(replace(DistillConfig(), seed=7, stride="random:6"), begun)


def test_other_changes_are_shown_as_a_table(begun, capsys):
    changed = {"learning_rate": 2e-4, "max_train_steps": 7, "report_to": "none"}
    check_changes(replace(DistillConfig(), **changed), begun)
    said = capsys.readouterr().err
    assert "changed since the last start" in said
    for option, then, now in (
        ("--learning-rate", "None", "0.0002"),
        ("--report-to", "auto", "none"),
    ):
        line = next(line for line in said.splitlines() if option in line)
        assert [w for w in line.split() if w in (option, then, now)] == [option, then, now]


def test_what_is_left_open_is_as_before(begun):
    decided = {"optimizer": "muon", "learning_rate": 0.02, "student_prediction": "v_prediction"}
    run = replace(DistillConfig(), loss_weighting="capped", **decided)
    (begun.parent / "config.json").write_text(to_json(run))
    assert changes_of(DistillConfig(), begun) == []


def test_another_output_folder_is_no_change(begun, tmp_path):
    assert changes_of(replace(DistillConfig(), output_dir=tmp_path / "moved"), begun) == []


def test_a_run_without_its_config_is_warned_of(begun, capsys):
    (begun.parent / "config.json").unlink()
    assert check_changes(DistillConfig(), begun) == []
    assert "has no config.json, so changed options cannot be seen" in capsys.readouterr().err


QUICK = {"max_train_steps": 2, "evaluation_samples": 0, "checkpointing_steps": 1}
ON = {"resume_from_checkpoint": "latest", "max_train_steps": 3, "evaluation_samples": 0}


def test_another_teacher_is_refused_unless_insisted(tmp_path):
    teacher = denoiser()
    small_runs.run(tmp_path, teacher, **QUICK)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / RUN).read_text())
    assert state["teacher"] == identity_of(teacher)
    assert state["config"]["train_batch_size"] == small_runs.SMALL.training.train_batch_size
    assert set(state["versions"]) == {"dkdm", "torch", "diffusers", "accelerate"}
    other = denoiser()
    with torch.no_grad():
        next(other.network.parameters()).flatten()[0] += 1e-3
    with pytest.raises(UsageError, match=r"made with another teacher: its weights differ\. Give"):
        small_runs.run(tmp_path, other, **ON)
    small_runs.run(tmp_path, other, accept_changes=True, **ON)


def test_a_student_whose_file_has_changed_is_refused(tmp_path):
    teacher, file = denoiser(), tmp_path / "config.json"
    student_of("dit-tiny", teacher).network.save_config(tmp_path)
    config = json.loads(file.read_text())
    small_runs.run(tmp_path, teacher, str(file), **QUICK)
    file.write_text(json.dumps({**config, "dropout": 0.25}))
    with pytest.raises(UsageError, match=r"made with another student: its network differ\."):
        small_runs.run(tmp_path, teacher, str(file), **ON)


def test_a_network_with_a_config_of_its_own_kind_is_described():
    one, other = (replace(denoiser(), network=torch.nn.Linear(2, 2)) for _ in range(2))
    one.network.config, other.network.config = Namespace(depth=3), Namespace(depth=4)
    assert kind_of(one)["network"] != kind_of(other)["network"]
    other.network.config = "a text"
    assert kind_of(other)["network"]


def test_history_has_every_start_and_what_changed(tmp_path):
    small_runs.run(tmp_path, **QUICK)
    folder, _, _ = small_runs.run(tmp_path, learning_rate=2e-4, weight_decay=0.5, **ON)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    assert lines[0]["changed"] == {}
    assert lines[1]["changed"] == {
        "max_train_steps": [2, 3],
        "learning_rate": [1e-3, 2e-4],
        "weight_decay": [0.0, 0.5],
        "checkpointing_steps": [1, 1000],
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_takes_effect(tmp_path, optimizer):
    small_runs.run(tmp_path, optimizer=optimizer, weight_decay=0.0, **QUICK)
    small_runs.run(tmp_path, optimizer=optimizer, weight_decay=0.5, **ON)
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "state.json").read_text())
    groups = state["parts"]["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5}


def test_a_refused_resumption_shows_no_traceback_and_writes_nothing(tmp_path, capsys):
    folder, _, _ = small_runs.run(tmp_path, **QUICK)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    args = ["--resume-from-checkpoint", "latest", "--output-dir", str(folder), "--seed", "3"]
    assert main(["distill", "--teacher", "factories:teacher", *args]) == 2
    assert "--seed was 0 and is 3" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_weights_are_hashed_by_name_type_shape_and_value():
    one = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros((), dtype=torch.int64)}
    hashes = {
        hash_of_weights(state)
        for state in (
            one,
            {**one, "a": one["a"].reshape(3, 2)},
            {**one, "a": one["a"].bfloat16()},
            {**one, "a": one["a"] + torch.eye(3)[:2] * 1e-6},
            {"c": one["a"], "b": one["b"]},
        )
    }
    assert len(hashes) == 5
    assert hash_of_weights(dict(reversed(one.items()))) in hashes
    assert hash_of_weights({"empty": torch.zeros(0, 3)}) != hash_of_weights({})


class Strange(torch.Tensor):
    """A tensor of a class that is not known."""


def test_tensors_of_any_class_and_place_are_hashed():
    whole = torch.arange(4.0)
    strange = {"a": whole.as_subclass(Strange)}
    assert hash_of_weights(strange) == hash_of_weights({"a": whole})
    sizes = {hash_of_weights({"a": torch.empty(n, device="meta")}) for n in (2, 3, 3)}
    assert len(sizes) == 2


def test_the_last_digits_of_a_noise_level_are_no_other_teacher():
    one = denoiser()
    process = replace(one.process, alpha=one.process.alpha * (1 + 1e-14))
    assert identity_of(replace(one, process=process)) == identity_of(one)
    process = replace(one.process, alpha=one.process.alpha * (1 + 1e-4))
    assert identity_of(replace(one, process=process)) != identity_of(one)


def test_more_steps_do_not_change_the_size_of_a_pool_that_was_left_open(tmp_path):
    small_runs.run(tmp_path, pool_size=None, rho=0.4, **QUICK)
    for steps in (3, 4):
        more = {**ON, "max_train_steps": steps, "pool_size": None, "rho": 0.4}
        folder, metrics, _ = small_runs.run(tmp_path, **more)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert json.loads((folder / "config.json").read_text())["pool_size"] == 16


def test_the_hash_of_a_tensor_does_not_depend_on_its_strides():
    whole = torch.arange(12.0).reshape(3, 4)
    assert hash_of_weights({"a": whole.T}) == hash_of_weights({"a": whole.T.contiguous()})


def test_a_checkpoint_of_a_former_version_knows_no_teacher(tmp_path):
    small_runs.run(tmp_path, **QUICK)
    folder = tmp_path / "run" / "checkpoint-2"

    def fill(partial):
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        for name in (MANIFEST, RUN):
            (partial / name).unlink()

    write_folder(folder, fill)
    other = denoiser()
    with torch.no_grad():
        next(other.network.parameters()).mul_(0.5)
    small_runs.run(tmp_path, other, **ON)


QUICKLY = [("adamw", "cosine", 0), ("muon", "linear", 1)]
ALL = [
    (optimizer, schedule, back)
    for optimizer in ("adamw", "muon")
    for schedule in ("constant", "constant_with_warmup", "linear", "cosine")
    for back in (0, 1)
]


@pytest.mark.parametrize(
    ("optimizer", "schedule", "back"),
    [each if each in QUICKLY else pytest.param(*each, marks=pytest.mark.slow) for each in ALL],
)
def test_another_learning_rate_takes_effect(tmp_path, optimizer, schedule, back):
    """With each optimizer and schedule, and after the run went back, which halves the new rate."""
    options = {"optimizer": optimizer, "lr_scheduler": schedule, "lr_warmup_steps": 2}
    trainer = small_runs.begun(tmp_path / "first", **options, max_train_steps=8)
    for _ in range(3):
        trainer.step()
    trainer.bad_steps.rolled_back = back
    trainer.save()
    trainer.saver.finish()
    steps, rate = 6, 4e-5
    again = small_runs.begun(
        tmp_path / "again", **options, max_train_steps=steps, learning_rate=rate
    )
    again.resume(trainer.output_dir / "checkpoint-3")
    share = {
        "constant": lambda n: 1.0,
        "constant_with_warmup": lambda n: 1.0,
        "linear": lambda n: (steps - n) / (steps - 2),
        "cosine": lambda n: 0.5 + 0.5 * math.cos(math.pi * (n - 2) / (steps - 2)),
    }[schedule]
    parts = [1.0, 0.1] if optimizer == "muon" else [1.0]
    for step in (3, 4):
        assert again.step_number == step
        rates = [group["lr"] for group in again.optimizer.param_groups]
        peak = rate * 0.5**back
        assert rates == pytest.approx([part * peak * share(step) for part in parts], rel=1e-9)
        again.step()
