"""The check of a student finds what is spoilt on purpose, and nothing in sound networks."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import own_networks
from dkdm.checks.findings import print_findings
from dkdm.checks.student import LOOKS, check_student
from dkdm.cli import main
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.errors import UsageError
from dkdm.models import load_teacher, with_texts
from dkdm.models.custom_network import awakened
from dkdm.runs.models import student_warnings
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import student_of
from factories import denoiser

PLACE = r"tests/own_networks\.py:\d+"


# All but the slow looks, which do not depend on what the tests here spoil.
QUICK = [name for name in LOOKS if name not in ("torch.compile", "torch.export", "speed")]


def look(student, teacher=None, only=QUICK):
    return check_student(student, teacher or denoiser(), only=only)


def troubles(checkup):
    return {each.name: each for each in checkup.findings if each.status != "ok"}


@pytest.fixture(scope="module")
def sound():
    return look("own_networks:make", only=None)


def test_nothing_is_found_in_a_sound_network(sound):
    assert troubles(sound) == {}
    assert sound.passed
    names = [each.name for each in sound.findings]
    assert names == [
        *("network", "shapes", "null condition", "uses x", "uses t", "uses class_labels"),
        *("samples", "gradients", "learns", "bfloat16 weights", "autocast", "device"),
        "checkpointing",
        *("reload", "shipping", "torch.compile", "torch.export", "speed"),
    ]


# Name in own_networks, finding, status, what it says.
FLAWS = [
    ("ReturnsList", "forward", "problem", "the network returned list: return a tensor"),
    (
        "WrongChannels",
        "shapes",
        "problem",
        r"\(3, 3, 8, 8\) for 3 .* instead of \(3, 1, 8, 8\)",
    ),
    ("NotFinite", "shapes", "problem", "not finite for 3 random samples"),
    ("Lazy", "factory", "problem", r"returned lazy layers \(time\.weight\)"),
    ("LogOfTime", "shapes", "problem", r"not finite for 2 random samples at t = 0, 49"),
    ("ChangesItsInput", "inputs", "problem", "changes its x in place"),
    ("OnTheCpu", "device", "warning", rf"makes a tensor on the CPU \({PLACE}\)"),
    ("PlainList", "plain modules", "problem", "neither trained, saved nor moved: more"),
    ("WeightNormed", "copy", "problem", "support the deepcopy protocol"),
    ("DropsOutAlways", "deterministic", "warning", "differ in evaluation mode"),
    ("NoLabels", "forward", "problem", "unexpected keyword argument 'class_labels'"),
    ("Raises", "forward", "problem", rf"channels.* \({PLACE}, in Raises\)"),
    ("IgnoresX", "uses x", "problem", "does not depend on x"),
    ("IgnoresTime", "uses t", "problem", "does not depend on t"),
    ("IgnoresClass", "uses class_labels", "warning", "does not depend on class_labels"),
    ("FirstTimeForAll", "uses t", "problem", "depends on the t of other samples"),
    ("FirstClassForAll", "uses class_labels", "problem", "depends on the class_labels of other"),
    ("MixesSamples", "uses x", "problem", "depends on the x of other samples"),
    ("NoNullClass", "null condition", "problem", "IndexError"),
    ("Unused", "gradients", "warning", r"unused: spare\.weight, spare\.bias"),
    ("NoEffect", "gradients", "warning", "without effect on the output: cut_off"),
    ("BatchNormed", "samples", "warning", "influence one another in training through BatchNorm: n"),
    ("Shared", "shared weights", "warning", r"time\.weight = again\.weight"),
    ("HiddenState", "reload", "problem", "not in state_dict: rates"),
    ("UnsavedBuffer", "reload", "problem", "not in state_dict: rates"),
    ("OtherEachTime", "reload", "problem", r"another network each time.*missing \(layer_\d"),
    ("RandomInEvaluation", "deterministic", "warning", "differ in evaluation mode"),
    ("Float32Only", "bfloat16 weights", "warning", rf"RuntimeError.* \({PLACE}"),
    ("Saturated", "learns", "problem", "the loss on one batch stays at"),
    ("raising_inside", "factory", "problem", rf"raised ValueError.* \({PLACE}\)"),
]

# The look that reports a finding of another name; itself otherwise.
LOOK_OF = {
    **dict.fromkeys(("uses x", "uses t", "uses class_labels", "deterministic"), "depends"),
    "bfloat16 weights": "bfloat16",
}
# Flaws for which all looks are taken: beside the finding itself there may be only these.
BESIDE = {
    "IgnoresTime": {"gradients"},
    "IgnoresClass": set(),
    "FirstTimeForAll": {"samples"},
    "Unused": set(),
    "BatchNormed": set(),
    "Float32Only": set(),
    "HiddenState": {"device", "plain tensors", "shipping"},
    "ChangesItsInput": set(),
    "OnTheCpu": set(),
    "PlainList": {"bfloat16 weights", "device", "reload", "shipping"},
    "DropsOutAlways": set(),
}


@pytest.mark.parametrize(("name", "where", "status", "what"), FLAWS, ids=[f[0] for f in FLAWS])
def test_flaws_are_found_and_not_taken_for_others(name, where, status, what):
    only = QUICK if name in BESIDE else [LOOK_OF.get(where, where)]
    checkup = look(f"own_networks:{name}", only=only)
    found = troubles(checkup)
    assert where in found, checkup.findings
    assert found[where].status == status
    assert re.search(what, found[where].what), found[where]
    assert found[where].remedy
    assert set(found) <= {where, *BESIDE.get(name, found)}
    assert checkup.passed == all(each.status != "problem" for each in found.values())
    assert (checkup.failure is not None) == (where in ("forward", "factory", "copy"))


def test_looks_are_chosen_by_name():
    found = look("own_networks:make", only=("shipping", "reload"))
    assert [each.name for each in found.findings] == ["network", "shapes", "reload", "shipping"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("IgnoresTime", "warning: uses t: the output does not depend on t; embed t and add it"),
        ("IgnoresClass", "warning: uses class_labels: the output does not depend on class_labels"),
        ("Unused", "warning: gradients: unused: spare.weight, spare.bias; remove them"),
        ("BatchNormed", "warning: samples: influence one another in training through BatchNorm"),
    ],
)
def test_a_run_warns_of_what_is_odd_and_is_not_changed_by_looking(name, said):
    teacher = denoiser()
    student, state = student_of(f"own_networks:{name}", teacher), torch.get_rng_state()
    weights = {key: value.clone() for key, value in student.network.state_dict().items()}
    assert any(line.startswith(said) for line in student_warnings(student, teacher))
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in student.network.state_dict().items():
        assert torch.equal(value, weights[key])


def test_nothing_is_said_of_sound_networks_and_of_those_that_are_no_users_own():
    teacher = denoiser()
    own = [f"own_networks:{name}" for name in ("make", "DropsOut", "SpectrallyNormed")]
    for name in (*own, "dit-tiny"):
        assert student_warnings(student_of(name, teacher), teacher) == []


@pytest.mark.parametrize("name", ["SpectrallyNormed", "DropsOut"])
def test_nothing_is_found_in_unusual_networks_that_work(name):
    checkup = look(f"own_networks:{name}")
    assert troubles(checkup) == {}
    assert checkup.passed


def test_what_a_gpu_alone_can_tell_is_left_to_it():
    device = look("own_networks:ThroughNumpy", only=["device"]).findings[-1]
    assert device.status == "ok"
    assert "could not be checked" in device.what


def test_another_process_and_prediction_of_the_student():
    checkup = check_student("own_networks:make", denoiser(), process="flow", only=QUICK)
    assert troubles(checkup) == {}
    with pytest.raises(UsageError, match="--student-prediction epsilon: FlowMatch"):
        check_student("own_networks:make", denoiser(), prediction="epsilon", process="flow")


def test_a_module_that_cannot_be_imported_is_told_where_it_is_looked_for():
    [finding] = look("no_such_module:make").findings
    assert finding.status == "problem"
    assert "into the current folder, or install them" in finding.remedy
    [finding] = look("own_networks:raising_inside").findings
    assert "make(sample_shape, out_channels, conditioning)" in finding.remedy


def test_python_control_flow_is_found_and_placed():
    found = troubles(look("own_networks:Branches", only=("torch.compile", "torch.export")))
    assert set(found) == {"torch.compile", "torch.export"}
    assert "with graph breaks, 1: " in found["torch.compile"].what
    assert "Python code decides by the value of a tensor" in found["torch.export"].what
    source = Path(own_networks.__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(source) if "t.max() > 5" in text)
    assert f"own_networks.py:{line}, in Branches" in found["torch.compile"].what
    assert f"own_networks.py:{line} `" in found["torch.export"].what


def test_an_object_is_checked_and_left_as_it_was():
    network = own_networks.Small(1, 1, 4)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    checkup = look(network)
    assert checkup.passed
    assert troubles(checkup)["shipping"].what.startswith("Small was given as an object")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_a_network_that_starts_at_zero_is_not_taken_for_a_constant():
    """A transformer of diffusers with all gates and its last layer at zero."""
    teacher = denoiser()
    network = student_of("dit-tiny", teacher).network
    for name, weight in network.named_parameters():
        if "proj_out" in name or ".norm1.linear" in name:
            nn.init.zeros_(weight)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0])
    label = torch.tensor([0, 1])
    assert not network.eval()(x, t, label).sample.any()
    assert troubles(look(network, teacher)) == {}


def test_waking_leaves_the_original_alone():
    network = nn.Linear(2, 2)
    nn.init.zeros_(network.weight)
    copied = awakened(network)
    assert copied.weight.all() and not network.weight.any()


def test_presets_have_no_troubles():
    assert troubles(look("unet-tiny", denoiser(None))) == {}


def test_learned_variance_asks_for_twice_the_channels():
    scheduler = {"variance_type": "learned_range", "prediction_type": "epsilon"}
    teacher = denoiser(3, scheduler, out_channels=2)
    assert troubles(look("own_networks:make", teacher)) == {}
    found = troubles(look("own_networks:OneChannel", teacher, only=()))
    assert "instead of (3, 2, 8, 8)" in found["shapes"].what


def test_sounds_and_videos():
    for shape in ((2, 16), (1, 4, 8, 8)):
        like = replace(denoiser(), sample_shape=shape, network=lambda x, t, class_labels: 0.5 * x)
        assert troubles(look("own_networks:pointwise", like)) == {}
        assert like.conditioning == ClassLabels(3, null_class=3)


@pytest.fixture
def told_by_text(tmp_path, monkeypatch):
    """A text teacher of one prompt."""
    import pipelines

    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    pipelines.stable_diffusion_v().save_pretrained(tmp_path / "teacher")
    return with_texts(load_teacher(str(tmp_path / "teacher")), "a red cat")


def test_text_is_shipped_reloaded_and_missed_where_it_is_ignored(told_by_text, tmp_path):
    assert troubles(look("own_networks:reader", told_by_text)) == {}
    found = troubles(look("own_networks:deaf", told_by_text, only=["depends"]))
    assert "does not depend on encoder_hidden_states" in found["uses encoder_hidden_states"].what
    student = student_of("own_networks:reader", told_by_text)
    write_pipeline(tmp_path / "run", student)
    again = with_texts(load_teacher(str(tmp_path / "run")), "a red cat")
    noise = torch.randn(1, *student.sample_shape)
    drawn = [
        model.sample(lambda _: noise, model.conditioning.in_turns(1), 2)
        for model in (student, again)
    ]
    assert torch.equal(*drawn)


def test_the_only_class_of_a_teacher_cannot_be_told_from_another():
    like = replace(denoiser(), conditioning=ClassLabels(3, classes=(1,)))
    label = look("own_networks:make", like, only=["depends"]).findings[-1]
    assert label.what == "could not be checked: class_labels has a single value"


def test_the_command(capsys):
    args = ["check-student", "--teacher", "factories:teacher", "--no-compile", "--no-export"]
    assert main([*args, "--student", "own_networks:make", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name", "status", "what", "remedy"} == set(found[0])
    assert not any(each["name"].startswith("torch.") for each in found)
    assert main([*args, "--student", "own_networks:IgnoresTime"]) == 1
    assert "does not depend on t" in capsys.readouterr().out
    assert main([*args, "--student", "own_networks:raising_inside"]) == 1
    both = capsys.readouterr()
    assert "own_networks.py:" in both.out
    assert "--debug shows the traceback" in both.err
    with pytest.raises(Exception, match="nothing more could be tried") as raised:
        main([*args, "--student", "own_networks:raising_inside", "--debug"])
    assert isinstance(raised.value.__cause__.__cause__, ValueError)


def test_findings_are_printed(sound):
    stream = io.StringIO()
    print_findings(sound.findings, Console(file=stream, width=120))
    assert "No problems found" in stream.getvalue()
