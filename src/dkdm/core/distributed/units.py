"""Which modules of a network are sharded by themselves, and gathered while they compute (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.objectives.feature_loss import stage_names


def shard(module: nn.Module, units: Sequence[nn.Module], device: torch.device) -> None:
    """Shard a module's parameters over all processes, in place.

    units: modules in it whose parameters are gathered by themselves, the inner ones first.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.world(),))
    for unit in (*units, module):
        fully_shard(unit, mesh=mesh)


def units_of(model: Denoiser) -> list[nn.Module]:
    """The blocks of a network, and before them what of a block the network calls by itself.

    As DiT does with the embedding of times, which lies in its first block. The network is evaluated
    once to see it.
    """
    network: nn.Module = model.network  # type: ignore[assignment]
    named = {name: network.get_submodule(name) for name in stage_names(network)}
    blocks = {name: block for name, block in named.items() if list(block.parameters())}
    calls = _Calls(blocks)
    with ExitStack() as stack:
        for name, block in blocks.items():
            for module in block.modules():
                begin = module.register_forward_pre_hook(partial(calls.begin, name))
                end = module.register_forward_hook(partial(calls.end, name))
                stack.callback(begin.remove)
                stack.callback(end.remove)
        with torch.no_grad(), torch.random.fork_rng():
            model.check()
    return [*calls.alone, *blocks.values()]


@dataclass
class _Calls:
    """Which block computes now, and the modules that were called while theirs did not.

    first: of each block that computes, the module whose call began it.
    """

    blocks: Mapping[str, nn.Module]
    first: dict[str, nn.Module] = field(default_factory=dict)
    alone: list[nn.Module] = field(default_factory=list)

    def begin(self, name: str, module: nn.Module, *_: Any) -> None:
        if name in self.first:
            return
        self.first[name] = module
        if module is not self.blocks[name] and module not in self.alone:
            self.alone.append(module)

    def end(self, name: str, module: nn.Module, *_: Any) -> None:
        if self.first.get(name) is module:
            del self.first[name]
