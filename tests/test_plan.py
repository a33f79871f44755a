"""The memory plan against what is really allocated, and its advice."""

import contextlib
import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import dkdm
import small_runs
from dkdm.checks import memory_plan
from dkdm.checks.memory_plan import (
    _SAVINGS,
    CONTEXT_MIB,
    PlannedRun,
    changes,
    plan,
    training_mib,
)
from dkdm.cli import main
from dkdm.config import OptimizerOptions, PlanOptions
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.saving.progress import read_metrics
from dkdm.core.sources import replay
from dkdm.core.training.learning import optimizer_of
from dkdm.errors import UsageError
from dkdm.evaluation.memory import MIB, LiveStorages, fused_attention, peak_allocated
from dkdm.reading.options import places
from dkdm.runs.arms import make_source, prepare_source
from dkdm.runs.distill import prepared
from dkdm.runs.scale import scale
from dkdm.students import student_of
from factories import denoiser

SMALL = PlannedRun(student="dit-tiny", train_batch_size=8, pool_size=100)


@pytest.fixture(scope="module")
def teacher():
    return denoiser()


@pytest.fixture(scope="module")
def small(teacher):
    return plan(teacher, SMALL)


def test_activations_on_the_meta_device_are_those_of_a_real_step(teacher):
    student = replace(teacher, network=copy.deepcopy(teacher.network).train())
    sketched = replace(student, network=copy.deepcopy(student.network).to("meta"))
    batch = Batch(torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64), {}, torch.zeros(8))
    cond = student.conditioning.draw(8, torch.Generator().manual_seed(0))
    with LiveStorages(student.network) as real:
        student.predict(batch._replace(cond=cond)).output.square().mean().backward()
    gradients = sum(p.grad.nbytes for p in student.network.parameters())
    assert training_mib(sketched, 8) == pytest.approx((real.peak - gradients) / MIB, rel=0.1)


def test_parts_are_what_they_are_named(teacher, small):
    weights = small.device["student weights"]
    assert weights < small.device["optimizer"] < 1.3 * weights  # Muon's, AdamW's of few weights
    assert 0 < small.device["update"] < 4 * weights
    assert small.device["student gradients"] == small.device["EMA"] == weights
    assert small.device["teacher weights"] == pytest.approx(
        teacher.num_parameters * 4 / MIB, rel=0.05
    )
    assert small.device["pool"] == 100 * 64 * 4 / MIB
    assert small.device_total < sum(small.device.values())


def test_several_devices_share_batch_and_pool(teacher, small):
    one, two = small, plan(teacher, SMALL, gpus=2)
    assert two.device["pool"] == one.device["pool"] / 2
    assert two.device["student activations"] < 0.6 * one.device["student activations"]
    assert two.device["student weights"] == one.device["student weights"]


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"mixed_precision": "bf16"}, "student activations"),
        ({"teacher_dtype": "bfloat16"}, "teacher weights"),
        ({"pool_dtype": "float16"}, "pool"),
    ],
)
def test_half_precision_halves_its_part(teacher, small, fields, part):
    whole = small.device[part]
    half = plan(teacher, replace(SMALL, **fields)).device[part]
    assert half == pytest.approx(whole / 2, rel=0.3)  # some arithmetic stays in float32


def test_int8_saves_the_linear_layers_share(teacher):
    linear = sum(m.weight.numel() for m in teacher.network.modules() if isinstance(m, nn.Linear))
    half = plan(teacher, replace(SMALL, teacher_dtype="bfloat16"))
    int8 = plan(teacher, replace(SMALL, teacher_dtype="int8"))
    saved = half.device["teacher weights"] - int8.device["teacher weights"]
    assert saved == pytest.approx(linear / MIB)


def test_offloaded_teacher_and_pool_are_counted_on_the_host(teacher):
    found = plan(teacher, replace(SMALL, teacher_offload="layers", pool_device="cpu"))
    assert found.device["teacher weights"] == found.device["pool"] == 0
    assert found.host["teacher weights"] > 0
    assert found.host["pool"] > 0
    on_disk = plan(teacher, replace(SMALL, pool_device="disk"))
    assert on_disk.device["pool"] == on_disk.host["pool"] == 0


def test_advice_leads_to_a_plan_that_fits(teacher):
    choices = replace(SMALL, train_batch_size=64, pool_size=10_000)
    found = plan(teacher, choices)
    limit = found.device_total - 5
    advice = changes(teacher, found, limit)
    assert advice[-1].device_total <= limit
    totals = [found.device_total, *(change.device_total for change in advice)]
    assert totals == sorted(totals, reverse=True)
    assert changes(teacher, found, found.device_total) == []


def test_fewer_samples_than_devices_are_refused(teacher):
    with pytest.raises(UsageError, match="--gpus 4 --train-batch-size 2"):
        plan(teacher, replace(SMALL, train_batch_size=2), gpus=4)


def test_the_optimizer_is_counted_as_it_is(teacher, small):
    student = student_of("dit-tiny", teacher)
    weights = [*student.network.parameters()]
    optimizer, _ = optimizer_of(student.network, weights, OptimizerOptions().decided(True), 1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [v.nbytes for state in optimizer.state.values() for v in state.values()]
    assert small.device["optimizer"] == sum(kept) / MIB
    adamw = plan(teacher, replace(SMALL, optimizer="adamw")).device
    twice = 2 * small.device["student weights"]
    assert adamw["optimizer"] == pytest.approx(twice, rel=1e-3)  # and a count for each weight
    assert adamw["update"] < small.device["update"]


def test_replay_keeps_states_and_outputs_of_the_last_batches(teacher, small, monkeypatch):
    assert small.device["replay"] == 0
    for module in (replay, memory_plan):
        monkeypatch.setattr(module, "RECENT", 3)
    options = replace(small_runs.SMALL, replay=2, fill="none", train_batch_size=8)
    source = make_source(teacher, teacher, options, torch.device("cpu"))
    for _ in range(2 * 4):
        batch = source.draw(8)
        source.advance(batch, source.target(batch))
    kept = sum(source.kept[name].nbytes for name in ("x", "output"))
    assert plan(teacher, replace(SMALL, replay=2)).device["replay"] == kept / MIB


def test_options_of_the_run_decide(teacher, small):
    guided = plan(teacher, replace(SMALL, guidance_scale="4"))
    assert guided.device["teacher evaluation"] > 1.9 * small.device["teacher evaluation"]
    assert plan(teacher, replace(SMALL, use_ema=False)).device["EMA"] == 0
    by_rho = plan(teacher, replace(SMALL, pool_size=None, rho=0.5))
    assert by_rho.pool_size == 0.5 * teacher.process.num_levels * 8


def test_command_says_by_its_exit_code_whether_it_fits(capsys, monkeypatch):
    command = ["plan", "factories:teacher", "dit-tiny", "--train-batch-size", "2"]
    command += ["--optimizer", "adamw", "--replay", "3", "--json"]
    assert main([*command, "--memory", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device_total"] <= found["limit"] == 1024
    assert found["choices"]["train_batch_size"] == 2
    assert found["choices"]["optimizer"] == "adamw" and found["choices"]["replay"] == 3
    assert found["choices"]["gpus"] == 1 and found["choices"]["guided"] is False
    monkeypatch.setattr("dkdm.checks.memory_plan._SAVINGS", _SAVINGS[:1])
    assert main([*command[:-1], "--memory", "0.4"]) == 1
    assert "does not fit" in capsys.readouterr().out


CASES = {
    "adamw": {"optimizer": "adamw"},
    "muon": {},
    "bfloat16": {"optimizer": "adamw", "mixed_precision": "bf16"},
    "recomputed": {"optimizer": "adamw", "gradient_checkpointing": True},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[1:]]


@pytest.mark.parametrize("case", ["adamw", *SLOW])
def test_the_plan_is_what_the_allocator_gives_out(tmp_path, case):
    options = {"student": "dit-xs", "train_batch_size": 16, "pool_size": 1000, **CASES[case]}
    options = {"learning_rate": None, **options}
    config = replace(small_runs.SMALL, output_dir=tmp_path / "run", fill="none", **options)
    like = replace(denoiser(classes=None), sample_shape=(3, 32, 32))

    def two_steps():
        ready = prepared(config, [student_of("dit-tiny", like)])
        prepare_source(ready.trainer.source, ready.teacher, ready.config)
        for _ in range(2):  # the optimizer has its state after the first
            ready.trainer.step()

    planned = plan(student_of("dit-tiny", like), PlannedRun(**options)).device_total - CONTEXT_MIB
    assert planned == pytest.approx(peak_allocated(two_steps) / MIB, rel=0.1)


def test_a_run_takes_the_evaluations_and_the_disk_that_are_planned(tmp_path):
    options = {"stride": "1", "max_train_steps": 10, "replay": 2, "evaluation_samples": 0}
    config = replace(small_runs.SMALL, output_dir=tmp_path / "run", student="dit-xs", **options)
    folder = dkdm.distill(denoiser(), None, config)
    shared = {key: value for key, value in config.flat().items() if key in places(PlannedRun)}
    found = plan(denoiser(), PlannedRun(**shared))
    work = scale(denoiser(), found, PlanOptions())
    metrics = read_metrics(folder / "metrics.jsonl")
    assert metrics[-1]["teacher_evaluations"] == work.preparing + work.training
    assert work.preparing == 8 * 2 and work.training == 5 * 8
    files = [path for path in (folder / "checkpoint-10").rglob("*.safetensors") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    kept = found.disk["replay"] * MIB * (1 - 5 / 64)  # the memory is not full yet
    assert work.checkpoint - kept == pytest.approx(written, rel=0.05)


def test_what_passes_between_devices_and_how_long_it_takes(teacher):
    machine = PlanOptions(device_tflops=1, utilization="0.5", link=1e-3)
    run = replace(SMALL, pool_device="disk", max_train_steps=10, optimizer="adamw")
    one, two = (scale(teacher, plan(teacher, run, gpus), machine) for gpus in (1, 2))
    weights = plan(teacher, run).device["student weights"] * MIB
    assert (one.sent, two.sent) == (0, pytest.approx(weights))  # 2 (N - 1) / N of the gradients
    assert (one.moved, two.moved) == (2 * 8 * 64 * 4, 2 * 4 * 64 * 4)
    samples = 8 * 10
    computed = 2 * samples * (one.teacher_macs + 3 * one.student_macs) / 0.5e12
    assert one.seconds_training == pytest.approx((computed, computed))
    traffic = 10 * two.sent / 1e6
    assert two.seconds_training == pytest.approx(
        (max(computed / 2, traffic), computed / 2 + traffic)
    )
    prepared_in = 2 * 16 * 20 * one.teacher_macs / 0.5e12  # 100 entries in 8 shards, 8 of a sample
    assert one.seconds_preparing[0] == pytest.approx(prepared_in)
    assert one.hours[1] == pytest.approx((prepared_in + computed) / 3600)


def test_a_pool_on_disk_takes_no_memory_and_every_device_holds_gradients_on_their_way(teacher):
    found = plan(teacher, replace(SMALL, pool_device="disk"), gpus=2)
    assert found.device["pool"] == found.host["pool"] == 0
    assert found.device["gradients on their way"] == found.device["student weights"]
    assert found.disk["pool"] > 100 * 64 * 4 / MIB


def test_shards_are_parts_and_send_more(teacher):
    found = plan(teacher, replace(SMALL, fsdp="both", optimizer="adamw"), gpus=4)
    whole = plan(teacher, replace(SMALL, optimizer="adamw"), gpus=4)
    for name in ("teacher weights", "student weights", "student gradients", "optimizer", "EMA"):
        assert found.device[name] == whole.device[name] / 4
    assert found.device["gradients on their way"] == whole.device["gathered blocks"] == 0
    both = whole.device["teacher weights"] + whole.device["student weights"]
    assert 0 < found.device["gathered blocks"] < both
    assert found.disk == whole.disk
    sent = [scale(teacher, each, PlanOptions()).sent for each in (found, whole)]
    weights, asked = (whole.device[name] * MIB for name in ("student weights", "teacher weights"))
    assert sent == pytest.approx([0.75 * (3 * weights + asked), 0.75 * 2 * weights])


@pytest.mark.parametrize("text", ["0", "1.5", "0.5:0.4", "a"])
def test_a_utilization_that_is_no_share_is_refused(text):
    with pytest.raises(UsageError, match="--utilization"):
        PlanOptions(utilization=text)


def test_fused_attention_needs_no_matrix_of_weights():
    tokens, width = 512, 8
    q = torch.zeros(1, 1, tokens, width, device="meta", requires_grad=True)
    peaks = []
    for mode in (fused_attention(), contextlib.nullcontext()):
        with mode, LiveStorages() as storages:
            nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        assert q.grad.shape == q.shape
        q.grad = None
        peaks.append(storages.peak)
    assert peaks[0] < 8 * tokens * width * 4 < tokens**2 * 4 <= peaks[1]
