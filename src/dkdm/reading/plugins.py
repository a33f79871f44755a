"""Code that the user names as `module:name`, and where it may come from.

The current directory is looked into for such names alone: whatever dkdm or a library imports by
itself comes from what is installed, also if a file of the same name lies where dkdm is run.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from dkdm.errors import UsageError


def import_object(spec: str) -> Any:
    """Import `module:name`, looking in the current directory first.

    Raises UsageError for any other name, and for what cannot be imported or is not there.
    """
    module, name = split(spec)
    try:
        with _looking_here_for(module.partition(".")[0]):
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import {spec}: {error}{_why(module)}") from error
    except Exception as error:  # whatever the module's code raises
        raise UsageError(f"cannot import {spec}: {type(error).__name__}: {error}") from error


def _why(module: str) -> str:
    """Why a module is not found that does lie in the current directory."""
    if not is_strange(Path.cwd() / module.partition(".")[0]):
        return ""
    return ". No code is taken from the folder of a model: put the module elsewhere if you trust it"


def is_spec(text: object) -> bool:
    """Whether this is written as `module:name`."""
    parts = r"[^\W\d]\w*"
    return isinstance(text, str) and bool(re.fullmatch(rf"{parts}(\.{parts})*:{parts}", text))


def named_code(value: object) -> list[str]:
    """What in an option is written as `module:name`."""
    parts = value.split(",") if isinstance(value, str) else []
    return [part.strip() for part in parts if is_spec(part.strip()) and "builtin:" not in part]


def split(spec: str) -> tuple[str, str]:
    """(module, name) of `module:name`. Raises UsageError for anything else."""
    if not is_spec(spec):
        raise UsageError(f"cannot import {spec!r}: write it as module:name, such as my_nets:make")
    module, _, name = spec.partition(":")
    return module, name


def places_of(module: str) -> list[Path]:
    """Files and folders that importing a module would run or look into, the module's file last.

    Nothing is imported; empty if it is not found.
    """
    found: list[Path] = []
    search: Sequence[str] | None = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:end]), search)
        if spec is None:
            return []
        search = list(spec.submodule_search_locations or [])
        found += _places(spec)
    return found


def _places(spec: ModuleSpec) -> list[Path]:
    """Folders of a package, and its file or the module's."""
    places = [*(spec.submodule_search_locations or []), spec.origin if spec.has_location else None]
    return [Path(place).resolve() for place in places if place is not None]


def _find(name: str, search: Sequence[str] | None) -> ModuleSpec | None:
    loaded = sys.modules.get(name)
    if loaded is not None:
        return loaded.__spec__
    if search is not None:
        return PathFinder.find_spec(name.rpartition(".")[2], search)
    here = PathFinder.find_spec(name, [str(Path.cwd())])
    return here if here and here.loader else importlib.util.find_spec(name) or here


def is_installed(path: Path) -> bool:
    """Whether a file is one of an installed package, or of Python itself."""
    return any(path.is_relative_to(folder) for folder in installed_folders())


def installed_folders() -> set[Path]:
    """Where packages are installed, and Python's library."""
    names = ("purelib", "platlib", "stdlib", "platstdlib")
    paths = [sysconfig.get_path(name) for name in names]
    paths += [*site.getsitepackages(), site.getusersitepackages()]
    return {Path(path).resolve() for path in paths}


class _In(MetaPathFinder):
    """Finds one top-level module in a folder, or any (None); none that lies in a model's folder."""

    def __init__(self, folder: Path, name: str | None) -> None:
        self.folder, self.name = folder, name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del target
        if path is not None or self.name not in (None, fullname):
            return None
        spec = PathFinder.find_spec(fullname, [str(self.folder)])
        return None if spec is None or any(map(is_strange, _places(spec))) else spec


@contextmanager
def _looking_here_for(name: str) -> Iterator[None]:
    """Let a name be found in the current directory first, and what its module imports from there,
    now or later, after all other places."""
    importlib.invalidate_caches()
    here = Path.cwd()
    found = PathFinder.find_spec(name, [str(here)])
    if found is None or name in sys.modules:
        yield
        return
    if not any(isinstance(each, _In) and each.folder == here for each in sys.meta_path):
        sys.meta_path.append(_In(here, None))
    if found.loader is None:  # a folder without __init__.py gives way to an installed package
        yield
        return
    first = _In(here, name)
    sys.meta_path.insert(0, first)
    try:
        yield
    finally:
        sys.meta_path.remove(first)


_STRANGE: set[Path] = set()


def distrust(folder: Path) -> None:
    """Take no code from a folder, which somebody else may have filled."""
    _STRANGE.add(folder.resolve())


def is_strange(path: Path) -> bool:
    """Whether a path lies in a folder that was opened as a model."""
    resolved = path.resolve()
    return any(resolved.is_relative_to(folder) for folder in _STRANGE)
