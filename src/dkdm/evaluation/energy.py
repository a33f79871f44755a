"""The energy distance: how far two sets of samples of any kind are apart, without a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.errors import DkdmError

BLOCK = 256
MOST = 2000  # samples of an energy distance: the time grows with their square


class Energy(NamedTuple):
    """An energy distance, and the same as a share of the largest that it could be.

    `share` is 0 for equal distributions and near 1 for distributions that have nothing in common.
    """

    distance: float
    share: float


@dataclass(frozen=True)
class TeacherDistance:
    """The energy distance between `num_samples` samples of a model and as many of its teacher.

    - `share`: of the largest that it could be, from 0 (equal) to 1 (nothing in common).
    - `floor`, `floor_share`: of one half of the teacher's samples to the other, which has other
      noise; None with fewer than 4 samples. They lie about 0, at times a little below. 0 where the
      samples are paired by their noise.
    """

    distance: float
    share: float
    floor: float | None
    floor_share: float | None
    num_samples: int


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


def teacher_distance(samples: Tensor, teacher: Tensor) -> TeacherDistance:
    """Compare samples [N, ...] of a model with the teacher's [M, ...], of other noise."""
    found, count = energy_distance(samples, teacher), min(len(samples), len(teacher))
    if len(teacher) < 4:
        return TeacherDistance(found.distance, found.share, None, None, count)
    floor = energy_distance(*teacher.tensor_split(2))
    return TeacherDistance(found.distance, found.share, floor.distance, floor.share, count)


def paired_teacher_distance(samples: Tensor, teacher: Tensor) -> TeacherDistance:
    """Compare samples [N, ...] of a model with the teacher's [N, ...], each from the same noise.

    Samples of one noise are not compared with each other, so that the estimate is unbiased as
    `energy_distance` is, with much less spread: the noise that both share cancels. It is 0 for the
    teacher itself, the floor.
    """
    x, y = samples.flatten(1), teacher.flatten(1)
    blocks = zip(x.split(BLOCK), y.split(BLOCK), strict=True)
    same = sum(float((a.double() - b.double()).norm(dim=1).sum()) for a, b in blocks)
    between = (_sum_between(x, y) - same) / (len(x) * (len(x) - 1))
    distance = 2 * between - _mean_within(x) - _mean_within(y)
    share = distance / (2 * between) if between else 0.0
    return TeacherDistance(distance, share, 0.0, 0.0, len(x))


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
