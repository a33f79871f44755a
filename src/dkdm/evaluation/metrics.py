"""What generated images are worth beside real ones: distance, class accuracy, diversity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dkdm.data.reference import FeatureStatistics, Reference
from dkdm.errors import DkdmError
from dkdm.evaluation.frechet import frechet_distance


@dataclass(frozen=True)
class Metrics:
    """The measurements of one set of images; those that need labels are None without them.

    - `fd`: Frechet distance to the reference, >= 0; it falls with more images, so compare at one
      `num_samples` only.
    - `class_accuracy`: share in [0, 1] of images the classifier puts in the class asked for.
    - `variance_ratio_mean`, `variance_ratio_min`: within-class pixel variance over that of the real
      images, over classes; 1 is as diverse as real, near 0 a collapsed class.
    """

    fd: float
    class_accuracy: float | None
    variance_ratio_mean: float | None
    variance_ratio_min: float | None
    num_samples: int
    reference: str


def evaluate_images(images: Tensor, labels: Tensor | None, reference: Reference) -> Metrics:
    """Measure images in [-1, 1] against the real ones of a reference.

    images: `[N, *shape]` of a shape that fits the reference. labels: `[N]`, the classes asked for;
    None leaves the measurements per class None. The variance ratios cover the classes with at least
    2 images, and are None if no class has 2. Raises `DkdmError` for other images or labels, and
    for fewer than 2 images.
    """
    images = _prepared(images, reference)
    features = reference.features(images)
    found = FeatureStatistics.of(features)
    accuracy = ratio_mean = ratio_min = None
    if labels is not None:
        real = reference.class_variance
        ratios = within_class_variance(images, labels, len(real)) / real
        ratios = ratios[ratios.isfinite()]
        if len(ratios):
            ratio_mean, ratio_min = ratios.mean().item(), ratios.min().item()
        accuracy = (reference.classify(features) == labels.cpu()).double().mean().item()
    return Metrics(
        fd=frechet_distance(found, reference.statistics),
        class_accuracy=accuracy,
        variance_ratio_mean=ratio_mean,
        variance_ratio_min=ratio_min,
        num_samples=found.count,
        reference=reference.name,
    )


def within_class_variance(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return, per class, the mean over pixels of the unbiased variance over its images.

    images: `[N, ...]`; labels: `[N]` in 0..num_classes-1. The result is float64 `[num_classes]`,
    NaN for a class of fewer than 2 images. Raises `DkdmError` for other labels.
    """
    _check_labels(images, labels, num_classes)
    pixels, labels = images.flatten(1).double().cpu(), labels.cpu()
    classes = [pixels[labels == c] for c in range(num_classes)]
    return torch.tensor(
        [each.var(dim=0).mean() if len(each) > 1 else math.nan for each in classes],
        dtype=torch.float64,
    )


def _prepared(images: Tensor, reference: Reference) -> Tensor:
    """Images as the reference's network takes them.

    Raises `DkdmError` if there are none, their shape does not fit, or values are not finite.
    """
    if not reference.fits(images.shape[1:]) or len(images) == 0:
        shapes = " or ".join(map(str, reference.shapes))
        raise DkdmError(
            f"images of shape {list(images.shape)} cannot be compared with {reference.name}: "
            f"give at least one image, of shape {shapes}"
        )
    broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if broken:
        raise DkdmError(
            f"{broken} of {len(images)} images hold NaN or infinity, the model has diverged: "
            "evaluate an earlier checkpoint or train it with a lower learning rate"
        )
    return reference.prepare(images)


def _check_labels(images: Tensor, labels: Tensor, num_classes: int) -> None:
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise DkdmError(
            f"labels are {labels.dtype} {list(labels.shape)}: give one integer for each of "
            f"{len(images)} images"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DkdmError(
            f"labels lie in {int(labels.min())}..{int(labels.max())}: use 0..{num_classes - 1}"
        )
