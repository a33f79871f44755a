"""The kernel distance: how far two sets of features are apart, without fitting a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from dkdm.errors import DkdmError

BLOCK = 2048


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return the unbiased squared MMD of features a [N, D] and b [M, D] with a cubic kernel.

    k(x, y) = (x y / D + 1)^3. All pairs count, so the value is what the usual mean over random
    subsets of 1,000 estimates; it may be slightly below 0. Computed in float64. Raises `DkdmError`
    for fewer than 2 images.

    Source: Binkowski et al., Demystifying MMD GANs (2018), eq. 4 and section 4.
    """
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise DkdmError(f"{min(n, m)} image(s) have no kernel distance: give at least 2")
    a, b = a.double(), b.double()
    within = [
        (_sum_of_kernels(x, x) - float(_kernel((x * x).sum(1), x.shape[1]).sum()))
        / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    return sum(within) - 2 * _sum_of_kernels(a, b) / (n * m)


def _sum_of_kernels(a: Tensor, b: Tensor) -> float:
    blocks = (_kernel(rows @ b.T, a.shape[1]).sum() for rows in a.split(BLOCK))
    return float(sum(blocks, torch.zeros((), dtype=a.dtype)))


def _kernel(products: Tensor, size: int) -> Tensor:
    return (products / size + 1) ** 3
