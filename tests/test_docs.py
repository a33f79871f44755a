"""What the documents name exists."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from dkdm.recipes import RECIPES

ROOT = Path(__file__).parents[1]
NAMED = sorted(
    set(re.findall(r"`((?:[a-z_]+)(?:\.\w+)+)`", (ROOT / "docs/algorithm.md").read_text()))
)
SYMBOLS = [name for name in NAMED if not name.endswith((".py", ".md"))]


def test_algorithm_names_many_symbols():
    assert len(SYMBOLS) > 15


@pytest.mark.parametrize("name", SYMBOLS)
def test_symbol_of_the_algorithm_exists(name):
    module, *attributes = name.split(".")
    found = importlib.import_module(f"dkdm.{module}")
    for attribute in attributes:
        found = getattr(found, attribute)
    assert callable(found)


def test_rooms_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("    src/dkdm/\n") :].split("\n\n")[0]
    names = re.findall(r"^ {6}([\w./]+(?:, [\w.]+)?)", tree, re.MULTILINE)
    assert len(names) > 15
    for name in ", ".join(names).split(", "):
        assert (ROOT / "src" / "dkdm" / name).exists(), name


def test_recipes_of_the_readme_exist():
    named = set(re.findall(r"--recipe ([\w-]+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= set(RECIPES)


def test_python_of_the_teachers_page_runs():
    """Every block, one after the other, as a reader would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/teachers.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names = {}
    for block in blocks:
        exec(compile(block, "docs/teachers.md", "exec"), names)
        if "teacher" in names:
            names["teacher"].check()
    assert isinstance(names["network"], torch.nn.Module)


def test_numbers_are_filled_in():
    assert "@" not in re.sub(r"\S+@\S+\.\w+", "", (ROOT / "README.md").read_text())
