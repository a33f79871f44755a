"""Training: gradients, a few steps, gradient checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from dkdm.checks.findings import Finding
from dkdm.checks.student.behaviour import listed
from dkdm.checks.student.case import Case
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.matching import on_levels_of
from dkdm.core.diffusion.process import per_sample
from dkdm.core.objectives.objective import Objective
from dkdm.core.training.learning import enable_gradient_checkpointing
from dkdm.errors import UsageError

STEPS = 10
LEARNING_RATES = (1e-3, 1e-4)


def gradients(case: Case) -> Iterator[Finding]:
    """Whether every parameter has an effect, with noise on all, so that no zero hides another."""
    network = copy.deepcopy(case.perturbed).train().requires_grad_(True)
    backward(case, network)
    named = list(network.named_parameters())
    absent = [name for name, weight in named if weight.grad is None]
    idle = [n for n, weight in named if weight.grad is not None and not weight.grad.any()]
    if absent:
        what = f"unused: {listed(absent)}"
        remedy = "remove them (DDP needs find_unused_parameters with them)"
        yield Finding("gradients", "warning", what, remedy)
    if idle:
        what = f"without effect on the output: {listed(idle)}"
        yield Finding("gradients", "warning", what, "remove them, or find what cuts them off")
    if not absent and not idle:
        yield Finding("gradients", "ok", f"reach all {len(named)} parameter tensors")
    fixed = [name for name, weight in case.network.named_parameters() if not weight.requires_grad]
    if fixed:
        what = f"not trained, since they do not require gradients: {listed(fixed)}"
        yield Finding("fixed weights", "ok", what)


def backward(case: Case, network: nn.Module) -> None:
    """Compute gradients of a random weighting of the output."""
    output = case.answer(network, case.probe(3))
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=random).to(output)
    (output * weights).sum().backward()


def learning(case: Case) -> list[Finding]:
    """Whether the loss on one batch falls within a few steps."""
    for rate in LEARNING_RATES:
        losses = _losses(case, rate)
        if min(losses) < 0.99 * losses[0]:
            what = f"{losses[0]:.4g} -> {min(losses):.4g} in {STEPS} steps on one batch"
            return [Finding("learns", "ok", what)]
    what = f"the loss on one batch stays at {losses[0]:.4g} for {STEPS} steps"
    remedy = "look for a detach(), a no_grad, or an output whose range excludes the target"
    return [Finding("learns", "problem", what, remedy)]


def _losses(case: Case, learning_rate: float) -> list[float]:
    teacher, network = case.teacher, case.copied()
    student = replace(on_levels_of(case.student, teacher.process), network=network)
    optimizer = torch.optim.AdamW(network.train().requires_grad_(True).parameters(), learning_rate)
    objective, batch = Objective(student, teacher), _batch(case)
    with torch.no_grad():
        target = teacher.predict(batch)
    losses = []
    for _ in range(STEPS + 1):
        loss = objective(student, batch, target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _batch(case: Case) -> Batch:
    """States as the teacher reaches them."""
    process, probe = case.teacher.process, case.probe(4)
    t = torch.linspace(0.1, 0.9, 4).mul(process.num_levels - 1).round().long()
    scale = per_sample(process.at(t)[1].clamp(min=1), probe["x"])
    return Batch(probe["x"] * scale, t, case.student.conditioning.in_turns(4), t)


def checkpointing(case: Case) -> list[Finding]:
    """Whether the backward pass can recompute activations."""
    network = case.copied().train().requires_grad_(True)
    try:
        enable_gradient_checkpointing(network)
    except UsageError:
        what = "not supported: it has no enable_gradient_checkpointing()"
        return [Finding("checkpointing", "ok", what)]
    backward(case, network)
    return [Finding("checkpointing", "ok", "--gradient-checkpointing works")]
