"""What a network is fed per sample beside (x_t, t), and guidance.

A condition is a dict of tensors with one row a sample. What a source stores and draws is small (a
class id, the number of a prompt); `embed` turns it into what the network is fed, whose keys are
named as in diffusers (`class_labels`, ...). The empty dict is unconditional.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dkdm.core.denoisers.kinds import Condition as Condition
from dkdm.core.denoisers.kinds import Conditioning as Conditioning
from dkdm.core.denoisers.kinds import Kind, Row
from dkdm.core.diffusion.process import per_sample
from dkdm.errors import UsageError
from dkdm.reading.arguments import NamedArguments, given, refuse, set_fields, whole
from dkdm.reading.values import Range


@dataclass(frozen=True)
class Unconditional(NamedArguments, Kind):
    """No condition at all."""

    def draw(self, count: int, generator: torch.Generator, dropout: float = 0.0) -> Condition:
        del count, generator, dropout
        return {}

    def null(self, count: int) -> Condition:
        """Raises UsageError: there is nothing to guide."""
        del count
        raise UsageError(
            "guidance and condition dropout need a conditional model, and this one is "
            "unconditional: leave guidance and --condition-dropout out"
        )

    def in_turns(self, count: int) -> Condition:
        del count
        return {}


ABSENT = -1  # in place of an id: the network is called without the argument


@dataclass(frozen=True, init=False)
class ClassLabels(NamedArguments, Kind):
    """Class ids 0..num_classes-1, fed as `class_labels`.

    null_class: the id that means "no class", num_classes or one of the others, which then is no
        class and is not drawn; "absent" calls the network without class_labels; None if the
        model has no such id. `null` is another name of it.
    classes: the ids to draw from, which a student learnt; None is all.
    weights: how often each of those is drawn, relative to the others; None draws them equally.
    names: what the ids mean, for images; None shows numbers.
    """

    asks = "class_labels"
    label = "class labels"
    num_classes: int
    null_class: int | Literal["absent"] | None
    classes: tuple[int, ...] | None
    names: tuple[str, ...] | None
    weights: tuple[float, ...] | None

    def __init__(
        self,
        num_classes: int,
        null_class: int | Literal["absent"] | None = None,
        classes: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        *,
        null: int | Literal["absent"] | None = None,
    ) -> None:
        if null is not None and null_class is not None:
            raise UsageError(f"ClassLabels: null is {null!r} and null_class too: give one of them")
        count = whole("ClassLabels: num_classes", num_classes, 1)
        ids = Literal["absent"] | Annotated[int, Range(0, count)] | None
        accepted = f"give {count}, one of 0..{count - 1} that is no class, 'absent' or None"
        null = given("ClassLabels: null_class", null_class if null is None else null, ids, accepted)
        set_fields(
            self,
            num_classes=count,
            null_class=null,
            classes=_row("classes", classes, int, "whole numbers"),
            names=_row("names", names, str, "strings"),
            weights=_row("weights", weights, float, "finite numbers"),
        )
        self.check(self.drawn)
        if not self.drawn:
            raise UsageError("classes: give at least one class id")
        if self.names is not None and len(self.names) != count:
            refuse("ClassLabels: names", self.names, f"give {count} names, one a class")
        self._check_weights()

    def _check_weights(self) -> None:
        weights = self.weights
        if weights is None:
            return
        if len(weights) != len(self.drawn) or min(weights) < 0 or not any(weights):
            raise UsageError(
                f"class weights {', '.join(map(str, weights))}: give {len(self.drawn)} "
                "numbers >= 0 that are not all 0, one for each class"
            )

    @property
    def null_is_absent(self) -> bool:
        """Whether "no class" is a call without class_labels."""
        return isinstance(self.null_class, str) and self.null_class == "absent"

    @property
    def drawn(self) -> tuple[int, ...]:
        """The ids that are drawn."""
        if self.classes is not None:
            return self.classes
        return tuple(i for i in range(self.num_classes) if i != self.null_class)

    def check(self, labels: Sequence[int]) -> None:
        """Raise UsageError for an id that is neither a class nor the null class."""
        wrong = sorted(
            {i for i in labels if not 0 <= i < self.num_classes and i != self.null_class}
        )
        if wrong:
            raise UsageError(
                f"class id {', '.join(map(str, wrong))} out of range: use 0..{self.num_classes - 1}"
            )

    def of(self, labels: Sequence[int]) -> Condition:
        """The condition for given class ids."""
        self.check(labels)
        return {"class_labels": torch.tensor(labels, dtype=torch.int64)}

    def draw(self, count: int, generator: torch.Generator, dropout: float = 0.0) -> Condition:
        """Class ids by their weights, int64 [count]."""
        ids = torch.tensor(self.drawn)
        if self.weights is None:
            chosen = torch.randint(len(ids), (count,), generator=generator)
        else:
            odds = torch.tensor(self.weights, dtype=torch.float64)
            chosen = torch.multinomial(odds, count, replacement=True, generator=generator)
        return dropped(self, {"class_labels": ids[chosen]}, generator, dropout)

    def null(self, count: int) -> Condition:
        if self.null_class is None:
            raise UsageError(
                f"guidance and condition dropout need a null class, and this model does not say "
                f"which of its {self.num_classes} ids that is: name it (--teacher-null-class "
                f"{self.num_classes - 1}, or --null-class if the model comes first), or leave "
                "guidance and --condition-dropout out"
            )
        null = ABSENT if isinstance(self.null_class, str) else self.null_class
        return {"class_labels": torch.full((count,), null)}

    def in_turns(self, count: int) -> Condition:
        return self.of([self.drawn[i % len(self.drawn)] for i in range(count)])

    def absent(self, cond: Condition) -> Tensor | None:
        """Which rows are evaluated without class_labels, bool [B]; None if there can be none."""
        return cond["class_labels"] == ABSENT if self.null_is_absent else None

    @property
    def table_rows(self) -> int:
        own = self.for_student()
        return max(own.num_classes, int(own.null_class or 0) + 1)

    def summary(self) -> str:
        known = "" if self.classes is None else f"{len(self.drawn)} of "
        return f"{known}{self.num_classes} classes"

    def facts(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes,
            "null_class": self.null_class,
            "class_names": self.names,
            "classes": self.classes,
        }

    def shown_names(self, most: int) -> tuple[str, ...] | None:
        del most
        return self.names

    def example(self, count: int) -> Condition:
        return self.in_turns(count)

    def fed(self) -> dict[str, Row]:
        return {"class_labels": Row((), "int64")}

    def usage(self) -> str:
        return f"class_labels={list(self.drawn[:4])}"

    def for_student(self) -> ClassLabels:
        """The same with a row of a table for "no class", as students have it."""
        if not self.null_is_absent:
            return self
        count = self.num_classes
        return TableOfLabels(count, count, self.classes, self.names, self.weights)


def _row(name: str, value: Any, kind: Any, accepted: str) -> Any:
    """A tuple of ids, names or weights from any sequence of them; None stays."""
    return given(
        f"ClassLabels: {name}", value, tuple[kind, ...] | None, f"give a tuple of {accepted}"
    )


class TableOfLabels(ClassLabels):
    """Labels of a student whose teacher has no row for "no class": absent ids are the last row."""

    def embed(self, cond: Condition) -> Condition:
        """The ids, absent ones as the null class."""
        labels, null = cond.get("class_labels"), self.null_class
        if labels is None or not isinstance(null, int):
            return cond
        return {**cond, "class_labels": labels.where(labels != ABSENT, null)}


def dropped(
    conditioning: Conditioning, cond: Condition, generator: torch.Generator, dropout: float
) -> Condition:
    """Replace each row by the null condition with probability `dropout`."""
    if not dropout:
        return cond
    count = len(next(iter(cond.values())))
    gone = torch.rand(count, generator=generator) < dropout
    null = conditioning.null(count)
    return {
        key: torch.where(gone, null[key], value) if key in null else value
        for key, value in cond.items()
    }


def restrict_classes(
    conditioning: Conditioning,
    classes: tuple[int, ...] | None,
    weights: tuple[float, ...] | None = None,
) -> Conditioning:
    """The same conditioning, drawing from the given class ids only; None changes nothing.

    weights: how often each is drawn; None is equally. Raises UsageError for a model without
    classes, for an id out of range and for weights that do not fit.
    """
    if classes is None and weights is None:
        return conditioning
    if not isinstance(conditioning, ClassLabels):
        raise UsageError("--classes or --class-weights was given, but the model has no classes")
    taught = conditioning.classes
    strangers = sorted(set(classes or ()) - set(taught or conditioning.drawn))
    if taught is not None and strangers:
        raise UsageError(
            f"class {', '.join(map(str, strangers))} was not taught to this model: use "
            f"{', '.join(map(str, taught))}"
        )
    ids = taught if classes is None else classes
    return replace(conditioning, classes=ids, weights=weights)


def with_null_class(conditioning: Conditioning, null: int | Literal["none"]) -> Conditioning:
    """Class labels whose id `null` means "no class" and is not drawn; "none": no id means that.

    Raises UsageError for a model without classes and for an id that the network does not embed.
    """
    if not isinstance(conditioning, ClassLabels):
        raise UsageError(
            "a null class was given (--teacher-null-class), but the model has no classes: leave "
            "this option out"
        )
    if null == "none":
        return replace(conditioning, null_class=None)
    classes = conditioning.num_classes
    if null == conditioning.null_class:
        return conditioning
    if not 0 <= null < classes or classes == 1:
        extra = "" if conditioning.null_class is None else f", {conditioning.null_class}"
        raise UsageError(
            f"--teacher-null-class {null}: give an id that the network embeds, "
            f"0..{classes - 1}{extra}, or none"
        )
    drawn = tuple(i for i in conditioning.drawn if i != null)
    if null < classes - 1:
        return replace(conditioning, null_class=null, classes=drawn)
    names, taught = conditioning.names, conditioning.classes
    return replace(
        conditioning,
        num_classes=classes - 1,
        null_class=null,
        names=names[: classes - 1] if names else None,
        classes=None if taught is None else drawn,
    )


def for_student(conditioning: Conditioning) -> Conditioning:
    """What a student is fed for a teacher's conditions: the same, "no class" as an id."""
    return conditioning.for_student() if isinstance(conditioning, Kind) else conditioning


def absent_rows(conditioning: Conditioning, cond: Condition) -> Tensor | None:
    """Rows that are evaluated without any condition, bool [B]; None if there are none."""
    said = getattr(conditioning, "absent", None)
    if said is None or not cond:
        return None
    rows: Tensor | None = said(cond)
    return None if rows is None or not bool(rows.any()) else rows


Interval = tuple[float, float]


def guide(
    conditional: Tensor, unconditional: Tensor, scale: float | Tensor, channels: int
) -> Tensor:
    """Classifier-free guidance, `u + scale * (c - u)`, on the first `channels` channels only.

    conditional, unconditional: network outputs [B, C or 2C, ...]; scale: one number, or one a
    sample [B]; 1 is no guidance. The variance half stays the conditional one. Source: arXiv
    2207.12598, Eq. 6 (w = scale - 1).
    """
    mean, free = conditional[:, :channels], unconditional[:, :channels]
    factor = per_sample(scale, mean) if isinstance(scale, Tensor) else scale
    return torch.cat([free + factor * (mean - free), conditional[:, channels:]], dim=1)
