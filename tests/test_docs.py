"""What the documents name exists."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import dkdm
from dkdm.checks.student import check_student
from dkdm.runs.recipes import RECIPES

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
    assert callable(found) or isinstance(found, property)


def test_layout_of_the_readme_is_the_package():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("    src/dkdm/ ") :].split("\n\n")[0]
    named = set(re.findall(r"^ {6}([\w.]+/?)", tree, re.MULTILINE)) | {"names.py"}
    package = ROOT / "src" / "dkdm"
    ours = {path.name + "/" * path.is_dir() for path in package.iterdir()}
    ours = {name for name in ours if not name.startswith("_")} - {"py.typed", "version.py"}
    assert named == ours


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


def test_the_own_network_of_the_students_page(tmp_path, monkeypatch):
    """It passes its check, is distilled and comes back by the page's own lines."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/students.md").read_text(), re.DOTALL)
    module, loading = blocks[:2]
    (tmp_path / "my_nets.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    teacher = dkdm.load_teacher("builtin:fashion")
    checkup = check_student("my_nets:Net", teacher, compile_backend=None, export=False)
    assert all(finding.status == "ok" for finding in checkup.findings), checkup.findings
    quick = {"train_batch_size": 4, "pool_size": 4, "fill_steps": 1, "validation_steps": 0}
    config = dkdm.DistillConfig(
        output_dir=tmp_path / "runs" / "mine", max_train_steps=1, evaluation_samples=0, **quick
    )
    dkdm.distill(teacher, "my_nets:Net", config)
    names = {}
    exec(compile(loading, "docs/students.md", "exec"), names)
    assert type(names["network"]).__name__ == "Net"
    assert next((tmp_path / "runs/mine/unet").glob("my_nets_*.py")).is_file()
    del sys.modules["my_nets"]
