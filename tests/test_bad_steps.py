"""Gradients, teachers and pool entries that are not finite: nothing of it reaches the weights."""

from dataclasses import replace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

import small_runs
from dkdm.core.objectives.objective import Objective
from dkdm.core.saving.checkpoint import checkpoints, newest_finite, read_tensors
from dkdm.core.sources.pool import Pool
from dkdm.core.training import bad_steps
from dkdm.core.training.bad_steps import CAUSES, RECENT, BadSteps, faults_in_words
from dkdm.core.training.trainer import Trainer
from dkdm.errors import DkdmError
from dkdm.report import write_report
from factories import denoiser
from page_reader import Page
from watched import Watched

RUN = {"max_train_steps": 8, "evaluation_samples": 0, "checkpointing_steps": 1}
CPU = torch.device("cpu")


def weights_of(folder, step, name="transformer"):
    return read_tensors(folder / f"checkpoint-{step}/{name}/diffusion_pytorch_model.safetensors")


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def bad_at(monkeypatch, *steps, value=float("nan")):
    """Let the losses of these batches not be finite, counted over the whole test."""
    simple, calls = Objective._simple, []

    def then(self, student, *given):
        calls.append(1)
        loss = simple(self, student, *given)
        return loss * value if len(calls) in steps else loss

    monkeypatch.setattr(Objective, "_simple", then)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_changes_no_weight(tmp_path, monkeypatch, capsys, optimizer, value):
    bad_at(monkeypatch, 3, 6, value=value)
    more = {"optimizer": optimizer, "weight_decay": 0.1, "checkpoints_total_limit": None, **RUN}
    folder, metrics, _ = small_runs.run(tmp_path, **more)
    for before, after, same in ((1, 2, False), (2, 3, True), (3, 4, False), (5, 6, True)):
        assert equal(weights_of(folder, before), weights_of(folder, after)) == same
    assert all(v.isfinite().all() for v in weights_of(folder, 8, "transformer_ema").values())
    assert [line.get("bad_steps", 0) for line in metrics] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [line["loss"] is None for line in metrics] == [n in (3, 6) for n in range(1, 9)]
    assert all(level is None or level < 1e3 for line in metrics for level in line["loss_per_level"])
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    said = capsys.readouterr().err
    assert said.count("1 of the last steps had a gradient that was not finite") == 2


def test_an_entry_that_is_not_finite_begins_anew(tmp_path, monkeypatch, capsys):
    pools = []
    draw = Pool.draw

    def then(self, batch_size):
        if self not in pools:
            pools.append(self)
            self.x[::3] = float("nan")
        return draw(self, batch_size)

    monkeypatch.setattr(Pool, "draw", then)
    small_runs.run(tmp_path, **RUN, fill_entries=1)
    (pool,) = pools
    assert pool.x.isfinite().all()
    assert "8 entries of the source were not finite, and begin anew" in capsys.readouterr().err


def test_a_mended_entry_is_pure_noise_at_the_top():
    pool = pool_of(64)
    pool.t.fill_(3)
    pool.x[::2] = float("inf")
    kept = pool.x[1::2].clone()
    assert pool.mend() == 32
    assert torch.equal(pool.x[1::2], kept)
    assert (pool.t[::2] == pool.process.num_levels - 1).all() and (pool.t[1::2] == 3).all()
    assert 0.9 < float(pool.x[::2].std() / pool.process.start_std) < 1.1
    assert pool.mend() == 0


def pool_of(size):
    teacher = denoiser()
    x = torch.randn(size, *teacher.sample_shape)
    cond = teacher.conditioning.draw(size, torch.Generator())
    return Pool(teacher, x, torch.zeros(size, dtype=torch.int64), cond)


def test_after_too_many_the_run_goes_back_with_half_the_rate(tmp_path, monkeypatch, capsys):
    bad_at(monkeypatch, 4, 5, 6)
    more = {"max_bad_steps": 3, "learning_rate": 1e-3, "checkpoints_total_limit": None}
    folder, metrics, _ = small_runs.run(tmp_path, **RUN, **more)
    said = capsys.readouterr().err
    assert "3 steps in a row were bad: back to checkpoint-5, with half the learning rate" in said
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert [line["learning_rate"] for line in metrics] == [1e-3] * 5 + [5e-4] * 3
    assert metrics[-1]["bad_steps"] == 3
    _, metrics, _ = small_runs.run(
        tmp_path, **{**RUN, **more, "max_train_steps": 9, "resume_from_checkpoint": "latest"}
    )
    assert metrics[-1]["learning_rate"] == 5e-4
    assert not equal(weights_of(folder, 5), weights_of(folder, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_teacher_that_overflows_ends_the_run_with_a_report(tmp_path, dtype):
    teacher = denoiser()
    with torch.no_grad():
        teacher.network.conv_out.weight.mul_(1e6)  # beyond 65,504, the largest number of float16
    teacher.network.to(dtype)
    options = {**RUN, "max_train_steps": 4, "max_bad_steps": 1, "fill": "none", "check": False}
    if dtype == torch.float32:
        _, metrics, _ = small_runs.run(tmp_path, teacher, **options)
        assert "bad_steps" not in metrics[-1]
        return
    with pytest.raises(DkdmError) as caught:
        small_runs.run(tmp_path, teacher, **options)
    said = str(caught.value)
    assert "4 steps were bad, and the run went back 3 times. The last good checkpoint is" in said
    assert "Most often the teacher's output was not finite" in said
    assert "give --teacher-dtype float32" in said
    last = checkpoints(tmp_path / "run")[-1]
    assert newest_finite(tmp_path / "run") == last


def test_a_fill_that_is_not_finite_ends_before_training(tmp_path):
    teacher = denoiser()
    call = teacher.call

    def overflows(network, x, time, cond):
        return call(network, x, time, cond) * float("nan")

    with pytest.raises(DkdmError, match="filled states are not finite.*--teacher-dtype"):
        small_runs.run(tmp_path, replace(teacher, call=overflows), **RUN)
    assert checkpoints(tmp_path / "run") == []


def test_a_checkpoint_with_a_number_that_is_not_finite_is_passed_over(tmp_path):
    folder, _, _ = small_runs.run(tmp_path, **RUN, checkpoints_total_limit=None)
    assert newest_finite(folder).name == "checkpoint-8"
    trainer = {}
    resume = Trainer.resume

    def keep(self, place):
        resume(self, place)
        trainer["it"] = self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "resume", keep)
        patch.setattr(Pool, "mend", lambda self: 0)
        patch.setattr(Pool, "draw", spoil(Pool.draw))
        on = {**RUN, "max_train_steps": 9, "resume_from_checkpoint": "latest", "max_bad_steps": 99}
        small_runs.run(tmp_path, checkpoints_total_limit=None, **on)
    assert trainer["it"].step_number == 9
    assert newest_finite(folder).name == "checkpoint-8"


def spoil(draw):
    def then(self, batch_size):
        self.x[0] = float("nan")
        return draw(self, batch_size)

    return then


def test_a_spike_is_logged(tmp_path, monkeypatch, capsys):
    bad_at(monkeypatch, 11, value=50.0)
    _, metrics, _ = small_runs.run(tmp_path, max_train_steps=12, evaluation_samples=0)
    spikes = [line["step"] for line in metrics if "loss_spike" in line]
    assert spikes == [11] and metrics[10]["loss_spike"] > 5
    assert "the loss of step 11 is " in capsys.readouterr().err


def test_what_is_known_of_bad_steps_survives_a_resume():
    bad = BadSteps(3, CPU)
    for norm in (1.0, float("nan"), float("inf")):
        bad.note(torch.tensor(norm))
    for number in range(2 * RECENT):
        bad.spike(1.0 + number)
    bad.rolled_back, bad.fresh = 1, 5
    again = BadSteps(3, CPU)
    again.load_state_dict(bad.state_dict())
    assert (again.total, again.too_many, again.fresh, again.pace) == (2, False, 5, 0.5)
    assert (again.news(), again.news()) == (2, 0)  # no line of metrics has told of them yet
    assert again.recent == bad.recent
    again.note(torch.tensor(float("nan")))
    assert again.too_many and again.news() == 1
    again.note(torch.tensor(1.0))
    assert not again.too_many


def nan_at(function, *calls, value=float("nan")):
    """The same function, whose answers of these calls are not finite, or as many times as large."""
    made = []

    def then(*given, **named):
        made.append(1)
        found = function(*given, **named)
        return found * value if len(made) in calls else found

    return then


def a_bad_teacher(_):
    teacher = denoiser()
    return replace(teacher, call=nan_at(teacher.call, 4))  # the first two are timed


def a_bad_state(monkeypatch):
    draw, calls = Pool.draw, []

    def then(self, batch_size):
        calls.append(1)
        batch = draw(self, batch_size)
        return batch._replace(x=batch.x * float("nan")) if len(calls) == 3 else batch

    monkeypatch.setattr(Pool, "draw", then)


def a_bad_student(monkeypatch):
    monkeypatch.setattr(Objective, "_simple", nan_at(Objective._simple, 3))


def a_bad_gradient(monkeypatch):
    simple, calls = Objective._simple, []

    def then(self, student, *given):
        calls.append(1)
        loss = simple(self, student, *given)
        if len(calls) == 3:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(Objective, "_simple", then)


@pytest.mark.parametrize(
    ("cause", "spoil"),
    {
        "teacher": a_bad_teacher,
        "state": a_bad_state,
        "student": a_bad_student,
        "gradient": a_bad_gradient,
    }.items(),
)
def test_what_was_not_finite_first_is_named(tmp_path, monkeypatch, capsys, cause, spoil):
    more = {"max_train_steps": 4, "evaluation_samples": 0, "fill": "none", "check": False}
    _, metrics, _ = small_runs.run(tmp_path, spoil(monkeypatch), **more)
    assert [line.get("bad_steps_by_cause") for line in metrics[1:]] == [None, *2 * [{cause: 1}]]
    said = capsys.readouterr().err
    assert [words in said for words in CAUSES.values()] == [name == cause for name in CAUSES]
    assert ("--teacher-dtype float32" in said) == (cause == "teacher")


def test_page_and_card_say_what_went_wrong(tmp_path, monkeypatch):
    bad_at(monkeypatch, 2, 4, 5)
    draw = Pool.draw

    def then(self, batch_size):
        if self.step == 1:
            self.x[:] = float("nan")
        return draw(self, batch_size)

    monkeypatch.setattr(Pool, "draw", then)
    folder, metrics, _ = small_runs.run(tmp_path, **RUN, max_bad_steps=2)
    said = faults_in_words(metrics)
    bad, anew = metrics[-1]["bad_steps"], metrics[-1]["entries_begun_anew"]
    assert said.startswith(f"{bad} steps were not finite and changed no weight (state ")
    assert "student 2" in said or "student 3" in said
    assert "; 1 times back to a checkpoint, with half the learning rate each time" in said
    assert f"; {anew} entries of the source were not finite and began anew" in said
    assert f"{said}." in Page(write_report(folder)).text
    assert said in (folder / "README.md").read_text()


def test_lines_of_metrics_may_hold_anything():
    assert faults_in_words([]) == faults_in_words([{"bad_steps": "7", "rolled_back": -1}]) == ""
    odd = {"bad_steps": 2, "bad_steps_by_cause": [3], "loss_spike": None}
    assert faults_in_words([odd]) == (
        "2 steps were not finite and changed no weight; 1 losses of 5 times the usual or more"
    )


def everything(trainer):
    """Copies of all tensors that an update may change."""
    state = small_runs.state_of(trainer)
    return {key: value for key, value in state.items() if not key.startswith(("source", "bad"))}


@pytest.mark.parametrize("features", [False, True])
def test_the_gradient_of_feature_projections_counts_too(tmp_path, features):
    trainer = small_runs.begun(tmp_path, feature_weight=0.5)
    for _ in range(2):
        trainer.step()
    before, learnt = everything(trainer), trainer.features if features else trainer.network
    handle = next(learnt.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    trainer.step()
    handle.remove()
    after = everything(trainer)
    kept = [key for key in before if key.startswith(("features", "optimizer", "unet/"))]
    assert len(kept) > 20 and all(torch.equal(before[key], after[key]) for key in kept)
    assert trainer.bad_steps.by_cause() == {"gradient": 1}
    trainer.step()
    assert not torch.equal(everything(trainer)[kept[0]], after[kept[0]])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_on_a_device_is_guarded_without_a_wait(tmp_path, monkeypatch, optimizer):
    """As on a CUDA device: the kernels look at the flag; AdamW's is torch's fused one."""
    monkeypatch.setattr(bad_steps, "AHEAD_OF", ("cpu",))
    trainer = small_runs.begun(tmp_path, optimizer=optimizer, weight_decay=0.1, use_ema=False)
    if optimizer == "adamw":
        for group in trainer.optimizer.param_groups:
            group["fused"] = True
    update, watched = trainer._update, []

    def seen(loss):
        with Watched() as watch:
            update(loss)
        watched.append(watch.counts.total())

    trainer._update = seen
    trainer.step()
    for bad in (True, False):
        before = everything(trainer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Objective, "_simple", nan_at(Objective._simple, 1 if bad else 0))
            trainer.step()
        after = everything(trainer)
        kept = [key for key in before if key.startswith(("optimizer", "unet/"))]
        changed = [key for key in kept if not torch.equal(before[key], after[key])]
        assert len(kept) > 20 and bool(changed) != bad
    assert min(watched) > 20 and trainer.bad_steps.total == 1


def test_a_scaler_leaves_steps_out_and_the_loss_says_which_were_bad(tmp_path):
    """fp16's way, with the scaler of a CPU: scales that overflow are tried, and are no fault."""
    trainer = small_runs.begun(tmp_path, optimizer="adamw", lr_warmup_steps=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, backoff_factor=2.0**-60)
    trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.step()
    scaler.update(2.0**127)
    before = everything(trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "_simple", nan_at(Objective._simple, 1, value=1e4))
        trainer.step()
    after = everything(trainer)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("unet/"))
    assert trainer.bad_steps.total == 0 and scaler.get_scale() == 2.0**67
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "_simple", nan_at(Objective._simple, 1))
        trainer.step()
    assert trainer.bad_steps.by_cause() == {"student": 1}
    trainer.step()
    learnt = everything(trainer)
    assert any(not torch.equal(after[key], learnt[key]) for key in after if "unet/" in key)
    assert all(value.isfinite().all() for value in learnt.values())
