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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, overload

import yaml  # type: ignore[import-untyped]

from dkdm.errors import UsageError

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
    while level:
        inner = [i for v in level if isinstance(v, (dict, list, tuple)) for i in _items(v)]
        deepest += any(isinstance(v, (dict, list, tuple)) for v in level)
        level = inner
    return deepest


def _items(value: Mapping[Any, Any] | Sequence[Any]) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, Mapping) else value)


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

    def _get(self, name: str, default: Any, accepted: str) -> tuple[Any, bool]:
        """(value, whether it is the default)."""
        if name in self.values and not (self.values[name] is None and default is None):
            return self.values[name], False
        if default is _REQUIRED:
            raise UsageError(f"{self.where}: {name} is missing: give {accepted}")
        return default, True

    def wrong(self, name: str, value: Any, accepted: str) -> UsageError:
        """The error that says that an entry has a value which is not accepted."""
        return UsageError(f"{self.where}: {name} is {shown(value)}: give {accepted}")

    @overload
    def number(self, name: str, *, low: float = ..., high: float = ...) -> float: ...
    @overload
    def number(
        self, name: str, default: Default, *, low: float = ..., high: float = ...
    ) -> float | Default: ...
    def number(
        self, name: str, default: Any = _REQUIRED, *, low: float = -1e300, high: float = 1e300
    ) -> Any:
        """A finite number in low..high."""
        accepted = _range("a number", low, high)
        value, absent = self._get(name, default, accepted)
        if absent:
            return value
        if not is_number(value) or not low <= value <= high:
            raise self.wrong(name, value, accepted)
        return float(value)

    @overload
    def whole(self, name: str, *, low: int = ..., high: int = ...) -> int: ...
    @overload
    def whole(
        self, name: str, default: Default, *, low: int = ..., high: int = ...
    ) -> int | Default: ...
    def whole(self, name: str, default: Any = _REQUIRED, *, low: int = 0, high: int = 2**31) -> Any:
        """A whole number in low..high."""
        accepted = _range("a whole number", low, high)
        value, absent = self._get(name, default, accepted)
        if absent:
            return value
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, value, accepted)
        return value

    @overload
    def flag(self, name: str) -> bool: ...
    @overload
    def flag(self, name: str, default: Default) -> bool | Default: ...
    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """true or false."""
        value, absent = self._get(name, default, "true or false")
        if not absent and type(value) is not bool:
            raise self.wrong(name, value, "true or false")
        return value

    @overload
    def text(self, name: str, *, among: Sequence[str] | None = ...) -> str: ...
    @overload
    def text(
        self, name: str, default: Default, *, among: Sequence[str] | None = ...
    ) -> str | Default: ...
    def text(
        self, name: str, default: Any = _REQUIRED, *, among: Sequence[str] | None = None
    ) -> Any:
        """A string; among: the only ones accepted."""
        accepted = "a string" if among is None else f"one of {', '.join(among)}"
        value, absent = self._get(name, default, accepted)
        if absent:
            return value
        if not isinstance(value, str) or (among is not None and value not in among):
            raise self.wrong(name, value, accepted)
        return value

    @overload
    def numbers(
        self, name: str, *, low: float = ..., high: float = ..., count: tuple[int, int] = ...
    ) -> tuple[float, ...]: ...
    @overload
    def numbers(
        self,
        name: str,
        default: Default,
        *,
        low: float = ...,
        high: float = ...,
        count: tuple[int, int] = ...,
    ) -> tuple[float, ...] | Default: ...
    def numbers(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        low: float = -1e300,
        high: float = 1e300,
        count: tuple[int, int] = (1, 100_000),
    ) -> Any:
        """A list of finite numbers in low..high; count: fewest and most of them."""
        fewest, most = count
        accepted = _range(f"a list of {fewest} to {most} numbers", low, high)
        value, absent = self._get(name, default, accepted)
        if absent:
            return value
        legal = isinstance(value, (list, tuple)) and fewest <= len(value) <= most
        if not legal or not all(is_number(v) and low <= v <= high for v in value):
            raise self.wrong(name, value, accepted)
        return tuple(map(float, value))

    @overload
    def inner(self, name: str) -> Fields: ...
    @overload
    def inner(self, name: str, default: Default) -> Fields | Default: ...
    def inner(self, name: str, default: Any = _REQUIRED) -> Any:
        """An object inside this one."""
        value, absent = self._get(name, default, "an object")
        if absent:
            return value
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "an object")
        return Fields(value, f"{self.where}: {name}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether this is a finite number; true and false are not."""
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float and math.isfinite(value)


def _range(what: str, low: float, high: float) -> str:
    if low <= -1e300 and high >= 1e300:
        return what
    if high >= 1e300:
        return f"{what}, {low:g} or more"
    return f"{what} from {low:g} to {high:g}"
