"""Groups of options as the arguments of a command, with a titled panel each in its help."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from dkdm.reading.options import Grouped, Options, flag, helps, hints
from dkdm.reading.values import members

Parsed = TypeVar("Parsed", bound=Grouped)
MOST_OF_CHOICES = 24  # characters beside an option's name; longer ones follow its help
_PLACES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


def parse(
    start: type[Parsed] | Parsed, args: Sequence[str], also: Mapping[str, str] | None = None
) -> Parsed:
    """The groups with the options that a command line gives, on top of those of `start`.

    also: options that are read before, and their help. Prints the help or what is wrong with the
    command line, and exits, as argparse does. Raises UsageError for an option's wrong value.
    """
    cls = start if isinstance(start, type) else type(start)
    values = {} if isinstance(start, type) else start.flat()
    kinds = hints(cls)
    panels = {name: _panel(kind, values) for name, kind in kinds.items()}
    fields: list[Any] = [
        (name, Annotated[bool, _words(text, None, None), tyro.conf.FlagCreatePairsOff], False)
        if name in ("dry_run", "smoke")
        else (name, Annotated[str | None, _words(text, None, "TEXT")], None)
        for name, text in (also or {}).items()
    ]
    fields += [
        (name, Annotated[panel, _titled(kinds[name])], dataclasses.field())
        for name, panel in panels.items()
    ]
    form: Any = dataclasses.make_dataclass(cls.__name__, fields, kw_only=True)
    found: Any = tyro.cli(
        form, args=list(args), prog=f"dkdm {cls.command}", description=description(cls)
    )
    given = {
        kind.option(field): getattr(getattr(found, name), field)
        for name, kind in kinds.items()
        for field in hints(kind)
    }
    return cls(**given)


def _panel(kind: type[Options], values: Mapping[str, Any]) -> type:
    """A group as tyro takes it: its options by the names they have on the command line."""
    fields: list[Any] = []
    positional: Any = tyro.conf.Positional
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        option, hint = kind.option(field.name), hints(kind)[field.name]
        default = values.get(option, field.default)
        place = _place(hint, default)
        if field.name in kind.positional:
            hint, place = positional[hint], _position(option, hint, default)
        choices = None
        if place and place.startswith("{") and len(place) > MOST_OF_CHOICES:
            place, choices = "TEXT", place.strip("{}").replace(",", ", ")
        words = _words(helps(kind)[field.name], default, place, flag(option)[2:], choices)
        fields.append((field.name, Annotated[hint, words], default))
    return dataclasses.make_dataclass(
        kind.__name__, fields, namespace={"__doc__": summary(kind)}, kw_only=True
    )


def _titled(kind: type[Options]) -> Any:
    """How tyro shows a group. Without a help, it would look for one in the source of its class."""
    return tyro.conf.arg(name=kind.title, help=summary(kind))


def _words(
    text: str,
    default: Any,
    place: str | None,
    name: str | None = None,
    choices: str | None = None,
) -> Any:
    """How tyro shows an option: under its name, its choices, and what it is if it is not given."""
    about = [] if choices is None else [f"one of: {choices}"]
    about += [] if default in (None, "", ()) else [f"default: {_text(default)}"]
    shown = f"({'; '.join(about)})" if about else ""
    return tyro.conf.arg(
        name=name, help=text, metavar=place, help_behavior_hint=shown, prefix_name=False
    )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _position(option: str, hint: Any, default: Any) -> str:
    """What stands for a value that is given by its place: in brackets if it may be left out."""
    name = option.upper()
    if typing.get_origin(hint) is tuple:
        return f"{name.removesuffix('S')} ..."
    return name if default is dataclasses.MISSING else f"[{name}]"


def _place(hint: Any, default: Any) -> str | None:
    """What stands for an option's value in the help; None for one without a value."""
    kinds = [kind for kind in members(hint) if kind is not type(None)]
    if kinds == [bool]:
        return None
    may_be_none = type(None) in members(hint) and default is not None
    return "|".join([*map(_one, kinds), *(["None"] if may_be_none else [])])


def _one(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _one(inner[0])
    if origin is Literal:
        return "{" + ",".join(inner) + "}" if len(inner) > 1 else inner[0]
    if origin is tuple:
        return f"{_one(inner[0])} ..." if inner[-1] is ... else " ".join(map(_one, inner))
    return _PLACES[kind]


def description(cls: type) -> str:
    """The docstring of a command: what it does, and examples, which are indented."""
    return inspect.cleandoc(cls.__doc__ or "")


def summary(cls: type) -> str:
    """The first line of a class's docstring."""
    return (cls.__doc__ or "").partition("\n")[0]
