"""What is done to a predicted x_0 before the chain uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dkdm.reading.arguments import NamedArguments, number, refuse, set_fields


@dataclass(frozen=True)
class Clipping(NamedArguments):
    """What is done to a predicted x_0 before the chain uses it.

    range: largest distance from `center` kept; None leaves x_0 alone.
    quantile: if given, dynamic thresholding (Imagen, arXiv 2205.11487, sec. 2.3): each sample is
        clamped to the quantile s of its |x_0|, 1 <= s <= range, and divided by s.
    rederive_eps: True recomputes eps from the clipped x_0 (DDPM); False keeps it (diffusers' DDIM).
    center: middle of the values of clean samples, 0.5 for those in [0, 1].
    """

    range: float | None = None
    quantile: float | None = None
    rederive_eps: bool = True
    center: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.range, (tuple, list)):
            refuse("Clipping: range", self.range, _clipping_between(self.range))
        if self.range is not None:
            set_fields(self, range=number("Clipping: range", self.range, 0, open_low=True))
        if self.quantile is not None:
            set_fields(
                self, quantile=number("Clipping: quantile", self.quantile, 0, 1, open_low=True)
            )
        if self.quantile is not None and self.range is None:
            refuse("Clipping: range", None, "give the largest quantile with quantile=...")
        if type(self.rederive_eps) is not bool:
            refuse("Clipping: rederive_eps", self.rederive_eps, "give True or False")
        set_fields(self, center=number("Clipping: center", self.center))


def _clipping_between(ends: Any) -> str:
    """The remedy for a range given as two ends."""
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        return "give one number, the largest distance from the center"
    middle, reach = (low + high) / 2, abs(high - low) / 2
    return (
        "give one number, the largest distance from the center: "
        f"Clipping(range={reach:g}, center={middle:g}) keeps {low:g} to {high:g}"
    )
