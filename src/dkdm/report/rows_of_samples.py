"""Samples of several models in rows, a column for each noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dkdm.report.entries import SHOWN, Entry, Samples
from dkdm.report.grids import grid
from dkdm.report.images import reduced
from dkdm.report.plots import is_plotted, plots
from dkdm.report.strips import LARGEST_IN_ROWS, PER_BLOCK, Strip, made


@dataclass(eq=False)
class Rows:
    """Samples [N, ...] from the same noise and for the same names, by who drew them."""

    names: tuple[str, ...]
    students: list[tuple[str, Tensor]] = field(default_factory=list)
    teachers: list[tuple[str, Tensor]] = field(default_factory=list)

    def add(self, name: str, samples: Samples) -> None:
        """Add a model, and its teacher unless the same samples of one are there."""
        self.students.append((name, samples.own[:SHOWN]))
        drawn = None if samples.teacher is None else samples.teacher[:SHOWN]
        if drawn is not None and not any(torch.equal(drawn, other) for _, other in self.teachers):
            self.teachers.append((f"teacher of {name}", drawn))

    @property
    def rows(self) -> list[tuple[str, Tensor]]:
        """Teachers first; a single one is called teacher."""
        alone = len(self.teachers) == 1
        teachers = [("teacher" if alone else name, drawn) for name, drawn in self.teachers]
        return [*teachers, *self.students]


def rows_of_samples(entries: Sequence[Entry], names: Sequence[str]) -> list[Rows]:
    """The samples of all that have some; those from other noise, or for others, lie apart."""
    found: dict[Any, Rows] = {}
    for entry, name in zip(entries, names, strict=True):
        samples = entry.samples
        if samples is not None:
            wanted = samples.names[:SHOWN]
            key = samples.noise, tuple(samples.own.shape[1:]), wanted
            found.setdefault(key, Rows(wanted)).add(name, samples)
    return list(found.values())


def strips_of(rows: Rows) -> Iterator[Strip]:
    """Images of a few columns each, the same rows in all."""
    who, drawn = zip(*rows.rows, strict=True)
    for first in range(0, len(rows.names), PER_BLOCK):
        names = list(rows.names[first : first + PER_BLOCK])
        parts = [samples[first : first + PER_BLOCK] for samples in drawn]
        together = torch.cat(parts)
        shown = plots(together) if is_plotted(together) else reduced(together, LARGEST_IN_ROWS)
        alt = f"{len(names)} samples. Rows: {', '.join(who)}."
        image = grid(shown, len(names))
        strip = made(image, (len(names), PER_BLOCK), "", names if names[0] else [], alt, who)
        yield replace(strip, is_plotted=is_plotted(together))
