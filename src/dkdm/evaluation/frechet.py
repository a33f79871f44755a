"""The Frechet distance between two Gaussians fitted to image features."""

import torch
from torch import Tensor

from dkdm.data.reference import FeatureStatistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared Frechet distance between N(mean_a, cov_a) and N(mean_b, cov_b).

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), and the trace of the root is
    that of the similar, symmetric cov_a^(1/2) cov_b cov_a^(1/2). Means are `[D]`, covariances
    `[D, D]`; computed in float64 on the CPU; >= 0. Eigenvalues that rounding made negative count
    as 0, so singular covariances (fewer images than features) are fine.

    Source: Dowson and Landau, The Frechet distance between multivariate normal distributions
    (1982), eq. 4; used on features by Heusel et al., GANs Trained by a Two Time-Scale Update Rule
    (2017), eq. 6.
    """
    mean_a, cov_a, mean_b, cov_b = (
        x.double().cpu() for x in (a.mean, a.covariance, b.mean, b.covariance)
    )
    root_a = _symmetric_root(cov_a)
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root
    return distance.clamp(min=0).item()


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
