"""What generated images are measured against: real images, as a network sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dkdm.errors import DkdmError


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean `[D]` and unbiased covariance `[D, D]` of the features of `count` images, float64."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Summarize features `[N, D]`. Raises `DkdmError` if N < 2."""
        if len(features) < 2:
            raise DkdmError(f"{len(features)} image(s) have no covariance: give at least 2")
        wide = features.double()
        return cls(mean=wide.mean(dim=0), covariance=wide.T.cov(), count=len(wide))


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images to compare with, and the network whose features are compared.

    - `features_in_words`: for a reader of the distances.
    - `dataset`: type, name and split, as the hub's model index wants them.
    - `shapes`: of samples that can be measured; the first is the network's.
    - `prepare`: brings images of these shapes to the network's.
    - `features`: `[N, D]`, float32 on the CPU, of prepared images.
    - `classify`: the most likely class `[N]` of features.
    - `statistics`, `class_variance`: of the real images; the second is the mean over pixels of the
      variance within each class, `[C]`.
    - `floor`: statistics of other real images, the best that a generator can be asked for.
    """

    name: str
    features_in_words: str
    dataset: Mapping[str, str]
    shapes: tuple[tuple[int, ...], ...]
    class_names: tuple[str, ...]
    prepare: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor]
    statistics: FeatureStatistics
    floor: FeatureStatistics
    class_variance: Tensor

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether samples of this shape can be measured."""
        return tuple(shape) in self.shapes
