"""The energy distance: how far two sets of samples of any kind are apart, without a network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.errors import DkdmError

BLOCK = 256


class Energy(NamedTuple):
    """An energy distance, and the same as a share of the largest that it could be.

    `share` is 0 for equal distributions and near 1 for distributions that have nothing in common.
    """

    distance: float
    share: float


def energy_distance(x: Tensor, y: Tensor) -> Energy:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples x [N, ...] and y [M, ...].

    Samples are flattened; |.| is the Euclidean norm, X' an independent copy. The estimate is
    unbiased: a sample is not compared with itself, so that equal distributions give about 0 and at
    times a little less. Computed in float64, in blocks. Raises `DkdmError` for fewer than 2 samples
    and for samples that are not finite.

    Source: Szekely and Rizzo, Energy statistics (2013), eq. 2.1; `share` is their coefficient H.
    """
    x, y = x.flatten(1), y.flatten(1)
    few = min(len(x), len(y))
    if few < 2:
        raise DkdmError(f"{few} sample(s) have no energy distance: give at least 2")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise DkdmError("samples hold NaN or infinity: they have no energy distance")
    between = _sum_between(x, y) / (len(x) * len(y))
    distance = 2 * between - _mean_within(x) - _mean_within(y)
    return Energy(distance, distance / (2 * between) if between else 0.0)


def _mean_within(x: Tensor) -> float:
    """The mean distance of two different samples; each pair is computed once."""
    total, blocks = 0.0, x.split(BLOCK)
    for i, block in enumerate(blocks):
        total += float(_distances(block, block).fill_diagonal_(0).sum())
        total += 2 * _sum_between(block, x[(i + 1) * BLOCK :])
    return total / (len(x) * (len(x) - 1))


def _sum_between(x: Tensor, y: Tensor) -> float:
    return sum(float(_distances(a, b).sum()) for a in x.split(BLOCK) for b in y.split(BLOCK))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x.double(), y.double())
