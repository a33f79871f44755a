"""The denoising check against the exact teacher: right, and wrong in every way it should notice."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from dkdm.checks.inspection import (
    check_denoising,
    inspect_denoiser,
    print_inspection,
    readings,
)
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.clipping import Clipping
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import karras, rectified_flow
from dkdm.errors import UsageError
from dkdm.evaluation.memory import evaluation_mib, weights_mib
from dkdm.models import load_teacher
from dkdm.models.schedulers import from_scheduler_config
from factories import denoiser as untrained

STEPS = 12
DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
COSINE = from_scheduler_config({**DDPM, "beta_schedule": "squaredcos_cap_v2"})
LINEAR = from_scheduler_config(DDPM)
PROCESSES = {
    "cosine": COSINE,
    "latent": replace(LINEAR, clipping=Clipping()),
    "flow": rectified_flow(200),
    "karras": karras(200),
}
VP_TYPES = ("epsilon", "sample", "v_prediction")
READABLE = [
    *(("cosine", kind) for kind in VP_TYPES),
    *(("latent", kind) for kind in VP_TYPES),
    *(("flow", kind) for kind in ("flow_prediction", "sample")),
    *(("karras", kind) for kind in ("edm", "epsilon", "sample")),
]


def ten_points(scale=1.0, shift=0.0, std=0.15, classes=None):
    means = torch.rand(10, 1, 8, 8, dtype=torch.float64) * 1.7 - 0.85
    return GaussianMixture.of(scale * means + shift, scale * std, classes=classes)


def exact(process=COSINE, kind="v_prediction", mixture=None):
    return mixture_denoiser(mixture or ten_points(), process, Parameterization(kind))


def misread(model, kind):
    return replace(model, parameterization=Parameterization(kind))


class FedTimes(nn.Module):
    """Feeds a network times in another unit."""

    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x, time):
        return self.network(x, time * self.factor)


@pytest.mark.parametrize(("process", "kind"), READABLE)
def test_exact_model_denoises_and_gives_no_warning(process, kind):
    found = check_denoising(exact(PROCESSES[process], kind), num_steps=STEPS)
    assert found.denoises
    assert found.warnings == ()
    decisive = [level.blind_ratio for level in found.levels if level.decisive]
    assert len(decisive) >= 8
    assert max(decisive) < 1.05
    assert min(decisive) < 0.3


def pairs():
    for process, kind in READABLE:
        for other in {name for where, name in READABLE if where == process} - {kind}:
            yield process, kind, other


@pytest.mark.parametrize(("process", "kind", "other"), sorted(pairs()))
def test_wrong_prediction_type_is_noticed_and_the_right_one_named(process, kind, other):
    model = misread(exact(PROCESSES[process], kind), other)
    found = check_denoising(model, num_steps=STEPS)
    assert not found.denoises
    assert f'"prediction_type": "{kind}"' in found.warnings[0].remedy


@pytest.mark.parametrize("kind", VP_TYPES)
def test_right_type_is_named_from_images_too(kind):
    mixture = ten_points()
    images = mixture.sample(32, torch.Generator().manual_seed(0)).float()
    model = exact(COSINE, kind, mixture)
    assert check_denoising(model, num_steps=STEPS, images=images).denoises
    for other in set(VP_TYPES) - {kind}:
        found = check_denoising(misread(model, other), num_steps=STEPS, images=images)
        assert not found.denoises
        assert f'"{kind}"' in found.warnings[-1].remedy


def test_nothing_beats_the_blind_guess_on_one_gaussian():
    """There the blind guess is the exact model, so every ratio is 1 and the errors are known."""
    std = 0.5
    mixture = GaussianMixture.of([[0.1, -0.2]], std)
    images = mixture.sample(20_000, torch.Generator().manual_seed(0)).float()
    found = check_denoising(
        exact(kind="epsilon", mixture=mixture), num_steps=2, images=images, max_trials=1
    )
    for level in found.levels:
        signal = level.snr * std**2
        assert level.x_0_error == pytest.approx(1 / (1 + signal), rel=0.05)
        assert level.eps_error == pytest.approx(signal / (1 + signal), rel=0.05)
        assert level.blind_ratio == pytest.approx(1, rel=0.05)
        explained = math.sqrt(1 / (1 + signal))
        assert level.eps_std == pytest.approx(explained, rel=0.05)
        assert level.eps_correlation == pytest.approx(explained, abs=0.02)
    assert not found.denoises


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("trained", "read", "name"),
    [(COSINE, LINEAR, "squaredcos_cap_v2"), (LINEAR, COSINE, "linear")],
)
def test_wrong_schedule_is_named(kind, trained, read, name):
    model = replace(exact(trained, kind), process=read)
    found = check_denoising(model, num_steps=STEPS)
    assert not found.denoises
    assert f'"beta_schedule": "{name}"' in found.warnings[0].remedy


def test_wrong_unit_of_time_is_named():
    model = exact(LINEAR, "epsilon")
    found = check_denoising(
        replace(model, network=FedTimes(model.network, 1 / 1000)), num_steps=STEPS
    )
    assert not found.denoises
    assert "times 0 to 9.99e+05 fed to the network" in found.warnings[0].remedy


class Convolved(nn.Module):
    """A small network of random weights that sees its neighbours and the time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1)
        )

    def forward(self, x, time):
        place = time[:, None, None, None].expand(len(x), 1, *x.shape[2:]) / 50
        return self.layers(torch.cat([x, place], dim=1))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_random_weights_do_not_denoise_under_any_reading(kind):
    model = untrained(classes=None, scheduler={"prediction_type": kind})
    if kind == "epsilon":  # beside the UNet, at a tenth of its cost
        model = replace(model, network=Convolved())
    found = check_denoising(model, num_steps=10, max_trials=30)
    assert found.denoises is False
    assert "trained weights" in found.warnings[0].remedy
    assert found.cure is None


def test_other_readings_are_named_only_if_they_were_tried():
    model = replace(untrained(classes=None), network=Convolved())
    found = check_denoising(model, num_samples=2, num_steps=10, max_trials=0)
    assert found.warnings[-1].remedy.startswith("check that these are trained weights")


def test_samples_of_few_steps_say_nothing_against_a_model():
    model = untrained(classes=None, scheduler={})
    found = check_denoising(model, num_steps=9, max_trials=1)
    assert found.denoises is None and found.cure is None
    assert "9 steps are too few" in found.warnings[-1].what
    assert "It cannot be judged" in shown(inspect_denoiser(model, num_steps=2, max_trials=1))
    assert check_denoising(exact(mixture=ten_points()), num_steps=9).denoises is True


def test_clipping_that_cuts_the_samples_is_noticed():
    found = check_denoising(exact(mixture=ten_points(scale=2)), num_steps=STEPS)
    assert [each.what[:18] for each in found.warnings] == ["clipping to -1..1 "]
    assert '"clip_sample": false' in found.warnings[0].remedy


def test_data_in_0_to_1_is_noticed():
    found = check_denoising(exact(mixture=ten_points(0.45, 0.5, std=0.1)), num_steps=STEPS)
    assert found.denoises
    assert found.warnings[0].usual.startswith("-1..1")


def test_unscaled_latents_are_noticed():
    model = exact(PROCESSES["latent"], mixture=ten_points(scale=10))
    found = check_denoising(model, num_steps=STEPS)
    assert found.denoises
    assert "scaling factor" in found.warnings[0].remedy


def test_images_in_another_range_are_noticed():
    mixture = ten_points()
    pixels = 127.5 * (mixture.sample(32, torch.Generator().manual_seed(0)).float() + 1)
    found = check_denoising(exact(mixture=mixture), num_steps=STEPS, images=pixels, max_trials=2)
    assert found.warnings[0].what.startswith("the given ones have mean")


def test_samples_that_are_not_finite_end_the_check():
    model = exact()
    broken = replace(model, network=lambda x, time: model.network(x, time) * math.nan)
    found = inspect_denoiser(broken, num_samples=4, num_steps=10, max_trials=20)
    assert not found.check.denoises
    assert found.check.levels == ()
    assert "not finite" in shown(found)
    assert found.as_dict()["check"]["samples"]["mean"] is None
    json.dumps(found.as_dict(), allow_nan=False)


def test_samples_that_are_all_alike_do_not_pass():
    model = exact(kind="sample")
    constant = replace(model, network=lambda x, time: 0 * x + 0.5 + 0 * time[0])
    found = check_denoising(constant, num_steps=10, max_trials=30)
    assert not found.denoises
    assert "all alike" in found.warnings[0].what


def test_same_seed_same_check_and_the_model_is_left_as_it_was():
    model = exact()
    model.network.train()
    found = check_denoising(model, num_steps=STEPS, seed=3)
    assert found == check_denoising(model, num_steps=STEPS, seed=3)
    assert found != check_denoising(model, num_steps=STEPS, seed=4)
    assert model.network.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "at least 2 samples"),
        ({"num_steps": 0}, "1 step"),
        ({"images": torch.zeros(4, 1, 9, 9)}, "images of shape"),
        ({"images": torch.zeros(1, 1, 8, 8)}, "images of shape"),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        check_denoising(exact(), **options)


def shown(inspection):
    stream = io.StringIO()
    print_inspection(inspection, Console(file=stream, width=100))
    return stream.getvalue()


def test_inspection_of_a_network_in_words_and_json():
    model = untrained()
    model.name = "runs/[a]"
    found = inspect_denoiser(model, num_samples=4, num_steps=2, max_trials=2)
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["parameters"] == sum(p.numel() for p in model.network.parameters())
    assert values["process"]["kind"] == "variance preserving"
    assert values["process"]["beta_schedule"] == "squaredcos_cap_v2"
    assert values["conditioning"] == {
        "kind": "class labels",
        "num_classes": 3,
        "null_class": 3,
        "class_names": None,
    }
    text = shown(found)
    assert "runs/[a]" in text
    for words in ("UNet2DModel", "T = 50", "3 class labels, null class 3", "to -1..1", "MiB"):
        assert words in text, words
    assert "It cannot be judged" in text


@pytest.mark.parametrize(
    ("process", "kind", "words"),
    [
        ("flow", "flow_prediction", "flow, T = 200"),
        ("karras", "edm", "variance exploding, T = 200"),
        ("latent", "epsilon", "variance preserving, T = 1000"),
    ],
)
def test_kinds_of_process_are_told_apart(process, kind, words):
    found = inspect_denoiser(exact(PROCESSES[process], kind), num_steps=STEPS)
    text = shown(found)
    assert words in text
    assert "It denoises." in text
    assert found.facts["conditioning"]["kind"] == "none"


def test_classes_without_a_null_class_and_dynamic_thresholding_are_said():
    thresholding = from_scheduler_config({**DDPM, "thresholding": True})
    model = exact(thresholding, mixture=ten_points(classes=[0] * 5 + [1] * 5))
    without = replace(model, conditioning=replace(model.conditioning, null_class=None))
    text = shown(inspect_denoiser(without, num_steps=2, max_trials=2))
    assert "no null class" in text
    assert "to its quantile 0.995" in text


class Widening(nn.Module):
    """Holds `count` copies of x at once, then as many again after letting them go."""

    def __init__(self, count):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2**18))
        self.count = count

    def forward(self, x, time):
        del time
        for _ in range(2):
            copies = [x + i for i in range(self.count)]
            total = copies[0] * 1
            del copies
        return total


@pytest.mark.parametrize("count", [10, 20])
def test_memory_counts_what_is_alive_at_once(count):
    model = Denoiser(Widening(count), LINEAR, Parameterization("epsilon"), (1, 64, 64))
    assert weights_mib(model) == 1
    one = 8 * 64 * 64 * 4 / 2**20
    assert count * one <= evaluation_mib(model, 8) < (count + 6) * one


def test_a_plain_function_has_no_weights():
    model = Denoiser(
        lambda x, time: x + 0 * time[0], LINEAR, Parameterization("epsilon"), (4,), name="plain"
    )
    assert weights_mib(model) == 0
    found = inspect_denoiser(model, num_steps=2, max_trials=2)
    names = ("parameters", "network", "dtype")
    assert [found.facts[name] for name in names] == [0, "<lambda>", None]


def test_trained_teacher_passes_as_it_was_trained_only(monkeypatch):
    monkeypatch.setattr(readings, "TIMES", readings.TIMES[:2])  # all of them: test_readings
    teacher = load_teacher("builtin:fashion")
    found = check_denoising(teacher, num_samples=4, num_steps=10)
    assert found.denoises
    assert found.warnings == ()
    wrong = check_denoising(misread(teacher, "epsilon"), num_samples=2, num_steps=10)
    assert not wrong.denoises
    assert f'"{teacher.parameterization.prediction}"' in wrong.warnings[0].remedy
