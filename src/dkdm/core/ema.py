"""The average of a network's weights over the steps of its training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of a network's weights, warmed up as (1 + n) / (10 + n)."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move every floating-point weight towards the network's after step n; copy the others."""
        decay = min(self.decay, (1 + step) / (10 + step))
        new = network.state_dict()
        floating = [k for k, v in self.weights.items() if v.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[k] for k in floating], [new[k].detach() for k in floating], 1 - decay
        )
        for key in self.weights.keys() - set(floating):
            self.weights[key].copy_(new[key])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return self.weights

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore them."""
        self.weights = {k: state[k].to(v.device, v.dtype) for k, v in self.weights.items()}
