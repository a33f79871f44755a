"""The two ways a command can fail, each with its exit code, and errors of others as one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class DkdmError(Exception):
    """A run failed: the message says what failed, in which place, and what to do."""

    exit_code = 1


class UsageError(DkdmError):
    """What was asked for cannot be done: a wrong value, path or combination of them."""

    exit_code = 2


@contextmanager
def raised_as(explained: Callable[[Exception], DkdmError]) -> Iterator[None]:
    """Turn whatever is raised in here, but dkdm's own errors, into the one that explains it."""
    try:
        yield
    except DkdmError:
        raise
    except Exception as error:
        raise explained(error) from error


_UNSAFE = re.compile(r"\.? (?:In PyTorch 2\.6|If you trust the file|This file can still be loaded)")


def in_a_line(error: BaseException, most: int = 300) -> str:
    """An exception as part of a message: its kind and its text on one line, and not long.

    torch and numpy go on with how to run what a file holds; that is left out.
    """
    text = _UNSAFE.split(" ".join(str(error).split()))[0]
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
