"""What learns, spread over the processes: each has all of it, and gradients are averaged."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dkdm.core import processes
from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.prediction import Prediction

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


def spread(learner: Learner) -> nn.Module:
    """The same learner, whose gradients are the average over all processes (DDP).

    Those of a batch that is not the last of its optimizer step wait, inside `no_sync`.
    """
    if processes.world() == 1:
        return learner
    return DistributedDataParallel(learner)
