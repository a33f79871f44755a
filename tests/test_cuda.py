"""What must hold on an accelerator too: the same numbers as on a CPU, and exact resume."""

import copy
import inspect
import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate.state import PartialState

import dkdm
from dkdm.checks.memory_plan import CONTEXT_MIB, PlannedRun, plan
from dkdm.config import SamplingOptions, read_config
from dkdm.core.captured.check import apart, outcome
from dkdm.core.captured.part import DevicePart
from dkdm.core.captured.step import as_they_are
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.graphs import replayed
from dkdm.core.saving.checkpoint import read_tensors
from dkdm.core.saving.progress import read_metrics
from dkdm.core.training.muon import Muon
from dkdm.evaluation.memory import MIB, peak_allocated
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.models import load_teacher
from dkdm.models.place import place
from dkdm.runs import batch_size
from dkdm.runs.arms import prepare_source
from dkdm.runs.distill import prepared
from dkdm.runs.outputs import sample_to_file
from dkdm.students import student_of
from factories import denoiser, some_batch
from small_runs import SMALL, begun, state_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch):
    """TF32 rounds the factors of convolutions to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def losses(folder):
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]


def distilled(folder, **changes):
    changes = {"student": "dit-tiny", "max_train_steps": 8, "evaluation_samples": 0} | changes
    return dkdm.distill(denoiser(), None, replace(SMALL, output_dir=folder, **changes))


def test_a_teacher_predicts_as_on_the_cpu():
    model = denoiser()
    there = replace(model, network=copy.deepcopy(model.network).to(DEVICE))
    batch = some_batch(model)
    cond = {key: value.to(DEVICE) for key, value in batch.cond.items()}
    moved = batch._replace(x=batch.x.to(DEVICE), cond=cond)
    with torch.no_grad():
        expected, found = model.predict(batch), there.predict(moved)
    torch.testing.assert_close(found.x_0.cpu(), expected.x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", [1e-3, None], ids=["adamw", "muon"])
def test_losses_are_those_of_a_cpu(tmp_path, monkeypatch, rate):
    # noise for the fill and for eta > 0 is drawn on the device
    same = {"learning_rate": rate, "pool_device": "cpu", "fill": "none", "eta": 0.0}
    there = losses(distilled(tmp_path / "there", **same))
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        PartialState._reset_state()
        here = losses(distilled(tmp_path / "here", **same))
    PartialState._reset_state()
    assert len(there) == 8
    # Muon calculates in bfloat16 there
    assert there == pytest.approx(here, rel=2e-3 if rate else 2e-2)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, precision):
    settings = {"mixed_precision": precision, "checkpointing_steps": 4}
    whole = distilled(tmp_path / "whole", **settings)
    parts = tmp_path / "parts"
    distilled(parts, **settings)
    for name in ("checkpoint-8", "model_index.json"):
        (parts / name).rename(tmp_path / name)
    distilled(parts, **settings, resume_from_checkpoint="checkpoint-4")
    manifests = (folder / "checkpoint-8" / "manifest.json" for folder in (whole, parts))
    expected, resumed = (json.loads(file.read_text()) for file in manifests)
    assert resumed == expected


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(tmp_path, precision):
    found = losses(distilled(tmp_path / "run", mixed_precision=precision, max_train_steps=40))
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_muon_moves_as_on_the_cpu():
    random = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(24, 40, generator=random) for _ in range(2))
    moved = []
    for device in ("cpu", "cuda"):
        weight = start.to(device).clone().requires_grad_()
        weight.grad = gradient.to(device)
        Muon([weight], [], 0.02).step()
        moved.append(weight.detach().cpu() - start)
    # there it calculates in bfloat16
    assert (moved[0] - moved[1]).norm() < 0.05 * moved[0].norm()


def test_samples_are_those_of_the_cpu():
    model = load_teacher("builtin:fashion")
    how = Sampling(20, 10, seed=0)
    cond = model.conditioning.in_turns(20)
    here = draw(model, cond, how)
    place(model, DEVICE)
    there = draw(model, cond, how)
    assert (there.cpu() - here).abs().mean() < 1e-3


def batches(model, count=6):
    random = torch.Generator().manual_seed(4)
    for _ in range(count):
        x = torch.randn(5, *model.sample_shape, generator=random).to(DEVICE)
        t = torch.randint(model.process.num_levels, (5,), generator=random)
        yield Batch(x, t, model.conditioning.draw(5, random))


@pytest.mark.parametrize("learns", [False, True])
def test_a_replayed_network_answers_and_learns_as_the_network(learns):
    plain = denoiser()
    plain.network.to(DEVICE).train(learns)
    graphed = replayed(plain)
    for batch in batches(plain):
        found = []
        for model in (plain, graphed):
            plain.network.zero_grad()
            with torch.set_grad_enabled(learns):
                output = model.predict(batch).output
            if learns:
                output.square().mean().backward()
            gradients = [p.grad.clone() for p in plain.network.parameters() if learns]
            found.append([output.detach(), *gradients])
            del output  # a graph of the last step would hold its streams
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert len(graphed.call.graphs) == 1


def test_a_network_with_a_hook_is_not_replayed():
    plain, seen = denoiser(), []
    plain.network.to(DEVICE)
    model = replayed(plain)
    model.network.conv_in.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        for batch in batches(model):
            model.predict(batch)
    assert len(seen) == 6
    assert not model.call.graphs


class Waits(torch.nn.Module):
    """Reads a number from the device, which a graph cannot."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, time, **cond):
        del time, cond
        return x * float(self.scale)


def test_what_cannot_be_captured_is_called_as_it_is(capsys):
    model = replayed(replace(denoiser(classes=None), network=Waits().to(DEVICE), call=None))
    with torch.no_grad():
        for batch in batches(model):
            torch.testing.assert_close(model.predict(batch).output, batch.x)
    assert "Waits is not replayed as a CUDA graph" in capsys.readouterr().err
    assert float(torch.ones(2, device=DEVICE).sum()) == 2  # the device is well


def test_runs_with_and_without_graphs_learn_the_same(tmp_path):
    settings = {"eta": 1.0, "max_train_steps": 12, "learning_rate": 1e-3}
    with_graphs = losses(distilled(tmp_path / "with", **settings))
    without = losses(distilled(tmp_path / "without", cuda_graphs=False, **settings))
    assert with_graphs == pytest.approx(without, rel=1e-4)


def test_samples_are_written_with_and_without_graphs(tmp_path):
    found = {}
    for graphs in (True, False):
        file = tmp_path / f"{graphs}.safetensors"
        how = SamplingOptions(file, num_samples=24, steps=10, cuda_graphs=graphs)
        model = load_teacher("builtin:fashion")
        sample_to_file(model, how)
        assert model.device.type == "cuda"
        found[graphs] = read_tensors(file)["samples"]
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-3)


def test_a_teacher_under_autocast_is_near(tmp_path):
    same = {"mixed_precision": "bf16", "eta": 0.0, "fill": "none"}
    folders = {dtype: tmp_path / str(dtype) for dtype in (None, "float32")}
    losses_of = {
        dtype: losses(distilled(folder, teacher_dtype=dtype, **same))
        for dtype, folder in folders.items()
    }
    assert losses_of[None] == pytest.approx(losses_of["float32"], rel=2e-2)


def test_a_fill_in_larger_batches_learns_the_same(tmp_path):
    settings = {"pool_size": 64, "shards": 1, "learning_rate": 1e-3}
    plain = losses(distilled(tmp_path / "plain", **settings))
    auto = losses(distilled(tmp_path / "auto", fill_batch_size="auto", **settings))
    assert auto == pytest.approx(plain, rel=1e-3)


CAPTURED = {
    "strides": {"stride": "random:20", "condition_dropout": 0.2},
    "guided": {"guidance_scale": "2:8", "stride": "random:9"},
    "muon": {"optimizer": "muon", "learning_rate": 0.02},
    "accumulation": {"gradient_accumulation_steps": 2, "stride": "random:20"},
    "bfloat16": {"mixed_precision": "bf16"},
    "features": {"feature_weight": 0.5},
    "replay": {"replay": 2},
    "host": {"pool_device": "cpu", "pool_pinned": True, "stride": "random:20"},
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_step_learns_what_the_usual_one_does(tmp_path, name):
    settings = {"max_train_steps": 20, **CAPTURED[name]}
    usual = begun(tmp_path / "usual", accelerate="off", **settings)
    whole = begun(tmp_path / "whole", **settings)  # whose step is captured by itself
    expected, found = ([float(each.step()) for _ in range(20)] for each in (usual, whole))
    assert type(whole.replay).__name__ == "WholeStep"
    assert found == pytest.approx(expected, rel=2e-2 if name in ("muon", "bfloat16") else 1e-3)
    assert whole.source.evaluations == usual.source.evaluations
    same = state_of(whole), state_of(usual)
    assert all(torch.equal(same[0][key], same[1][key]) for key in same[0] if key.endswith("/t"))


@pytest.mark.parametrize("name", ["strides", "muon", "accumulation", "bfloat16"])
def test_a_captured_step_is_resumed_exactly(tmp_path, name):
    settings = {"max_train_steps": 8, "accelerate": "graph", **CAPTURED[name]}
    whole, part = begun(tmp_path / "whole", **settings), begun(tmp_path / "part", **settings)
    for trainer, steps in ((whole, 8), (part, 4)):
        for _ in range(steps):
            trainer.step()
    part.save()
    part.saver.finish()
    resumed = begun(tmp_path / "resumed", **settings)
    resumed.resume(part.output_dir / "checkpoint-4")
    for _ in range(4):
        resumed.step()
    expected, found = state_of(whole), state_of(resumed)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_graph_that_is_wrong_is_not_used(tmp_path, monkeypatch, capsys):
    usual = begun(tmp_path / "usual", accelerate="off", max_train_steps=9)
    trainer = begun(tmp_path / "whole", max_train_steps=9)
    learn = DevicePart.learn

    def spoils(part):
        learn(part)
        if torch.cuda.is_current_stream_capturing():
            part.next.mul_(1.1)

    monkeypatch.setattr(DevicePart, "learn", spoils)
    random = torch.cuda.get_rng_state()
    found = [float(trainer.step()) for _ in range(6)]
    assert trainer.replay is None
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert "one CUDA graph: graphs of it do not give what single calls give: next states" in (
        capsys.readouterr().err
    )
    assert found == pytest.approx([float(usual.step()) for _ in range(6)], rel=1e-3)


@pytest.mark.parametrize("name", ["guided", "muon", "accumulation", "bfloat16"])
def test_what_a_graph_reads_stays_alive(tmp_path, monkeypatch, name):
    if "check_input_liveness" not in inspect.signature(torch.cuda.graph).parameters:
        pytest.skip("this torch does not watch what a graph reads")
    monkeypatch.setattr(torch.cuda, "graph", partial(torch.cuda.graph, check_input_liveness=True))
    trainer = begun(tmp_path, accelerate="graph", max_train_steps=9, **CAPTURED[name])
    for _ in range(4):
        trainer.step()  # raises if memory that it was captured with is gone
    assert type(trainer.replay).__name__ == "WholeStep"


def test_a_graph_that_is_right_agrees_with_single_calls(tmp_path):
    """What it differs by, for every kind of result; the limit is far above."""
    trainer = begun(tmp_path, stride="random:20", max_train_steps=9)
    trainer.step()
    whole = trainer.replay
    whole._tell_all(trainer.source.plan(8))
    expected = outcome(whole.part, as_they_are(whole._sections()))
    found = outcome(whole.part, whole._runs)
    distances = {kind: apart(found[kind], values) for kind, values in expected.items()}
    weights = distances.pop("weights")
    assert weights < 0.02 and max(distances.values()) < 1e-4, distances


def test_nobody_waits_for_a_captured_step(tmp_path):
    trainer = begun(tmp_path, accelerate="graph", stride="random:20", max_train_steps=30)
    trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_few_kernels_are_started_beside_the_graph(tmp_path):
    trainer = begun(tmp_path, accelerate="graph", max_train_steps=30)
    trainer.step()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as seen:
        for _ in range(5):
            trainer.step()
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in seen.key_averages()}
    launches = sum(n for key, n in counts.items() if key.startswith(("cudaLaunch", "cuLaunch")))
    assert counts["cudaGraphLaunch"] == 5
    assert launches / 5 <= 50


def test_what_fails_in_a_capture_leaves_the_usual_step(tmp_path, monkeypatch, capsys):
    usual = begun(tmp_path / "usual", accelerate="off", max_train_steps=9)
    trainer = begun(tmp_path / "whole", accelerate="graph", max_train_steps=9)
    learn = DevicePart.learn

    def waits(part):
        learn(part)
        float(part.loss)

    monkeypatch.setattr(DevicePart, "learn", waits)
    found = [float(trainer.step()) for _ in range(6)]
    assert trainer.replay is None
    assert "the step is not captured as one CUDA graph" in capsys.readouterr().err
    assert found == pytest.approx([float(usual.step()) for _ in range(6)], rel=1e-3)


def test_a_teacher_on_a_stream_of_its_own_teaches_the_same(tmp_path):
    settings = {"stride": "random:20", "max_train_steps": 12}
    usual = begun(tmp_path / "usual", **settings)
    ahead = begun(tmp_path / "ahead", teacher_prefetch=True, **settings)
    expected, found = ([float(each.step()) for _ in range(12)] for each in (usual, ahead))
    assert found == pytest.approx(expected, rel=1e-4)
    assert torch.equal(ahead.source.source.t, usual.source.t)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_teacher_on_another_device_teaches_the_same(tmp_path):
    settings = {"stride": "random:20", "max_train_steps": 12}
    usual = begun(tmp_path / "usual", **settings)
    ahead = begun(tmp_path / "ahead", teacher_device="cuda:1", **settings)
    expected, found = ([float(each.step()) for _ in range(12)] for each in (usual, ahead))
    assert found == pytest.approx(expected, rel=1e-3)
    assert ahead.source.source.x.device == torch.device("cuda:1")


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_states_that_travel_are_those_that_are_sent(tmp_path, place):
    settings = {"stride": "random:20", "max_train_steps": 12, "pool_device": place}
    usual = begun(tmp_path / "usual", **settings)
    pinned = begun(tmp_path / "pinned", pool_pinned=True, **settings)
    expected, found = ([float(each.step()) for _ in range(12)] for each in (usual, pinned))
    assert found == pytest.approx(expected, rel=1e-4)
    same = state_of(pinned), state_of(usual)
    torch.testing.assert_close(*same, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_plan_is_what_the_allocator_gives_out(tmp_path, precision):
    options = {"student": "unet-mini", "train_batch_size": 128, "optimizer": "adamw"}
    options |= {"mixed_precision": precision, "pool_size": 2000, "cuda_graphs": False}
    config = replace(SMALL, output_dir=tmp_path / "run", fill="none", learning_rate=None, **options)

    like = replace(denoiser(classes=None), sample_shape=(3, 32, 32))

    def two_steps():
        ready = prepared(config, [student_of("unet-tiny", like)])
        prepare_source(ready.trainer.source, ready.teacher, ready.config)
        for _ in range(2):
            ready.trainer.step()

    planned = plan(student_of("unet-tiny", like), PlannedRun(**options)).device_total - CONTEXT_MIB
    assert planned == pytest.approx(peak_allocated(two_steps) / MIB, rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nobody_waits_for_an_update_and_a_bad_one_changes_nothing(tmp_path, optimizer):
    trainer = begun(tmp_path, optimizer=optimizer, weight_decay=0.1, lr_warmup_steps=0)
    trainer.step()
    update = trainer._update

    def guarded(loss):
        torch.cuda.set_sync_debug_mode("error")
        try:
            update(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer._update = guarded
    trainer.step()
    before = state_of(trainer)
    trainer.source.x[:] = torch.nan
    trainer.step()
    after = state_of(trainer)
    kept = [key for key in before if key.startswith(("unet/", "optimizer/"))]
    assert len(kept) > 20 and all(torch.equal(before[key], after[key]) for key in kept)
    assert trainer.bad_steps.by_cause() == {"state": 1}


def test_the_largest_batch_that_fits_is_found(tmp_path, monkeypatch, capsys):
    real = batch_size.memory_of_run
    monkeypatch.setattr(batch_size, "memory_of_run", lambda: (real()[0], 2**28))
    folder = distilled(tmp_path / "auto", train_batch_size="auto", pool_size=None, rho=0.1)
    found = read_config(folder / "config.json").training.train_batch_size
    assert 1 <= found <= batch_size.LARGEST
    said = capsys.readouterr().err
    needed = re.search(r"samples take ([\d,]+) MiB of the 256 MiB", said)
    assert needed and int(needed[1].replace(",", "")) <= 256
    number = distilled(tmp_path / "number", train_batch_size=found, pool_size=None, rho=0.1)
    assert losses(number) == pytest.approx(losses(folder), rel=1e-4)


def test_a_device_without_memory_for_a_size_takes_a_smaller_one(tmp_path):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**28 / total)
    try:
        options = {"train_batch_size": "auto", "pool_size": None, "rho": 0.1}
        folder = distilled(tmp_path / "run", **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert read_config(folder / "config.json").training.train_batch_size < batch_size.LARGEST
