"""A student that jumps: at any level it gives x_0 at the end of the trajectory that it is on.

A consistency model (arXiv 2303.01469, algorithm 1): jump to x_0, put new noise on it, jump again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dkdm.core.few_steps.model import FewStep


@dataclass(eq=False)
class Jumps(FewStep):
    """A consistency model on a grid, one jump from each point that it samples at."""

    renoises: ClassVar[bool] = True
    beside: ClassVar[Mapping[str, str]] = {
        "many-steps": "the same weights as they denoise, for many steps",
        "plain": "the student for many steps, as it was before",
    }
