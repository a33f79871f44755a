"""The captured step's eager twin: fixed shapes on a CPU, beside the usual step.

`test_cuda.py` has the graphs themselves.
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState

from dkdm.core.captured.choice import capture_steps, misfit
from dkdm.core.captured.graph import fresh
from dkdm.core.captured.inputs import Inputs
from dkdm.core.captured.part import DevicePart
from dkdm.core.captured.placed import placed, placed_objective
from dkdm.core.captured.step import WholeStep, as_they_are, spare_rows
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.saving.progress import LossPerLevel
from dkdm.core.sources.chains import Stride
from dkdm.core.training.learning import Ema
from dkdm.core.training.muon import Muon
from small_runs import begun, state_of
from watched import OfTheDevice, Watched

CPU = torch.device("cpu")
RUNS = {
    "stride 1": {},
    "classes, long strides": {"stride": "random:20", "condition_dropout": 0.2},
    "guided": {"guidance_scale": "2:8", "stride": "7"},
    "one scale": {"guidance_scale": "1.5", "random_conditioning": 0.5},
    "guided chain": {"guidance_scale": "3", "guidance_on": "chain", "stride": "random:9"},
    "another process": {"student_process": "flow", "stride": "random:20"},
    "muon": {"optimizer": "muon", "learning_rate": 0.02, "weight_decay": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "stride": "random:20"},
    "iterative": {"source": "iterative", "stride": "random:9", "pool_size": None},
    "half a pool": {"pool_dtype": "float16", "use_ema": False, "eta": 0.0, "stride": "random:9"},
    "replay": {"replay": 3, "stride": "random:9", "guidance_scale": "2"},
    "features": {"feature_weight": 0.5, "stride": "random:9"},
    "learned variance": {"eta": 1.0, "stride": "random:9"},
}


def ready(folder, name="stride 1", **changes):
    return begun(folder, name == "learned variance", **{**RUNS[name], **changes})


def some(*quick):
    """All kinds of runs; those that are not named are slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in RUNS]


@pytest.mark.parametrize("name", some("learned variance"))
def test_fixed_shapes_learn_what_the_usual_step_learns(tmp_path, name):
    usual, trainer = ready(tmp_path, name), ready(tmp_path, name)
    whole = WholeStep(trainer, as_they_are)
    losses = [[float(step()) for _ in range(8)] for step in (usual.step, whole)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    expected, found = state_of(usual), state_of(trainer)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=2e-3, atol=2e-5, msg=f"{name}: {key}")
    assert trainer.source.evaluations == usual.source.evaluations
    assert trainer.schedule.get_last_lr() == usual.schedule.get_last_lr()


def test_a_resumed_step_of_fixed_shapes_equals_the_uninterrupted_one(tmp_path):
    name = "classes, long strides"
    whole, parts = ready(tmp_path, name), ready(tmp_path / "parts", name)
    step = WholeStep(whole, as_they_are)
    for _ in range(5):
        step()
    first = WholeStep(parts, as_they_are)
    for _ in range(2):
        first()
    parts.save()
    parts.saver.finish()
    resumed = ready(tmp_path / "resumed", name)
    resumed.resume(parts.output_dir / "checkpoint-2")
    second = WholeStep(resumed, as_they_are)
    for _ in range(3):
        second()
    expected, found = state_of(whole), state_of(resumed)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", some("guided", "learned variance", "replay"))
def test_the_devices_part_reads_no_number(tmp_path, name):
    whole = WholeStep(ready(tmp_path, name), as_they_are)
    whole()
    with Watched() as seen:
        whole.part.learn()
        whole.part.restart()
        if name == "replay":
            whole.part.again()
    assert 100 < seen.counts.total() < 3000


def test_the_watch_sees_what_a_capture_forbids():
    mask = torch.tensor([True, False])
    for forbidden in (lambda: bool(mask.any()), lambda: mask.nonzero(), lambda: mask[mask]):
        with pytest.raises(AssertionError), Watched():
            forbidden()


@pytest.mark.parametrize("name", some("guided", "learned variance", "another process"))
def test_nothing_of_the_host_is_used_on_the_device(tmp_path, name):
    """On the meta device there are no values; a tensor of the CPU is not even sent there."""
    trainer, meta = ready(tmp_path, name), torch.device("meta")
    whole = WholeStep(trainer, as_they_are)
    source, student = trainer.source, trainer.student_on_teacher_levels
    source = getattr(source, "source", source)  # of a replay
    for network in filter(None, (source.teacher.network, trainer.network, trainer.features)):
        network.to(meta)
    teacher = placed(source.teacher, meta)
    part = DevicePart(
        source.guidance,
        source.eta,
        source.process.start_std,
        teacher,
        placed(student, meta),
        placed_objective(trainer.objective, teacher, meta),
        trainer.network,
        trainer.optimizer.optimizer,
        Ema(trainer.network, 0.9),
        LossPerLevel(source.process.num_levels, meta),
        1.0,
        1,
        *({k: v.to(meta) for k, v in each.values.items()} for each in (whole.given, whole.new)),
        whole.part.x.to(meta),
        whole.part.noise.to(meta),
        trainer.features,
    )
    with OfTheDevice():
        part.learn()
        part.restart()
        if name == "replay":
            part.again()
        part.ema.move(part.network, part.given["share"])
    gradients = [weight.grad for weight in trainer.network.parameters()]
    assert all(gradient.device == meta for gradient in gradients)


def test_the_watch_sees_what_comes_from_the_host():
    there = torch.zeros(2, device="meta")
    for forbidden in (lambda: torch.zeros(2).to("meta"), lambda: there + torch.tensor(1.0)):
        with pytest.raises(AssertionError, match="on the host"), OfTheDevice():
            forbidden()


def test_what_a_capture_tries_leaves_no_trace(tmp_path):
    trainer = ready(tmp_path, "muon")
    whole, before = WholeStep(trainer, as_they_are), state_of(trainer)
    random = torch.get_rng_state()
    whole._tell(trainer.source.plan(8))
    with fresh(whole.part):
        for _ in range(3):
            whole.part.learn()
            whole.part.update()
            torch.rand(3)
    after = state_of(trainer)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    fresh_states = {key for key in after if key.startswith("optimizer/")}
    assert fresh_states and all(not after[key].any() for key in fresh_states)


def fails(sections):
    for run in as_they_are(sections).values():
        run()
    raise RuntimeError("operation not permitted when stream is capturing\nmore about it")


def spoilt(spoil):
    """Runs of sections after which something of the part is changed, as by a wrong graph."""

    def make(sections):
        (learn, *_), runs = sections["learn"], as_they_are(sections)
        part = learn.__self__

        def learn_and_spoil():
            runs["learn"]()
            with torch.no_grad():
                spoil(part)

        return runs | {"learn": learn_and_spoil}

    return make


def of_the_first_batch(sections):
    """Levels are those of the batch of the capture, as of a graph that holds host memory."""
    (learn, *_), runs = sections["learn"], as_they_are(sections)
    given = learn.__self__.given["t"]
    kept = given.clone()

    def run():
        given.copy_(kept)
        runs["learn"]()

    return runs | {"learn": run}


def not_updated(sections):
    """Weights stay."""
    (learn, *_), runs = sections["learn"], as_they_are(sections)
    weights = list(learn.__self__.network.parameters())

    def run():
        before = [weight.detach().clone() for weight in weights]
        runs["learn"]()
        with torch.no_grad():
            torch._foreach_copy_(weights, before)

    return runs | {"learn": run}


WRONG = {
    "capture": (fails, "operation not permitted when stream is capturing"),
    "one state": (spoilt(lambda part: part.next[3].mul_(1.1)), "next states differ by 0.1"),
    "loss": (spoilt(lambda part: part.loss.mul_(0.9)), "losses differ by 0.1"),
    "not finite": (spoilt(lambda part: part.loss.fill_(torch.nan)), "losses differ by 1"),
    "norm": (spoilt(lambda part: part.norm.mul_(1.02)), "norms of the gradient differ by 0.02"),
    "no update": (not_updated, "weights differ by"),
    "an average": (
        spoilt(lambda part: part.state()["exp_avg"][5].mul_(1.1)),
        "exp_avg differ by 0.1",
    ),
    "first batch": (of_the_first_batch, "differ by"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_step_whose_graphs_are_wrong_is_the_usual_one(tmp_path, monkeypatch, capsys, name):
    usual = ready(tmp_path, accelerate="off")
    trainer = ready(tmp_path, accelerate="graph" if name == "loss" else "auto")
    monkeypatch.setattr("dkdm.core.captured.choice.misfit", lambda _: None)
    make, reason = WRONG[name]
    capture_steps(trainer, make)
    random = torch.get_rng_state()
    capsys.readouterr()
    assert [float(trainer.step()) for _ in range(3)] == [float(usual.step()) for _ in range(3)]
    assert trainer.replay is None
    assert torch.equal(torch.get_rng_state(), random)
    said = [line for line in capsys.readouterr().err.splitlines() if "captured" in line]
    assert len(said) == 1 and reason in said[0]
    expected, found = state_of(usual), state_of(trainer)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", some("stride 1", "replay"))
def test_a_step_whose_graphs_are_right_is_used(tmp_path, monkeypatch, capsys, name):
    unchecked, trainer = ready(tmp_path, name), ready(tmp_path, name)
    whole = WholeStep(unchecked, as_they_are)
    monkeypatch.setattr("dkdm.core.captured.choice.misfit", lambda _: None)
    capture_steps(trainer, as_they_are)
    random = torch.get_rng_state()
    assert [float(trainer.step()) for _ in range(4)] == [float(whole()) for _ in range(4)]
    assert isinstance(trainer.replay, WholeStep)
    assert torch.equal(torch.get_rng_state(), random)
    assert "captured" not in capsys.readouterr().err


def test_batches_that_are_added_up_begin_without_gradients(tmp_path):
    """Those of the capture are dropped, though the update keeps their memory."""
    trainer = ready(tmp_path, "replay", gradient_accumulation_steps=2)
    usual = ready(tmp_path, "replay", gradient_accumulation_steps=2)

    def warmed_up(sections):
        runs = as_they_are(sections)
        for _ in range(2):
            for run in runs.values():
                run()
            runs["learn"]()
        return runs

    whole = WholeStep(trainer, warmed_up)
    whole.prepare()
    gradients = [w.grad for w in trainer.network.parameters() if w.grad is not None]
    assert gradients and not any(bool(gradient.any()) for gradient in gradients)
    assert float(whole()) == pytest.approx(float(usual.step()), rel=1e-4)
    torch.testing.assert_close(
        trainer.network.state_dict(), usual.network.state_dict(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("accelerate", ["auto", "graph", "networks"])
def test_without_a_cuda_device_the_step_stays_as_it_is(tmp_path, capsys, accelerate):
    trainer = ready(tmp_path, accelerate=accelerate)
    assert trainer.replay is None
    said = "not captured as one CUDA graph: there is no CUDA device"
    assert (said in capsys.readouterr().err) == (accelerate == "graph")


def test_what_fits_is_captured_though_the_devices_number_is_not_given(tmp_path, monkeypatch):
    """The accelerator of a single process says "cuda", its tensors "cuda:0"."""
    trainer, there = ready(tmp_path), torch.device("cuda:0")
    monkeypatch.setattr(PartialState(), "device", torch.device("cuda"))
    monkeypatch.setattr(Denoiser, "device", property(lambda _: there))
    monkeypatch.setattr(trainer.losses, "sums", SimpleNamespace(device=there))
    assert trainer.accelerator.device != there
    assert misfit(trainer) is None
    hook = trainer.network.register_forward_hook(lambda *_: None)
    assert misfit(trainer) == "model has hooks, which a graph does not call"
    hook.remove()
    monkeypatch.setattr(Denoiser, "device", property(lambda _: torch.device("cuda:1")))
    assert misfit(trainer) == "model is not on cuda:0"


def test_inputs_keep_shapes_and_values():
    like = {
        "a": torch.zeros(3, dtype=torch.int64),
        "b": torch.zeros((), dtype=torch.float32),
        "c": torch.zeros(5, dtype=torch.bool),
        "d": torch.zeros(2, 2, dtype=torch.float16),
    }
    inputs = Inputs(like, CPU)
    places = {name: value.data_ptr() for name, value in inputs.values.items()}
    for number in range(1, 5):
        sent = {name: (value + number).to(value.dtype) for name, value in like.items()}
        inputs.send(sent)
        for name, value in sent.items():
            assert torch.equal(inputs.values[name], value)
            assert inputs.values[name].data_ptr() == places[name]


def test_most_steps_begin_their_chains_at_once():
    assert spare_rows(Stride(1, 199), 1000, 128) == 17
    assert spare_rows(Stride(30, 30), 50, 4) == 4
    assert spare_rows(Stride(1, 1), 1000, 8) == 1


def test_rates_and_shares_may_be_tensors():
    random = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(24, 40, generator=random) for _ in range(2))
    moved = []
    for rate in (0.02, torch.tensor(0.02)):
        weight = start.clone().requires_grad_()
        weight.grad = gradient.clone()
        optimizer = Muon([weight], [], 0.02, 0.1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        moved.append(weight.detach())
    torch.testing.assert_close(moved[1], moved[0])
    layers = torch.nn.Linear(3, 3)
    averages = [Ema(layers, 0.9) for _ in range(2)]
    torch.nn.init.ones_(layers.weight)
    averages[0].update(layers, 100)
    averages[1].move(layers, torch.tensor(averages[1].share(100)))
    torch.testing.assert_close(averages[1].weights, averages[0].weights)


@pytest.mark.parametrize("name", ["stride 1", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_bad_step_changes_no_weight(tmp_path, name):
    found = []
    for fixed in (False, True):
        trainer = ready(tmp_path, name)
        step = WholeStep(trainer, as_they_are) if fixed else trainer.step
        step()
        before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
        trainer.source.x[trainer.source.plan(8).rows[0]] = torch.nan
        step()
        after = trainer.network.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert trainer.bad_steps.by_cause() == {"state": 1}
        found.append(state_of(trainer))
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-5, equal_nan=True)
    assert all(value.isfinite().all() for key, value in found[1].items() if "optimizer" in key)


def test_after_a_run_went_back_its_step_is_captured_anew(tmp_path, monkeypatch):
    made = []
    trainer = ready(tmp_path, accelerate="graph")
    monkeypatch.setattr("dkdm.core.captured.choice.misfit", lambda _: None)
    capture_steps(trainer, lambda sections: made.append(1) or as_they_are(sections))
    trainer.save()
    trainer.saver.finish()
    losses = [float(trainer.step()) for _ in range(3)]
    trainer.resume(trainer.output_dir / "checkpoint-0")
    assert [float(trainer.step()) for _ in range(3)] == losses
    assert len(made) == 2


def test_a_step_that_fails_to_be_captured_anew_is_the_usual_one(tmp_path, monkeypatch, capsys):
    made = []
    usual, trainer = ready(tmp_path), ready(tmp_path / "captured", accelerate="graph")
    monkeypatch.setattr("dkdm.core.captured.choice.misfit", lambda _: None)

    def once(sections):
        made.append(1)
        return (as_they_are if len(made) == 1 else fails)(sections)

    capture_steps(trainer, once)
    trainer.save()
    trainer.saver.finish()
    trainer.step()
    trainer.resume(trainer.output_dir / "checkpoint-0")
    assert [float(trainer.step()) for _ in range(3)] == [float(usual.step()) for _ in range(3)]
    assert capsys.readouterr().err.count("not captured as one CUDA graph: operation not") == 1
