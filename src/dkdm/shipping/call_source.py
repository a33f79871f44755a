"""The source of a function of `dkdm.core.denoisers.calls`, for a program that runs without dkdm."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

from dkdm.core.denoisers import calls


def call_source(call: Callable[..., Any] | None) -> str:
    """The functions that a call needs, each after those that it uses, without annotations.

    Empty for the plain call, `network(x, time, **cond)`, and for a user's function. The text needs
    nothing but torch and contextlib.nullcontext.
    """
    plain = call not in calls.CALLS.values() or call is calls.unet
    return "" if plain else "\n\n".join(map(_without_annotations, _with_needed(call)))


def _with_needed(function: Any) -> list[Any]:
    """A function of `calls` after all those that it uses."""
    used = inspect.getclosurevars(function).globals.values()
    ours = [f for f in used if inspect.isfunction(f) and f.__module__ == calls.__name__]
    needed = [each for f in ours for each in _with_needed(f)]
    return list(dict.fromkeys([*needed, function]))


def _without_annotations(function: Any) -> str:
    """The lines of a function, with the names of its parameters alone."""
    source = inspect.getsource(function)
    [node] = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    for parameter in ast.walk(node.args):
        if isinstance(parameter, ast.arg):
            parameter.annotation = None
    body = "".join(source.splitlines(keepends=True)[node.body[0].lineno - 1 :])
    return f"def {node.name}({ast.unparse(node.args)}):\n{body}".rstrip()
