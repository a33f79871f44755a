"""Random numbers as a function of what they are for: (seed, purpose, shard, step)."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, and only on these parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on `device` seeded by `derived_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derived_seed(*parts))
