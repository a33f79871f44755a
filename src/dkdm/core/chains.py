"""The laws of a chain: how far it moves at once, how it is guided, when it is shown as another."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from dkdm.core.conditioning import Condition
from dkdm.errors import UsageError


@dataclass(frozen=True)
class Stride:
    """The law of k, the levels a state moves at once: uniform on low..high."""

    low: int = 1
    high: int = 1

    @classmethod
    def parse(cls, text: str, num_levels: int) -> Stride:
        """Read '20' (always 20) or 'random:20' (uniform on 1..39, mean 20).

        Raises UsageError for anything else, and for strides of T or more.
        """
        read = re.fullmatch("(random:)?([0-9]+)", text)
        if read is None or int(read[2]) < 1:
            raise UsageError(f"--stride '{text}': expected a number of levels or random:MEAN")
        mean = int(read[2])
        stride = cls(1, 2 * mean - 1) if read[1] else cls(mean, mean)
        if stride.high >= num_levels:
            raise UsageError(
                f"--stride '{text}' reaches {stride.high} of {num_levels} levels: too far"
            )
        return stride

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Independent strides, int64 [count]."""
        return torch.randint(self.low, self.high + 1, (count,), generator=random)


@dataclass(frozen=True)
class Guidance:
    """How the teacher is guided: a scale uniform on low..high for each chain; 1 is none.

    chain_only: whether the target is left unguided (the same evaluations give both).
    """

    low: float = 1.0
    high: float = 1.0
    chain_only: bool = False

    @classmethod
    def parse(cls, text: str, chain_only: bool = False) -> Guidance:
        """Read '4' or '2:8'. Raises UsageError for anything else."""
        try:
            numbers = [float(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        legal = len(numbers) in (1, 2) and all(map(math.isfinite, numbers))
        if not legal or numbers[0] > numbers[-1]:
            raise UsageError(f"--guidance-scale '{text}': expected a number or LOW:HIGH")
        return cls(numbers[0], numbers[-1], chain_only)

    @property
    def is_off(self) -> bool:
        """Whether nothing is guided."""
        return self.low == self.high == 1.0

    def draw(self, count: int, random: torch.Generator) -> Condition:
        """A scale for each of `count` chains; nothing where guidance is off."""
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

    `highest * exp(-5 (1 - t / T))`: states of high noise say little of their condition, so that
    prompts without states of their own are learnt there. Source: Random Conditioning (arXiv
    2504.02011), with highest = 1, in the form of its published code (`src/dataset.py`).
    """
    return highest * torch.exp(-RANDOM_CONDITIONING_DECAY * (1 - t.double() / num_levels))
