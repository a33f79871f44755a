"""A teacher in shards: its calls gather its blocks, so that all processes must make as many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.core import processes
from dkdm.core.denoisers.calls import Call, Network
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.distributed.units import shard, units_of


@dataclass(eq=False)
class Lockstep:
    """A call that every process makes at the same time.

    How many calls a batch takes depends on what is drawn: new chains are moved by one more. So each
    call is announced, and who has nothing to ask joins those of the others in `align`.
    """

    call: Call
    last: list[Any] = field(default_factory=list)

    def __call__(
        self, network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        """The network's output."""
        processes.any_of(True)
        one = slice(0, 1)
        self.last[:] = network, x[one], time[one], {key: value[one] for key, value in cond.items()}
        return self.call(network, x, time, cond)

    def align(self) -> None:
        """Join the calls of others until all are here; together."""
        with torch.no_grad():
            while processes.any_of(False):
                self.call(*self.last)


def sharded_teacher(teacher: Denoiser, device: torch.device) -> tuple[Denoiser, Callable[[], None]]:
    """The teacher with its weights in shards over all processes (FSDP2), and its `align`."""
    network: nn.Module = teacher.network  # type: ignore[assignment]
    units = units_of(teacher)
    shard(network.requires_grad_(False), units, device)
    assert teacher.call is not None
    lockstep = Lockstep(teacher.call)
    return replace(teacher, call=lockstep), lockstep.align
