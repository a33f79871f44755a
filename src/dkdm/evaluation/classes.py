"""What generated images are worth beside real ones: distance, obedience to the class, diversity."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dkdm.errors import DkdmError
from dkdm.evaluation.features import (
    NUM_CLASSES,
    FeatureNetwork,
    FeatureStatistics,
    ReferenceName,
    check_images,
    extract_features,
    load_feature_network,
    load_reference,
    to_image_shape,
)
from dkdm.evaluation.frechet import frechet_distance


@dataclass(frozen=True)
class Metrics:
    """The measurements of one set of images; those that need labels are None without them.

    - `fd`: Frechet distance to the reference, >= 0; it falls with more images, so compare at one
      `num_samples` only.
    - `class_agreement`: share in [0, 1] of images the classifier puts in the class asked for.
    - `variance_ratio_mean`, `variance_ratio_min`: within-class pixel variance over that of the real
      images, over classes; 1 is as diverse as real, near 0 a collapsed class.
    """

    fd: float
    class_agreement: float | None
    variance_ratio_mean: float | None
    variance_ratio_min: float | None
    num_samples: int
    reference: str

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def class_agreement(images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Return the share in [0, 1] of images whose most likely class is the one asked for.

    Images are `[N, 1, 16, 16]` in [-1, 1], labels `[N]` in 0..9. Raises `DkdmError` for others.
    """
    check_images(images)
    _check_labels(images, labels)
    network = load_feature_network().to(images.device)
    features = extract_features(network, images, batch_size)
    return _agreement(network.cpu(), features, labels)


def within_class_variance(images: Tensor, labels: Tensor) -> Tensor:
    """Return, per class, the mean over pixels of the unbiased variance over its images.

    Images are `[N, 1, 16, 16]` in [-1, 1], labels `[N]` in 0..9. The result is float64 `[10]`, NaN
    for a class of fewer than 2 images. Raises `DkdmError` for other images or labels.
    """
    check_images(images)
    _check_labels(images, labels)
    pixels, labels = images.flatten(1).double().cpu(), labels.cpu()
    return torch.stack([_mean_variance(pixels[labels == c]) for c in range(NUM_CLASSES)])


def evaluate_images(
    images: Tensor,
    labels: Tensor | None = None,
    reference: ReferenceName = "fashion-test",
) -> Metrics:
    """Measure images in [-1, 1] against real ones of the packaged reference.

    Images are `[N, 1, 16, 16]`, or `[N, 1, 28, 28]`, which are brought to 16x16 as the data were.
    `labels` `[N]` in 0..9 are the classes asked for; None leaves the two measurements per class
    None. The variance ratios cover the classes with at least 2 images. Raises `DkdmError` for other
    images or labels, for fewer than 2 images, and where no class has 2.
    """
    images = to_image_shape(images)
    real = load_reference(reference)
    network = load_feature_network().to(images.device)
    features = extract_features(network, images)
    fake = FeatureStatistics.of(features)
    agreement = ratio_mean = ratio_min = None
    if labels is not None:
        ratios = _variance_ratios(images, labels, real.class_variance)
        ratio_mean, ratio_min = ratios.mean().item(), ratios.min().item()
        agreement = _agreement(network.cpu(), features, labels)
    return Metrics(
        fd=frechet_distance(
            fake.mean, fake.covariance, real.features.mean, real.features.covariance
        ),
        class_agreement=agreement,
        variance_ratio_mean=ratio_mean,
        variance_ratio_min=ratio_min,
        num_samples=fake.count,
        reference=reference,
    )


def _variance_ratios(images: Tensor, labels: Tensor, real: Tensor) -> Tensor:
    ratios = within_class_variance(images, labels) / real
    ratios = ratios[ratios.isfinite()]
    if len(ratios) == 0:
        raise DkdmError(f"no class has 2 of the {len(images)} images: give more images a class")
    return ratios


@torch.no_grad()
def _agreement(network: FeatureNetwork, features: Tensor, labels: Tensor) -> float:
    predicted = network.head(features).argmax(dim=1)
    return (predicted == labels.cpu()).double().mean().item()


def _mean_variance(pixels: Tensor) -> Tensor:
    if len(pixels) < 2:
        return pixels.new_tensor(float("nan"))
    return pixels.var(dim=0).mean()


def _check_labels(images: Tensor, labels: Tensor) -> None:
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise DkdmError(
            f"labels are {labels.dtype} {list(labels.shape)}, "
            f"expected one integer for each of {len(images)} images"
        )
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise DkdmError(
            f"labels lie in {int(labels.min())}..{int(labels.max())}, expected 0..{NUM_CLASSES - 1}"
        )
