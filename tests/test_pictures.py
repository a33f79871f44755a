"""The pictures of the README, drawn by a script from the folders of runs."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import dkdm
from dkdm.config import to_json
from dkdm.evaluation.numbers import number
from dkdm.report.run import read_run
from finished_run import alone, write_metrics
from small_runs import SMALL

SCRIPT = Path(__file__).parent.parent / "scripts/make_pictures.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A step of the embedded teacher's student, ten samples in two steps."""
    folder = tmp_path_factory.mktemp("picture") / "run"
    config = replace(SMALL, output_dir=folder, max_train_steps=1, check=False)
    return dkdm.distill("builtin:fashion", "dit-tiny", replace(config, evaluation_samples=10))


def drawn(script, monkeypatch, folder, *more):
    monkeypatch.setattr(sys, "argv", ["script", str(folder), *map(str, more)])
    script.main()


def test_both_themes_are_drawn_and_the_same_run_gives_the_same_files(
    script, run, tmp_path, monkeypatch, capsys
):
    names = ("demo-dark.png", "demo-light.png")
    for again in ("a", "b"):
        (tmp_path / again).mkdir()
        drawn(script, monkeypatch, run, "--output-dir", tmp_path / again)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    dark, light = (Image.open(tmp_path / "a" / name) for name in names)
    assert dark.size == light.size
    assert dark.getpixel((0, 0))[3] == light.getpixel((0, 0))[3] == 0
    place = script.EDGE // 2, script.EDGE
    assert sum(dark.getpixel(place)[:3]) < 120 < 700 < sum(light.getpixel(place)[:3])
    first = light.crop((script.left_of(0), script.EDGE, script.left_of(0) + 128, script.EDGE + 128))
    whole = first.reduce(8).resize(first.size, Image.Resampling.NEAREST)
    assert whole.tobytes() == first.tobytes()
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_numbers_are_those_of_the_run(script, run):
    found = read_run(run)
    facts = dict(script.facts_of(found, found.comparison))
    results = json.loads((run / "evaluation.json").read_text())
    distances = [number(results[who]["metrics"]["fd"]) for who in ("student", "teacher")]
    assert distances[0] in facts and f"its teacher's is {distances[1]}" in facts[distances[0]]
    assert f"{results['teacher']['macs'] / results['student']['macs']:.1f} times" in facts
    assert "10 samples of each model, 2 steps of DDIM" in script.how_measured(
        found.comparison, "2 steps of DDIM"
    )


def test_samples_that_are_not_the_runs_are_refused(script, run):
    found = read_run(run)
    with pytest.raises(AssertionError, match="not close"):
        script.states_of(run, found.comparison, torch.zeros(10, 1, 16, 16))


def test_a_run_that_was_not_evaluated_is_refused(script, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(SystemExit):
        drawn(script, monkeypatch, tmp_path)
    assert "is no finished distillation: metrics.jsonl is empty" in capsys.readouterr().err


def test_the_picture_of_a_few_step_run_has_its_distances(script, tmp_path, monkeypatch):
    few = {"objective": "few-step", "few_step_share": 0.5, "few_step_pool": 8, "check": False}
    config = replace(SMALL, output_dir=tmp_path / "run", max_train_steps=2, **few)
    config = replace(config, student_steps="1:4", few_step_heads=4, evaluation_samples=10)
    folder = dkdm.distill("builtin:fashion", "dit-tiny", config)
    said = []
    monkeypatch.setattr(script.Card, "text", lambda *given: said.append(given[2]))
    drawn(script, monkeypatch, folder, "--output-dir", tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "few-steps-light.png",
        "few-steps-dark.png",
    }
    table = read_run(folder).steps
    shown = [("teacher", 25), ("teacher", 1), ("student", 1), ("student", 2), ("student", 4)]
    found = {(row.model, row.num_steps): row.metrics["fd"] for row in table.rows}
    distances = [words for words in said if words.startswith("distance ")]
    assert distances == 2 * [f"distance {number(found[row])}" for row in shown]
    assert all(words in said for words in ("in 25 steps", "in 1 step", "0 images", "T-shirt"))


def test_a_run_without_a_teacher_is_refused(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(to_json(dkdm.TrainConfig(max_train_steps=200)))
    write_metrics(tmp_path, last=200)
    alone().save(tmp_path)
    with pytest.raises(SystemExit):
        drawn(script, monkeypatch, tmp_path, "--output-dir", tmp_path)
    assert "is no finished distillation" in capsys.readouterr().err
