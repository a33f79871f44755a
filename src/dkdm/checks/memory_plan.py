"""What a distillation takes in memory, what fits, and what to change where it does not."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dkdm.checks.inspection.memory import (
    MIB,
    LiveStorages,
    evaluation_mib,
    fused_attention,
    weights_mib,
)
from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.modes import silence_label_dropout
from dkdm.core.trainer import enable_gradient_checkpointing
from dkdm.errors import UsageError
from dkdm.students import untried_student_of

GIB = 2**10  # MiB
CONTEXT_MIB = 500.0  # of CUDA and its libraries, as they are on recent cards


@dataclass(frozen=True)
class Choices:
    """What decides the memory of a run; the names are those of `dkdm distill`.

    gpus: devices the batch is divided among. pool_size: entries over all of them.
    """

    gpus: int = 1
    train_batch_size: int = 128
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    use_ema: bool = True
    guided: bool = False
    teacher_dtype: str = "float32"
    teacher_offload: str = "none"
    pool_size: int = 51_200
    pool_dtype: str = "float32"
    pool_device: str = "device"
    student_factory: str | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.train_batch_size < self.gpus:
            raise UsageError(
                f"--gpus {self.gpus} --train-batch-size {self.train_batch_size}: expected at least "
                "one GPU and one sample for each"
            )


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device, in MiB, by what holds it; host: the same of the host."""

    choices: Choices
    device: dict[str, float]
    host: dict[str, float]

    @property
    def device_total(self) -> float:
        """All that one device holds at the worst moment of a step.

        The teacher's evaluation is over before the student's begins.
        """
        passing = (self.device["teacher evaluation"], self.device["student activations"])
        return sum(self.device.values()) - min(passing)


def plan(teacher: Denoiser, student: str, choices: Choices) -> MemoryPlan:
    """The memory a run takes, measured on torch's meta device: nothing is allocated or loaded.

    teacher: its network may be on the meta device; student: a preset, a config.json or
    module:factory. Activations are those of one forward and backward pass of the batch that a
    device gets, with fused attention and without what kernels allocate inside themselves. Raises
    UsageError where the student does not fit the teacher.
    """
    batch = choices.train_batch_size // choices.gpus
    learner = _student(teacher, student, choices)
    weights = learner.num_parameters * 4 / MIB
    pool = _pool_mib(teacher, choices)
    taught_by = weights_mib(_in(choices.teacher_dtype, teacher))
    if choices.teacher_dtype == "int8":
        taught_by -= _saved_by_int8(teacher)
    on_device = {
        "teacher weights": 0.0 if choices.teacher_offload == "layers" else taught_by,
        "teacher evaluation": _evaluation_mib(
            _in(choices.teacher_dtype, teacher), batch * (2 if choices.guided else 1)
        ),
        "student weights": weights,
        "student gradients": weights,
        "optimizer (AdamW)": 2 * weights,
        "EMA": weights,
        "student activations": training_mib(learner, batch),
        "pool": pool if choices.pool_device == "device" else 0.0,
        "CUDA context": CONTEXT_MIB,
    }
    on_host = {
        "teacher weights": taught_by if choices.teacher_offload == "layers" else 0.0,
        "pool": pool if choices.pool_device == "cpu" else 0.0,
    }
    return MemoryPlan(choices, on_device, on_host)


def _evaluation_mib(teacher: Denoiser, batch_size: int) -> float:
    with fused_attention():
        return evaluation_mib(teacher, batch_size)


def _in(dtype: str, teacher: Denoiser) -> Denoiser:
    """The teacher as it is held, on the meta device."""
    network: nn.Module = copy.deepcopy(teacher.network)  # type: ignore[assignment]
    held = torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
    return replace(teacher, network=nn.Module.to(network, "meta", held))


def _saved_by_int8(teacher: Denoiser) -> float:
    """What one byte instead of two for each weight of a linear layer saves, in MiB."""
    network: nn.Module = teacher.network  # type: ignore[assignment]
    linear = (m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
    return sum(linear) / MIB


def _student(teacher: Denoiser, spec: str, choices: Choices) -> Denoiser:
    with torch.device("meta"):
        student = untried_student_of(spec, teacher, choices.student_factory)
    network = student.network.to("meta")  # type: ignore[union-attr]
    student.check()
    silence_label_dropout(network)
    if choices.gradient_checkpointing:
        enable_gradient_checkpointing(network)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(choices.mixed_precision)
    network = nn.Module.to(network, half) if half else network
    return replace(student, network=network.train().requires_grad_(True))


def _pool_mib(teacher: Denoiser, choices: Choices) -> float:
    values = choices.pool_size * torch.Size(teacher.sample_shape).numel()
    return values * getattr(torch, choices.pool_dtype).itemsize / choices.gpus / MIB


def training_mib(student: Denoiser, batch_size: int) -> float:
    """Largest memory alive in a forward and backward pass beside weights and gradients, in MiB."""
    cond = student.conditioning.draw(batch_size, torch.Generator().manual_seed(0))
    t = torch.zeros(batch_size, dtype=torch.int64)
    before = student.evaluations
    with fused_attention(), LiveStorages() as storages:
        x = torch.zeros(batch_size, *student.sample_shape, device=student.device)
        prediction = student.predict(Batch(x, t, cond, t))
        prediction.output.square().mean().backward()
    network: nn.Module = student.network  # type: ignore[assignment]
    gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    network.zero_grad(set_to_none=True)
    student.evaluations = before
    return max(0.0, (storages.peak - gradients) / MIB)


def device_memory_mib() -> float:
    """Memory of this machine's first GPU; 24 GiB where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / MIB
    return 24.0 * GIB


@dataclass(frozen=True)
class Change:
    """An option that saves memory, and what the device holds with it and all before it."""

    flag: str
    device_total: float


def changes(teacher: Denoiser, student: str, found: MemoryPlan, limit_mib: float) -> list[Change]:
    """Options to take one after the other until a run fits, those that cost nothing first."""
    taken: list[Change] = []
    for flag, fields in _SAVINGS:
        if found.device_total <= limit_mib:
            break
        if all(getattr(found.choices, key) == value for key, value in fields.items()):
            continue
        try:
            tried = plan(teacher, student, replace(found.choices, **fields))  # type: ignore[arg-type]
        except UsageError:
            continue  # a network that cannot recompute its activations
        if tried.device_total < found.device_total:
            found = tried
            taken.append(Change(flag, tried.device_total))
    while found.device_total > limit_mib and found.choices.train_batch_size > found.choices.gpus:
        smaller = max(found.choices.gpus, found.choices.train_batch_size // 2)
        found = plan(teacher, student, replace(found.choices, train_batch_size=smaller))
        flag = f"--train-batch-size {smaller} (and more --gradient-accumulation-steps)"
        taken.append(Change(flag, found.device_total))
    return taken


_SAVINGS: tuple[tuple[str, dict[str, object]], ...] = (
    ("--pool-device cpu", {"pool_device": "cpu"}),
    ("--mixed-precision bf16", {"mixed_precision": "bf16"}),
    ("--teacher-dtype bfloat16", {"teacher_dtype": "bfloat16"}),
    ("--gradient-checkpointing", {"gradient_checkpointing": True}),
    ("--teacher-offload layers", {"teacher_offload": "layers"}),
)


def print_plan(found: MemoryPlan, advice: list[Change], limit_mib: float, console: Console) -> None:
    """Print the plan as a table, whether it fits, and what to change."""
    choices = found.choices
    table = Table(
        title=f"One of {choices.gpus} device{'s' if choices.gpus > 1 else ''}, "
        f"{choices.train_batch_size // choices.gpus} samples each",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("device, GiB", justify="right")
    table.add_column("host, GiB", justify="right")
    for name in found.device:
        row = (found.device[name], found.host.get(name, 0.0))
        table.add_row(name, *(f"{value / GIB:,.2f}" if value else "-" for value in row))
    table.add_row(
        "at most", f"{found.device_total / GIB:,.2f}", f"{sum(found.host.values()) / GIB:,.2f}"
    )
    console.print(table)
    if found.device_total <= limit_mib:
        console.print(f"[green]It fits[/green] into {limit_mib / GIB:,.1f} GiB.")
        return
    console.print(f"[red]It does not fit[/red] into {limit_mib / GIB:,.1f} GiB. Change:")
    for change in advice:
        console.print(f"  {change.flag}: {change.device_total / GIB:,.2f} GiB", soft_wrap=True)
    if not advice or advice[-1].device_total > limit_mib:
        console.print("  and still too much: a smaller student, or a device with more memory")
    if choices.gpus > 1:
        console.print("Training on several devices is planned for, not supported yet.")
