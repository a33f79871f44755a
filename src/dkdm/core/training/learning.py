"""A network that learns: which weights, how, their average, and whether they stay finite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from dkdm.config import OptimizerOptions
from dkdm.core import processes
from dkdm.core.denoisers.calls import Call, Network
from dkdm.core.distributed.sharded import here
from dkdm.core.saving import checkpoint
from dkdm.core.training.muon import Muon, hidden_matrices
from dkdm.errors import DkdmError, UsageError

NEVER = 2**62  # a step that no run comes to


def prepare(network: nn.Module, frozen: Collection[str], recompute: bool) -> list[nn.Parameter]:
    """Bring a network into training mode; returns the parameters that learn.

    frozen: names of those that stay as they are, as do those that the network's code holds fixed.
    recompute: activations, in the backward pass.
    """
    if not any(parameter.requires_grad for parameter in network.train().parameters()):
        network.requires_grad_(True)
    for name in frozen:
        network.get_parameter(name).requires_grad_(False)
    if recompute:
        enable_gradient_checkpointing(network)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def optimizer_of(
    network: nn.Module,
    parameters: Collection[nn.Parameter],
    options: OptimizerOptions,
    num_steps: int,
) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer of `parameters`, and the schedule of its learning rate over `num_steps` steps.

    network: says which of the parameters are hidden matrices, for Muon.
    """
    options = options.decided(new=False)
    rate, decay = options.learning_rate, options.weight_decay
    assert rate is not None
    optimizer: torch.optim.Optimizer
    if options.optimizer == "muon":
        hidden = hidden_matrices(network)
        matrices = [weight for weight in parameters if weight in hidden]
        rest = [weight for weight in parameters if weight not in hidden]
        optimizer = Muon(matrices, rest, rate, decay)
    else:
        fused = all(weight.device.type == "cuda" for weight in parameters)
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=fused or None)
    schedule = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=num_steps,
    )
    return optimizer, schedule


class ScheduleState:
    """A schedule as a part; its kind, length and peak rates stay those of the options."""

    def __init__(self, schedule: Any) -> None:
        self.schedule, self.peaks = schedule, list(schedule.base_lrs)

    def state_dict(self) -> dict[str, Any]:
        """The schedule's own."""
        return dict(self.schedule.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, after the optimizer, whose rates follow."""
        self.schedule.load_state_dict(state)
        self.at_pace(1.0)

    def at_pace(self, pace: float) -> None:
        """Multiply the peak rates of the options by `pace`, from now on."""
        schedule, peaks = self.schedule, [pace * peak for peak in self.peaks]
        schedule.base_lrs, groups = peaks, schedule.optimizer.param_groups
        for group, peak, share in zip(groups, peaks, schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = peak, peak * share(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in groups]


def autocasting(accelerator: Accelerator, call: Call | None) -> Call:
    """The same call of a network, in the precision of the run."""
    assert call is not None

    def casting(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        with accelerator.autocast():
            return call(network, x, time, cond)

    return casting


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Recompute activations in the backward pass. Raises UsageError if the network cannot."""
    enable: Callable[[], None] | None = getattr(network, "enable_gradient_checkpointing", None)
    if enable is None or not getattr(network, "_supports_gradient_checkpointing", True):
        raise UsageError(
            f"--gradient-checkpointing: {type(network).__name__} has no "
            "enable_gradient_checkpointing(), as diffusers' models do; leave this option out"
        )
    enable()


class Ema:
    """Exponential moving average of a network's weights, warmed up as (1 + n) / (10 + n)."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move every floating-point weight towards the network's after step n; copy the others."""
        self.move(network, self.share(step))

    def share(self, step: int) -> float:
        """The way to the network's weights that the average goes after step n."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def move(self, network: nn.Module, share: float | Tensor) -> None:
        """Go this share of the way to the network's weights: a number, or one on the device."""
        new = network.state_dict()
        floating = [k for k, v in self.weights.items() if v.is_floating_point()]
        old, wanted = [self.weights[k] for k in floating], [new[k] for k in floating]
        if isinstance(share, Tensor):
            apart = torch._foreach_sub(wanted, old)
            torch._foreach_mul_(apart, share)
            torch._foreach_add_(old, apart)
        else:
            torch._foreach_lerp_(old, wanted, share)
        for key in self.weights.keys() - set(floating):
            self.weights[key].copy_(new[key])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return self.weights

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.weights = {k: state[k].to(v.device, v.dtype) for k, v in self.weights.items()}


def check_finite(network: nn.Module, step: int, output_dir: Path) -> None:
    """Raise DkdmError if a weight is not finite by this step; together.

    output_dir: of the run, which has checkpoints.
    """
    weights = [here(p) for p in network.parameters() if p.is_floating_point()]
    finite = not weights or bool(torch.stack([p.isfinite().all() for p in weights]).all())
    if processes.least(int(finite)):
        return
    kept = checkpoint.checkpoints(output_dir)
    raise DkdmError(
        f"the weights became NaN or infinite by step {step}. The last good checkpoint is "
        f"{kept[-1] if kept else '(none yet)'}. Try a lower --learning-rate, a lower "
        "--max-grad-norm or --mixed-precision no, with --resume-from-checkpoint latest"
    )
