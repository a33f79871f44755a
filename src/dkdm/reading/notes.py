"""Lines that a command prints on stderr while it prepares its work, each once in a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_said: ContextVar[set[str] | None] = ContextVar("said", default=None)


@contextmanager
def each_once() -> Iterator[None]:
    """Inside, `say` says no line twice: parts of a run are prepared more than once."""
    token = _said.set(set())
    try:
        yield
    finally:
        _said.reset(token)


def say(line: str) -> None:
    """Print a line on stderr, unless it was said before inside the same `each_once`."""
    said = _said.get()
    if said is None or line not in said:
        print(line, file=sys.stderr)
    if said is not None:
        said.add(line)
