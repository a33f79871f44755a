"""Read files of others as data: check what they hold before it is used.

Nothing here imports, allocates or follows what a file says. Every refusal is one line that names
the file, the entry, what was found and what is accepted.
"""

from __future__ import annotations

import json
import keyword
import math
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

import yaml  # type: ignore[import-untyped]

from dkdm.errors import UsageError
from dkdm.reading.values import FINITE, Range, WrongValueError, as_type

MAX_JSON_BYTES = 32 * 2**20
MAX_YAML = 2**20
MAX_DEPTH = 64
SHOWN = 60  # characters of a wrong value in a message
Default = TypeVar("Default")
_REQUIRED: Any = object()


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    what: what the file should be, for the message. Raises UsageError if the file is
    missing, is no regular file, is larger than 32 MiB or nested deeper than 64 levels, or holds
    anything but a JSON object.
    """
    text = read_text(path, what)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"{path} cannot be read as JSON: {reason}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: give a JSON object ({what}), not {shown(values)}")
    if depth(values) > MAX_DEPTH:
        raise UsageError(f"{path} is nested deeper than {MAX_DEPTH} levels")
    return values


def read_text(path: Path, what: str, limit: int = MAX_JSON_BYTES) -> str:
    """Read a UTF-8 text file of at most `limit` bytes.

    Raises UsageError if it is missing, is no regular file, is larger, or is not UTF-8.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is not a file: give {what}")
        if found.st_size > limit:
            raise UsageError(
                f"{path} has {found.st_size:,} bytes, too many for {what} (at most {limit:,})"
            )
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path.parent}: {path.name} is missing: give {what}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def read_yaml(text: str, where: str) -> Any:
    """The plain values of YAML, without aliases, which can make a small file a large one.

    Raises UsageError for YAML that is damaged, longer than 1 MiB or nested deeper than 64 levels,
    and for tags and aliases.
    """
    if len(text) > MAX_YAML:
        raise UsageError(f"{where}: {len(text):,} characters of YAML: give at most {MAX_YAML:,}")
    try:
        level = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            level += isinstance(event, yaml.CollectionStartEvent)
            level -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or level > MAX_DEPTH:
                wrong = "an alias" if level <= MAX_DEPTH else f"more than {MAX_DEPTH} levels"
                raise UsageError(f"{where}: YAML with {wrong}: write the values out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{where}: cannot be read as YAML: {reason}") from error


def depth(value: Any) -> int:
    """How many containers lie inside each other, without recursion."""
    deepest, level = 0, [value]
    while level := [v for v in level if isinstance(v, (dict, list, tuple))]:
        deepest += 1
        level = [i for v in level for i in (v.values() if isinstance(v, dict) else v)]
    return deepest


def shown(value: Any) -> str:
    """A value as it is quoted in a message: on one line, and short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def is_name(value: Any) -> bool:
    """Whether this can name a component: an ASCII identifier that is no keyword of Python."""
    return (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", value) is not None
        and not keyword.iskeyword(value)
        and len(value) <= SHOWN
    )


def as_named(name: Any) -> str:
    """A name that a file gives, for a message: quoted and short unless it is an identifier."""
    return str(name) if is_name(name) else shown(name)


@dataclass(frozen=True)
class Fields:
    """The entries of a JSON object, each checked by type and range when it is read.

    values: the object. where: the file, for messages. An entry that is absent takes the default;
    without a default it is required. `null` counts as absent if the default is None. All methods
    raise UsageError naming file, entry, value and what is accepted.
    """

    values: Mapping[str, Any]
    where: str

    def _read(self, name: str, default: Any, kind: Any) -> Any:
        value = self.values.get(name, default)
        if value is default is not _REQUIRED:
            return default
        try:
            return as_type(kind, value, strict=True)
        except WrongValueError as error:
            if value is not _REQUIRED:
                raise self.wrong(name, value, str(error)) from error
            raise UsageError(f"{self.where}: {name} is missing: give {error}") from error

    def wrong(self, name: str, value: Any, accepted: str) -> UsageError:
        """The error that says that an entry has a value which is not accepted."""
        return UsageError(f"{self.where}: {name} is {shown(value)}: give {accepted}")

    def number(
        self, name: str, default: Default = _REQUIRED, *, low: float = -FINITE, high: float = FINITE
    ) -> float | Default:
        """A finite number in low..high."""
        return self._read(name, default, Annotated[float, Range(low, high)])

    def whole(
        self, name: str, default: Default = _REQUIRED, *, low: int = 0, high: int = 2**31
    ) -> int | Default:
        """A whole number in low..high."""
        return self._read(name, default, Annotated[int, Range(low, high)])

    def flag(self, name: str, default: Default = _REQUIRED) -> bool | Default:
        """true or false."""
        return self._read(name, default, bool)

    def text(
        self, name: str, default: Default = _REQUIRED, *, among: Sequence[str] | None = None
    ) -> str | Default:
        """A string; among: the only ones accepted."""
        return self._read(name, default, str if among is None else Literal[*among])

    def numbers(
        self,
        name: str,
        default: Default = _REQUIRED,
        *,
        low: float = -FINITE,
        high: float = FINITE,
        count: tuple[int, int] = (1, 100_000),
    ) -> tuple[float, ...] | Default:
        """A list of finite numbers in low..high; count: fewest and most of them."""
        found = self._read(name, default, tuple[Annotated[float, Range(low, high)], ...])
        if found is not default and not count[0] <= len(found) <= count[1]:
            accepted = f"a list of {count[0]} to {count[1]:,} numbers"
            raise self.wrong(name, self.values[name], accepted)
        return found

    def inner(self, name: str, default: Default = _REQUIRED) -> Fields | Default:
        """An object inside this one."""
        found = self._read(name, default, Mapping[str, Any])
        return found if found is default else Fields(found, f"{self.where}: {name}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether this is a finite number; true and false are not."""
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float and math.isfinite(value)
