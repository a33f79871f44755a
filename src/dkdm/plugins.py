"""Objects named on the command line as `module:name`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from dkdm.errors import UsageError


def import_object(spec: str) -> Any:
    """Import `module:name`, looking in the current directory too.

    Raises UsageError where the module cannot be imported or has no such name.
    """
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import {spec}: {error}") from error
