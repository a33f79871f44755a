"""The recipes of the paper, and `--smoke`, which tries any recipe in seconds."""

from dataclasses import replace

import pytest
import torch

from dkdm.cli import main
from dkdm.config import DistillConfig, TrainConfig
from dkdm.core.sources.budget import newly_drawn
from dkdm.errors import DkdmError, UsageError
from dkdm.models import LoadOptions, load_teacher
from dkdm.networks.adm import AdmUNet
from dkdm.reading.files import cache_dir
from dkdm.runs.paper_recipes import PAPER_RECIPES, TO_BE_GIVEN
from dkdm.runs.recipes import RECIPES, check_given, recipe
from dkdm.runs.smoke import shrunk, smoke
from dkdm.runs.smoke_stand_ins import STAND_INS, stand_in_teacher
from dkdm.runs.without_effect import without_effect
from pipelines import stable_diffusion_v

NEEDS_TEXT = {"fashion-text", "fashion-text-teacher"}
QUICK = {"fashion-flow", "fashion-latent-teacher", "fashion-text", "fashion-text-teacher"}


def config_of(name):
    return recipe(name, RECIPES[name][0])


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES],
)
def test_a_smoke_run_of_every_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    assert smoke(config_of(name)).startswith("the pipeline holds: ")
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    prompts = cache_dir("prompts")
    assert not prompts.exists() or list(prompts.iterdir()) == []


@pytest.mark.parametrize("name", sorted(NEEDS_TEXT))
def test_text_encoders_that_stand_in_need_transformers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dkdm.runs.smoke_stand_ins.find_spec", lambda _: None)
    with pytest.raises(DkdmError, match=r"need transformers: pip install 'dkdm\[text\]'"):
        smoke(config_of(name))


def test_nothing_stands_in_for_a_run_of_yours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="nothing stands in for it: make it first"):
        smoke(replace(config_of("demo"), teacher="runs/mine"))


def test_a_smoke_run_draws_with_your_text_teacher(tmp_path):
    stable_diffusion_v().save_pretrained(tmp_path / "sd")
    asked = {"teacher": str(tmp_path / "sd"), "prompts": "a red cat", "student": "bk-tiny"}
    assert smoke(DistillConfig(**asked)).startswith("the pipeline holds: ")


def test_a_smoke_run_keeps_the_student_and_is_small(tmp_path):
    config = config_of("paper-cifar10")
    small, stood_in = shrunk(config, tmp_path)
    assert stood_in == ["(CIFAR-10 teacher)"]
    assert small.student_choice == config.student_choice
    assert small.loss == config.loss
    assert newly_drawn(small.pool, small.training) == 4
    assert not small.hub.push_to_hub


@pytest.mark.parametrize("name", sorted({*RECIPES} - NEEDS_TEXT))
def test_a_smoke_run_notes_no_option_that_nobody_gave(name, tmp_path):
    config = config_of(name)
    assert {*without_effect(shrunk(config, tmp_path)[0])} <= {*without_effect(config)}


def test_a_stand_in_is_in_evaluation_mode_as_a_model_that_is_read(tmp_path):
    assert not stand_in_teacher("(CIFAR-10 teacher)", tmp_path).network.training


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_what_only_the_user_has_is_asked_for(name, capsys):
    kind, settings = PAPER_RECIPES[name]
    command = "train" if kind is TrainConfig else "distill"
    needed = [value for value in map(str, settings.values()) if value in TO_BE_GIVEN]
    if not needed:
        check_given(config_of(name))
        return
    assert main([command, "--recipe", name]) == 2
    said = capsys.readouterr().err
    assert f"this recipe needs {TO_BE_GIVEN[needed[0]]}" in said
    key = "images" if command == "train" else "teacher"
    check_given(replace(config_of(name), **{key: "elsewhere"}))


def test_every_missing_teacher_has_a_stand_in():
    teachers = {
        settings["teacher"]
        for kind, settings in PAPER_RECIPES.values()
        if kind is DistillConfig
    }  # fmt: skip
    assert teachers <= set(STAND_INS)


@pytest.mark.parametrize(
    ("name", "size", "widths", "attention", "width"),
    [
        ("paper-cifar10", 32, (1, 2, 2, 2), (2, 4), 128),
        pytest.param("paper-celeba64", 64, (1, 2, 3, 4), (2, 4, 8), 192, marks=pytest.mark.slow),
    ],
)
def test_flags_of_the_papers_teachers(name, size, widths, attention, width, tmp_path):
    network = AdmUNet(
        sample_size=size,
        out_channels=6,
        model_channels=32,
        num_res_blocks=3,
        channel_mult=widths,
        attention_resolutions=attention,
        num_head_channels=32,
        resblock_updown=True,
        use_scale_shift_norm=True,
        use_new_attention_order=True,
    )
    torch.save(network.state_dict(), tmp_path / "model.pt")
    flags = PAPER_RECIPES[name][1]["teacher_flags"]
    flags = flags.replace(f"--num_channels {width}", "--num_channels 32")
    flags = flags.replace("--num_head_channels 64", "--num_head_channels 32")
    teacher = load_teacher(tmp_path / "model.pt", options=LoadOptions(flags=flags))
    assert teacher.sample_shape == (3, size, size)
    assert teacher.process.num_levels == 1000
    assert teacher.parameterization.prediction == "epsilon"
    assert teacher.parameterization.variance == "learned_range"
    x, t = torch.randn(1, 3, size, size), torch.tensor([500])
    with torch.no_grad():
        found = teacher.call(teacher.network, x, t.float(), {})
        torch.testing.assert_close(found, network.eval()(x, t.float()))
