"""Options that change nothing are named, and those that are named change nothing."""

from dataclasses import replace

import pytest
import torch

import dkdm
from dkdm.config import DistillConfig, TrainConfig
from dkdm.runs.arms import ARMS, make_source, prepare_source
from dkdm.runs.recipes import RECIPES
from dkdm.runs.without_effect import without_effect
from factories import denoiser
from small_runs import SMALL

OTHER = {
    "pool_size": 16,
    "rho": 0.9,
    "fill": "none",
    "fill_steps": 1,
    "stride": "7",
    "eta": 0.0,
    "random_conditioning": 1.0,
    "shards": 3,
    "pool_dtype": "float16",
    "pool_device": "cpu",
}


def batches(tmp_path, **changes):
    """States and conditions of three batches."""
    config = replace(SMALL, output_dir=tmp_path, synthetic_samples=None, **changes)
    if config.pool.source == "synthetic":
        config = replace(config, synthetic_samples=9, synthetic_steps=2)
    teacher = denoiser()
    source = make_source(teacher, teacher, config, torch.device("cpu"))
    prepare_source(source, teacher, config)
    seen = []
    for _ in range(3):
        batch = source.draw(8)
        seen += [batch.x.float(), *batch.cond.values()]
        source.advance(batch, source.target(batch))
    return seen


@pytest.mark.parametrize("source", ["iterative", "shuffled", "synthetic"])
def test_what_is_called_idle_changes_no_batch(source, tmp_path):
    given = {"pool_size": None} if source == "shuffled" else {}
    idle = {n: OTHER[n] for n in ARMS[source].ignores if n in OTHER}
    changed = {**given, **idle}
    plain = batches(tmp_path / "plain", source=source, **given)
    same = batches(tmp_path / "other", source=source, **changed)
    assert idle and all(map(torch.equal, plain, same))
    others = [name for name in OTHER if name not in (*ARMS[source].ignores, "pool_device")]
    for name in others if source != "synthetic" else ():
        seen = batches(tmp_path / name, source=source, **{**given, name: OTHER[name]})
        assert not all(map(torch.equal, plain, seen)), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, []),
        ({"source": "images", "images": "x", "stride": "5"}, ["--stride changes", "this --source"]),
        ({"source": "images", "images": "x", "fill": "none", "rho": 1}, ["--rho and --fill cha"]),
        ({"source": "synthetic", "eta": 0, "shards": 2}, ["--eta and --shards change nothing"]),
        ({"source": "synthetic", "pool_size": 64}, []),  # a set costs what the pool would
        (
            {"source": "synthetic", "synthetic_samples": 9, "fill_steps": 3},
            ["--fill-steps changes"],
        ),
        ({"source": "iterative", "pool_size": 64}, ["--pool-size changes nothing"]),
        ({"pool_size": 64, "rho": 0.1}, ["--rho changes nothing with --pool-size"]),
        ({"fill": "none", "fill_steps": 3}, ["--fill-steps changes nothing with this --fill"]),
        ({"images_share": 0.5, "mixed_share": 0.2}, ["--mixed-share and --images-share"]),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 9}, ["--lr-warmup-steps changes"]),
        ({"use_ema": False, "ema_decay": 0.9}, ["--ema-decay changes nothing with --no-use-ema"]),
        ({"loss_weighting": "uniform", "snr_gamma": 1}, ["--snr-gamma changes nothing"]),
        ({"loss_weighting": "capped", "snr_gamma": 1}, []),
        ({"few_step_heads": 8}, ["--few-step-heads changes nothing with this --objective"]),
        ({"few_step_heads": 8, "objective": "few-step"}, []),
        ({"few_step_heads": 8, "objective": "consistency"}, ["--few-step-heads changes"]),
        ({"validation_samples": 9}, ["--validation-samples changes nothing with no --valid"]),
    ],
)
def test_options_without_effect_are_named_with_the_reason(given, said):
    notes = without_effect(DistillConfig(**given))
    assert len(notes) == bool(said)
    for words in said:
        assert words in notes[0] and notes[0].startswith("note: --")


def test_a_training_on_images_names_its_own():
    assert without_effect(TrainConfig()) == []
    assert len(without_effect(TrainConfig(use_ema=False, ema_decay=0.5))) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_has_an_option_without_effect(name):
    kind, settings = RECIPES[name]
    assert without_effect(kind(**settings)) == []


def test_a_run_says_it_once_before_it_learns(tmp_path, capsys):
    config = replace(SMALL, output_dir=tmp_path / "run", evaluation_samples=0, images_share=0.5)
    few = {"objective": "few-step", "student_steps": "1:2", "few_step_heads": 2, "pair_decay": 0.5}
    dkdm.distill(denoiser(), "dit-tiny", replace(config, few_step_pool=8, **few))
    printed = capsys.readouterr().err
    for name in ("images-share", "pair-decay"):
        assert printed.count(f"--{name} changes nothing") == 1
    assert printed.index("changes nothing") < printed.index("loss")
