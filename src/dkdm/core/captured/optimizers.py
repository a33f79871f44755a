"""Optimizers whose learning rates are tensors, as long as a step is captured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def stepped_by(optimizer: torch.optim.Optimizer, rates: Tensor) -> Iterator[None]:
    """In here a step reads its learning rates from `rates`, float32 [groups], on the device.

    Elsewhere groups hold numbers, as schedules and checkpoints expect.
    """
    groups = optimizer.param_groups
    before = [(group["lr"], group.get("capturable", False)) for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"], group["capturable"] = rate, rate.device.type == "cuda"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True.*")
            yield
    finally:
        for group, (rate, capturable) in zip(groups, before, strict=True):
            group["lr"], group["capturable"] = rate, capturable


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """A step that changes nothing if `bad` holds, a bool on the device, which nobody waits for."""
    inner: Any = optimizer
    if bad.device.type == "cuda" and all(group.get("fused") for group in inner.param_groups):
        inner.grad_scale, inner.found_inf = None, bad.float()
        inner.step()
        return
    weights = [weight.detach() for group in inner.param_groups for weight in group["params"]]
    changing = [*weights, *states_of(optimizer)]
    before = [value.clone() for value in changing]
    inner.step()
    for value, former in zip(changing, before, strict=True):
        value.copy_(torch.where(bad.to(value.device), former, value))


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor of its state: all are zero before its first step."""
    states = (entry.values() for entry in optimizer.state.values())
    return [value for values in states for value in values if isinstance(value, Tensor)]


def count_on(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Bring the counts of steps there: to where a graph counts on, or back to the host.

    Fused optimizers count beside their weights anyway.
    """
    fused = {weight for g in optimizer.param_groups if g.get("fused") for weight in g["params"]}
    for weight, entry in optimizer.state.items():
        if "step" in entry and weight not in fused:
            entry["step"] = entry["step"].to(device)
