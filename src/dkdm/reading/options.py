"""Groups of options, each a frozen dataclass that checks its own values when it is made.

A field `pool_size: Annotated[int, Range(1)]` is `--pool-size` on the command line, `pool_size` in
`config.json`, and a keyword of the constructors; the string below it is its help. A group is a
panel of `--help`, and may give its options a prefix or other names.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform

from dkdm.errors import DkdmError, UsageError
from dkdm.reading.arguments import check_names, described
from dkdm.reading.fields import SHOWN
from dkdm.reading.values import WrongValueError, as_type


@dataclass_transform(frozen_default=True)
class Options:
    """Base of a group: its values are brought to their types, or refused with their option's name.

    title: of its panel in --help; the docstring's first line is its description there.
    prefix: what comes before the names of its options; the option of the field `model` is the
    prefix alone. renamed: fields whose option has another name. positional: fields given by their
    place on the command line. All four are keywords of a class, and inherited.
    """

    title: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    renamed: ClassVar[Mapping[str, str]] = {}
    positional: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, renamed: Mapping[str, str] | None = None, **given: Any) -> None:
        _set(cls, renamed={**cls.renamed, **(renamed or {})}, **given)
        dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            value = _checked(self.flag(name), hint, getattr(self, name))
            object.__setattr__(self, name, value)

    @classmethod
    def option(cls, name: str) -> str:
        """The name of a field's option, such as teacher_size."""
        if name in cls.renamed:
            return cls.renamed[name]
        if not cls.prefix:
            return name
        return cls.prefix if name == "model" else f"{cls.prefix}_{name}"

    @classmethod
    def flag(cls, name: str) -> str:
        """The field's option as it is typed, such as --teacher-size."""
        return flag(cls.option(name))


@contextmanager
def as_typed(choice: Options) -> Iterator[None]:
    """Errors about a teacher's options name the ones of this choice: --size for --teacher-size."""

    def typed(found: re.Match[str]) -> str:
        field = found[1].replace("-", "_")
        return choice.flag(field) if field in hints(type(choice)) else found[0]

    try:
        yield
    except DkdmError as error:
        said = re.sub(r"--teacher-([a-z-]*[a-z])", typed, str(error))
        bare = "" if "model" in choice.positional else f"{choice.flag('model')} "
        error.args = (re.sub(r"--teacher (?=\S)", bare, said),)
        raise


def flag(option: str) -> str:
    """An option as it is typed."""
    return f"--{option.replace('_', '-')}"


def _set(cls: type, **given: Any) -> None:
    for name, value in given.items():
        setattr(cls, name, value)


def _hints(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass, with its Range."""
    found = typing.get_type_hints(cls, include_extras=True)
    first = cls.__annotations__ if issubclass(cls, Grouped) else ()
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: found[name] for name in (*first, *names)}


def _helps(cls: type) -> dict[str, str]:
    """The help of each field, on one line: the string below it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.cleandoc(f"\n{inspect.getsource(base)}")).body[0].body  # type: ignore[attr-defined]
        for field, below in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                found[field.target.id] = " ".join(text.split())  # type: ignore[union-attr]
    return found


class Grouped:
    """Base of a set of groups, one a field, made and read by the names of the options too.

    `DistillConfig(seed=1)`, `dataclasses.replace(config, seed=1)` and `config.seed` reach into the
    group that has this option. command: the one whose options these are. meant: options by the
    names that people give them elsewhere. Both are keywords of a class. A class's groups come
    before those that it inherits.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    command: ClassVar[str] = ""
    meant: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **given: Any) -> None:
        _set(cls, **given)
        dataclass(frozen=True, init=False)(cls)

    def __init__(self, /, *unnamed: object, **given: Any) -> None:
        if unnamed:
            name = type(self).__name__
            raise UsageError(f"{name}({described(unnamed[0])}): name each option: {name}(seed=1)")
        groups, options = hints(type(self)), places(type(self))
        asked = {name: value for name, value in given.items() if name not in groups}
        check_names(f"{type(self).__name__}(...)", asked, options, self.meant)
        for name, kind in groups.items():
            inner = {options[key][1]: v for key, v in asked.items() if options[key][0] == name}
            group = given.get(name, getattr(type(self), name, None))
            if group is None:
                group = kind(**inner)
            elif not isinstance(group, kind):
                raise UsageError(f"{name}: give a {kind.__name__}(...)")
            object.__setattr__(self, name, dataclasses.replace(group, **inner))

    if not TYPE_CHECKING:  # dkdm itself reads from the groups, whose types are known

        def __getattr__(self, name: str) -> Any:
            place = places(type(self)).get(name)
            if place is None or place[0] not in self.__dict__:
                raise AttributeError(f"{type(self).__name__} has no option {name!r}")
            return getattr(self.__dict__[place[0]], place[1])

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *places(type(self))]

    def flat(self) -> dict[str, Any]:
        """Every option's value by its name."""
        return {name: getattr(self, name) for name in places(type(self))}


def _places(cls: type) -> dict[str, tuple[str, str]]:
    """The group of each option, and its field there."""
    return {
        kind.option(field): (group, field)
        for group, kind in hints(cls).items()
        for field in hints(kind)
    }


hints: Callable[[type], dict[str, Any]] = functools.cache(_hints)
helps: Callable[[type], dict[str, str]] = functools.cache(_helps)
places: Callable[[type], dict[str, tuple[str, str]]] = functools.cache(_places)


def _checked(flag: str, hint: Any, value: Any) -> Any:
    try:
        return as_type(hint, value)
    except WrongValueError as error:
        as_typed = isinstance(value, str) and value.isprintable() and len(value) <= SHOWN
        shown = value if as_typed or isinstance(value, (int, float)) else described(value)
        raise UsageError(f"{flag} {shown}: give {error}") from error
