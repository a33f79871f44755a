"""What generated images are measured against: real images, as a network sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dkdm.errors import DkdmError

COLOURS = {1: "grey", 3: "RGB", 4: "RGBA"}


class Features(NamedTuple):
    """What a network sees in N images, float32 on the CPU; None is what it does not give.

    - `features`: [N, D], the penultimate activations.
    - `spatial`: [N, S], activations of single places, for sFID.
    - `logits`: [N, K], of the network's classes.
    - `pixels`: [N, P], what diversity within a class is measured on.
    - `lpips`, `lpips_diversity`, `clip`: [N], numbers of single images, made while these are at
      hand (`evaluation.single_images`); NaN for an image that has none.
    """

    features: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None
    pixels: Tensor | None = None
    lpips: Tensor | None = None
    lpips_diversity: Tensor | None = None
    clip: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """The features of several batches as those of one."""
        columns = zip(*parts, strict=True)
        return cls(*(None if None in column else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def rows(self, indices: Tensor) -> Features:
        """The features of some of the images: indices [M]."""
        return Features(*(None if each is None else each[indices] for each in self))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean `[D]` and unbiased covariance `[D, D]` of the features of `count` images, float64.

    count is None where a file of statistics does not say it.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Summarize features `[N, D]`. Raises `DkdmError` if N < 2 or values are not finite."""
        if len(features) < 2:
            raise DkdmError(f"{len(features)} image(s) have no covariance: give at least 2")
        wide = features.double()
        if not wide.isfinite().all():
            raise _broken_features(_not_finite(wide), len(wide))
        return cls(mean=wide.mean(dim=0), covariance=wide.T.cov(), count=len(wide))


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A network whose view of images is compared.

    - `name`: its version, the same for the same features; part of what statistics are kept under.
    - `in_words`: what a reader of the distances reads, with how images are brought to its size.
    - `compute`: the `Features` of images [N, C, H, W] in [-1, 1] of shapes that fit.
    - `fits`: whether images of a shape (C, H, W) can be measured.
    - `sizes`: which shapes fit, in words.
    - `gives`: which of `Features` it gives, beside `features`.
    - `class_names`: of its logits, if these are the classes that models are asked for.
    - `num_features`, `num_spatial`: D and S of `Features`.
    - `resizes`: whether it brings images of any size to its own.
    """

    name: str
    in_words: str
    compute: Callable[[Tensor], Features]
    fits: Callable[[Sequence[int]], bool]
    sizes: str
    num_features: int
    num_spatial: int = 0
    resizes: bool = False
    gives: frozenset[str] = frozenset()
    class_names: tuple[str, ...] | None = None

    def __call__(self, images: Tensor) -> Features:
        """Return the features of images [N, C, H, W] in [-1, 1]; values outside are clipped.

        Raises `DkdmError` if there are none, their shape does not fit, or they are not finite, or
        their features are not.
        """
        if len(images) == 0 or not self.fits(images.shape[1:]):
            raise DkdmError(
                f"images of shape {list(images.shape)} cannot be compared by {self.in_words}: "
                f"give at least one image, of shape {self.sizes}"
            )
        broken = _not_finite(images)
        if broken:
            raise DkdmError(
                f"{broken} of {len(images)} images hold NaN or infinity, the model has diverged: "
                "evaluate an earlier checkpoint or train it with a lower learning rate"
            )
        with torch.no_grad():
            found = self.compute(images.clamp(-1, 1))
        if broken := max(_not_finite(each) for each in found if each is not None):
            raise _broken_features(broken, len(images))
        return found


def _not_finite(rows: Tensor) -> int:
    """How many rows hold NaN or infinity; one sum is enough to see that none does."""
    if rows.sum().isfinite():
        return 0
    return int((~rows.isfinite()).flatten(1).any(dim=1).sum())


def _broken_features(broken: int, count: int) -> DkdmError:
    return DkdmError(
        f"the features of {broken} of {count} images are not finite: check the feature network and "
        "its device"
    )


class Apart(NamedTuple):
    """Real images that stand in for samples, and what they are compared with one by one.

    - `others`: [K, D], the features of real images that are none of these.
    """

    features: Features
    others: Tensor


def no_floor(count: int) -> None:
    """The floor of a reference that holds no images."""
    del count


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images to compare with, summarized.

    - `statistics`, `spatial`: of the features of `network`; None if it gives none.
    - `features`: reads [M, D] of the images, for what needs single images; None if only their
      statistics are known. `num_images`: M, if it is known.
    - `floor`: statistics of other real images, known without computing anything; None if there are
      none.
    - `floor_features`: gives the features of so many real images, drawn at random with a fixed
      seed: measured like samples, they are the best that a generator can be asked for. None if
      there are not more than that.
    - `floor_apart`: the same for what looks at single images: an image beside itself is no
      measure. Gives fewer if the others would be fewer than those; None if there are none.
    - `class_variance`: [C], mean over pixels of the variance within each class; None if unknown.
    - `dataset`: type, name and split, as the hub's model index wants them.
    - `shape`: (C, H, W) of the images, (C,) if their sizes differ; empty if unknown.
    - `warnings`: what a reader of numbers measured against it has to know.
    """

    name: str
    network: FeatureExtractor
    statistics: FeatureStatistics
    spatial: FeatureStatistics | None = None
    features: Callable[[], Tensor] | None = None
    num_images: int | None = None
    floor: FeatureStatistics | None = None
    floor_features: Callable[[int], Features | None] = no_floor
    floor_apart: Callable[[int], Apart | None] = no_floor
    class_variance: Tensor | None = None
    dataset: Mapping[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether samples of this shape can be measured."""
        return not self.refusal(shape)

    def refusal(self, shape: Sequence[int]) -> str:
        """Why samples of shape (C, H, W) cannot be measured, in words; empty if they can."""
        return mismatch(self.network, self.shape, tuple(shape))


def mismatch(network: FeatureExtractor, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    """Why samples of our shape (C, H, W) cannot be measured against images of theirs, in words.

    theirs: see `Reference.shape`. Empty if they can.
    """
    if not network.fits(ours):
        return f"is for samples of shape {network.sizes}, not {ours}: give another"
    if theirs and theirs[0] != ours[0]:
        has, needs = (COLOURS.get(count, f"{count}-channel") for count in (theirs[0], ours[0]))
        return f"holds {has} images, the samples are {needs}: convert the images to {needs}"
    if len(theirs) == 3 and network.resizes and theirs != ours:
        has, needs = (f"{height}x{width}" for _, height, width in (theirs, ours))
        return f"holds images of {has}, the samples are {needs}: resize the images to {needs}"
    return ""


def within_class_variance(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return, per class, the mean over pixels of the unbiased variance over its images.

    images: `[N, ...]`; labels: `[N]` in 0..num_classes-1. The result is float64 `[num_classes]`,
    NaN for a class of fewer than 2 images. Raises `DkdmError` for other labels.
    """
    labels = checked_labels(labels, len(images), range(num_classes))
    pixels = images.flatten(1).double().cpu()
    classes = [pixels[labels == c] for c in range(num_classes)]
    return torch.tensor(
        [each.var(dim=0).mean() if len(each) > 1 else math.nan for each in classes],
        dtype=torch.float64,
    )


def checked_labels(labels: Tensor, count: int, classes: Any) -> Tensor:
    """The labels on the CPU. Raises `DkdmError` unless there is one of the classes an image."""
    if labels.shape != (count,) or labels.is_floating_point():
        raise DkdmError(
            f"labels are {labels.dtype} {list(labels.shape)}: give one integer for each of "
            f"{count} images"
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DkdmError(
            f"labels lie in {int(labels.min())}..{int(labels.max())}: use 0..{len(classes) - 1}"
        )
    return labels.cpu()
