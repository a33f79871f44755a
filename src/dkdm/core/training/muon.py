"""Muon: each matrix moves by the nearest orthogonal matrix to its momentum (Jordan et al., 2024).

It takes a network of random weights further than AdamW in as many steps: `docs/evidence.md`.
Convolutions are matrices of one row for each output channel. torch.optim.Muon
takes no convolutions, and one matrix at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dkdm.core.distributed.sharded import placed_like, whole

# Five steps of this polynomial bring every singular value of at least 0.003 of the largest between
# 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_SMALLEST_SIDE = 8  # with fewer rows or columns, as at inputs and outputs, AdamW does as well


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest, with a tenth of the learning rate.

    matrices: weights [rows, ...], of hidden layers. rest: all others. learning_rate: of a matrix
    of as many rows as columns; one with more rows takes sqrt(rows / columns) of it, so that it
    carries over from narrow networks to wide ones. found_inf: 1 on the device lets the next step
    change nothing, without a wait of the host; 0 and None are a usual step.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        rest: Iterable[Tensor],
        learning_rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        matrix = {"params": list(matrices), "lr": learning_rate, "momentum": 0.95}
        others = {"params": list(rest), "lr": learning_rate / 10, "betas": (0.9, 0.999)}
        groups = [group for group in (matrix, others) if group["params"]]
        super().__init__(groups, {"weight_decay": weight_decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; matrices of one shape are orthogonalized together.

        Every process orthogonalizes whole matrices, and moves its shards if they are sharded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._orthogonal if "momentum" in group else self._adamw)(group)
        self.found_inf = None
        return loss

    def _adamw(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        captured, flag = group.get("capturable", False), self.found_inf
        for weight in weights:
            if not self.state[weight]:
                zero = torch.zeros_like(weight)
                counted_on = weight.device if captured else None
                count = torch.zeros((), device=counted_on)
                self.state[weight] = {"step": count, "exp_avg": zero, "exp_avg_sq": zero.clone()}
        states = [self.state[weight] for weight in weights]
        if flag is not None:  # the fused kernel looks at it, and counts on the device
            for weight, state in zip(weights, states, strict=True):
                state["step"] = state["step"].to(weight.device)
        adamw(
            weights,
            [weight.grad for weight in weights],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            capturable=captured,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
            fused=None if flag is None else True,
            found_inf=flag,
        )

    def _orthogonal(self, group: dict[str, Any]) -> None:
        alike: dict[Any, list[Tensor]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                alike[tuple(weight.flatten(1).shape), weight.dtype, weight.device].append(weight)
        for (shape, *_), weights in alike.items():
            matrices = [whole(each).flatten(1) for each in self._directions(weights, group)]
            directions = self._unless_bad(orthogonal(torch.stack(matrices)), 0.0)
            pace = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            kept = self._unless_bad(1 - group["lr"] * group["weight_decay"], 1.0)
            torch._foreach_mul_(weights, kept)
            pairs = zip(directions.to(weights[0].dtype), weights, strict=True)
            moves = [placed_like(found.view(weight.shape), weight) for found, weight in pairs]
            if isinstance(pace, Tensor):  # in a graph
                torch._foreach_mul_(moves, pace)
                torch._foreach_sub_(weights, moves)
            else:
                torch._foreach_add_(weights, moves, alpha=-pace)

    def _directions(self, weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The gradients of weights of one shape after momentum (Nesterov's)."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if "average" not in self.state[weight]:
                self.state[weight]["average"] = torch.zeros_like(weight)
        averages = [self.state[weight]["average"] for weight in weights]
        if self.found_inf is not None:  # an average that goes to itself stays
            both = (torch.stack([v.flatten(1) for v in vs]) for vs in (gradients, averages))
            pairs = zip(self._unless_bad(*both), weights, strict=True)
            gradients = [found.view(weight.shape) for found, weight in pairs]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        return list(torch._foreach_lerp(gradients, averages, group["momentum"]))

    def _unless_bad(self, value: Any, otherwise: Any) -> Any:
        """A value of the step, or what leaves everything as it is if the step is bad."""
        flag = self.found_inf
        return value if flag is None else torch.where(flag > 0, otherwise, value)


def orthogonal(matrices: Tensor) -> Tensor:
    """The orthogonal matrices nearest to `matrices` [n, rows, columns], by Newton and Schulz.

    Singular values come out between 0.7 and 1.2. In bfloat16 on an accelerator.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.to(torch.float32 if x.device.type == "cpu" else torch.bfloat16)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


def hidden_matrices(network: nn.Module) -> set[Tensor]:
    """The weights that Muon moves: of linear layers and convolutions, and no table of classes."""
    tables = {m.weight for m in network.modules() if isinstance(m, nn.Embedding)}
    return {
        weight
        for weight in network.parameters()
        if weight.ndim > 1
        and weight not in tables
        and min(weight.flatten(1).shape) >= _SMALLEST_SIDE
    }
