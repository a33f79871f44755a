"""The kernel distance: how far two sets of features are apart, without fitting a Gaussian."""

from __future__ import annotations

from torch import Tensor

from dkdm.errors import DkdmError

BLOCK = 1024


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
    within = sum(_sum_within(x) / (len(x) * (len(x) - 1)) for x in (a, b))
    return within - 2 * sum(_sum_between(rows, b) for rows in a.split(BLOCK)) / (n * m)


def _sum_between(a: Tensor, b: Tensor) -> float:
    return float(_kernel(a @ b.T, a.shape[1]).sum())


def _sum_within(x: Tensor) -> float:
    """Over all pairs of two different images; each is computed once."""
    total, blocks = 0.0, x.split(BLOCK)
    for i, rows in enumerate(blocks):
        total += float(_kernel(rows @ rows.T, x.shape[1]).fill_diagonal_(0).sum())
        total += 2 * sum(_sum_between(rows, others) for others in blocks[i + 1 :])
    return total


def _kernel(products: Tensor, size: int) -> Tensor:
    return (products / size + 1) ** 3
