"""Tables and tensors that a Python user hands over as a tensor, a numpy array or a list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dkdm.errors import UsageError
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
