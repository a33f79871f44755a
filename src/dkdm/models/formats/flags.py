"""Flags of the original repositories' own command lines, given as one string."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

from dkdm.errors import UsageError
from dkdm.reading import options


def read_flags(flags: str, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The values of `--name value` or `--name=value`; hyphens and underscores are the same.

    known: name with underscores -> what reads its value. Flags that are not given are left out.
    Raises UsageError for an unknown flag, and for a value that is missing or cannot be read.
    """
    words = [word for part in shlex.split(flags) for word in part.split("=", 1)]
    found = {}
    for flag, value in zip_longest(words[::2], words[1::2]):
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in known:
            raise UsageError(
                f"--teacher-flags: unknown '{flag}': this format takes "
                f"{', '.join(map(options.flag, known)) or 'no flags'}"
            )
        if value is None:
            raise UsageError(f"--teacher-flags: {flag} needs a value")
        try:
            found[name] = known[name](value)
        except ValueError as error:
            raise UsageError(f"--teacher-flags: {flag} {value}: {error}") from error
    return found


def one_of(*allowed: str) -> Callable[[str], str]:
    """Reads one of the given words."""

    def read(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"use one of {', '.join(allowed)}")
        return value

    return read
