"""Published statistics of real images: mean and covariance of their features, in an .npz."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dkdm.data.array_files import array_names, read_array
from dkdm.data.real_images import Images, Summary
from dkdm.data.reference import FeatureExtractor, FeatureStatistics, Reference
from dkdm.errors import DkdmError

MEAN, COVARIANCE = "mu", "sigma"
SPATIAL_MEAN, SPATIAL_COVARIANCE = "mu_s", "sigma_s"
SKEW = 1e-3  # of the largest entry: how far a covariance may be from symmetric


def holds_statistics(path: Path) -> bool:
    """Whether an .npz holds a mean and a covariance. Raises `DkdmError` if it cannot be read."""
    return {MEAN, COVARIANCE} <= set(array_names(path))


def statistics_reference(path: Path, network: FeatureExtractor) -> Reference:
    """What pytorch-fid, EDM and ADM publish of a data set: `mu` and `sigma`, ADM `mu_s`, `sigma_s`.

    How many images they are of is not in the file, nor how these were brought to 299x299. Raises
    `DkdmError` for arrays that are no mean and covariance of the network's features.
    """
    names, spatial = array_names(path), None
    if "spatial" in network.gives and {SPATIAL_MEAN, SPATIAL_COVARIANCE} <= set(names):
        spatial = _statistics(path, (SPATIAL_MEAN, SPATIAL_COVARIANCE), network.num_spatial)
    return Reference(
        name=path.name,
        network=network,
        statistics=_statistics(path, (MEAN, COVARIANCE), network.num_features),
        spatial=spatial,
        dataset={"type": path.stem, "name": path.stem},
    )


def with_images(reference: Reference, images: Images, look: Callable[[], Summary]) -> Reference:
    """The same statistics, and for what needs single images those of the same file.

    look: gives what the network sees in them; it is not called before it is needed.
    """
    seen = cache(look)
    return replace(
        reference,
        shape=images.shape,
        num_images=images.count,
        features=lambda: seen().features.features,
        floor_features=lambda count: seen().drawn(count),
        floor_apart=lambda count: seen().apart(count),
    )


def _statistics(path: Path, names: tuple[str, str], size: int) -> FeatureStatistics:
    mean, covariance = (
        torch.from_numpy(read_array(path, name, shape).astype(np.float64))
        for name, shape in zip(names, [(size,), (size, size)], strict=True)
    )
    for name, values in zip(names, (mean, covariance), strict=True):
        if not values.isfinite().all():
            raise DkdmError(f"{path}: {name} holds NaN or infinity: give another file")
    largest = covariance.abs().max()
    if (covariance - covariance.T).abs().max() > SKEW * largest:
        raise DkdmError(f"{path}: {names[1]} is not symmetric, so it is no covariance")
    if covariance.diagonal().min() < -SKEW * largest:
        raise DkdmError(f"{path}: {names[1]} has negative variances, so it is no covariance")
    return FeatureStatistics(mean, covariance, None)
