"""How much of the real images a model draws, and how much of what it draws is real.

Both sets are described by balls around each image that reach to its k-th neighbour in the set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.errors import DkdmError

BLOCK = 1024
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5


class Coverage(NamedTuple):
    """Shares in [0, 1], but `density`, which is 1 for a perfect model and may be above.

    - `precision`: of drawn images inside a ball of a real one; `recall`: of real ones inside a ball
      of a drawn one.
    - `density`: balls of real images that hold a drawn one, by the number of neighbours.
    - `coverage`: of real images whose ball holds a drawn one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def coverage(real: Tensor, drawn: Tensor) -> Coverage:
    """Compare features real [M, D] with drawn [N, D].

    Precision and recall reach to the 3rd neighbour (Kynkaanniemi et al., Improved Precision and
    Recall Metric, 2019, eq. 1 and 2), density and coverage to the 5th (Naeem et al., Reliable
    Fidelity and Diversity Metrics, 2020, eq. 2 and 4). Raises `DkdmError` for fewer than 6 images.
    """
    if min(len(real), len(drawn)) <= DENSITY_NEIGHBOURS:
        few = min(len(real), len(drawn))
        raise DkdmError(f"{few} image(s) have too few neighbours: give at least 6")
    real, drawn = real.double(), drawn.double()
    near, far = _radii(real)
    reach = _radii(drawn)[0]
    precise, dense = [], []
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool)
    for block, radius in zip(drawn.split(BLOCK), reach.split(BLOCK), strict=True):
        apart = torch.cdist(block, real)
        precise.append((apart <= near).any(dim=1))
        recalled |= (apart <= radius[:, None]).any(dim=0)
        inside = apart <= far
        dense.append(inside.sum(dim=1))
        covered |= inside.any(dim=0)
    return Coverage(
        precision=_mean(torch.cat(precise)),
        recall=_mean(recalled),
        density=_mean(torch.cat(dense)) / DENSITY_NEIGHBOURS,
        coverage=_mean(covered),
    )


def _radii(features: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of each image to its 3rd and 5th neighbour, [N] each; itself is none."""
    blocks = [
        torch.cdist(block, features).topk(DENSITY_NEIGHBOURS + 1, largest=False).values
        for block in features.split(BLOCK)
    ]
    nearest = torch.cat(blocks)
    return nearest[:, PRECISION_NEIGHBOURS], nearest[:, DENSITY_NEIGHBOURS]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
