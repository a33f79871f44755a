"""What a command imports before its first message: read off the sources, not off a clock."""

import ast
import inspect
from functools import cache
from pathlib import Path

import pytest

import dkdm
import dkdm.models
from dkdm import cli

PACKAGE = Path(inspect.getfile(dkdm)).parent
LAZY = {"dkdm": dkdm._HOMES, "dkdm.models": dkdm.models._HOMES}
OF_LEARNING = {"diffusers", "transformers", "dkdm.networks.parts", "dkdm.core.training.trainer"}
OF_OTHER_COMMANDS = {
    "dkdm.checks.student",
    "dkdm.models.formats.originals",
    "dkdm.networks.adm",
    "dkdm.shipping.graph",
    "gradio",
    "jinja2",
    "matplotlib",
    "onnx",
    "peft",
    "sympy",
    "torch.export",
    "transformers",
}


def file_of(module):
    path = PACKAGE.parent.joinpath(*module.split("."))
    found = [each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()]
    return found[0] if found else None


def home(module, name):
    """The module that `from module import name` runs, beside the module itself."""
    if file_of(f"{module}.{name}"):
        return f"{module}.{name}"
    homes = LAZY.get(module, {})
    if name in homes and module == "dkdm.models":
        return f"{module}.{homes[name]}"
    return next((f"dkdm.{at}" for at, names in homes.items() if name in names), module)


def named(node):
    """The modules that an import statement runs."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    assert node.level == 0, "write imports in full"
    return {node.module, *(home(node.module, alias.name) for alias in node.names)}


def at_import(nodes):
    """The import statements that run when a module does: outside of functions and of types."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from at_import(ast.iter_child_nodes(node))


@cache
def imports(module):
    """What a module imports at once."""
    file = file_of(module)
    tree = ast.parse(file.read_text(encoding="utf-8")) if file else ast.Module([], [])
    return frozenset().union(*map(named, at_import(tree.body)))


def with_parents(names):
    return {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}


def closure(names):
    """All modules that run when these are imported, as far as this package imports them."""
    found, new = set(), with_parents(names)
    while new:
        found |= new
        new = with_parents(set().union(*map(imports, new))) - found
    return found


def imported_by(command):
    """What the program and the function of a command import."""
    tree = ast.parse(inspect.getsource(cli.COMMANDS[command][1]))
    inner = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return closure({"dkdm.__main__", "dkdm.cli"}.union(*map(named, inner)))


def test_help_and_wrong_usage_need_no_torch():
    assert not closure({"dkdm.__main__", "dkdm.cli"}) & {"torch", "numpy", "diffusers", "PIL"}


@pytest.mark.parametrize("command", ["report", "compare", "push"])
def test_commands_that_load_no_model_import_no_models(command):
    assert not imported_by(command) & OF_LEARNING


@pytest.mark.parametrize("command", ["distill", "train", "sample", "evaluate", "harvest"])
def test_a_command_leaves_out_what_others_need(command):
    assert not imported_by(command) & OF_OTHER_COMMANDS


def test_what_a_command_needs_is_seen():
    assert {"dkdm.shipping.graph", "torch.export"} <= imported_by("export")
    assert {"torch", "diffusers", "dkdm.models.loading"} <= imported_by("distill")
    assert "dkdm.checks.student" in imported_by("check-student")
