"""The Frechet distance between two Gaussians fitted to image features."""

import torch
from torch import Tensor

from dkdm.evaluation.features import FeatureStatistics, extract_features, load_feature_network


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Return the squared Frechet distance between N(mean_a, cov_a) and N(mean_b, cov_b).

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), where the trace of the root is
    taken of the similar, symmetric cov_a^(1/2) cov_b cov_a^(1/2). Means are `[D]`, covariances
    `[D, D]`; computed in float64 on the CPU; >= 0. Eigenvalues that rounding made negative count
    as 0, so singular covariances (fewer images than features) are fine.

    Source: Dowson and Landau, The Frechet distance between multivariate normal distributions
    (1982), eq. 4; used on features by Heusel et al., GANs Trained by a Two Time-Scale Update Rule
    (2017), eq. 6.
    """
    mean_a, cov_a, mean_b, cov_b = (x.double().cpu() for x in (mean_a, cov_a, mean_b, cov_b))
    root_a = _symmetric_root(cov_a)
    trace_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root
    return distance.clamp(min=0).item()


def feature_statistics(images: Tensor, batch_size: int = 500) -> FeatureStatistics:
    """Return the packaged network's feature statistics of images `[N, 1, 16, 16]` in [-1, 1].

    Computed on the images' device, `batch_size` at a time. Raises `DkdmError` for another shape,
    for fewer than 2 images, and for values that are not finite.
    """
    network = load_feature_network().to(images.device)
    return FeatureStatistics.of(extract_features(network, images, batch_size))


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
