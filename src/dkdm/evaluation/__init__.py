"""Measure images against real ones: Frechet distance, class agreement, within-class variance."""

from dkdm.evaluation.classes import (
    Metrics,
    class_agreement,
    evaluate_images,
    within_class_variance,
)
from dkdm.evaluation.features import (
    FeatureNetwork,
    FeatureStatistics,
    Reference,
    ReferenceName,
    extract_features,
    load_feature_network,
    load_reference,
)
from dkdm.evaluation.frechet import feature_statistics, frechet_distance

__all__ = [
    "FeatureNetwork",
    "FeatureStatistics",
    "Metrics",
    "Reference",
    "ReferenceName",
    "class_agreement",
    "evaluate_images",
    "extract_features",
    "feature_statistics",
    "frechet_distance",
    "load_feature_network",
    "load_reference",
    "within_class_variance",
]
