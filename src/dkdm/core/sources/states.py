"""States of a pool on their way to the teacher and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.core.devices import to_device
from dkdm.core.mapped import used_at_random

ON_THE_WAY = 1  # batches that may still be travelling to the host when the next one is gathered


@dataclass(eq=False)
class States:
    """States x [N, ...] that are read and written where they lie. device: the teacher's."""

    x: Tensor
    device: torch.device

    def gather(self, rows: Tensor) -> Tensor:
        """Those of some entries, beside the teacher, in float32."""
        used_at_random(self.x)  # a checkpoint may have read it in order
        x = self.x[to_device(rows, self.x.device)]
        return to_device(x, self.device, torch.float32)

    def write(self, rows: Tensor, x: Tensor) -> None:
        """Overwrite those of some entries."""
        self.x[to_device(rows, self.x.device)] = x.to(self.x.device, self.x.dtype)

    def settle(self) -> None:
        """Wait until everything that was written has arrived."""


class Written(NamedTuple):
    """States that travel to the host: of which entries, on the device, in pinned memory."""

    rows: Tensor
    there: Tensor
    here: Tensor
    arrived: torch.cuda.Event | None


@dataclass(eq=False)
class Travelling(States):
    """States in the host's memory, or mapped into it, of a teacher on a device.

    Both ways lead through pinned memory, and nobody waits: what was written last is still taken
    from the device, where it is, and stored when it has arrived.
    """

    _coming: list[Written] = field(default_factory=list, repr=False)

    def gather(self, rows: Tensor) -> Tensor:
        """As `States.gather`; waits for batches before the last one alone."""
        self._store(ON_THE_WAY)
        used_at_random(self.x)
        found = to_device(torch.index_select(self.x, 0, rows, out=self._room(rows)), self.device)
        for written in self._coming:
            into, of = shared_entries(rows, written.rows)
            if len(into):
                found[to_device(into, found.device)] = written.there[to_device(of, found.device)]
        return found.float()

    def write(self, rows: Tensor, x: Tensor) -> None:
        """As `States.write`; they are stored later."""
        there = x.to(self.x.dtype, copy=True)
        here = self._room(rows).copy_(there, non_blocking=True)
        arrived = torch.cuda.Event() if there.device.type == "cuda" else None
        if arrived is not None:
            arrived.record()
        self._coming.append(Written(rows, there, here, arrived))
        self._store(ON_THE_WAY + 1)

    def settle(self) -> None:
        """As `States.settle`."""
        self._store(0)

    def _store(self, leave: int) -> None:
        """Store what was written, but for the last few batches."""
        while len(self._coming) > leave:
            written = self._coming.pop(0)
            if written.arrived is not None:
                written.arrived.synchronize()
            self.x[written.rows] = written.here

    def _room(self, rows: Tensor) -> Tensor:
        """Memory of the host that copies need not wait for; torch keeps it until they are done."""
        pinned = self.device.type == "cuda"
        return torch.empty(len(rows), *self.x.shape[1:], dtype=self.x.dtype, pin_memory=pinned)


def states_of(x: Tensor, device: torch.device, pinned: bool) -> States:
    """States x of a teacher on this device. pinned: whether they travel through pinned memory."""
    apart = pinned and x.device.type == "cpu" and device.type == "cuda"
    return Travelling(x, device) if apart else States(x, device)


def shared_entries(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Where entries of one batch lie in it and in another: places, int64 [n] each.

    rows, others: int64 [B], distinct in themselves.
    """
    ordered, order = others.sort()
    at = torch.searchsorted(ordered, rows).clamp(max=len(others) - 1)
    into = (ordered[at] == rows).nonzero().flatten()
    return into, order[at[into]]
