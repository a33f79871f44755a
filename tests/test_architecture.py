"""The order of the house: a module imports only from the rooms before its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "dkdm"

# A room is a module, or a package with everything in it.
ROOMS = [
    "errors",
    "names",
    "version",
    "reading",
    "quantization",
    "places",
    "typed",
    "sizes",
    "arguments",
    "arrays",
    "randomness",
    "plugins",
    "made_here",
    "config",
    "progress",
    "checkpoint",
    "process",
    "prediction",
    "schedulers",
    "steps",
    "conditioning",
    "inputs",
    "allowed",
    "networks",
    "effective",
    "prompts",
    "calls",
    "modes",
    "bundle",
    "denoiser",
    "given",
    "matching",
    "own",
    "toy",
    "datasets",
    "teachers",
    "students",
    "pool",
    "sources",
    "objective",
    "features",
    "plots",
    "pictures",
    "charts",
    "evaluation",
    "listing",
    "inspection",
    "doctor",
    "generated",
    "ship",
    "export",
    "markdown",
    "licence",
    "card",
    "hub",
    "graph",
    "quantized",
    "report",
    "finish",
    "launch",
    "trainer",
    "estimate",
    "plan",
    "check_student",
    "recipes",
    "trainset",
    "api",
    "cli",
]
PUBLIC_FACE = "__init__"
EXEMPT = {"__init__.py", "__main__.py"}


def allowed_rooms(room: str) -> set[str]:
    """The rooms that a room may import from, its own included."""
    if room == "api":
        return {*ROOMS, PUBLIC_FACE}
    if room == "toy":
        return {"toy", *ROOMS[: ROOMS.index("denoiser") + 1]}
    earlier = set(ROOMS[: ROOMS.index(room) + 1])
    if room == "cli":
        earlier.add(PUBLIC_FACE)
    return earlier - {"toy"}


def first_part(dotted: str) -> str:
    return dotted.split(".")[0]


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
    return names


def imported_rooms(source: str, package: str) -> set[str]:
    """The rooms that the source imports from; a name that is no room comes from `__init__`."""
    names = imported_names(source, package)
    inner = {name.removeprefix("dkdm").removeprefix(".") for name in names if is_inner(name)}
    rooms = {first_part(name) for name in inner}
    return {room if is_room(room) else PUBLIC_FACE for room in rooms}


def is_inner(name: str) -> bool:
    return first_part(name) == "dkdm"


def is_room(name: str) -> bool:
    exists = (PACKAGE / f"{name}.py").is_file() or (PACKAGE / name).is_dir()
    return name in ROOMS or (exists and name != "")


def modules() -> list[Path]:
    every = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    found = sorted(path for path in every if path.parts[0] != "assets")  # models as shipped
    return [path for path in found if str(path) not in EXEMPT]


def package_of(module: Path) -> str:
    return ".".join(["dkdm", *module.parent.parts])


@pytest.mark.parametrize("module", modules(), ids=str)
def test_module_imports_only_from_earlier_rooms(module):
    room = module.with_suffix("").parts[0]
    assert room in ROOMS, f"{module} is in no room: enter {room!r} in ROOMS, in its place"
    rooms = imported_rooms((PACKAGE / module).read_text(encoding="utf-8"), package_of(module))
    wrong = sorted(rooms - allowed_rooms(room))
    assert not wrong, f"{module} imports from {wrong}, which {room!r} may not"


@pytest.mark.parametrize(
    ("source", "package", "rooms"),
    [
        ("import dkdm", "dkdm", {PUBLIC_FACE}),
        ("import dkdm.pool as p", "dkdm", {"pool"}),
        ("import dkdm.teachers.adm", "dkdm", {"teachers"}),
        ("from dkdm import pool, Denoiser", "dkdm", {"pool", PUBLIC_FACE}),
        ("from dkdm.pool import Pool", "dkdm", {"pool"}),
        ("from . import process", "dkdm", {"process"}),
        ("from .process import NoiseProcess", "dkdm", {"process"}),
        ("from .adm import load", "dkdm.teachers", {"teachers"}),
        ("from . import adm", "dkdm.teachers", {"teachers"}),
        ("from ..process import NoiseProcess", "dkdm.teachers", {"process"}),
        ("from .. import process", "dkdm.teachers", {"process"}),
        ("def f():\n    from dkdm.trainer import train", "dkdm", {"trainer"}),
        ("import torch, dkdm_other\nfrom torch import nn", "dkdm", set()),
    ],
)
def test_imported_rooms_are_found(source, package, rooms):
    assert imported_rooms(source, package) == rooms


@pytest.mark.parametrize(
    ("room", "other", "allowed"),
    [
        ("prediction", "process", True),
        ("process", "prediction", False),
        ("pool", "trainer", False),
        ("trainer", "pool", True),
        ("teachers", "teachers", True),
        ("toy", "denoiser", True),
        ("toy", "pool", False),
        ("cli", "toy", False),
        ("cli", "api", True),
        ("cli", PUBLIC_FACE, True),
        ("pool", PUBLIC_FACE, False),
        ("api", "cli", True),
    ],
)
def test_allowed_rooms(room, other, allowed):
    assert (other in allowed_rooms(room)) is allowed
