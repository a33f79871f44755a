"""Fashion-MNIST to measure against: a small classifier, and what the real images give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib.resources import files
from typing import Literal

import torch
from safetensors.torch import load
from torch import Tensor, nn

from dkdm.core.randomness import generator
from dkdm.data.fashion import CLASS_NAMES, ROOT, SHAPES, halve, load_fashion_mnist
from dkdm.data.real_images import AT_ONCE, Images, Look, Source, summarized
from dkdm.data.reference import Apart, FeatureExtractor, Features, FeatureStatistics, Reference

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
        num_features=NUM_FEATURES,
        gives=frozenset({"logits", "pixels"}),
        class_names=CLASS_NAMES,
    )


def fashion_reference(
    name: str,
    extractor: FeatureExtractor | None = None,
    shape: Sequence[int] | None = None,
    cache: bool = True,
    look: Look = summarized,
) -> Reference:
    """Return "fashion-test", the 10,000 test images, or "fashion-train", the 60,000 others.

    extractor: another network than the packaged one, which sees the images at the size of `shape`,
    (1, 16, 16) or (1, 28, 28), by `look`. The floor of each are images of the other. Raises
    `DkdmError` if the images are not installed and another network is to see them.
    """
    packaged = feature_extractor()
    if extractor is not None and extractor.name != packaged.name:
        return _seen_by(extractor, name, 16 if tuple(shape or ()) == SHAPES[0] else 28, cache, look)
    tensors, split = _load_asset("statistics.safetensors"), SPLITS[name]
    found = Reference(
        name=name,
        network=packaged,
        statistics=_statistics(tensors, name),
        features=lambda: packaged(load_fashion_mnist(split)[0]).features,
        num_images=int(tensors[f"{name}.count"]),
        floor=_statistics(tensors, FLOORS[name]),
        class_variance=tensors[f"{name}.class_variance"],
        dataset=_dataset(split, 16),
    )
    return _with_floors(found, 16, cache=False)


def _with_floors(reference: Reference, size: int, cache: bool) -> Reference:
    """The same reference, its floors those of images of the other split."""
    drawn = lru_cache(maxsize=1)(partial(_drawn, reference.network, reference.name, size, cache))
    seen = reference.features

    def apart(count: int) -> Apart | None:
        features = drawn(count)
        return None if features is None or seen is None else Apart(features, seen())

    return replace(reference, floor_features=drawn, floor_apart=apart)


def _drawn(
    network: FeatureExtractor, name: str, size: int, cache: bool, count: int
) -> Features | None:
    """The features of so many images of the other split; None if these are too few or missing.

    cache: keep them in the cache folder.
    """
    if not ROOT.is_dir():
        return None
    other = FLOORS[name]
    images = load_fashion_mnist(SPLITS[other], size=size)[0]
    if count > len(images):
        return None
    order = torch.randperm(len(images), generator=generator("cpu", 0, "floor"))
    images = images[order[:count]]
    called, digest = f"{count:,} images of {other}", f"{other} {size} {count}"
    source = Source(called, lambda: digest, lambda _: _images(images))
    return summarized(source, network, cache).features


def _seen_by(network: FeatureExtractor, name: str, size: int, cache: bool, look: Look) -> Reference:
    split = SPLITS[name]

    def opened(_: FeatureExtractor) -> Images:
        return _images(*load_fashion_mnist(split, size=size))

    source = Source(name, lambda: f"{name} {size}", opened)
    found = look(source, network, cache, None).reference(name, network)
    return _with_floors(replace(found, dataset=_dataset(split, size)), size, cache)


def _images(images: Tensor, labels: Tensor | None = None) -> Images:
    def batches(starts: Sequence[int]) -> Iterator[Tensor]:
        return (images[first : first + AT_ONCE] for first in starts)

    return Images(len(images), tuple(images.shape[1:]), batches, labels)


def _dataset(split: str, size: int) -> dict[str, str]:
    return {
        "type": "zalando-datasets/fashion_mnist",
        "name": f"Fashion-MNIST at {size}x{size}",
        "split": split,
    }


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
