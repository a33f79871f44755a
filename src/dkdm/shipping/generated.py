"""Text of Python files that dkdm writes: values are literals and names are names, nothing else."""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dkdm.errors import UsageError
from dkdm.reading.fields import is_name, shown


def literal(value: Any) -> str:
    """A value as a Python literal: None, a truth value, a finite number, a string, or lists, tuples
    and dicts of these. Raises UsageError for anything else."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return repr(int(value))
    if isinstance(value, float) and math.isfinite(value):
        return repr(float(value))
    if isinstance(value, str):
        return repr(str(value))
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(literal, value))
        comma = "," if len(value) == 1 else ""
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{comma})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    raise UsageError(f"cannot be written into a Python file: {shown(value)}, expected plain values")


def identifier(value: Any) -> str:
    """An ASCII name. Raises UsageError for anything else."""
    if not is_name(value):
        raise UsageError(f"cannot be written into a Python file: {shown(value)} is no name")
    return str(value)


def dotted(value: Any) -> str:
    """Names of Python with dots between them. Raises UsageError for anything else."""
    parts = value.split(".") if isinstance(value, str) else [""]
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        raise UsageError(f"cannot be written into a Python file: {shown(value)} is no module")
    return str(value)


def templates() -> Environment:
    """The templates of Python files, with these three as filters."""
    environment = Environment(  # nosec: writes Python, not HTML
        loader=PackageLoader("dkdm.shipping"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"literal": literal, "name": identifier, "dotted": dotted}
    return environment
