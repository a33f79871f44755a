"""The protocol of a conditioning: four methods of everyone's, and what dkdm asks of each kind.

A new kind of condition is one class with the four methods that inherits `Kind` and overrides the
answers that differ. A user's class with the four methods alone is asked through `Custom`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from dkdm.errors import UsageError
from dkdm.reading.arguments import refuse
from dkdm.reading.values import scalar

Condition = dict[str, Tensor]


class Conditioning(Protocol):
    """Where the conditions of a model come from."""

    def draw(self, count: int, generator: torch.Generator, dropout: float = 0.0) -> Condition:
        """Random conditions for `count` samples, each replaced by the null one with probability
        `dropout` (classifier-free guidance, arXiv 2207.12598, algorithm 1)."""

    def null(self, count: int) -> Condition:
        """The condition that means "nothing asked". Raises UsageError if the model has none."""

    def in_turns(self, count: int) -> Condition:
        """Conditions for `count` samples that take every possibility in turns."""

    def embed(self, cond: Condition) -> Condition:
        """What the network is fed for drawn conditions."""


METHODS = {
    "draw": "draw(count, generator, dropout=0.0)",
    "null": "null(count)",
    "in_turns": "in_turns(count)",
    "embed": "embed(cond)",
}
DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}
Asks = Literal["prompt", "class_labels", "cond"]
Same = TypeVar("Same")


@dataclass(frozen=True)
class Row:
    """What a network is fed under one name for one sample: a shape without the batch, a dtype."""

    shape: tuple[int, ...]
    dtype: str


class Kind:
    """What dkdm asks of a conditioning; the answers are those of a model without conditions.

    asks: what a pipeline asks its user for: prompts, class ids, what the network is fed, or None.
    """

    asks: ClassVar[Asks | None] = None

    @property
    def table_rows(self) -> int | None:
        """Rows of a table of class embeddings, the null class included; None without classes."""
        return None

    @property
    def label(self) -> str:
        """The kind's name in `dkdm inspect`."""
        return "none"

    def summary(self) -> str:
        """What the model is conditioned on, in the words of its card."""
        return self.label

    def facts(self) -> dict[str, Any]:
        """num_classes, null_class, class_names and classes of a model with classes."""
        return {}

    def embed(self, cond: Condition) -> Condition:
        """What the network is fed for drawn conditions: the same."""
        return cond

    def shown_names(self, most: int) -> tuple[str, ...] | None:
        """What the numbers that a sample was drawn for mean; of prompts the first `most`."""
        del most
        return None

    def example(self, count: int) -> Condition | None:
        """Conditions to try a network with; None if none were given yet."""
        del count
        return {}

    def fed(self) -> dict[str, Row]:
        """What the network is fed for one sample, by name."""
        return {}

    def usage(self) -> str:
        """The arguments of a pipeline's call that ask for a few samples."""
        return "batch_size=4"

    def for_student(self: Same) -> Same:
        """What a student is fed for the same conditions."""
        return self


class AsksForRows(Kind):
    """A kind that a pipeline knows only by what the network is fed."""

    asks = "cond"

    def usage(self) -> str:
        """Rows of zeros by each name."""
        rows = self.fed().items()
        fed = (f'"{k}": torch.zeros(4, *{r.shape}, dtype=torch.{r.dtype})' for k, r in rows)
        return f"cond={{{', '.join(fed)}}}"


@dataclass(frozen=True)
class Custom(AsksForRows):
    """The answers for a user's conditioning, which has only the four methods."""

    conditioning: Conditioning

    @property
    def label(self) -> str:
        """The name of its class."""
        return type(self.conditioning).__name__

    def example(self, count: int) -> Condition:
        """The first of its conditions."""
        return self.conditioning.in_turns(count)

    def fed(self) -> dict[str, Row]:
        """Shapes and dtypes of what `embed` returns. Raises UsageError for other dtypes."""
        found = rows_of(self.conditioning.embed(self.example(1)))
        for key, row in found.items():
            if row.dtype not in DTYPES:
                raise UsageError(
                    f"{self.label}.embed gives '{key}' as torch.{row.dtype}, which cannot be "
                    f"shipped: return {', '.join(DTYPES)}"
                )
        return found


def kind_of(conditioning: Conditioning) -> Kind:
    """The answers for a conditioning: its own, or those for a user's class."""
    return conditioning if isinstance(conditioning, Kind) else Custom(conditioning)


def rows_of(embedded: Mapping[str, Tensor]) -> dict[str, Row]:
    """Shape and dtype of one row of each tensor."""
    names = {key: str(value.dtype).removeprefix("torch.") for key, value in embedded.items()}
    return {key: Row(tuple(value.shape[1:]), names[key]) for key, value in embedded.items()}


def null_or_none(conditioning: Conditioning, count: int) -> Condition | None:
    """The null condition; None if the model has none."""
    try:
        return conditioning.null(count)
    except UsageError:
        return None


def check_conditioning(conditioning: Any) -> None:
    """Raise UsageError for what lacks one of the four methods of a `Conditioning`."""
    name = "Denoiser: conditioning"
    if type(scalar(conditioning)) is int:
        refuse(name, conditioning, f"give dkdm.ClassLabels({conditioning})")
    if conditioning is None:
        refuse(name, None, "leave it out, or give dkdm.Unconditional()")
    if isinstance(conditioning, type):
        refuse(name, conditioning, f"make one first: {conditioning.__name__}(...)")
    if isinstance(conditioning, Mapping):
        refuse(name, conditioning, "give constants=... if it is the same for every sample")
    missing = [m for m in METHODS if not callable(getattr(conditioning, m, None))]
    if len(missing) == len(METHODS):
        refuse(name, conditioning, "give dkdm.ClassLabels(...), or an object with draw, null, ...")
    if missing:
        lacks = ", ".join(METHODS[m] for m in missing)
        raise UsageError(f"{name}: {type(conditioning).__name__} has no {lacks}: add it")
