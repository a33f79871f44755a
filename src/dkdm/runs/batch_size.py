"""`--train-batch-size auto`: the largest batch that fits in memory, by steps that are tried.

Before a run makes anything, trainers like its own take two steps in a folder that is thrown away.
What a run holds grows by as much with each sample, so two sizes say which one fits; on a CUDA
device, whose kernels and allocator take more, that one is tried too.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import tempfile
from collections.abc import Callable, Collection
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from dkdm.config import RunConfig
from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.training.trainer import Trainer
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.memory import MIB, LiveStorages
from dkdm.models.place import device_of_run
from dkdm.reading.machine import usable_memory
from dkdm.runs.launch import start_accelerator
from dkdm.runs.memory import REMEDIES, OutOfMemory, is_out_of_memory, needs

Config = TypeVar("Config", bound=RunConfig)
Measure = Callable[[Trainer, Denoiser | None], int]
Try = Callable[[Config, Measure], int]
Needed = Callable[[int], int | None]

AUTO = "auto"
LARGEST = 1024  # samples of one process: by then more steps are worth more than larger batches
FIRST = 8  # the smaller of the two sizes that are measured
USED = {"cuda": 0.9, "cpu": 0.8}  # of what is free: the rest is for what is not measured


class Found(NamedTuple):
    """The largest batch of a process, what a run takes with it, and what it may take, in bytes."""

    size: int
    needed: int
    limit: int


def with_batch_size(config: Config, try_with: Try[Config]) -> Config:
    """The config with a number in place of `--train-batch-size auto`; together.

    try_with: makes trainers of a run with these options, one for each of its parts, and gives the
    largest number that is measured of them. Nothing of the run is touched. Raises DkdmError if
    not a single sample fits, and what the run would refuse.
    """
    fsdp = config.training.fsdp
    if fsdp != "none":
        raise UsageError(
            f"--train-batch-size auto: with --fsdp {fsdp} no process can try sizes by itself; give "
            "a number, for which dkdm plan --gpus counts the memory"
        )
    start_accelerator(config.run, config.training, config.checkpoints)
    world = processes.world()
    most = most_of(config, world)
    with processes.alone(), tempfile.TemporaryDirectory() as folder:
        found = _found(config, Path(folder), world, most, try_with)
    size = processes.least(found.size)
    print(f"--train-batch-size auto: {in_words(found, size, world, most)}", file=sys.stderr)
    return replace(config, train_batch_size=size * world)


def in_words(found: Found, size: int, world: int, most: int) -> str:
    """What was found: the number, measured memory, and what bounds it."""
    shares = f" ({size:,} in each of {world} processes)" if world > 1 else ""
    why = "the pool has no more entries" if most < LARGEST else "larger ones are not tried"
    bound = f"; {why}" if size == most else ""
    return (
        f"{size * world:,} samples{shares} take {found.needed / MIB:,.0f} MiB of the "
        f"{found.limit / MIB:,.0f} MiB that a run may use here, as measured{bound}. Give the "
        "number to repeat this run"
    )


def most_of(config: RunConfig, world: int) -> int:
    """The largest batch of a process that is tried: no larger than its part of the pool."""
    entries = getattr(getattr(config, "pool", None), "pool_size", None)
    return LARGEST if entries is None else max(1, min(LARGEST, entries // world))


def _found(config: Config, folder: Path, world: int, most: int, try_with: Try[Config]) -> Found:
    device, limit = memory_of_run()

    def by(measure: Measure, size: int) -> int | None:
        _forget(device)
        try:
            with redirect_stderr(io.StringIO()):  # the run says it again
                return try_with(_as_tried(config, folder, size, world), measure)
        except (RuntimeError, MemoryError, OutOfMemory) as error:
            if not is_out_of_memory(error):
                raise
        except UsageError:  # that the images, the pool or its place have no room for so many
            if size <= FIRST:
                raise
        finally:
            _forget(device)
        return None

    stored = getattr(getattr(config, "pool", None), "pool_device", "device")
    elsewhere = ("pool",) if stored == "disk" else ()

    def needed(size: int) -> int | None:
        return by(lambda trainer, teacher: taken(trainer, teacher, world, elsewhere), size)

    def made(size: int) -> int | None:
        return by(lambda *_: 0, size)

    return largest(needed, limit, most, needed if device.type == "cuda" else made)


def largest(needed: Needed, limit: int, most: int, confirm: Needed) -> Found:
    """The largest power of two, or `most`, that takes no more than `limit` bytes.

    needed: bytes that a size takes, measured; None if there are not so many. confirm: the same of
    the size that is chosen, or 0 if that it is possible is enough. Raises DkdmError if not a
    single sample fits.
    """
    size = min(FIRST, most)
    while (least := needed(size)) is None and size > 1:
        size //= 2
    if least is None:
        raise DkdmError(
            "--train-batch-size auto: memory does not suffice for a single sample: give "
            f"{REMEDIES['teacher']}; {REMEDIES['student']}; or {REMEDIES['pool']}"
        )
    second = min(2 * size, most)
    more = needed(second) if second > size else None
    each = 0.0 if more is None else max(0.0, (more - least) / (second - size))
    most = size if more is None else most
    sizes = {most, *(2**power for power in range(most.bit_length()))}
    expected = {n: round(least + each * (n - size)) for n in sorted(sizes, reverse=True)}
    for chosen, taken_ in expected.items():
        if taken_ > limit:
            continue
        seen = taken_ if chosen <= second else confirm(chosen)
        if seen is not None and seen <= limit:
            return Found(chosen, seen or taken_, limit)
    return Found(1, expected[1], limit)


def memory_of_run() -> tuple[torch.device, int]:
    """The device of this process, and the bytes there that its run may use."""
    device = device_of_run()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        free = usable_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return device, int(USED.get(device.type, USED["cpu"]) * free)


def taken(
    trainer: Trainer, teacher: Denoiser | None, world: int = 1, elsewhere: Collection[str] = ()
) -> int:
    """Bytes that a trainer takes on its device, by two steps of it.

    elsewhere: parts in the memory of the CPU that stand for files on a disk.
    """
    device = trainer.accelerator.device
    reduced = sum(p.nbytes for p in trainer.network.parameters()) if world > 1 else 0
    if device.type == "cuda":
        trainer.step()  # makes the optimizer's state and a graph, which it does without if need be
        _forget(device)
        trainer.step()
        return torch.cuda.max_memory_reserved(device) + reduced
    with LiveStorages(trainer.network) as storages:
        trainer.step()  # makes the optimizer's state
        storages.peak = lasting = storages.alive
        trainer.step()
    held = [size for name, size in needs(trainer, teacher).items() if name not in elsewhere]
    return sum(held) + storages.peak - lasting + reduced


def _as_tried(config: Config, folder: Path, size: int, world: int) -> Config:
    """Options of one process's part of a run, without what is done beside its steps."""
    accelerate, pool = config.training.accelerate, getattr(config, "pool", None)
    changes: dict[str, Any] = {
        "train_batch_size": size,
        "output_dir": folder / "run",
        "resume_from_checkpoint": None,
        "report_to": "none",
        "validation_steps": 0,
        "validation_metric": None,
        "ship_best": False,
        "evaluation_samples": 0,
        "evaluation_reference": "none",
        "accelerate": "off" if accelerate == "compile" else accelerate,
    }
    if pool is not None and pool.pool_size is not None:
        changes["pool_size"] = max(size, pool.pool_size // world)
    return replace(config, **changes)


def _forget(device: torch.device) -> None:
    """Free what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
