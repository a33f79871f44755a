"""How much memory a distillation takes, whether it fits, and what to change if it does not."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from dkdm.config import DistillConfig
from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.learning import enable_gradient_checkpointing
from dkdm.core.modes import silence_label_dropout
from dkdm.errors import UsageError
from dkdm.evaluation.memory import (
    MIB,
    LiveStorages,
    evaluation_mib,
    fused_attention,
    weights_mib,
)
from dkdm.students import sketched_student_of

GIB = 2**10  # MiB
CONTEXT_MIB = 500.0  # CUDA and its libraries on recent cards


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run in MiB, by what holds it: on each device, and on the host.

    gpus: devices that share the batch and the pool. pool_size: entries on all of them.
    """

    config: DistillConfig
    gpus: int
    pool_size: int
    device: dict[str, float]
    host: dict[str, float]

    @property
    def device_total(self) -> float:
        """What a device holds at the worst moment of a step.

        The teacher's evaluation is over before the student's begins.
        """
        passing = (self.device["teacher evaluation"], self.device["student activations"])
        return sum(self.device.values()) - min(passing)

    def as_dict(self) -> dict[str, Any]:
        """The plan and the options it depends on, as JSON values."""
        given = {name: getattr(self.config, name) for name in _DECISIVE}
        planned = {
            "gpus": self.gpus,
            "pool_size": self.pool_size,
            "guided": not self.config.guidance.is_off,
        }
        held = {"device": self.device, "host": self.host, "device_total": self.device_total}
        return {"choices": given | planned, **held}


_DECISIVE = (
    "train_batch_size",
    "mixed_precision",
    "gradient_checkpointing",
    "use_ema",
    "teacher_dtype",
    "teacher_offload",
    "pool_dtype",
    "pool_device",
    "student_factory",
)


def plan(teacher: Denoiser, config: DistillConfig, gpus: int = 1) -> MemoryPlan:
    """The memory that a run takes, measured on torch's meta device: nothing is allocated or loaded.

    teacher: its network may be on the meta device. Activations are those of one forward and
    backward pass of the batch that a device gets, with fused attention and without what kernels
    allocate inside themselves. Raises UsageError if the student does not fit the teacher, and for
    fewer samples than devices.
    """
    batch_size = config.training.train_batch_size
    if batch_size < gpus:
        raise UsageError(
            f"--gpus {gpus} --train-batch-size {batch_size}: give each GPU at least one sample"
        )
    batch = batch_size // gpus
    student = _student(teacher, config)
    weights = student.num_parameters * 4 / MIB
    pool_size = config.pool.pool_size or round(
        config.pool.rho * teacher.process.num_levels * batch_size
    )
    values = pool_size * torch.Size(teacher.sample_shape).numel()
    pool = values * getattr(torch, config.pool.pool_dtype).itemsize / gpus / MIB
    held = _in(config.teacher_choice.dtype, teacher)
    teacher_weights = weights_mib(held)
    if config.teacher_choice.dtype == "int8":
        teacher_weights -= _saved_by_int8(teacher)
    with fused_attention():
        evaluation = evaluation_mib(held, batch * (1 if config.guidance.is_off else 2))
    on_host = {
        "teacher weights": teacher_weights if config.teacher_choice.offload == "layers" else 0.0,
        "pool": pool if config.pool.pool_device == "cpu" else 0.0,
    }
    on_device = {
        "teacher weights": teacher_weights - on_host["teacher weights"],
        "teacher evaluation": evaluation,
        "student weights": weights,
        "student gradients": weights,
        "optimizer (AdamW)": 2 * weights,
        "EMA": weights if config.optimizer.use_ema else 0.0,
        "student activations": training_mib(student, batch),
        "pool": pool - on_host["pool"],
        "CUDA context": CONTEXT_MIB,
    }
    return MemoryPlan(config, gpus, pool_size, on_device, on_host)


def _in(dtype: str, teacher: Denoiser) -> Denoiser:
    """The teacher in this precision, on the meta device."""
    network: nn.Module = copy.deepcopy(teacher.network)  # type: ignore[assignment]
    held = torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
    return replace(teacher, network=nn.Module.to(network, "meta", held))


def _saved_by_int8(teacher: Denoiser) -> float:
    """What one byte instead of two for each weight of a linear layer saves, in MiB."""
    network: nn.Module = teacher.network  # type: ignore[assignment]
    linear = (m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
    return sum(linear) / MIB


def _student(teacher: Denoiser, config: DistillConfig) -> Denoiser:
    student = sketched_student_of(
        config.student_choice.student, teacher, config.teacher_choice.factory
    )
    network: nn.Module = student.network  # type: ignore[assignment]
    student.check()
    silence_label_dropout(network)
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(network)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.training.mixed_precision)
    network = nn.Module.to(network, half) if half else network
    return replace(student, network=network.train().requires_grad_(True))


def training_mib(student: Denoiser, batch_size: int) -> float:
    """Largest memory alive in a forward and backward pass beside weights and gradients, in MiB."""
    cond = student.conditioning.draw(batch_size, torch.Generator().manual_seed(0))
    t = torch.zeros(batch_size, dtype=torch.int64)
    with fused_attention(), LiveStorages() as storages:
        x = torch.zeros(batch_size, *student.sample_shape, device=student.device)
        prediction = student.predict(Batch(x, t, cond, t))
        prediction.output.square().mean().backward()
    network: nn.Module = student.network  # type: ignore[assignment]
    gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    network.zero_grad(set_to_none=True)
    return max(0.0, (storages.peak - gradients) / MIB)


def device_memory_mib() -> float:
    """Memory of this machine's first GPU; 24 GiB if it has none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / MIB
    return 24.0 * GIB


@dataclass(frozen=True)
class Change:
    """An option that saves memory, and what a device holds with it and all before it."""

    flag: str
    device_total: float


def changes(teacher: Denoiser, found: MemoryPlan, limit_mib: float) -> list[Change]:
    """Options to take one after the other until a run fits, those that cost nothing first."""
    taken: list[Change] = []
    for flag, options in _SAVINGS:
        if found.device_total <= limit_mib:
            break
        try:
            tried = plan(teacher, replace(found.config, **options), found.gpus)
        except UsageError:
            continue  # a network that cannot recompute its activations
        if tried.device_total < found.device_total:
            found = tried
            taken.append(Change(flag, tried.device_total))
    batch = found.config.training.train_batch_size
    while found.device_total > limit_mib and found.config.training.train_batch_size > found.gpus:
        smaller = max(found.gpus, found.config.training.train_batch_size // 2)
        found = plan(teacher, replace(found.config, train_batch_size=smaller), found.gpus)
    if found.config.training.train_batch_size < batch:
        flag = f"--train-batch-size {found.config.training.train_batch_size}"
        flag += " (and more --gradient-accumulation-steps)"
        taken.append(Change(flag, found.device_total))
    return taken


_SAVINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--pool-device cpu", {"pool_device": "cpu"}),
    ("--mixed-precision bf16", {"mixed_precision": "bf16"}),
    ("--teacher-dtype bfloat16", {"teacher_dtype": "bfloat16"}),
    ("--gradient-checkpointing", {"gradient_checkpointing": True}),
    ("--teacher-offload layers", {"teacher_offload": "layers"}),
)


def print_plan(found: MemoryPlan, advice: list[Change], limit_mib: float, console: Console) -> None:
    """Print the plan as a table, whether it fits, and what to change."""
    several, batch = found.gpus > 1, found.config.training.train_batch_size // found.gpus
    whose = f"Each of {found.gpus} devices, with a" if several else "A"
    table = Table(
        "",
        *(Column(f"{each}, GiB", justify="right") for each in ("device", "host")),
        title=f"{whose} batch of {batch}",
        title_justify="left",
    )
    for name in found.device:
        row = (found.device[name], found.host.get(name, 0.0))
        table.add_row(name, *(f"{value / GIB:,.2f}" if value else "-" for value in row))
    totals = (found.device_total, sum(found.host.values()))
    table.add_row("at most", *(f"{value / GIB:,.2f}" for value in totals))
    console.print(table)
    if found.device_total <= limit_mib:
        console.print(f"[green]It fits[/green] into {limit_mib / GIB:,.1f} GiB.")
        return
    console.print(f"[red]It does not fit[/red] into {limit_mib / GIB:,.1f} GiB. Change:")
    for change in advice:
        console.print(f"  {change.flag}: {change.device_total / GIB:,.2f} GiB", soft_wrap=True)
    if not advice or advice[-1].device_total > limit_mib:
        console.print("  Still too much: use a smaller student, or a device with more memory.")
    if several:
        console.print("Training on several devices is not supported yet.")
