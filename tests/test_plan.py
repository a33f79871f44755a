"""The memory plan against what is really allocated, and its advice."""

import contextlib
import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import small_runs
from dkdm.checks import memory_plan
from dkdm.checks.memory_plan import _SAVINGS, PlannedRun, changes, plan, training_mib
from dkdm.cli import main
from dkdm.config import OptimizerOptions
from dkdm.core import replay
from dkdm.core.denoiser import Batch
from dkdm.core.learning import optimizer_of
from dkdm.errors import UsageError
from dkdm.evaluation.memory import MIB, LiveStorages, fused_attention
from dkdm.runs.arms import make_source
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
    with LiveStorages() as real:
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
