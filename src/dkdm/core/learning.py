"""A network that learns: which of its weights, in which precision, by which optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from dkdm.config import OptimizerOptions
from dkdm.core.calls import Call, Network
from dkdm.errors import UsageError


def prepare(network: nn.Module, frozen: Collection[str], recompute: bool) -> list[nn.Parameter]:
    """Bring a network into training mode; returns the parameters that learn.

    frozen: names of those that stay as they are. recompute: activations, in the backward pass.
    """
    make_trainable(network.train())
    for name in frozen:
        network.get_parameter(name).requires_grad_(False)
    if recompute:
        enable_gradient_checkpointing(network)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def optimizer_of(
    parameters: Iterable[nn.Parameter], options: OptimizerOptions, num_steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, and the schedule of its learning rate over `num_steps` steps."""
    decay, warmup = options.weight_decay, options.lr_warmup_steps
    optimizer = torch.optim.AdamW(parameters, options.learning_rate, weight_decay=decay)
    schedule = get_scheduler(
        options.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps
    )
    return optimizer, schedule


def autocasting(accelerator: Accelerator, call: Call | None) -> Call:
    """The same call of a network, in the precision of the run."""
    assert call is not None

    def casting(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        with accelerator.autocast():
            return call(network, x, time, cond)

    return casting


def make_trainable(network: nn.Module) -> None:
    """Let every parameter learn, except those that the network's code holds fixed."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        network.requires_grad_(True)


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Recompute activations in the backward pass. Raises UsageError if the network cannot."""
    enable: Callable[[], None] | None = getattr(network, "enable_gradient_checkpointing", None)
    if enable is None or not getattr(network, "_supports_gradient_checkpointing", True):
        raise UsageError(
            f"--gradient-checkpointing: {type(network).__name__} has no "
            "enable_gradient_checkpointing(), as diffusers' models do; leave this option out"
        )
    enable()
