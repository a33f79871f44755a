"""A custom network as one file that diffusers loads without dkdm."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dkdm.models.custom_network import OWN_CLASS, Origin, origin_of
from dkdm.reading.files import render
from dkdm.reading.plugins import installed_folders, places_of

# Installed wherever the folder is loaded: diffusers and what it requires.
_ALWAYS_THERE = {"torch", "diffusers", "numpy", "safetensors", "huggingface_hub", "packaging"}


@dataclass(frozen=True)
class Shipment:
    """The Python file of a network that a factory makes.

    file: its name. text: its content. package: the top-level package that it imports the factory
    from; None if the text holds the factory's source. requires: other packages that it imports.
    """

    file: str
    text: str
    package: str | None
    requires: tuple[str, ...]


def shipment(origin: Origin) -> Shipment:
    """The Python file for a network that has a factory."""
    assert origin.factory is not None
    module, _, name = origin.factory.partition(":")
    source = _source_of(module)
    imported = set() if source is None else _imported_packages(source, module)
    package = None
    if source is None or imported & _beside(module):
        source, package = None, module.partition(".")[0]
        imported = {package}
    others = imported - _ALWAYS_THERE - set(sys.stdlib_module_names) - {package}
    text = render(
        "dkdm.shipping",
        "custom_network.py.j2",
        source=source,
        module=module,
        factory=name,
        own_class=OWN_CLASS,
        dkdm="dkdm" in imported,
    )
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]  # one process may load several of them
    file = f"{module.rpartition('.')[2]}_{digest}.py"
    return Shipment(file, text, package, tuple(sorted(others)))


def _source_of(module: str) -> str | None:
    """The text of a module; None if there is no such file, as in a notebook."""
    try:
        file = inspect.getsourcefile(importlib.import_module(module))
        text = Path(str(file)).read_text(encoding="utf-8")
        ast.parse(text)
    except (ImportError, OSError, TypeError, SyntaxError, UnicodeDecodeError):
        return None
    return text


def _imported_packages(source: str, module: str) -> set[str]:
    """Top-level packages that a source needs: all that it imports, except foreign ones in a `try`
    that goes on without them. A relative import counts as the module's package."""
    nodes = list(ast.walk(ast.parse(source)))
    tried = {inner for node in nodes for inner in _tried(node)}
    needed = _names([node for node in nodes if node not in tried], module)
    return needed | (_names(nodes, module) & (_beside(module) | {"dkdm"}))


def _names(nodes: list[ast.AST], module: str) -> set[str]:
    """Top-level names that import statements among these import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = node.module if node.level == 0 else module
            found.add((name or module).partition(".")[0])
    return found


_MISSING = ("ImportError", "ModuleNotFoundError", "Exception", "BaseException")


def _tried(node: ast.AST) -> list[ast.AST]:
    """The body of a `try` that catches a missing package and goes on; empty for other nodes."""
    if not isinstance(node, ast.Try):
        return []
    raising = [h for h in node.handlers if any(isinstance(n, ast.Raise) for n in ast.walk(h))]
    caught = [handler.type for handler in node.handlers if handler not in raising]
    names = [name for kind in caught if kind for name in ast.walk(kind)]
    catches = None in caught or any(isinstance(n, ast.Name) and n.id in _MISSING for n in names)
    return [inner for line in node.body for inner in ast.walk(line)] if catches else []


def _beside(module: str) -> set[str]:
    """The module's package and, unless it is installed, the modules that lie beside it."""
    top = module.partition(".")[0]
    places = places_of(top)
    if not places or places[-1].is_dir():
        return {top}
    home = places[-1].parent.parent if len(places) > 1 else places[-1].parent
    if home in installed_folders():
        return {top}
    found = {path.stem for path in home.glob("*.py")} | {p.name for p in home.iterdir()}
    return {top} | {name for name in found if name.isidentifier() and name not in _ALWAYS_THERE}


def shipping_note(network: nn.Module) -> str | None:
    """What loading the folder requires besides diffusers; None for nothing."""
    origin = origin_of(network)
    if origin is None:
        return None
    if origin.factory is None:
        return (
            f"{origin.network} was given as an object and its class cannot make it again: "
            "diffusers cannot load this folder. Make the network yourself (output "
            f"channels: {origin.out_channels}), and its weights are loaded by "
            "`dkdm.load_student(folder, network=...)`"
        )
    shipped = shipment(origin)
    if shipped.package:
        return (
            f"the network is made by `{origin.factory}`, which needs other files of yours and was "
            f"not shipped: `{shipped.package}` and what it imports must be importable where the "
            "folder is loaded"
        )
    if shipped.requires:
        return f"the network's file imports {', '.join(shipped.requires)}, which must be installed"
    return None
