"""The tables of docs/scaling.md are those that its command makes."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__("scaling")
    sys.modules.pop("scaling")


def lines(scaling, name):
    return scaling.in_document(scaling.DOC.read_text(encoding="utf-8"), name).splitlines()


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_every_line_is_there(scaling, name):
    head, under, *rows = lines(scaling, name)
    assert [head, under] == scaling.HEAD.splitlines()
    devices = [int(row.split("|")[1].replace(",", "")) for row in rows]
    assert tuple(devices) == scaling.DEVICES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_line_is_what_the_command_says(scaling, name, tmp_path):
    case = scaling.CASES[name]
    made = scaling.planned(case, scaling.written(case, tmp_path), (8, 1024))
    assert {scaling.row(*each) for each in made} < set(lines(scaling, name))
