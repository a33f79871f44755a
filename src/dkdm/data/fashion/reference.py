"""Fashion-MNIST to measure against: a small classifier, and what the real images give."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

import torch
from safetensors.torch import load
from torch import Tensor, nn

from dkdm.data.fashion import CLASS_NAMES, SHAPES, halve, load_fashion_mnist
from dkdm.data.reference import FeatureExtractor, Features, FeatureStatistics, Reference

SPLITS: dict[str, Literal["train", "test"]] = {"fashion-test": "test", "fashion-train": "train"}
FLOORS = {"fashion-test": "fashion-train", "fashion-train": "fashion-test"}
NUM_FEATURES = 64
BATCH = 500


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
        self.head = nn.Linear(NUM_FEATURES, len(CLASS_NAMES))

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate activations `[N, 64]`, all >= 0, of images `[N, 1, 16, 16]`."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class logits `[N, 10]` of images `[N, 1, 16, 16]`."""
        return self.head(self.features(x))


def load_feature_network() -> FeatureNetwork:
    """Return the packaged network in evaluation mode, on the CPU, without gradients."""
    network = FeatureNetwork()
    network.load_state_dict(_load_asset("model.safetensors"), strict=True)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def feature_extractor() -> FeatureExtractor:
    """The packaged network as distances use it: images of 28x28 are brought to 16x16."""
    network = load_feature_network()

    def compute(images: Tensor) -> Features:
        images = halve(images) if images.shape[-1] == 28 else images
        parts = [network.features(batch.cpu().float()) for batch in images.split(BATCH)]
        features = torch.cat(parts)
        return Features(features, logits=network.head(features), pixels=images.flatten(1).cpu())

    return FeatureExtractor(
        name="fashion-16",
        in_words="64 features of dkdm's packaged 16x16 Fashion-MNIST classifier",
        compute=compute,
        fits=lambda shape: tuple(shape) in SHAPES,
        sizes=" or ".join(map(str, SHAPES)),
        gives=frozenset({"logits", "pixels"}),
        class_names=CLASS_NAMES,
    )


def fashion_reference(name: str) -> Reference:
    """Return "fashion-test", the 10,000 test images, or "fashion-train", the 60,000 others."""
    tensors, network, split = (
        _load_asset("statistics.safetensors"),
        feature_extractor(),
        SPLITS[name],
    )
    return Reference(
        name=name,
        network=network,
        statistics=_statistics(tensors, name),
        features=lambda: network(load_fashion_mnist(split)[0]).features,
        floor=_statistics(tensors, FLOORS[name]),
        class_variance=tensors[f"{name}.class_variance"],
        dataset={
            "type": "zalando-datasets/fashion_mnist",
            "name": "Fashion-MNIST at 16x16",
            "split": split,
        },
    )


def _statistics(tensors: dict[str, Tensor], name: str) -> FeatureStatistics:
    mean, covariance = tensors[f"{name}.mean"], tensors[f"{name}.covariance"]
    return FeatureStatistics(mean, covariance, int(tensors[f"{name}.count"]))


def _convolution(channels_in: int, channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels_in, channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def _load_asset(name: str) -> dict[str, Tensor]:
    return load((files("dkdm") / "data" / "fashion" / "features" / name).read_bytes())
