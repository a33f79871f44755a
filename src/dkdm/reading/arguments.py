"""What a Python user hands over, checked by type and range when it comes in.

Numbers of numpy and torch are taken where a number is meant. Every refusal is one line with the
argument's name, the value, what is accepted and, if it is known, what was probably meant. Arrays
are in `arrays`, which needs torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, NoReturn, Self

from dkdm.errors import UsageError
from dkdm.reading.fields import shown
from dkdm.reading.values import FINITE, Range, WrongValueError, as_type, is_array, scalar


class NamedArguments:
    """A class whose constructor names the nearest argument for one that it does not have.

    meant: arguments by the names that people give them elsewhere.
    """

    meant: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *_: Any, **named: Any) -> Self:
        """An object that is still to be initialized. Raises UsageError for an unknown argument."""
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        check_names(f"{cls.__name__}(...)", named, known, cls.meant)
        return super().__new__(cls)


def check_names(
    where: str, given: Mapping[str, Any], known: Iterable[str], meant: Mapping[str, str]
) -> None:
    """Raise UsageError for the first name that is not known, with the nearest ones that are."""
    known = list(known)
    for name, value in given.items():
        if name not in known:
            use = f"use {meant[name]}" if meant.get(name) in known else nearest(name, known)
            there = f"{where}: there is no {shown(name)}"
            raise UsageError(f"{there} (given as {described(value)}): {use}")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to use instead of an unknown name: the closest ones, or all."""
    known = list(known)
    words = set(name.split("_"))
    sharing = [k for k in known if len(words & set(k.split("_"))) > 1]
    near = [*get_close_matches(name, known, 3, 0.6), *sharing]
    near = list(dict.fromkeys(near)) or get_close_matches(name, known, 3, 0.4)
    return f"use {' or '.join(near[:3])}" if near else f"use one of {', '.join(known)}"


def refuse(name: str, value: Any, accepted: str) -> NoReturn:
    """Raise the UsageError that says which value of an argument is not accepted."""
    raise UsageError(f"{name} is {described(value)}: {accepted}")


def described(value: Any) -> str:
    """A value as a message shows it: short, tensors by their shape, objects by their kind."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if is_array(value):
        return f"an array of shape {tuple(value.shape)}"
    if hasattr(value, "state_dict"):
        return f"a network, {type(value).__name__}"
    if callable(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    plain = (str, int, float, bool, tuple, list, dict, type(None))
    return shown(value) if isinstance(value, plain) else f"an object of {type(value).__name__}"


def given(name: str, value: Any, kind: Any, accepted: str = "") -> Any:
    """A value in a type, as `as_type` reads it; accepted: what a refusal says instead of it."""
    try:
        return as_type(kind, value)
    except WrongValueError as error:
        refuse(name, value, accepted or f"give {error}")


def instance(
    name: str, value: Any, kind: Any, accepted: str, instead: Mapping[Any, str] | None = None
) -> Any:
    """An object of a class; instead: the remedy for one of another class, the first that fits."""
    if isinstance(value, kind):
        return value
    remedies = (remedy for other, remedy in (instead or {}).items() if isinstance(value, other))
    refuse(name, value, next(remedies, accepted))


def number(
    name: str, value: Any, low: float = -FINITE, high: float = FINITE, open_low: bool = False
) -> float:
    """A finite number in low..high; open_low: low itself is left out."""
    return float(given(name, value, Annotated[float, Range(low, high, open_low)]))


def whole(name: str, value: Any, low: int = 0, high: int = 2**31) -> int:
    """A whole number in low..high."""
    return int(given(name, value, Annotated[int, Range(low, high)]))


def chosen(name: str, value: Any, allowed: Iterable[str], others: Mapping[str, str]) -> str:
    """One of the allowed words.

    others: by allowed word, what people call it elsewhere, separated by spaces, for the message.
    """
    allowed = tuple(allowed)
    if isinstance(value, str) and value in allowed:
        return value
    key = value.lower().replace("-", "_") if isinstance(value, str) else ""
    named = [ours for ours, names in others.items() if key in names.split()]
    meant = next(iter([*named, *get_close_matches(key, allowed, 1)]), None)
    hint = f"did you mean '{meant}'? It is" if meant else "give"
    refuse(name, value, f"{hint} one of {', '.join(allowed)}")


def shape(name: str, value: Any) -> tuple[int, ...]:
    """The shape (C, ...) of one sample; a number n is the shape (n,) of a vector."""
    accepted = "give the shape of one sample without the batch, such as (3, 32, 32)"
    sides = (value,) if type(scalar(value)) is int else value
    sizes: tuple[int, ...] = given(name, sides, tuple[Annotated[int, Range(1)], ...], accepted)
    return sizes if 1 <= len(sizes) <= 5 else refuse(name, value, accepted)


def set_fields(value: Any, **fields: Any) -> None:
    """Set fields of a frozen dataclass while it is made."""
    for name, found in fields.items():
        object.__setattr__(value, name, found)
