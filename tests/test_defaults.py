"""What is decided by the teacher if the options leave it open; a run goes on as it began."""

from dataclasses import replace

import pytest

from dkdm.config import DistillConfig, to_json
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.clipping import Clipping
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import beta_schedule, from_betas, rectified_flow
from dkdm.errors import UsageError
from dkdm.runs.defaults import with_defaults, with_optimizer

MIXTURE = GaussianMixture.of([[0.0, 1.0]], 0.1)
UNCLIPPED = from_betas(beta_schedule("linear", 20))
PROCESS = replace(UNCLIPPED, clipping=Clipping(1.0))


def teacher(kind="epsilon", process=PROCESS):
    return mixture_denoiser(MIXTURE, process, Parameterization(kind))


def decided(config, model=None, found=None):
    config = with_defaults(config, model or teacher(), found)
    return config.student_choice.student_prediction, config.loss.loss_weighting


def test_a_new_student_of_an_eps_teacher_predicts_v_capped():
    assert decided(DistillConfig()) == ("v_prediction", "capped")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"student_prediction": "epsilon"}, ("epsilon", "uniform")),
        ({"loss_weighting": "snr"}, ("v_prediction", "snr")),
        ({"student_init": "teacher"}, (None, "uniform")),
        ({"student_process": "flow"}, (None, "uniform")),
    ],
)
def test_what_is_given_decides(given, expected):
    assert decided(DistillConfig(**given)) == expected


@pytest.mark.parametrize(
    "model",
    [
        teacher("v_prediction"),
        teacher("flow_prediction", rectified_flow(20)),
        teacher(process=UNCLIPPED),
    ],
)
def test_other_teachers_have_students_of_their_kind(model):
    assert decided(DistillConfig(), model) == (None, "uniform")


@pytest.mark.parametrize(
    ("begun", "expected"),
    [
        ({}, (None, "uniform")),  # as earlier versions wrote it
        ({"student_prediction": "v_prediction", "loss_weighting": "capped"}, None),
        ({"student_prediction": "epsilon", "loss_weighting": "min-snr"}, None),
    ],
)
def test_a_run_goes_on_as_it_began(tmp_path, begun, expected):
    config = DistillConfig(**({"loss_weighting": "uniform"} | begun))
    (tmp_path / "config.json").write_text(to_json(config))
    found = tmp_path / "checkpoint-1"
    found.mkdir()
    expected = expected or (begun["student_prediction"], begun["loss_weighting"])
    assert decided(DistillConfig(), found=found) == expected
    started = replace(DistillConfig(), student_init=str(tmp_path))
    assert decided(started) == (expected[0], "uniform")


@pytest.mark.parametrize("part", ["checkpoint-1", "best"])
def test_a_student_that_starts_from_a_part_of_a_run_predicts_what_it_does(tmp_path, part):
    begun = DistillConfig(student_prediction="v_prediction")
    (tmp_path / "config.json").write_text(to_json(begun))
    (tmp_path / part).mkdir()
    (tmp_path / part / "best.json").write_text("{}")
    started = replace(DistillConfig(), student_init=str(tmp_path / part))
    assert decided(started) == ("v_prediction", "uniform")


def test_a_folder_called_teacher_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, prediction in (("teacher", "sample"), ("random", "epsilon")):
        (tmp_path / name / "checkpoint-1").mkdir(parents=True)
        begun = DistillConfig(student_prediction=prediction)
        (tmp_path / name / "config.json").write_text(to_json(begun))
    assert decided(DistillConfig()) == ("v_prediction", "capped")
    assert decided(DistillConfig(student_init="teacher")) == (None, "uniform")


def test_a_checkpoint_without_its_run_does_not_say_what_its_student_predicts(tmp_path):
    with pytest.raises(UsageError, match="--student-prediction epsilon or v_prediction"):
        decided(DistillConfig(), found=tmp_path / "checkpoint-1")
    given = replace(DistillConfig(), student_prediction="epsilon")
    assert decided(given, found=tmp_path / "checkpoint-1") == ("epsilon", "uniform")


def optimizer(found=None, **given):
    options = with_optimizer(DistillConfig(**given), found, new=True).optimizing
    return options.optimizer, options.learning_rate


def test_a_network_from_random_weights_learns_by_muon():
    assert optimizer() == ("muon", 0.02)
    for given in ({"student_init": "teacher"}, {"lora_rank": 4}):
        config = with_defaults(DistillConfig(**given), teacher(), None)
        assert (config.optimizing.optimizer, config.optimizing.learning_rate) == ("adamw", 1e-4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"learning_rate": 1e-3}, ("adamw", 1e-3)),
        ({"optimizer": "adamw"}, ("adamw", 1e-4)),
        ({"optimizer": "muon", "learning_rate": 0.01}, ("muon", 0.01)),
        ({"learning_rate": 0.0}, ("adamw", 0.0)),
    ],
)
def test_a_given_learning_rate_is_that_of_adamw(given, expected):
    assert optimizer(**given) == expected


@pytest.mark.parametrize(
    ("begun", "expected"),
    [
        ({"learning_rate": 1e-3}, ("adamw", 1e-3)),  # as in files from before there was a choice
        ({"optimizer": "muon", "learning_rate": 0.03}, ("muon", 0.03)),
    ],
)
def test_a_run_goes_on_with_its_optimizer(begun, expected, tmp_path):
    found = tmp_path / "checkpoint-2"
    found.mkdir()
    (tmp_path / "config.json").write_text(to_json(DistillConfig(**begun)))
    assert optimizer(found) == expected


def test_a_checkpoint_without_its_run_is_one_of_adamw(tmp_path):
    assert optimizer(tmp_path / "checkpoint-2") == ("adamw", 1e-4)


@pytest.mark.parametrize("begun", [{"learning_rate": 1e-3}, {"optimizer": "muon"}])
def test_a_run_does_not_go_on_with_another_optimizer(begun, tmp_path):
    found = tmp_path / "checkpoint-2"
    found.mkdir()
    (tmp_path / "config.json").write_text(to_json(DistillConfig(**begun)))
    before = begun.get("optimizer", "adamw")
    other = {"adamw": "muon", "muon": "adamw"}[before]
    with pytest.raises(UsageError, match=f"by a run with --optimizer {before}: go on with"):
        optimizer(found, optimizer=other)
    assert optimizer(found, optimizer=before)[0] == before
