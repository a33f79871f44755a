"""Values of a file, checked against the types of the dataclass that they are for."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from dkdm.errors import UsageError
from dkdm.reading.fields import is_number, shown

MAX_TEXT = 100_000  # characters of a text
MAX_ITEMS = 100_000  # of a list
Made = TypeVar("Made")


def made_of(cls: type[Made], values: object, where: str, **given: Any) -> Made:
    """A dataclass from the entries of a JSON object, each of the type of its field.

    where: the file, for messages. given: fields that do not come from the file. Unknown entries are
    left out. Raises UsageError that names the entry for one that is missing or of another type.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: give an object, not {shown(values)}")
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):  # type: ignore[arg-type]
        if entry.name in given:
            continue
        if entry.name in values:
            given[entry.name] = restored(
                hints[entry.name], values[entry.name], f"{where}: {entry.name}"
            )
        elif _is_required(entry):
            raise UsageError(f"{where}: {entry.name} is missing")
    return cls(**given)


def _is_required(entry: dataclasses.Field[Any]) -> bool:
    nothing = dataclasses.MISSING
    return entry.default is nothing and entry.default_factory is nothing


def restored(hint: Any, value: Any, name: str) -> Any:
    """A value of JSON as the type of a field: numbers finite, lists as tuples, paths as Path.

    name: of the entry, for messages. Raises UsageError for a value of another type.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, name)
    if origin is Literal:
        if type(value) not in (str, int) or value not in inner:
            raise _wrong(name, value, f"one of {', '.join(map(str, inner))}")
        return value
    if origin is tuple:
        return _tuple(inner, value, name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return made_of(hint, value, name)
    legal, accepted = _PLAIN[hint]
    if not legal(value):
        raise _wrong(name, value, accepted)
    return hint(value) if hint in (float, Path) else value


def _one_of(hints: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in hints:
        return None
    kinds = [hint for hint in hints if hint is not type(None)]
    for hint in kinds[:-1]:
        try:
            return restored(hint, value, name)
        except UsageError:
            continue
    return restored(kinds[-1], value, name)


def _tuple(inner: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_ITEMS:
        raise _wrong(name, value, "a list")
    hints = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
    if len(hints) != len(value):
        raise _wrong(name, value, f"a list of {len(hints)}")
    pairs = enumerate(zip(hints, value, strict=True))
    return tuple(restored(kind, item, f"{name}[{i}]") for i, (kind, item) in pairs)


def _wrong(name: str, value: Any, accepted: str) -> UsageError:
    return UsageError(f"{name} is {shown(value)}: give {accepted}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and "\0" not in value


_PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: type(value) is bool, "true or false"),
    int: (lambda value: type(value) is int and is_number(value), "a whole number"),
    float: (is_number, "a finite number"),
    str: (_is_text, "a text"),
    Path: (_is_text, "a path"),
}
