"""Validation by a metric changes nothing of a run, and the best weights are kept and shipped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import dkdm
from dkdm.cli import main
from dkdm.config import EvaluationOptions, TrainConfig
from dkdm.core.randomness import derived_seed
from dkdm.core.saving import checkpoint, folders
from dkdm.core.saving.progress import MetricsFile, read_metrics
from dkdm.core.training.selection import Selection
from dkdm.data.named import load_reference
from dkdm.errors import UsageError
from dkdm.evaluation.frechet import frechet_distance
from dkdm.evaluation.same_noise import Sampling, draw
from dkdm.evaluation.validation import Validation, how_in_words, validation_seed
from dkdm.reading.places import link_folder
from dkdm.runs.compare import entry_of_model
from dkdm.runs.earlier import run_of, weights_of
from dkdm.students import student_of
from dkdm.students.start import read_checkpoint
from factories import denoiser, tiny_unet
from small_runs import SMALL

SELECTING = replace(
    SMALL,
    learning_rate=1e-2,
    checkpointing_steps=2,
    checkpoints_total_limit=1,
    validation_steps=1,
    validation_metric="gap",
    validation_samples=4,
    evaluation_samples=0,
    check=False,
)


def distil(folder, **changes):
    """Four steps of a student with dropout, which draws on the global random state."""
    teacher = denoiser()
    torch.manual_seed(3)
    student = replace(denoiser(), network=tiny_unet(4, dropout=0.3))
    return dkdm.distill(teacher, student, replace(SELECTING, output_dir=folder, **changes))


def lines(folder):
    entries = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in entry.items() if k != "steps_per_second"} for entry in entries]


def values(folder):
    return {e["step"]: e["validation"]["gap"] for e in lines(folder) if "validation" in e}


def weights(folder):
    return checkpoint.read_tensors(folder / "unet" / checkpoint.WEIGHTS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("whole") / "run")


def test_validation_changes_nothing_of_the_training(whole, tmp_path):
    without = distil(tmp_path / "run", validation_metric=None, validation_steps=0)
    hashes = [
        json.loads((run / "checkpoint-4/manifest.json").read_text()) for run in (whole, without)
    ]
    assert hashes[0].pop("state.json") != hashes[1].pop("state.json")  # it names the best
    assert hashes[0].pop("run.json") != hashes[1].pop("run.json")  # it has the options
    assert hashes[0] == hashes[1]
    assert [entry for entry in lines(whole) if "validation" not in entry] == lines(without)


def test_a_killed_run_ends_as_the_whole_one(whole, tmp_path, monkeypatch):
    """Killed after step 3 was validated, when checkpoint-2 is the last."""
    write = MetricsFile.write

    def killed(self, entry):
        if entry["step"] == 3 and "loss" in entry:
            raise KeyboardInterrupt
        write(self, entry)

    monkeypatch.setattr(MetricsFile, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path / "run")
    monkeypatch.undo()
    assert len(values(tmp_path / "run")) == 3
    resumed = distil(tmp_path / "run", resume_from_checkpoint="latest")
    for file in ("checkpoint-4/manifest.json", "best/manifest.json"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()
    assert lines(resumed) == lines(whole)


def test_the_best_is_kept_and_the_state_knows_it(whole):
    best = json.loads((whole / "best/best.json").read_text())
    assert best["value"] == min(values(whole).values())
    assert values(whole)[best["step"]] == best["value"]
    state = json.loads((whole / "checkpoint-4/state.json").read_text())
    assert state["best"] == best
    assert dkdm.load_teacher(str(whole / "best"))


@pytest.fixture
def second_is_best(monkeypatch):
    found = iter((3.0, 1.0, 2.0, 1.0))
    monkeypatch.setattr(Validation, "measure", lambda *_: next(found))


@pytest.mark.usefixtures("second_is_best")
def test_the_best_weights_are_shipped_if_asked_for(whole, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: logged.append((step, values)))
    shipped = distil(tmp_path / "run", ship_best=True)
    tracked = [entry for entry in logged if "validation/gap" in entry[1]]
    assert tracked == [(k, {"validation/gap": v}) for k, v in values(shipped).items()]
    card = (shipped / "README.md").read_text()
    chosen = "of step 2, EMA, decay 0.9999; the best by gap (100.0 %; 4 samples, DDIM, 2 steps, "
    assert chosen in card and f"guidance none, seed {validation_seed(SELECTING.run.seed)})" in card
    second = distil(tmp_path / "short", max_train_steps=2, validation_metric=None)
    assert json.loads((shipped / "best/best.json").read_text())["step"] == 2  # the first of equals
    assert [path.name for path in checkpoint.checkpoints(shipped)] == ["checkpoint-4"]
    for name, expected in weights(second).items():
        assert torch.equal(weights(shipped)[name], expected)
    assert any(not torch.equal(weights(whole)[k], v) for k, v in weights(shipped).items())


def test_a_metric_is_that_of_samples_from_the_same_noise():
    reference = load_reference("fashion-test")
    student = student_of("unet-tiny", dkdm.load_teacher("builtin:fashion"))
    sampling = Sampling(6, 2, seed=5)
    validation = Validation("fd", sampling, (1.0, 1.0), reference=reference)
    validation.rehearse(student)
    found = validation.measure(student)
    assert found == validation.measure(student)
    assert how_in_words(validation.how) == (
        "6 samples, DDIM, 2 steps, guidance none, seed 5, against fashion-test, by fashion-16"
    )
    x = draw(student, student.conditioning.in_turns(6), sampling).clamp(-1, 1)
    features = reference.network(x).features.double()
    mean, covariance = features.mean(0), features.T.cov()
    real = reference.statistics
    expected = frechet_distance(replace(real, mean=mean, covariance=covariance), real)
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_average_gap_is_that_of_the_levels():
    teacher, student = denoiser(), denoiser(seed=1)
    perfect = Validation("gap", Sampling(4, 2, seed=0), (1.0, 1.0), teacher)
    assert perfect.measure(teacher) == pytest.approx(0, abs=1e-12)
    assert perfect.measure(student) > 0.01


def test_the_distance_to_the_teacher_is_that_of_samples_from_other_noise():
    teacher, student = denoiser(), denoiser(seed=1)
    validation = Validation("teacher_distance", Sampling(5, 2, seed=0), (1.0, 1.0), teacher)
    cond = student.conditioning.in_turns(5)
    x = draw(student, cond, Sampling(5, 2, seed=0)).flatten(1).double()
    y = draw(teacher, cond, Sampling(5, 2, derived_seed(0, "teacher"))).flatten(1).double()
    apart, own, teachers = (torch.cdist(a, b) for a, b in ((x, y), (x, x), (y, y)))
    expected = 2 * apart.mean() - own.sum() / 20 - teachers.sum() / 20
    assert validation.measure(student) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--validation-metric", "fdd"], "fdd is no metric: give one of gap, "),
        (["--validation-metric", "variance_ratio_mean"], "is neither better high nor low"),
        (["--validation-metric", "gap", "--validation-steps", "0"], "is never measured"),
        (["--validation-metric", "lpips"], "lpips is measured by dkdm evaluate only"),
        (["--ship-best"], "--ship-best: give the metric that chooses"),
        (["--validation-samples", "1"], "--validation-samples 1: give a whole number"),
    ],
)
def test_a_wrong_choice_is_refused_before_work(tmp_path, capsys, given, message):
    command = ["distill", "--output-dir", str(tmp_path / "run"), "--teacher", "no/such", *given]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_a_run_cannot_measure_is_refused_before_work(tmp_path):
    with pytest.raises(UsageError, match="no reference to measure it against; give"):
        distil(tmp_path / "run", validation_metric="fd")
    with pytest.raises(UsageError, match="this run has no teacher"):
        Validation("gap", Sampling(2, 2, 0), (1.0, 1.0))
    reference, unconditional = load_reference("fashion-test"), denoiser(None)
    with pytest.raises(UsageError, match="fid cannot be measured against fashion-test"):
        Validation("fid", Sampling(2, 2, 0), (1.0, 1.0), reference=reference)
    with pytest.raises(UsageError, match="--validation-samples 5 is too few for precision"):
        Validation("precision", Sampling(5, 2, 0), (1.0, 1.0), reference=reference)
    accuracy = Validation("class_accuracy", Sampling(2, 2, 0), (1.0, 1.0), reference=reference)
    with pytest.raises(UsageError, match="needs a model that draws classes"):
        accuracy.rehearse(replace(unconditional, sample_shape=(1, 16, 16)))
    assert not (tmp_path / "run").exists()


def test_only_what_is_measured_alike_is_compared(tmp_path, capsys):
    def write(folder, *_):
        (folder / "weights").touch()

    first = Selection(tmp_path, "higher", {"metric": "is"}, write)
    first.offer(1, float("nan"), None)
    assert first.best is None
    for step, value in enumerate((2.0, 3.0, 2.5, float("nan"))):
        first.offer(step, value, None)
    assert first.best == (1, 3.0)
    again = Selection(tmp_path, "higher", {"metric": "is"}, write)
    again.load_state_dict(first.state_dict())
    assert again.best == (1, 3.0)
    other = Selection(tmp_path, "lower", {"metric": "gap"}, write)
    other.load_state_dict(first.state_dict())
    assert other.best is None
    assert "chosen by another measurement; the next validation" in capsys.readouterr().err
    more = {"metric": "is", "network": "fashion-16"}  # of which the folder says nothing
    later = Selection(tmp_path, "higher", more, write)
    later.load_state_dict(first.state_dict())
    assert later.best == (1, 3.0)
    (tmp_path / "best" / "weights").write_text("damaged")
    again.load_state_dict(first.state_dict())
    assert "weights is damaged" in capsys.readouterr().err


def test_the_former_best_survives_a_kill_while_it_is_replaced(tmp_path, monkeypatch):
    def write(folder, model, former):
        last = former and (former / "weights").read_text()
        (folder / "weights").write_text(f"{model} after {last}")

    found = Selection(tmp_path, "lower", {"metric": "gap"}, write)
    found.offer(1, 3.0, "first")
    rename = Path.rename

    def killed(self, target):
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        found.offer(2, 1.0, "second")
    monkeypatch.undo()
    again = Selection(tmp_path, "lower", {"metric": "gap"}, write)
    again.load_state_dict({"step": 1, "value": 3.0})
    assert again.best == (1, 3.0)
    again.offer(2, 1.0, "second")
    assert (tmp_path / "best" / "weights").read_text() == "second after first after None"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_the_best_is_described_and_measured_beside_its_teacher(whole):
    best = json.loads((whole / "best/best.json").read_text())
    card = (whole / "best" / "README.md").read_text()
    assert "# run/best" in card and f"of step {best['step']}, EMA" in card
    folders.verify_folder(whole / "best")
    run = run_of(whole / "best")
    assert run == run_of(whole) == run_of(whole / "checkpoint-4") and run.output_dir == whole
    assert weights_of(whole / "best", run).startswith(f"of step {best['step']}, EMA")
    assert run_of(whole / "unet") is None
    started, best = read_checkpoint(str(whole / "best")), weights(whole / "best")
    assert started.keys() == best.keys()
    assert all(torch.equal(started[key], best[key]) for key in best)


def test_components_of_the_former_best_are_linked(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights").write_text("many")
    link_folder(tmp_path / "vae", tmp_path / "best" / "vae")
    assert (tmp_path / "best/vae/weights").samefile(tmp_path / "vae/weights")


def test_options_name_each_other():
    with pytest.raises(UsageError, match="validation_metric"):
        TrainConfig(metric_for_best_model="fd")
    assert EvaluationOptions(validation_metric="gap", ship_best=True).ship_best


def test_the_best_is_compared_as_weights_of_its_run(whole, monkeypatch):
    monkeypatch.setattr("dkdm.runs.compare.evaluations_per_second", lambda *_: 1.0)
    best = json.loads((whole / "best/best.json").read_text())
    found = entry_of_model(str(whole / "best"), draws=False)
    assert found.facts["weights"].startswith(f"of step {best['step']}, EMA")
    assert "the best by gap" in found.facts["weights"]
