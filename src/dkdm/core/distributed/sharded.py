"""Tensors that lie in shards, one for each process (FSDP2), and whole ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.core import processes
from dkdm.core.saving.checkpoint import Part, load_strict


def is_sharded(value: Any) -> bool:
    """Whether a tensor lies in shards."""
    return hasattr(value, "full_tensor")


def whole(value: Any) -> Any:
    """All of a tensor, together; other values as they are."""
    return value.full_tensor() if is_sharded(value) else value


def here(value: Tensor) -> Tensor:
    """The part of a tensor that this process has: all of one that is not sharded."""
    local: Callable[[], Tensor] | None = getattr(value, "to_local", None)
    return value if local is None else local()


def placed_like(value: Tensor, own: Tensor) -> Tensor:
    """This process's part of a whole tensor that lies as `own` does; nothing is sent."""
    if not is_sharded(own) or is_sharded(value) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    there = own.device_mesh, own.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(own.device), *there, src_data_rank=None)


def gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with whole tensors in the main process's memory, together; empty in the others."""
    found = {}
    for key, value in state.items():
        full = whole(value)
        if processes.is_main():
            found[key] = full.cpu() if is_sharded(value) else full
    return found


class Whole:
    """A part whose tensors are sharded, saved and restored as whole ones.

    So that a checkpoint does not depend on the number of processes. own: of a state, the tensors
    that lie as its own do.
    """

    def __init__(
        self, part: Part, own: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    ) -> None:
        self.part, self.own = part, own

    def state_dict(self) -> dict[str, Any]:
        """The whole state in the main process, together; empty in the others."""
        return gathered(self.part.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore each process's shards."""
        own = self.own(state)
        found = {k: placed_like(v, own[k]) if k in own else v for k, v in state.items()}
        if isinstance(self.part, nn.Module):
            load_strict(self.part, found, "the checkpoint")
        else:
            self.part.load_state_dict(found)


def own_state(part: Part) -> Callable[[Mapping[str, Any]], Mapping[str, Tensor]]:
    """The tensors of a part that has all of them from the start."""
    return lambda _: part.state_dict()


def by_parameter(optimizer: torch.optim.Optimizer, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameter that each tensor of an optimizer's state, such as `0.exp_avg`, belongs to."""
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    found = {}
    for name in names:
        index, _, key = name.partition(".")
        if key:
            found[name] = parameters[int(index)]
    return found
