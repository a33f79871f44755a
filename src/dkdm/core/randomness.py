"""Random numbers as a function of what they are for: (seed, purpose, shard, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, and only on these parts."""
    return derived_seeds(*parts[:-1])(parts[-1])


def derived_seeds(*parts: int | str) -> Callable[[int | str], int]:
    """`derived_seed(*parts, last)` as a function of `last`; the parts are hashed once."""
    begun = hashlib.sha256("".join(f"{part}/" for part in parts).encode())

    def seed(last: int | str) -> int:
        hashed = begun.copy()
        hashed.update(str(last).encode())
        return int.from_bytes(hashed.digest()[:8], "big") >> 1

    return seed


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on `device` seeded by `derived_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derived_seed(*parts))
