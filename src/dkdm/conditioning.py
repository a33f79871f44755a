"""What a network is fed per sample beside (x_t, t), and guidance.

A condition is a dict of tensors with one row a sample; its keys are the network's own keyword
arguments. The empty dict is unconditional.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dkdm.errors import UsageError

Condition = dict[str, Tensor]


class Conditioning(Protocol):
    """Where the conditions of a model come from."""

    def draw(self, count: int, generator: torch.Generator, dropout: float = 0.0) -> Condition:
        """Random conditions for `count` samples, each replaced by the null one with probability
        `dropout` (classifier-free guidance, arXiv 2207.12598, algorithm 1)."""

    def null(self, count: int) -> Condition:
        """The condition that means "nothing asked". Raises UsageError where the model has none."""


@dataclass(frozen=True)
class Unconditional:
    """No condition at all."""

    def draw(self, count: int, generator: torch.Generator, dropout: float = 0.0) -> Condition:
        """The empty condition."""
        del count, generator, dropout
        return {}

    def null(self, count: int) -> Condition:
        """Raises UsageError: there is nothing to guide."""
        del count
        raise UsageError("guidance needs a conditional model, and this one is unconditional")


@dataclass(frozen=True)
class ClassLabels:
    """Class ids 0..num_classes-1, fed as `class_labels`.

    null_class: the id that means "no class"; None where the model has none.
    classes: the ids to draw from, uniformly; None draws from all.
    names: what the ids mean, for pictures; None shows numbers.
    """

    num_classes: int
    null_class: int | None = None
    classes: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self.check(self.classes or ())

    def check(self, labels: Sequence[int]) -> None:
        """Raise UsageError for an id that is neither a class nor the null class."""
        wrong = sorted(
            {i for i in labels if not 0 <= i < self.num_classes and i != self.null_class}
        )
        if wrong:
            raise UsageError(
                f"class id {', '.join(map(str, wrong))} out of range: "
                f"expected 0..{self.num_classes - 1}"
            )

    def of(self, labels: Sequence[int]) -> Condition:
        """The condition for given class ids."""
        self.check(labels)
        return {"class_labels": torch.tensor(labels, dtype=torch.int64)}

    def draw(self, count: int, generator: torch.Generator, dropout: float = 0.0) -> Condition:
        """Uniform class ids, int64 [count]."""
        ids = torch.tensor(self.classes or range(self.num_classes))
        labels = ids[torch.randint(len(ids), (count,), generator=generator)]
        if dropout:
            dropped = torch.rand(count, generator=generator) < dropout
            labels = torch.where(dropped, self.null(count)["class_labels"], labels)
        return {"class_labels": labels}

    def null(self, count: int) -> Condition:
        """The null class for every sample."""
        if self.null_class is None:
            raise UsageError(
                f"guidance and condition dropout need a null class, and this model has only "
                f"{self.num_classes} classes: expected --guidance-scale 1, --condition-dropout 0"
            )
        return {"class_labels": torch.full((count,), self.null_class)}


def restrict_classes(conditioning: Conditioning, classes: tuple[int, ...] | None) -> Conditioning:
    """The same conditioning, drawing from the given class ids only; None changes nothing.

    Raises UsageError for a model without classes and for an id out of range.
    """
    if classes is None:
        return conditioning
    if not isinstance(conditioning, ClassLabels):
        raise UsageError("--classes was given, but the teacher has no classes")
    return replace(conditioning, classes=classes)


def guide(conditional: Tensor, unconditional: Tensor, scale: float, channels: int) -> Tensor:
    """Classifier-free guidance, `u + scale * (c - u)`, on the first `channels` channels only.

    conditional, unconditional: network outputs [B, C or 2C, ...]; scale 1 is no guidance. The
    variance half stays the conditional one. Source: arXiv 2207.12598, Eq. 6 (w = scale - 1).
    """
    mean, free = conditional[:, :channels], unconditional[:, :channels]
    return torch.cat([free + scale * (mean - free), conditional[:, channels:]], dim=1)
