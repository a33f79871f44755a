"""Values on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(
    value: Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """The same values on `device`; from the host they are sent without waiting for the device."""
    return value.to(device, dtype, non_blocking=value.device.type == "cpu")


def looked_up(table: Tensor, t: Tensor) -> Tensor:
    """A table's values at the levels t, int64 [B], on the table's device."""
    return table[t.to(table.device)]
