"""Tables and tensors that a user hands over: a tensor, a numpy array, a list, or a file of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dkdm.errors import UsageError, in_a_line, raised_as
from dkdm.reading.arguments import refuse


def table(name: str, value: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """A row of finite numbers [T] on the CPU, from a tensor, an array or a list."""
    accepted = "give a row of numbers [T]: a tensor, a numpy array or a list"
    if value is None or isinstance(value, (str, bytes, type, Mapping)) or callable(value):
        refuse(name, value, accepted)
    found = tensor(name, value, accepted).detach().to("cpu", dtype)
    if found.ndim != 1 or not found.numel():
        refuse(name, value, accepted)
    if not found.isfinite().all():
        at = int((~found.isfinite()).nonzero()[0])
        raise UsageError(f"{name}[{at}] is {float(found[at])}: {accepted}, all of them finite")
    return found


def tensor(
    name: str, value: Any, accepted: str = "give a tensor, a numpy array or a list"
) -> Tensor:
    """A tensor from a tensor, an array or nested lists."""
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        refuse(name, value, accepted)


def read_arrays(name: str, path: Path, others: str = "") -> dict[str, Tensor]:
    """The tensors of a file by their names, "" in a .npy file; nothing is unpickled.

    name: the option and the path, for messages. others: what may be given instead of a file.
    Raises UsageError for a file of another kind, and for one that cannot be read.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{name}: give a {', '.join(_READERS)} file{others}")
    with raised_as(lambda error: UsageError(f"{name} cannot be read: {in_a_line(error)}")):
        return reader(path)


def _numpy(path: Path) -> dict[str, Tensor]:
    loaded = np.load(path, allow_pickle=False)
    arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    return {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}


def _torch(path: Path) -> dict[str, Tensor]:
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    values = loaded if isinstance(loaded, dict) else {"": loaded}
    return {str(key): value for key, value in values.items() if isinstance(value, Tensor)}


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": load_file,
    ".npz": _numpy,
    ".npy": _numpy,
    ".pt": _torch,
    ".pth": _torch,
}
