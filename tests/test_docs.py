"""What the documents name exists."""

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import dkdm
from dkdm.checks.student import check_student
from dkdm.cli import COMMANDS, repeated
from dkdm.evaluation.cost import count_macs
from dkdm.evaluation.metrics import METRICS
from dkdm.reading.command_line import parse
from dkdm.runs.recipes import RECIPES
from dkdm.students import student_of
from small_runs import run

ROOT = Path(__file__).parents[1]
ALGORITHM = (ROOT / "docs/algorithm.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:[a-z_]+)(?:\.\w+)+)`", ALGORITHM)))
SYMBOLS = [name for name in NAMED if not name.endswith((".py", ".md"))]


def test_algorithm_names_many_symbols():
    assert len(SYMBOLS) > 15


def resolved(name):
    """What a dotted name of the page stands for."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(["dkdm", *parts[:split]]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[split:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(f"there is no module for {name}")


@pytest.mark.parametrize("name", SYMBOLS)
def test_symbol_of_the_algorithm_exists(name):
    found = resolved(name)
    assert callable(found) or isinstance(found, property)


def rows_of_the_algorithm():
    """(what of the paper, names of code) of the page's first table."""
    for line in ALGORITHM.splitlines():
        if re.match(r"\| (Eq|Alg)\. ", line):
            yield line.split("|")[1].strip(), re.findall(r"`([\w.]+)`", line.rpartition("|")[0])


@pytest.mark.parametrize(("paper", "names"), list(rows_of_the_algorithm()))
def test_code_of_an_equation_cites_it(paper, names):
    """The docstring of what the page names, or of its module, has the same number."""
    for number in re.findall(r"Eq\. (\d+)", paper):
        texts = [inspect.getdoc(resolved(name)) or "" for name in names]
        texts += [sys.modules[resolved(name).__module__].__doc__ for name in names]
        cited = {int(n) for text in texts for n in re.findall(r"Eqs?\. ?(\d+)", text)}
        ranges = [r for text in texts for r in re.findall(r"Eqs?\. ?(\d+)[-\u2013](\d+)", text)]
        covered = cited | {n for low, high in ranges for n in range(int(low), int(high) + 1)}
        assert int(number) in covered, f"{names} do not cite Eq. {number}"


def test_a_step_of_algorithm_1_calls_what_the_page_names_in_its_order(tmp_path):
    """Of a run with long strides: each step ends some chains and begins them anew."""
    rows = [row for row in rows_of_the_algorithm() if row[0].startswith("Alg. 1")]
    names = {}
    for _, of_row in rows:
        for name in of_row:
            found = inspect.unwrap(resolved(name))
            names[getattr(found, "__code__", None)] = name
    called = []

    def trace(frame, event, _):
        if event == "call" and frame.f_code in names:
            called.append(names[frame.f_code])

    sys.setprofile(trace)
    try:
        run(tmp_path, max_train_steps=1, evaluation_samples=0, stride="random:25")
    finally:
        sys.setprofile(None)
    begun = called[called.index("core.training.trainer.Trainer.learn") :]
    order = ["learn", "draw", "target", "advance", "move", "_restart"]
    places = [next(i for i, n in enumerate(begun) if n.endswith(f".{name}")) for name in order]
    assert places == sorted(places), begun
    before = called[: called.index("core.training.trainer.Trainer.learn")]
    assert (
        "core.sources.budget.pool_entries" in before and "core.sources.fill.fill_few_step" in before
    )


def test_layout_of_the_readme_is_the_package():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("    src/dkdm/ ") :].split("\n\n")[0]
    named = set(re.findall(r"^ {6}([\w.]+/?)", tree, re.MULTILINE))
    package = ROOT / "src" / "dkdm"
    ours = {path.name + "/" * path.is_dir() for path in package.iterdir()}
    ours = {name for name in ours if not name.startswith("_")} - {"py.typed", "version.py"}
    assert named == ours


README_COMMANDS = re.findall(r"^    dkdm (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", README_COMMANDS)
def test_a_command_of_the_readme_has_these_options(line):
    name, *words = shlex.split(line, comments=True)
    kind, _ = COMMANDS[name]
    parse(kind, repeated(words) if name == "distill" else words)
    assert len(line) <= 106


def test_recipes_of_the_readme_exist():
    named = set(re.findall(r"--recipe ([\w-]+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= set(RECIPES)


def test_every_metric_is_described():
    table = (ROOT / "docs/metrics.md").read_text().split("## How many samples")[0]
    named = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    described = [name for row in named for name in re.findall(r"`(\w+)`", row)]
    assert described == list(METRICS)


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


def test_the_readmes_numbers_of_the_embedded_teacher_and_its_student_are_theirs():
    """Those that a test can count; what was timed and drawn is in `benchmarks/results`."""
    table = (ROOT / "README.md").read_text().partition("## Measured")[2]
    teacher = dkdm.load_teacher("builtin:fashion")
    student = student_of("dit-tiny", teacher)
    shown = [f"{model.num_parameters:,}" for model in (teacher, student)]
    assert f"| parameters | {shown[0]} | {shown[1]} |" in table
    shown = [f"{count_macs(model) / 1e6:.1f} M" for model in (teacher, student)]
    assert f"| multiply-accumulates per evaluation | {shown[0]} | {shown[1]} |" in table


def test_the_measured_numbers_of_the_readme_are_those_of_the_results():
    results = (ROOT / "benchmarks/results/2026-11-26-muon-and-ladder.md").read_text()
    first = (ROOT / "README.md").read_text().partition("## Measured")[2].partition("\n\n| run")[2]
    first = first.partition("\n\n")[0]
    demo = results.partition("## `dkdm distill --recipe demo`")[2].partition("\n## ")[0]
    rows = {
        "Frechet distance": ("Frechet distance", 2),
        "evaluations a second": ("evaluations per second", 0),
    }
    for label, (shown, digits) in rows.items():
        of_run = re.search(rf"{label} +([\d.,]+) +([\d.,]+)", demo).groups()
        wanted = [f"{float(value.replace(',', '')):,.{digits}f}" for value in of_run]
        [line] = [line for line in first.splitlines() if line.startswith(f"| {shown}")]
        assert [cell.strip() for cell in line.split("|")[2:4]] == wanted


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
