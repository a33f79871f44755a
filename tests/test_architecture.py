"""The order of the house: a folder imports only from the ones before it, and a module of a folder
never from one that imports it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "dkdm"

# Each a folder with everything in it, or a module.
ORDER = [
    "version",
    "errors",
    "moved",
    "reading",
    "config",
    "networks",
    "core",
    "models",
    "students",
    "data",
    "evaluation",
    "shipping",
    "report",
    "checks",
    "runs",
    "cli",
]
# The folders of `core` in their order; the modules beside them come first, and import no folder.
CORE = [
    "diffusion",
    "saving",
    "denoisers",
    "objectives",
    "sources",
    "distributed",
    "training",
    "captured",
    "few_steps",
]
CORE_MAY_USE = {"errors", "reading", "config", "core"}
PUBLIC_FACE = "__init__"
MAY_USE_IT = {"cli", "runs"}
ENTRIES = 20


def allowed(place: str) -> set[str]:
    """The places that a place may import from, its own included."""
    if place == "core":
        return CORE_MAY_USE
    earlier = set(ORDER[: ORDER.index(place) + 1])
    return earlier | ({PUBLIC_FACE} if place in MAY_USE_IT else set())


def absolute_name(node: ast.ImportFrom, package: str) -> str:
    """The full name of what `from ... import` names, seen from a module in `package`."""
    if node.level == 0:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def imported_names(source: str, package: str) -> set[str]:
    """The full names of all modules, or names in modules, that the source imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_name(node, package)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] == "dkdm"}


def imported_places(source: str, package: str) -> set[str]:
    """The places that the source imports from; a name that is none comes from `__init__`."""
    inner = {
        name.removeprefix("dkdm").removeprefix(".") for name in imported_names(source, package)
    }
    places = {name.split(".")[0] for name in inner}
    return {place if place in ORDER else PUBLIC_FACE for place in places}


def modules() -> dict[str, Path]:
    """Every module by its full name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if "builtin" not in parts:  # models as shipped
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def place_of(module: str) -> str:
    return module.split(".")[1]


def package_of(module: str, path: Path) -> str:
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    every = modules()
    found = {}
    for module, path in every.items():
        names = imported_names(path.read_text(encoding="utf-8"), package_of(module, path))
        inner = {name if name in every else name.rpartition(".")[0] for name in names}
        found[module] = (inner & set(every)) - {module}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports; none if there is none."""
    left = {module: set(imports) for module, imports in edges.items()}
    while True:
        done = {module for module, imports in left.items() if not imports & set(left)}
        if not done:
            return sorted(left)
        left = {module: imports for module, imports in left.items() if module not in done}


def test_modules_import_only_from_earlier_places():
    wrong = []
    for module, path in modules().items():
        if module in {"dkdm", "dkdm.__main__"}:
            continue
        place = place_of(module)
        assert place in ORDER, f"enter {place!r} in ORDER, in its place"
        places = imported_places(path.read_text(encoding="utf-8"), package_of(module, path))
        wrong += [f"{module} imports from {other}" for other in sorted(places - allowed(place))]
    assert not wrong


def rank(module: str) -> int:
    """Which folder of the core a module lies in; -1 for those beside the folders."""
    folder = module.removeprefix("dkdm.core.").split(".")[0]
    return CORE.index(folder) if folder in CORE else -1


def test_folders_of_the_core_import_only_from_earlier_ones():
    assert {path.parent.name for path in (PACKAGE / "core").glob("*/*.py")} == set(CORE)
    inner = {m: names for m, names in graph().items() if m.startswith("dkdm.core.")}
    wrong = [
        f"{module} imports {name}"
        for module, names in inner.items()
        for name in names & set(inner)
        if rank(name) > rank(module)
    ]
    assert not wrong


def test_no_modules_import_each_other():
    edges = graph()
    inner = {m: {i for i in edges[m] if i != "dkdm"} for m in edges if m != "dkdm"}
    assert circle(inner) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]


def test_few_entries_lie_at_the_top():
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= ENTRIES, sorted(entries)


@pytest.mark.parametrize(
    ("source", "package", "places"),
    [
        ("import dkdm", "dkdm", {PUBLIC_FACE}),
        ("import dkdm.core.sources.pool as p", "dkdm", {"core"}),
        ("import dkdm.models.formats.edm", "dkdm", {"models"}),
        ("from dkdm import core, Denoiser", "dkdm", {"core", PUBLIC_FACE}),
        ("from . import reading", "dkdm", {"reading"}),
        ("from .process import Process", "dkdm.core", {"core"}),
        ("from ..core import process", "dkdm.models", {"core"}),
        ("def f():\n    from dkdm.core.training.trainer import Trainer", "dkdm", {"core"}),
        ("import torch, dkdm_other\nfrom torch import nn", "dkdm", set()),
    ],
)
def test_imported_places_are_found(source, package, places):
    assert imported_places(source, package) == places


@pytest.mark.parametrize(
    ("place", "other", "may"),
    [
        ("models", "core", True),
        ("core", "models", False),
        ("core", "networks", False),
        ("core", "reading", True),
        ("runs", "checks", True),
        ("evaluation", "report", False),
        ("cli", PUBLIC_FACE, True),
        ("core", PUBLIC_FACE, False),
    ],
)
def test_allowed_places(place, other, may):
    assert (other in allowed(place)) is may
