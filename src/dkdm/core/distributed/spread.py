"""How what learns is spread over the processes: every one has all of it, or a shard of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.modes import evaluating
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.distributed.sharded import Whole, gathered
from dkdm.core.distributed.units import shard, units_of
from dkdm.core.saving.checkpoint import Part

Loss = Callable[[Denoiser, Batch, Prediction], Tensor]


class Learner(nn.Module):
    """All that learns, as one module whose output is the loss of every sample.

    So that the gradients of everything are reduced, whoever calls the network.
    """

    def __init__(self, network: nn.Module, features: nn.Module | None, objective: Loss) -> None:
        super().__init__()
        self.network, self.features, self.objective = network, features, objective

    def forward(self, student: Denoiser, batch: Batch, target: Prediction) -> Tensor:
        """The loss of every sample, [B]."""
        return self.objective(student, batch, target)


class Replicated:
    """Every process has all of what learns; its gradients are the average of all (DDP)."""

    def place(self, student: Denoiser, features: nn.Module | None) -> None:
        """Lay what learns where it stays; before its optimizer is made."""
        del features
        self.student = student

    def place_beside(self, model: Denoiser) -> None:
        """Lay a network of the same kind that follows what learns, and is only evaluated."""

    def learner(self, learner: Learner) -> nn.Module:
        """The same learner, whose gradients are reduced, but for batches inside its `no_sync`."""
        if processes.world() == 1:
            return learner
        unused = bool(without_gradient(self.student))  # looking for them costs a little every step
        return DistributedDataParallel(learner, find_unused_parameters=unused)

    def part(self, part: Part, own: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]) -> Part:
        """A part of what learns as checkpoints keep it; own: which tensor lies where one does."""
        del own
        return part

    def plain(self, network: nn.Module) -> nn.Module:
        """A network that says what it is."""
        return network

    def copied(self, network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """A copy of a network with these weights, in the main process; together."""
        if not processes.is_main():
            return network
        found = copy.deepcopy(network)
        found.load_state_dict(weights)
        return found


class Sharded(Replicated):
    """Every process has a shard of each tensor of what learns (FSDP2), and of its optimizer's.

    A block of the network is whole while it computes. Equal to `Replicated` to rounding.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # what a network returns may be a view, and is not changed in place here
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)

    def place(self, student: Denoiser, features: nn.Module | None) -> None:
        """Shard what learns; a copy of the network without weights is kept."""
        network: nn.Module = student.network  # type: ignore[assignment]
        self.skeleton = without_weights(network)
        shard(network, units_of(student), self.device)
        if features is not None:
            shard(features, [], self.device)

    def place_beside(self, model: Denoiser) -> None:
        """Shard it; after an evaluation its weights are those of the shards again."""
        network: Any = model.network
        shard(network, units_of(model), self.device)
        network.set_reshard_after_forward(True)

    def learner(self, learner: Learner) -> nn.Module:
        """The same learner, which can leave its gradients unreduced."""
        return ShardedLearner(learner.network, learner.features, learner.objective)

    def part(self, part: Part, own: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]) -> Part:
        """A part that is saved and restored as one of whole tensors."""
        return Whole(part, own)

    def plain(self, network: nn.Module) -> nn.Module:
        """The network as it was before it was sharded, without weights."""
        del network
        return self.skeleton

    def copied(self, network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """A whole network with these weights, in the main process; together."""
        full = gathered(weights)
        if not processes.is_main():
            return network
        found = copy.deepcopy(self.skeleton)
        found.load_state_dict(full, assign=True)
        return found.to(self.device)


class ShardedLearner(Learner):
    """A learner whose modules are sharded."""

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Batches inside add their gradients to those of each process, which are not reduced."""
        modules: list[Any] = [m for m in (self.network, self.features) if m is not None]
        for module in modules:
            module.set_requires_gradient_sync(False)
        yield
        for module in modules:
            module.set_requires_gradient_sync(True)


def spread_of(fsdp: str, device: torch.device) -> Replicated:
    """The way that `--fsdp` asks for; one process has all."""
    is_sharded = fsdp in ("student", "both") and processes.world() > 1
    return Sharded(device) if is_sharded else Replicated()


def without_gradient(student: Denoiser) -> list[str]:
    """Parameters that learn, and that the student's output does not depend on."""
    network: nn.Module = student.network  # type: ignore[assignment]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, *student.sample_shape, generator=random).to(student.device)
    t = torch.tensor([0, student.process.num_levels - 1])
    batch = Batch(x, t, student.conditioning.draw(2, random))
    with evaluating(network, student.call):
        student.predict(batch).output.float().sum().backward()
    learning = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    found = [name for name, weight in learning if weight.grad is None]
    network.zero_grad(set_to_none=True)
    return found


def without_weights(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters have shapes and no values."""
    empty: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
        for weight in network.parameters()
    }
    return copy.deepcopy(network, empty)
