"""Options: grouped in the code, flat for users, each with a range, refused by the name it has."""

import copy
import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Annotated

import pytest

from dkdm import UsageError
from dkdm.cli import COMMANDS, main
from dkdm.config import (
    DistillConfig,
    ExportedModel,
    GivenModel,
    PoolOptions,
    RunOptions,
    TeacherOptions,
    TrainConfig,
    from_mapping,
    read_config,
    to_json,
)
from dkdm.errors import DkdmError
from dkdm.reading.command_line import parse
from dkdm.reading.options import as_typed, flag, helps, hints, places
from dkdm.reading.values import Range
from dkdm.runs.recipes import RECIPES, recipe, recipes

KINDS = [kind for kind, _ in COMMANDS.values()]
OPTIONS = [
    (kind, option, hints(hints(kind)[group])[field])
    for kind in KINDS
    for option, (group, field) in places(kind).items()
]


def parts(hint):
    """A type and the types in it, down to the Annotated ones."""
    yield hint
    if typing.get_origin(hint) is not Annotated:
        for inner in typing.get_args(hint):
            yield from parts(inner)


def bounds(hint):
    return next((typing.get_args(part)[1] for part in parts(hint) if ranged(part)), None)


def ranged(hint):
    return typing.get_origin(hint) is Annotated and isinstance(typing.get_args(hint)[1], Range)


def needed(kind):
    return {"run": "runs/x"} if "run" in places(kind) and "seed" not in places(kind) else {}


def given(hint, value):
    """The value, as often as a tuple option needs it."""
    if typing.get_origin(hint) is not tuple and not any(
        typing.get_origin(part) is tuple for part in parts(hint)
    ):
        return value
    many = next(typing.get_args(p) for p in parts(hint) if typing.get_origin(p) is tuple)
    return (value,) * (1 if many[-1] is ... else len(many))


def test_every_number_of_every_command_has_a_range():
    numbers = [(kind.command, option) for kind, option, hint in OPTIONS if bounds(hint)]
    assert len(numbers) > 60
    assert not [
        (kind.command, option) for kind, option, hint in OPTIONS if {int, float} & set(parts(hint))
    ]


RANGED = [(kind, option, hint) for kind, option, hint in OPTIONS if bounds(hint)]


@pytest.mark.parametrize(
    ("kind", "option", "hint"), RANGED, ids=lambda v: getattr(v, "command", str(v)[:20])
)
def test_numbers_out_of_their_range_are_refused_by_their_option(kind, option, hint):
    found = bounds(hint)
    outside = [found.low if found.above else found.low - 1, found.high if found.below else None]
    outside[1] = outside[1] or found.high * 2 + 1
    for value in [*outside, float("nan"), float("inf"), -float("inf"), 1e309, True, "1"]:
        with pytest.raises(UsageError, match=f"^{flag(option)} .*: give ") as refused:
            kind(**needed(kind), **{option: given(hint, value)})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-train-steps", "-3"), "--max-train-steps -3: give a whole number of 1 or more"),
        (("--ema-decay", "1.5"), "--ema-decay 1.5: give a number of 0 or more and below 1"),
        (("--max-grad-norm", "-1"), "--max-grad-norm -1.0: give a number above 0"),
        (("--weight-decay", "1e30"), "--weight-decay 1e+30: give a number from 0 to 10"),
        (("--rho", "1e309"), "--rho inf: give a number above 0 and at most 1,000"),
        (("--shards", "-1"), "--shards -1: give a whole number from 1 to 1,048,576"),
        (("--learning-rate", "nan"), "--learning-rate nan: give a number from 0 to 1,000"),
        (("--learning-rate", "-1"), "--learning-rate -1.0: give a number from 0 to 1,000"),
        (("--train-batch-size", "0"), "--train-batch-size 0: give a whole number of 1 or more"),
        (("--teacher-size", "0", "8"), "--teacher-size (0, 8): give a list, each a whole number"),
        (("--classes", "-1"), "--classes (-1,): give a list, each a whole number of 0 or more"),
        (("--guidance-scale", "nan"), "--guidance-scale 'nan': give a number"),
        (("--guidance-scale", "8:2"), "--guidance-scale '8:2': give a number"),
        (("--guidance-interval", "0.7:0.3"), "--guidance-interval '0.7:0.3': give LOW:HIGH"),
        (("--stride", "0"), "--stride '0': give a number of levels or random:MEAN"),
        (("--seed", "-1"), "--seed -1: give a whole number from 0"),
        (("--license", "My Own"), "--license 'My Own': give the hub's name of a licence"),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_loaded(words, said, tmp_path, capsys):
    args = ["distill", "--teacher", "no/such/model", "--output-dir", str(tmp_path / "run"), *words]
    assert main(args) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", sorted(places(DistillConfig)))
def test_every_option_is_written_read_and_replaced_under_its_own_name(option):
    config = DistillConfig()
    other = {
        str: "none" if option == "guidance_interval" else "2",
        bool: not getattr(config, option),
    }
    value = other.get(type(getattr(config, option)))
    if value is None or option in ("source", "fill", "lr_scheduler"):
        value = getattr(config, option)
    try:
        changed = dataclasses.replace(config, **{option: value})
    except UsageError:
        changed = config  # a word that is not one of its words
    assert getattr(changed, option) == changed.flat()[option]
    assert from_mapping(DistillConfig, json.loads(to_json(changed))) == changed


def test_groups_and_options_reach_each_other():
    config = DistillConfig(stride="random:100", seed=1, teacher_size=[3, 8])
    assert (config.pool.strides, config.run.seed) == ((1, 199), 1)
    assert config.teacher_choice.size == config.teacher_size == (3, 8)
    assert dataclasses.replace(config, seed=2).flat() == config.flat() | {"seed": 2}
    assert dataclasses.replace(config, pool=PoolOptions(eta=0.5)).stride == "1"
    assert DistillConfig(run=RunOptions(seed=4), output_dir="a").output_dir == Path("a")
    assert DistillConfig(stride=1).pool.strides == (1, 1)
    with pytest.raises(UsageError, match="^pool: give a PoolOptions"):
        DistillConfig(pool=RunOptions())
    with pytest.raises(UsageError, match=r"DistillConfig\('runs/a'\): name each option"):
        DistillConfig("runs/a")
    with pytest.raises(AttributeError, match="DistillConfig has no option 'sed'"):
        _ = config.sed
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run = RunOptions()


def test_configs_are_values():
    config, same = DistillConfig(seed=1), DistillConfig(seed=1)
    assert config == same and hash(config) == hash(same) and config != DistillConfig()
    assert copy.deepcopy(config) == config
    assert {"seed", "run"} <= set(dir(config))


# The keys of config.json as earlier versions wrote them.
FIRST_KEYS = {"kind", "output_dir", "seed", "teacher", "teacher_size", "student_factory", "stride"}


def test_config_json_is_flat_and_of_earlier_runs(tmp_path):
    written = json.loads(to_json(DistillConfig(teacher_lora=("a", "b:0.5"))))
    assert set(written) >= FIRST_KEYS and len(written) >= 106
    assert not any(isinstance(value, dict) for value in written.values())
    assert len(json.loads(to_json(TrainConfig()))) >= 49
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = read_config(tmp_path / "config.json")
    assert (read.teacher_lora, read.teacher_choice.lora) == (("a", "b:0.5"),) * 2


def test_errors_name_the_option_that_was_typed():
    said = "--teacher-size: give 2 numbers, or --teacher-format X with --teacher M --teacher-lora F"
    for choice, named in [
        (GivenModel(), "--size: give 2 numbers, or --format X with M --lora F"),
        (ExportedModel(), "--size: give 2 numbers, or --teacher-format X with M --lora F"),
        (TeacherOptions(), said),
    ]:
        with pytest.raises(DkdmError) as refused, as_typed(choice):
            raise DkdmError(said)
        assert str(refused.value) == named


@pytest.mark.parametrize("command", ["sample", "inspect", "export"])
def test_a_size_of_the_wrong_length_names_the_option(command, capsys):
    assert main([command, "--size", "8"]) == 2
    assert capsys.readouterr().err.startswith("dkdm: --size")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.command)
def test_help_has_a_panel_for_each_group_and_whole_sentences(kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([kind.command, "--help"])
    shown = capsys.readouterr().out
    words = " ".join(shown.replace("│", " ").split())
    for group, options in hints(kind).items():
        typed = [f for f in hints(options) if f not in options.positional]
        assert not typed or f" {options.title} options " in words, group
        for field, text in helps(options).items():
            assert text in words and text.endswith("."), field
    assert "(default: None)" not in shown


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.command)
def test_help_stands_beside_most_options(kind, capsys, monkeypatch):
    """tyro puts all help below the options, unless their mean length lets it beside them."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([kind.command, "--help"])
    shown = capsys.readouterr().out
    assert re.search(r"^\W*-.*\S  +[A-Za-z]", shown, re.MULTILINE)
    assert all(len(found) <= 26 for found in re.findall("{[a-z0-9_,-]+}", shown))


@pytest.mark.parametrize("kind", [DistillConfig, TrainConfig], ids=lambda kind: kind.command)
def test_help_names_only_options_of_its_own_command(kind):
    groups = hints(kind).values()
    own = {flag(group.option(field)) for group in groups for field in hints(group)}
    for group in groups:
        for field, text in helps(group).items():
            named = {
                each.replace("--no-", "--") for each in re.findall("--[a-z][a-z-]*[a-z]", text)
            }
            assert named <= own | {"--recipe", "--config"}, field


def test_every_option_has_a_help():
    for kind in KINDS:
        for group in hints(kind).values():
            assert set(helps(group)) >= set(hints(group))


PLACES = {
    "a file in the way": (lambda tmp: tmp / "file" / "x{}", "file is not a folder: give another"),
    "a folder in the way": (lambda tmp: tmp / "folder{}", "is a folder: give the name of a file"),
    "a link to nowhere": (lambda tmp: tmp / "link" / "x{}", "link is not a folder"),
    "no place for files": (lambda tmp: Path("/proc/x{}"), "nothing can be written to /proc"),
}
SUFFIXES = {"sample": ".png", "inspect": ".png", "export": ".onnx"}


@pytest.fixture
def crowded(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for suffix in SUFFIXES.values():
        (tmp_path / f"folder{suffix}").mkdir(exist_ok=True)
    return tmp_path


def listing(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", SUFFIXES)
def test_an_output_is_checked_before_the_model_is_loaded(command, place, crowded, capsys):
    where, said = PLACES[place]
    output, before = str(where(crowded)).format(SUFFIXES[command]), listing(crowded)
    assert main([command, "no/such/model", "--output", output]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"dkdm: --output {output}") and said in message
    assert listing(crowded) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sample", "--output", "x.xyz"), "x.xyz: give a name that ends in .png, "),
        (("sample", "--output", "x"), "x: give a name that ends in .png, "),
        (("inspect", "--output", "x.xyz"), "x.xyz: give a name that ends in .png, "),
        (("export", "--output", "x.pt2"), "x.pt2: give a name that ends in .onnx"),
        (
            ("export", "--format", "torch-export", "--output", "x"),
            "x: give a name that ends in",
        ),
        (
            ("export", "--format", "int8", "--output", "file"),
            "file is a file: give the name of",
        ),
        (("sample", "--output", "old.png"), "old.png exists: give another name, or --overwrite"),
        (("inspect", "--output", "old.png"), "old.png exists: give another name"),
        (("export", "--output", "old.onnx"), "old.onnx.json exists: give another name"),
    ],
)
def test_a_wrong_name_is_refused_before_the_model_is_loaded(
    words, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "old.png", "old.onnx.json"):
        Path(name).write_text("mine")
    assert main([words[0], "no/such/model", *words[1:]]) == 2
    assert f"--output {said}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [DistillConfig, TrainConfig], ids=lambda kind: kind.command)
@pytest.mark.parametrize("place", ["file", "file/x", "link", "link/x", "/proc/x"])
def test_an_output_dir_is_checked_first(kind, place, crowded, capsys):
    before = listing(crowded)
    words = {"distill": ["--teacher", "no/such"], "train": ["--images", "no/such"]}[kind.command]
    assert main([kind.command, *words, "--output-dir", str(crowded / place)]) == 2
    assert capsys.readouterr().err.startswith("dkdm: --output-dir ")
    assert listing(crowded) == before


def test_a_report_that_is_a_folder_is_refused(tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert "the report" in capsys.readouterr().err


def test_recipes_are_configs_of_their_command():
    for name, (kind, settings) in RECIPES.items():
        config = recipe(name, kind)
        assert settings.items() <= config.flat().items()
        assert name in recipes(kind)
    assert not set(recipes(DistillConfig)) & set(recipes(TrainConfig))
    with pytest.raises(UsageError, match="--recipe 'demo': give one of fashion-teacher"):
        recipe("demo", TrainConfig)


def test_options_start_from_a_recipe():
    start = recipe("demo", DistillConfig)
    assert parse(start, []) == start
    assert parse(start, ["--seed", "3"]) == dataclasses.replace(start, seed=3)
