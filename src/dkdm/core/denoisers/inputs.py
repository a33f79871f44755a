"""Custom conditions: tried when a run starts, and given as a file when a model is sampled.

A run with a custom conditioning ships what its network is fed, the tensors of `embed`, as the
argument `cond` of its pipeline. When such a model is loaded, it asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import dropped
from dkdm.core.denoisers.kinds import (
    DTYPES,
    METHODS,
    AsksForRows,
    Condition,
    Conditioning,
    Custom,
    Row,
    kind_of,
    rows_of,
)
from dkdm.errors import UsageError
from dkdm.reading.arrays import read_arrays
from dkdm.reading.fields import Fields, is_name, shown

NULL = "null."  # before the names of what guidance leads away from
TRIED = 3  # rows


def try_conditioning(conditioning: Conditioning) -> None:
    """Call the four methods of a custom conditioning on a few rows.

    Raises UsageError naming the method, what it returned and what it must return.
    """
    if not isinstance(kind_of(conditioning), Custom):
        return
    name = type(conditioning).__name__
    drawn = _tried(f"{name}.draw", lambda: conditioning.draw(TRIED, _random(), 0.0))
    again = _tried(f"{name}.draw", lambda: conditioning.draw(TRIED, _random(), 0.0))
    if any(not torch.equal(again[key], drawn[key]) for key in drawn):
        raise UsageError(
            f"{name}.draw gave other rows for the same generator: draw from `generator` alone, "
            "so that a run can be repeated and resumed"
        )
    _tried(f"{name}.in_turns", lambda: conditioning.in_turns(TRIED), like=drawn)
    _tried(f"{name}.embed", lambda: conditioning.embed(drawn))
    try:
        null = conditioning.null(TRIED)
    except UsageError:
        return  # it has none
    except Exception as error:
        raise UsageError(
            f"{name}.null raised {type(error).__name__}: raise dkdm.UsageError if there is no null "
            "condition"
        ) from error
    _check_rows(f"{name}.null", null, like=drawn)
    dropped = _tried(f"{name}.draw", lambda: conditioning.draw(TRIED, _random(), 1.0))
    if any(not torch.equal(dropped[key], value) for key, value in null.items()):
        raise UsageError(
            f"{name}.draw(count, generator, dropout=1.0) gave other rows than {name}.null(count): "
            "replace each row by null's with probability `dropout`"
        )
    _try_absent(name, conditioning, drawn)


def _try_absent(name: str, conditioning: Conditioning, drawn: Condition) -> None:
    """Try the method that not all have: which rows are evaluated without any condition."""
    absent = getattr(conditioning, "absent", None)
    if absent is None:
        return
    found = absent(drawn)
    legal = isinstance(found, Tensor) and found.dtype == torch.bool and found.shape == (TRIED,)
    if not legal and found is not None:
        raise UsageError(
            f"{name}.absent returned {shown(found)}: return a bool tensor with one entry a row, "
            f"here {TRIED}, or None"
        )


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _tried(what: str, call: Callable[[], Any], like: Condition | None = None) -> Condition:
    try:
        found = call()
    except Exception as error:
        method = METHODS[what.rpartition(".")[2]]
        hint = f"; define {method}" if isinstance(error, TypeError) else ""
        raise UsageError(f"{what}({TRIED}) raised {type(error).__name__}: {error}{hint}") from error
    _check_rows(what, found, like)
    return dict(found)


def _check_rows(what: str, found: Any, like: Condition | None) -> None:
    """Raise UsageError for what are no rows, or not of the names, shapes and dtypes of `like`."""
    must = f"it must return a dict of tensors with one row a sample, here {TRIED}"
    if not isinstance(found, Mapping):
        raise UsageError(f"{what} returned {shown(found)}: {must}")
    for key, value in found.items():
        if not is_name(key) or key == "guidance":
            raise UsageError(f"{what} returned the key {key!r}: use another name, letters and _")
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != TRIED:
            has = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"{what} returned {has} for '{key}': {must}")
    ours, theirs = rows_of(found), rows_of(found if like is None else like)
    if ours != theirs:
        raise UsageError(f"{what} returned {ours}, draw {theirs}: return the same names and shapes")


def to_index(shapes: Mapping[str, Row]) -> dict[str, Any]:
    """The entry of model_index.json."""
    return {key: {"shape": list(row.shape), "dtype": row.dtype} for key, row in shapes.items()}


def from_index(entry: Any, where: str) -> GivenRows:
    """The conditioning that an entry of model_index.json describes, without rows.

    Raises UsageError for what is no such entry.
    """
    if not isinstance(entry, Mapping) or not entry or not all(map(is_name, entry)):
        raise UsageError(f"{where}: _conditions is {shown(entry)}: give shapes by name")
    shapes = {}
    for key in entry:
        fields = Fields(entry, f"{where}: _conditions").inner(key)
        sides = fields.numbers("shape", low=1, high=1e6, count=(0, 4))
        dtype = fields.text("dtype", among=tuple(DTYPES))
        shapes[key] = Row(tuple(int(side) for side in sides), dtype)
    return GivenRows(shapes)


@dataclass(frozen=True, eq=False)
class GivenRows(AsksForRows):
    """Conditions that whoever samples the model gives, as the network is fed them.

    shapes: of one row, by name. rows: N of them; None as long as none are given. nulls: one row of
    each, for guidance; None without.
    """

    label = "GivenRows"
    shapes: Mapping[str, Row]
    rows: Condition | None = None
    nulls: Condition | None = None

    def _given(self) -> Condition:
        if self.rows is None:
            fed = ", ".join(f"{key} {row.shape} {row.dtype}" for key, row in self.shapes.items())
            raise UsageError(
                f"this model is fed {fed}: give rows of them, --cond FILE.safetensors or FILE.npz"
            )
        return self.rows

    def draw(self, count: int, generator: torch.Generator, dropout: float = 0.0) -> Condition:
        rows = self._given()
        chosen = torch.randint(len(next(iter(rows.values()))), (count,), generator=generator)
        return dropped(self, {k: v[chosen] for k, v in rows.items()}, generator, dropout)

    def null(self, count: int) -> Condition:
        if self.nulls is None:
            names = ", ".join(f"{NULL}{key}" for key in self.shapes)
            raise UsageError(
                f"guidance needs the null condition: add {names} of one row to the file of --cond, "
                "or remove --guidance-scale"
            )
        return {k: v.expand(count, *v.shape[1:]) for k, v in self.nulls.items()}

    def in_turns(self, count: int) -> Condition:
        rows = self._given()
        order = torch.arange(count) % len(next(iter(rows.values())))
        return {key: value[order] for key, value in rows.items()}

    def fed(self) -> dict[str, Row]:
        return dict(self.shapes)

    def example(self, count: int) -> Condition:
        return {
            key: torch.zeros(count, *row.shape, dtype=DTYPES[row.dtype])
            for key, row in self.shapes.items()
        }


def refuse_without_rows(conditioning: Conditioning, name: str) -> None:
    """Raise UsageError for a teacher that needs rows: a run draws conditions all the time."""
    if isinstance(conditioning, GivenRows) and conditioning.rows is None:
        raise UsageError(
            f"the teacher {name} was trained with a custom conditioning, which its folder "
            "does not hold: give a function, --teacher module:function, that returns "
            f"dataclasses.replace(dkdm.load_teacher({name!r}), conditioning=...)"
        )


def with_rows(conditioning: Conditioning, path: Path | None) -> Conditioning:
    """A model's conditioning with the rows of a file; None changes nothing.

    path: a file with a tensor [N, ...] by each name; `null.NAME`, one row, is what guidance leads
    away from. Raises UsageError for a model without such conditions, and for rows
    with other names or shapes.
    """
    if path is None:
        return conditioning
    if not isinstance(conditioning, GivenRows):
        raise UsageError(f"--cond {path}: this model has no custom conditions: remove --cond")
    arrays = read_arrays(f"--cond {path}", path)
    found = {key: _as_row(conditioning, key, v, path) for key, v in arrays.items()}
    rows = {key: value for key, value in found.items() if not key.startswith(NULL)}
    nulls = {key.removeprefix(NULL): v for key, v in found.items() if key.startswith(NULL)}
    wanted = [*conditioning.shapes, *(f"{NULL}{key}" for key in conditioning.shapes if nulls)]
    missing = [key for key in wanted if key not in found]
    if missing:
        raise UsageError(f"--cond {path} has no {', '.join(missing)}: add it")
    if len({len(value) for value in rows.values()}) != 1 or not len(next(iter(rows.values()))):
        raise UsageError(f"--cond {path}: give as many rows under each name, one at least")
    if any(len(value) != 1 for value in nulls.values()):
        raise UsageError(f"--cond {path}: give one row under each {NULL}NAME")
    return replace(conditioning, rows=rows, nulls=nulls or None)


def _as_row(conditioning: GivenRows, key: str, value: Tensor, path: Path) -> Tensor:
    """Rows in the dtype that the network was fed."""
    row = conditioning.shapes.get(key.removeprefix(NULL))
    if row is None:
        names = ", ".join(conditioning.shapes)
        raise UsageError(f"--cond {path}: the model is not fed '{key}': give {names}")
    if tuple(value.shape[1:]) != row.shape or value.ndim != len(row.shape) + 1:
        raise UsageError(
            f"--cond {path}: {key} has shape {tuple(value.shape)}: give (N, "
            f"{', '.join(map(str, row.shape))})"
        )
    return value.to(DTYPES[row.dtype])
