"""Where the states of a pool lie: in the memory of a device, or in a file mapped into memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dkdm.core.mapped import mapped
from dkdm.errors import UsageError
from dkdm.reading.files import existing_folder
from dkdm.reading.machine import usable_memory

SMALLER = "give a smaller --rho or --pool-size, --pool-dtype float16"


def in_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in the memory of a device. Raises UsageError if it exceeds what is free."""
    check_memory(shape, dtype, device)
    return torch.empty(shape, dtype=dtype, device=device)


def on_disk(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor on the CPU whose values lie in a file, on the disk of `folder`.

    The file has no name: its space is free again when the process ends, however it does. It is
    reserved here, since a page that finds no space later would end the process. Raises UsageError
    if there is not enough.
    """
    place = existing_folder(folder)
    needed, free = _bytes(shape, dtype), shutil.disk_usage(place).free
    remedy = f"{SMALLER}, or --pool-dir on another disk"
    if needed > 0.95 * free:
        raise UsageError(
            f"{_described(shape, dtype)}, and {free / 2**30:.1f} GiB are free on the disk of "
            f"{place.absolute()}: {remedy}"
        )
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            _reserve(file.fileno(), needed)
            return mapped(file.fileno(), shape, dtype)
    except OSError as error:
        raise UsageError(
            f"{_described(shape, dtype)}, and no file of that size can be made in "
            f"{place.absolute()} ({error.strerror}): {remedy}"
        ) from error


def _reserve(file: int, size: int) -> None:
    """Make a file this large, with its space taken where the system can take it."""
    os.truncate(file, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def check_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise UsageError if a tensor of this shape exceeds the free memory of its device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else usable_memory()
    if _bytes(shape, dtype) > 0.9 * free:
        other = "disk" if device.type == "cpu" else "cpu"
        raise UsageError(
            f"{_described(shape, dtype)}, and {free / 2**30:.1f} GiB are free on {device}: "
            f"{SMALLER}, or --pool-device {other}"
        )


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    size = _bytes(shape, dtype) / 2**30
    return f"a pool of {shape[0]} entries of shape {shape[1:]} in {dtype} takes {size:.1f} GiB"
