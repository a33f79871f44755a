"""How much memory a distillation takes, whether it fits, and what to change if it does not."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from dkdm.config import (
    GuidanceOptions,
    OptimizerOptions,
    PoolOptions,
    Precision,
    StorageOptions,
    StudentChoice,
    TeacherOptions,
    TrainingOptions,
)
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.modes import silence_label_dropout
from dkdm.core.objectives.feature_loss import stage_names
from dkdm.core.sources.budget import pool_entries
from dkdm.core.sources.replay import RECENT
from dkdm.core.training.learning import optimizer_of, prepare
from dkdm.errors import UsageError
from dkdm.evaluation.memory import (
    MIB,
    LiveStorages,
    evaluation_mib,
    fused_attention,
    weights_mib,
)
from dkdm.reading.options import Grouped
from dkdm.students import sketched_student_of

GIB = 2**10  # MiB
CONTEXT_MIB = 500.0  # CUDA and its libraries on recent cards


class PlannedRun(Grouped):
    """The groups of a run's options that its memory depends on."""

    teacher_choice: TeacherOptions
    student_choice: StudentChoice
    training: TrainingOptions
    guidance: GuidanceOptions
    pool: PoolOptions
    optimizing: OptimizerOptions


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run in MiB, by what holds it: on each device, and beside it on its host.

    gpus: devices that share the batch and the pool. pool_size: entries on all of them. disk: what a
    checkpoint of the whole run holds.
    """

    run: PlannedRun
    gpus: int
    pool_size: int
    device: dict[str, float]
    host: dict[str, float]
    disk: dict[str, float]

    @property
    def device_total(self) -> float:
        """What a device holds at the worst moment of a step.

        The teacher's evaluation is over before the student's begins, and that before its update.
        """
        passing = [self.device[name] for name in _PASSING]
        return sum(self.device.values()) - sum(passing) + max(passing)

    def as_dict(self) -> dict[str, Any]:
        """The plan and the options it depends on, as JSON values."""
        choices = {name: getattr(self.run, name) for name in _DECISIVE}
        choices |= {"gpus": self.gpus, "pool_size": self.pool_size}
        choices["guided"] = not self.run.guidance.is_off
        held = {"device": self.device, "host": self.host, "disk": self.disk}
        return {"choices": choices, **held, "device_total": self.device_total}


_PASSING = ("teacher evaluation", "student activations", "update")
_DECISIVE = (
    "train_batch_size",
    "optimizer",
    "replay",
    "mixed_precision",
    "gradient_checkpointing",
    "fsdp",
    "use_ema",
    "teacher_dtype",
    "teacher_offload",
    "pool_dtype",
    "pool_device",
    "student_factory",
)


class Sizes(NamedTuple):
    """What is measured of a run, in MiB; the rest is arithmetic.

    parameters: of the student. optimizer: what it keeps. update: what a step of it takes beside.
    gathered: what is whole of the teacher, and of the student, while shards of it compute.
    """

    teacher: float
    evaluation: float
    parameters: int
    activations: float
    optimizer: float
    update: float
    gathered: tuple[float, float]


def plan(teacher: Denoiser, run: PlannedRun, gpus: int = 1) -> MemoryPlan:
    """The memory that a run takes, measured on torch's meta device: nothing is allocated or loaded.

    teacher: its network may be on the meta device. Activations are those of one forward and
    backward pass of the batch that a device gets, with fused attention and without what kernels
    allocate inside themselves. The student starts from random weights. Raises UsageError if it does
    not fit the teacher, and for fewer samples than devices.
    """
    batch_size = run.training.batch_size
    if batch_size < gpus:
        raise UsageError(
            f"--gpus {gpus} --train-batch-size {batch_size}: give each GPU at least one sample"
        )
    return plan_of_sizes(sizes(teacher, run, batch_size // gpus), teacher, run, gpus)


def sizes(teacher: Denoiser, run: PlannedRun, batch: int) -> Sizes:
    """Measure both networks on the meta device with the batch of one device."""
    choice, training = run.teacher_choice, run.training
    student = sketched_student_of(run.student_choice.student, teacher, choice.factory)
    student.check()
    parameters = student.num_parameters
    _, teacher_mib = _held(teacher, choice.dtype or "float32")
    held, _ = _held(teacher, choice.dtype or _PRECISIONS[training.mixed_precision])
    with fused_attention():
        evaluation = evaluation_mib(held, batch * (1 if run.guidance.is_off else 2))
    gathered = gathered_mib(held), gathered_mib(student)
    optimizer, update = optimizer_mib(student, run.optimizing)
    activations = training_mib(_in_training(student, training), batch)
    return Sizes(teacher_mib, evaluation, parameters, activations, optimizer, update, gathered)


def plan_of_sizes(measured: Sizes, teacher: Denoiser, run: PlannedRun, gpus: int = 1) -> MemoryPlan:
    """The memory of a run whose devices get the batch that was measured."""
    batch_size, pool, training = run.training.batch_size, run.pool, run.training
    weights = measured.parameters * 4 / MIB
    sharded = {name: training.fsdp in (name, "both") and gpus > 1 for name in _SHARDED}
    part, teacher_part = (1 / gpus if sharded[name] else 1.0 for name in ("student", "teacher"))
    own, teacher_own = weights * part, measured.teacher * teacher_part
    gathered = zip(measured.gathered, _SHARDED, strict=True)
    pool_size = pool_entries(pool, training, teacher.process.num_levels)
    values = pool_size * torch.Size(teacher.sample_shape).numel()
    states = values * getattr(torch, pool.pool_dtype).itemsize / MIB
    replayed = replay_mib(teacher, pool, batch_size)
    on_host = {
        "teacher weights": teacher_own if run.teacher_choice.offload == "layers" else 0.0,
        "pool": states / gpus if pool.pool_device == "cpu" else 0.0,
    }
    on_device = {
        "teacher weights": teacher_own - on_host["teacher weights"],
        "teacher evaluation": measured.evaluation,
        "student weights": own,
        "weights in half precision": 0.0 if training.mixed_precision == "no" else weights / 2,
        "student gradients": own,
        "gradients on their way": weights if gpus > 1 and not sharded["student"] else 0.0,
        "gathered blocks": sum(size for size, name in gathered if sharded[name]),
        "optimizer": measured.optimizer * part,
        "update": measured.update * part,
        "EMA": own if run.optimizing.use_ema else 0.0,
        "student activations": measured.activations,
        "pool": states / gpus if pool.pool_device == "device" else 0.0,
        "replay": replayed / gpus,
        "CUDA context": CONTEXT_MIB,
    }
    on_disk = {
        "student weights": weights,
        "optimizer": measured.optimizer,
        "EMA": weights if run.optimizing.use_ema else 0.0,
        "pool": states + pool_size * _noted(teacher, run.guidance) / MIB,
        "replay": replayed,
    }
    return MemoryPlan(run, gpus, pool_size, on_device, on_host, on_disk)


_SHARDED = ("teacher", "student")


def gathered_mib(model: Denoiser) -> float:
    """What is whole of a network in shards (FSDP2) while it computes, in MiB.

    The parameters outside of its blocks, and two blocks: the next comes while one computes.
    """
    network: nn.Module = model.network  # type: ignore[assignment]
    blocks = [
        sum(parameter.nbytes for parameter in network.get_submodule(name).parameters())
        for name in stage_names(network)
    ]
    whole = sum(parameter.nbytes for parameter in network.parameters())
    return min(whole, whole - sum(blocks) + 2 * max(blocks, default=0)) / MIB


def _noted(teacher: Denoiser, guidance: GuidanceOptions) -> int:
    """Bytes that a pool keeps of an entry beside its state: level, birth, condition, scale."""
    cond = teacher.conditioning.draw(1, torch.Generator().manual_seed(0))
    scale = 0 if guidance.is_off else torch.float32.itemsize
    return 2 * torch.int64.itemsize + scale + sum(value.nbytes for value in cond.values())


def _held(teacher: Denoiser, precision: Precision) -> tuple[Denoiser, float]:
    """The teacher in this precision, on the meta device, and the MiB of its weights."""
    network: nn.Module = copy.deepcopy(teacher.network)  # type: ignore[assignment]
    dtype = torch.bfloat16 if precision == "int8" else getattr(torch, precision)
    held = replace(teacher, network=nn.Module.to(network, "meta", dtype))
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    one_byte_each = sum(layer.weight.numel() for layer in linear) if precision == "int8" else 0
    return held, weights_mib(held) - one_byte_each / MIB


def _in_training(student: Denoiser, options: TrainingOptions) -> Denoiser:
    """The student as it is trained; its network is changed in place."""
    network: nn.Module = student.network  # type: ignore[assignment]
    silence_label_dropout(network)
    prepare(network, (), options.gradient_checkpointing)
    return replace(
        student, network=nn.Module.to(network, getattr(torch, _PRECISIONS[options.mixed_precision]))
    )


_PRECISIONS: dict[str, Precision] = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def training_mib(student: Denoiser, batch_size: int) -> float:
    """Largest memory alive in a forward and backward pass beside weights and gradients, in MiB."""
    cond = student.conditioning.draw(batch_size, torch.Generator().manual_seed(0))
    t = torch.zeros(batch_size, dtype=torch.int64)
    with fused_attention(), LiveStorages(student.network) as storages:
        x = torch.zeros(batch_size, *student.sample_shape, device=student.device)
        prediction = student.predict(Batch(x, t, cond, t))
        prediction.output.square().mean().backward()
    network: nn.Module = student.network  # type: ignore[assignment]
    gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    network.zero_grad(set_to_none=True)
    return max(0.0, (storages.peak - gradients) / MIB)


def optimizer_mib(student: Denoiser, options: OptimizerOptions) -> tuple[float, float]:
    """MiB of what the optimizer of random weights keeps, and of what an update takes beside it."""
    network: nn.Module = student.network  # type: ignore[assignment]
    weights = prepare(network, (), recompute=False)
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer, _ = optimizer_of(network, weights, options.decided(new=True), 1)
    with LiveStorages() as storages:
        optimizer.step()  # the first makes what is kept
        kept = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
        storages.peak = storages.alive
        optimizer.step()
        passing = storages.peak - storages.alive
    network.zero_grad(set_to_none=True)
    return kept / MIB, passing / MIB


def replay_mib(teacher: Denoiser, pool: StorageOptions, batch_size: int) -> float:
    """MiB of the evaluations that are kept to be learnt from again, without their conditions."""
    if pool.replay == 1:
        return 0.0
    channels, *size = teacher.sample_shape
    values = (channels + teacher.out_channels) * torch.Size(size).numel()
    return RECENT * batch_size * values * torch.float32.itemsize / MIB


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
    taken, batch = list[Change](), found.run.training.batch_size
    for flag, options in _SAVINGS:
        if found.device_total <= limit_mib:
            break
        try:
            tried = plan(teacher, replace(found.run, **options), found.gpus)
        except UsageError:
            continue  # a network that cannot recompute its activations
        if tried.device_total < found.device_total:
            found = tried
            taken.append(Change(flag, tried.device_total))
    smaller = batch
    while found.device_total > limit_mib and smaller > found.gpus:
        smaller = max(found.gpus, smaller // 2)
        found = plan(teacher, replace(found.run, train_batch_size=smaller), found.gpus)
    if smaller < batch:
        flag = f"--train-batch-size {smaller} (and more --gradient-accumulation-steps)"
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
    several, batch = found.gpus > 1, found.run.training.batch_size // found.gpus
    whose = f"Each of {found.gpus} devices, with a" if several else "A"
    table = Table(
        "",
        *(Column(f"{each}, GiB", justify="right") for each in ("device", "host", "checkpoint")),
        title=f"{whose} batch of {batch}",
        title_justify="left",
    )
    for name in found.device:
        row = (found.device[name], found.host.get(name, 0.0), found.disk.get(name, 0.0))
        table.add_row(name, *(f"{value / GIB:,.2f}" if value else "-" for value in row))
    totals = (found.device_total, sum(found.host.values()), sum(found.disk.values()))
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
