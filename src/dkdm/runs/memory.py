"""What a run says when its device has no memory left: what each part took, and what helps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.config import TrainingOptions
from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.teachers import parts_of
from dkdm.core.training.trainer import Trainer
from dkdm.errors import DkdmError, in_a_line

MIB = 2**20
REMEDIES = {
    "teacher": "--teacher-dtype bfloat16 or int8, or --teacher-offload layers",
    "student": "a smaller --student",
    "optimizer": "--optimizer muon or a smaller --student",
    "average": "--no-use-ema",
    "pool": "--pool-device cpu or disk, --pool-dtype float16, or a smaller --pool-size or --rho",
    "batch": "--gradient-checkpointing, or half the --train-batch-size with twice the "
    "--gradient-accumulation-steps and --accept-changes (in a new run, --train-batch-size auto "
    "finds the largest)",
}


class OutOfMemory(DkdmError):
    """A run's memory is used up; says what each part takes."""


@contextmanager
def explained(trainer: Trainer, teacher: Denoiser | None) -> Iterator[None]:
    """Around what computes in a run. Raises OutOfMemory in place of an error that says that memory
    is used up: with what each part takes, measured, and the options that make the largest
    smaller."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(in_words(error, needs(trainer, teacher), trainer.training)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    lines = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)) or (
        isinstance(error, RuntimeError) and any(line in str(error) for line in lines)
    )


def needs(trainer: Trainer, teacher: Denoiser | None) -> dict[str, int]:
    """Bytes that each part of a run takes on the device of the training, measured.

    `batch` is the rest of the most that was allocated; 0 on a device that does not say.
    """
    device = trainer.accelerator.device
    networks = [] if teacher is None else [part.network for part in parts_of(teacher)]
    with processes.alone():
        sources = {name: part.state_dict() for name, part in trainer.source.parts().items()}
    found = {
        "teacher": sum(_of_network(network, device) for network in networks),
        "student": _of_network(trainer.network, device) + _gradients(trainer.network, device),
        "optimizer": _total(_tensors(trainer.optimizer.state_dict()["state"]), device),
        "average": 0 if trainer.ema is None else _total(trainer.ema.weights.values(), device),
        "pool": _total(_tensors(sources), device),
    }
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {**found, "batch": max(0, most - sum(found.values()))}


def _of_network(network: object, device: torch.device) -> int:
    if not isinstance(network, nn.Module):
        return 0
    return _total([*network.parameters(), *network.buffers()], device)


def _gradients(network: nn.Module, device: torch.device) -> int:
    return _total([p.grad for p in network.parameters() if p.grad is not None], device)


def _total(tensors: Iterable[Tensor], device: torch.device) -> int:
    return sum(t.nbytes for t in tensors if t.device.type == device.type)


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in nested mappings."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, Mapping):
        return [tensor for value in values.values() for tensor in _tensors(value)]
    return []


def in_words(error: BaseException, found: Mapping[str, int], training: TrainingOptions) -> str:
    """The message: what each part takes, the largest first, and what makes that smaller."""
    rows = sorted(found.items(), key=lambda row: -row[1])
    parts = [f"{name} {size / MIB:,.0f} MiB" for name, size in rows if size]
    largest = rows[0][0] if found["batch"] else "batch"
    helps = [REMEDIES[largest]] + ([REMEDIES["batch"]] if largest != "batch" else [])
    goes_on = "--resume-from-checkpoint latest"
    return (
        f"memory is used up at a batch of {training.batch_size}: {', '.join(parts)} "
        f"({in_a_line(error, 120)}). Give {'; or '.join(helps)}, and {goes_on}"
    )
