"""Check a value against a type: of an option, of an entry in a file, of a Python argument.

The caller names the place of the value; this module says what is accepted there.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast

from dkdm.errors import UsageError

MAX_TEXT = 100_000  # characters of a text
MAX_ITEMS = 100_000  # of a list
LARGEST = 10**15  # an option's number without a bound
FINITE = 1e300  # numbers beyond it overflow in the next product
Made = TypeVar("Made")


class WrongValueError(Exception):
    """What is accepted in place of a value."""


@dataclass(frozen=True)
class Range:
    """The numbers that are accepted; above, below: the bound itself is left out."""

    low: float = -LARGEST
    high: float = LARGEST
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is finite and in the range."""
        least = self.low < value if self.above else self.low <= value
        most = value < self.high if self.below else value <= self.high
        return least and most and abs(value) <= FINITE

    def __str__(self) -> str:
        low, high = (f"{end:,}" for end in (self.low, self.high))
        if self.low <= -LARGEST:
            return "" if self.high >= LARGEST else f" of {high} or less"
        if self.high >= LARGEST:
            return f" above {low}" if self.above else f" of {low} or more"
        if self.above or self.below:
            least = f"above {low}" if self.above else f"of {low} or more"
            return f" {least} and {'below' if self.below else 'at most'} {high}"
        return f" from {low} to {high}"


_UNBOUNDED = {int: Range(-(2**63) + 1, 2**63 - 1), float: Range(-FINITE, FINITE)}


def as_type(hint: Any, value: Any, strict: bool = False) -> Any:
    """A value in a type.

    hint: bool, int, float, str, Path, None, Any, a Literal, tuple, Mapping, dataclass or union.
    `Annotated[int, Range(1)]` bounds a number. strict: as JSON has values. Otherwise numbers and
    arrays of numpy and torch, whole numbers such as 3.0, and numbers and paths for a text are taken
    too. Raises WrongValueError with what is accepted.
    """
    accepted = []
    for kind in members(hint):
        try:
            return _READERS.get(typing.get_origin(kind) or kind, _object)(kind, value, strict)
        except WrongValueError as error:
            accepted.append(str(error))
    raise WrongValueError(", or ".join(filter(None, accepted)))


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def accept(value: Any, legal: bool, otherwise: str) -> Any:
    """The value, if it is legal. Raises WrongValueError."""
    if not legal:
        raise WrongValueError(otherwise)
    return value


def _number(kind: Any, value: Any, range: Range, strict: bool) -> Any:
    value = value if strict else scalar(value)
    what = "a whole number" if kind is int else "a number"
    if not strict and kind is int and type(value) is float and value.is_integer():
        value = int(value)
    legal = type(value) in ((int,) if kind is int else (int, float)) and range.holds(value)
    return kind(accept(value, legal, f"{what}{range}"))


def _word(hint: Any, value: Any, _: bool) -> Any:
    """One of the words or whole numbers of a Literal."""
    among = typing.get_args(hint)
    words = f"{'one of ' * (len(among) > 1)}{', '.join(map(str, among))}"
    return accept(value, type(value) in (str, int) and value in among, words)


def _is_text(value: Any) -> bool:
    """Whether this is a string, not too long and without the character that ends one."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and "\0" not in value


def _text(_: Any, value: Any, strict: bool) -> str:
    value = value if strict else scalar(value)
    plain = not strict and (type(value) in (int, float) or isinstance(value, Path))
    return str(accept(value, plain or _is_text(value), "a text"))


def _path(_: Any, value: Any, strict: bool) -> Path:
    legal = _is_text(value) or (isinstance(value, Path) and not strict)
    return Path(accept(value, legal, "a path"))


def _flag(_: Any, value: Any, strict: bool) -> bool:
    value = value if strict else scalar(value)
    return bool(accept(value, type(value) is bool, "true or false" if strict else "True or False"))


def _none(_: Any, value: Any, strict: bool) -> None:
    accept(value, value is None, "null" * strict)


def _tuple(hint: Any, value: Any, strict: bool) -> tuple[Any, ...]:
    kinds = typing.get_args(hint)
    value = value.tolist() if not strict and is_array(value) and value.ndim else value
    listed = isinstance(value, (tuple, list)) and len(value) <= MAX_ITEMS
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(accept(value, listed, "a list"))
    value = accept(value, listed and len(value) == len(kinds), f"a list of {len(kinds)}")
    try:
        return tuple(as_type(kind, item, strict) for kind, item in zip(kinds, value, strict=True))
    except WrongValueError as error:
        raise WrongValueError(f"a list, each {error}") from error


def _mapping(hint: Any, value: Any, strict: bool) -> dict[str, Any]:
    _, kind = typing.get_args(hint)
    entries = accept(value, isinstance(value, Mapping), "an object").items()
    try:
        return {key: as_type(kind, item, strict) for key, item in entries}
    except WrongValueError as error:
        raise WrongValueError(f"an object, each {error}") from error


def made_of(cls: type[Made], values: object, where: str, **given: Any) -> Made:
    """A dataclass from the entries of a JSON object, each of the type of its field.

    where: the file, for messages. given: fields that do not come from the file. Unknown entries are
    left out. Raises UsageError that names an entry that is missing or of another type.
    """
    try:
        return cast("Made", _object(cls, values, True, given))
    except WrongValueError as error:
        raise UsageError(f"{where}: give {error}") from error


def _object(cls: Any, value: Any, strict: bool, given: Mapping[str, Any] | None = None) -> Any:
    accept(value, isinstance(value, Mapping), "an object")
    hints, made = typing.get_type_hints(cls, include_extras=True), dict(given or {})
    for entry in dataclasses.fields(cls):
        required = entry.default is entry.default_factory is dataclasses.MISSING
        if entry.name not in made and (required or entry.name in value):
            found = value.get(entry.name, dataclasses.MISSING)
            try:
                made[entry.name] = as_type(hints[entry.name], found, strict)
            except WrongValueError as error:
                raise WrongValueError(f"an object in which {entry.name} is {error}") from error
    return cls(**made)


def scalar(value: Any) -> Any:
    """A number of numpy or torch as Python's; other values as they are."""
    return value.item() if is_array(value) and value.ndim == 0 else value


def is_array(value: Any) -> bool:
    """Whether this is a tensor, or an array or number of numpy; neither is imported for it."""
    return all(hasattr(value, name) for name in ("item", "ndim", "shape")) and not isinstance(
        value, type
    )


_READERS: dict[Any, Callable[[Any, Any, bool], Any]] = {
    Annotated: lambda hint, value, strict: _number(
        hint.__origin__, value, hint.__metadata__[0], strict
    ),
    Literal: _word,
    tuple: _tuple,
    Mapping: _mapping,
    Any: lambda _, value, __: value,
    bool: _flag,
    int: lambda kind, value, strict: _number(kind, value, _UNBOUNDED[kind], strict),
    float: lambda kind, value, strict: _number(kind, value, _UNBOUNDED[kind], strict),
    str: _text,
    Path: _path,
    type(None): _none,
}
