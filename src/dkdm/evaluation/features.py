"""The feature space of the Fashion-MNIST metrics: a small classifier and what real images give."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import torch
from safetensors.torch import load
from torch import Tensor, nn

from dkdm.data.datasets import halve
from dkdm.errors import DkdmError

IMAGE_SHAPE = (1, 16, 16)
MEASURABLE_SHAPES = (IMAGE_SHAPE, (1, 28, 28))
NUM_FEATURES = 64
NUM_CLASSES = 10

ReferenceName = Literal["fashion-test", "fashion-train"]


class FeatureNetwork(nn.Module):
    """Classify 16x16 Fashion-MNIST images, and give the features its decision rests on.

    Six 3x3 convolutions with batch normalization at 16, 8 and 4 pixels, averaged over space.
    Images are float32 `[N, 1, 16, 16]` in [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 32, stride=2),
            *_convolution(32, 64),
            *_convolution(64, 64, stride=2),
            *_convolution(64, 128),
            *_convolution(128, NUM_FEATURES),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate activations `[N, 64]`, all >= 0, of images `[N, 1, 16, 16]`."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class logits `[N, 10]` of images `[N, 1, 16, 16]`."""
        return self.head(self.features(x))


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean `[64]` and unbiased covariance `[64, 64]` of the features of `count` images, float64."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Summarize features `[N, 64]`; `DkdmError` where N < 2."""
        if len(features) < 2:
            raise DkdmError(f"{len(features)} image(s) have no covariance: give at least 2")
        wide = features.double()
        return cls(mean=wide.mean(dim=0), covariance=wide.T.cov(), count=len(wide))


@dataclass(frozen=True)
class Reference:
    """What real images measure: feature statistics and within-class pixel variance `[10]`."""

    features: FeatureStatistics
    class_variance: Tensor


def load_feature_network() -> FeatureNetwork:
    """Return the packaged network in evaluation mode, on the CPU, without gradients."""
    network = FeatureNetwork()
    network.load_state_dict(_load_asset("model.safetensors"), strict=True)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def load_reference(name: ReferenceName = "fashion-test") -> Reference:
    """Return the packaged statistics of the 10,000 test or the 60,000 training images.

    Raises `DkdmError` for another name.
    """
    tensors = _load_asset("statistics.safetensors")
    known = sorted({key.split(".")[0] for key in tensors})
    if name not in known:
        raise DkdmError(f"unknown reference {name!r}: expected one of {', '.join(known)}")
    return Reference(
        features=FeatureStatistics(
            mean=tensors[f"{name}.mean"],
            covariance=tensors[f"{name}.covariance"],
            count=int(tensors[f"{name}.count"]),
        ),
        class_variance=tensors[f"{name}.class_variance"],
    )


@torch.no_grad()
def extract_features(network: FeatureNetwork, images: Tensor, batch_size: int = 500) -> Tensor:
    """Return the features `[N, 64]`, float32 on the CPU, of images `[N, 1, 16, 16]` in [-1, 1].

    The images are moved, `batch_size` at a time, to the network's device. Raises `DkdmError` for
    another shape, and for values that are not finite.
    """
    check_images(images)
    device = network.head.weight.device
    batches = images.split(batch_size)
    return torch.cat([network.features(batch.to(device).float()).cpu() for batch in batches])


def to_image_shape(images: Tensor) -> Tensor:
    """Bring 28x28 images to the 16x16 of the packaged features; leave any others alone."""
    return halve(images) if tuple(images.shape[1:]) == (1, 28, 28) else images


def check_images(images: Tensor) -> None:
    """Raise `DkdmError` unless images are finite and `[N, 1, 16, 16]` with N >= 1."""
    if tuple(images.shape[1:]) != IMAGE_SHAPE or len(images) == 0:
        raise DkdmError(
            f"images have shape {list(images.shape)}, expected [N, 1, 16, 16] with N >= 1: "
            "the packaged features are those of 16x16 Fashion-MNIST"
        )
    broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if broken:
        raise DkdmError(
            f"{broken} of {len(images)} images hold NaN or infinity: the model has diverged, "
            "evaluate an earlier checkpoint or train it with a lower learning rate"
        )


def _convolution(channels_in: int, channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels_in, channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def _load_asset(name: str) -> dict[str, Tensor]:
    return load((files("dkdm") / "data" / "fashion" / "features" / name).read_bytes())
