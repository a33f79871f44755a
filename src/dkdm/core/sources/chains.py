"""The laws of a chain: how far it moves at once, how it is guided, when it is shown as another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dkdm.config import GuidanceOptions, PoolOptions
from dkdm.core.denoisers.conditioning import Condition
from dkdm.errors import UsageError


@dataclass(frozen=True)
class Stride:
    """The law of k, the levels a state moves at once: uniform on low..high."""

    low: int = 1
    high: int = 1

    @classmethod
    def of_options(cls, options: PoolOptions, num_levels: int) -> Stride:
        """The law that the options name. Raises UsageError for strides of T or more."""
        stride = cls(*options.strides)
        if stride.high >= num_levels:
            raise UsageError(
                f"--stride {options.stride} moves a state by up to {stride.high} levels, and the "
                f"teacher has {num_levels}: give a smaller stride"
            )
        return stride

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Independent strides, int64 [count]."""
        return torch.randint(self.low, self.high + 1, (count,), generator=random)


@dataclass(frozen=True)
class Guidance:
    """How the teacher is guided: each chain draws a scale, uniform on low..high; 1 is unguided.

    chain_only: guide the chain alone and leave the target unguided (one evaluation gives both).
    """

    low: float = 1.0
    high: float = 1.0
    chain_only: bool = False

    @classmethod
    def of_options(cls, options: GuidanceOptions) -> Guidance:
        """The law that the options name."""
        return cls(*options.scales, options.chain_only)

    @property
    def is_off(self) -> bool:
        """Whether nothing is guided."""
        return self.low == self.high == 1.0

    def draw(self, count: int, random: torch.Generator) -> Condition:
        """A scale for each of `count` chains; an empty condition if guidance is off."""
        if self.is_off:
            return {}
        if self.low == self.high:
            return {"guidance": torch.full((count,), self.low)}
        return {"guidance": self.low + (self.high - self.low) * torch.rand(count, generator=random)}

    def of(self, cond: Condition) -> float | Tensor:
        """The scale of drawn chains: one number, or one each [B]."""
        return cond["guidance"] if self.low != self.high else self.low


RANDOM_CONDITIONING_DECAY = 5.0


def random_conditioning_odds(t: Tensor, num_levels: int, highest: float) -> Tensor:
    """Probability that a state at t is shown under another condition, float64 [B].

    `highest * exp(-5 (1 - t / T))`: states of high noise say little about their condition, so a
    student can learn prompts there that no chain of the pool has. Source: Random Conditioning
    (arXiv 2504.02011), with highest = 1, in the form of its published code (`src/dataset.py`).
    """
    return highest * torch.exp(-RANDOM_CONDITIONING_DECAY * (1 - t.double() / num_levels))


def row_mask(mask: Tensor, rows: Tensor) -> Tensor:
    """Shape a [B] mask so that it selects rows of a [B, ...] tensor."""
    return mask.reshape(-1, *[1] * (rows.ndim - 1))


def joined(conds: Sequence[Condition]) -> Condition:
    """The rows of several conditions one after the other."""
    return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}
