"""Checksums in files of tensors that are read again much later, and that no manifest lists."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

KEY = "dkdm.crc32"  # in the metadata of a safetensors file


def sums_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata for a file of these tensors: the CRC-32 of each, its type and shape included."""
    return {KEY: json.dumps({name: _sum(tensors[name]) for name in sorted(tensors)})}


def are_damaged(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bool:
    """Whether tensors are not what the metadata of their file says; False if it says nothing."""
    known = (metadata or {}).get(KEY)
    return known is not None and known != sums_of(tensors)[KEY]


def _sum(tensor: Tensor) -> int:
    kept = tensor.detach().cpu().contiguous()
    kind = f"{kept.dtype} {tuple(kept.shape)}".encode()
    return zlib.crc32(kept.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(kind))
