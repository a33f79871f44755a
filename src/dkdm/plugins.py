"""Objects named on the command line as `module:name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

from dkdm.errors import UsageError


def import_object(spec: str) -> Any:
    """Import `module:name`, looking in the current directory too.

    Raises UsageError where the module cannot be imported or has no such name.
    """
    module, _, name = spec.partition(":")
    _look_here_too()
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import {spec}: {error}") from error
    except Exception as error:  # whatever the module's own code raises
        raise UsageError(f"cannot import {spec}: {type(error).__name__}: {error}") from error


def find_top_module(name: str) -> ModuleSpec | None:
    """Where a module without dots would be imported from, without importing it."""
    _look_here_too()
    loaded = sys.modules.get(name)
    if loaded is not None:
        return loaded.__spec__
    return importlib.util.find_spec(name) if name else None


def _look_here_too() -> None:
    if "" not in sys.path:
        sys.path.insert(0, "")
