"""What generated images are worth beside real ones: every metric is a row of `METRICS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from dkdm.data.reference import (
    FeatureExtractor,
    Features,
    FeatureStatistics,
    Reference,
    checked_labels,
    within_class_variance,
)
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.frechet import frechet_distance
from dkdm.evaluation.kernel import kernel_distance
from dkdm.evaluation.neighbours import Coverage, coverage
from dkdm.evaluation.numbers import number, percent

SPLIT = 5000  # images of an Inception Score, at least


@dataclass(frozen=True)
class Sampled:
    """Samples of a model to be measured: as a network sees them, and the classes asked for, [N]."""

    features: Features
    labels: Tensor | None = None


Measure = Callable[[Sampled, Any], float | None]  # beside a `Reference`, or None for `PER_SAMPLE`


@dataclass(frozen=True)
class Metric:
    """A number of a set of samples beside a reference.

    - `measure`: gives it; None if these samples do not have it.
    - `needs`: what of samples and reference it is made from, see `missing`.
    - `format`: makes text of it.
    - `better`: which values are better, for what makes a headline; None for details.
    - `least`: fewer samples than this give a number that cannot be compared with published ones.
    """

    label: str
    measure: Measure
    needs: frozenset[str] = frozenset()
    format: Callable[[float], str] = number
    better: Literal["lower", "higher"] | None = None
    least: int = 2


@dataclass(frozen=True)
class Metrics:
    """The measurements of one set of samples, by their names in `METRICS`.

    `reference`: its name; empty without one.
    """

    values: Mapping[str, float]
    num_samples: int
    reference: str

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def get(self, name: str) -> float | None:
        """The measurement, or None if it was not made."""
        return self.values.get(name)


def evaluate_images(images: Tensor, labels: Tensor | None, reference: Reference) -> Metrics:
    """Measure images in [-1, 1] against the real ones of a reference, by its usual metrics.

    images: `[N, *shape]` of a shape that fits the reference. labels: `[N]`, the classes asked for.
    Raises `DkdmError` for other images or labels, and for fewer than 2 images.
    """
    sampled = Sampled(reference.network(images), labels)
    return measure(sampled, reference, usual(reference))


def known_labels(labels: Tensor | None, reference: Reference) -> Tensor | None:
    """The labels [N] of samples, if the reference knows all of their classes; None leaves classes
    unmeasured."""
    names = reference.network.class_names
    if labels is None or names is None or int(labels.max()) < len(names):
        return labels
    return None


def measure(sampled: Sampled, reference: Reference | None, names: Iterable[str]) -> Metrics:
    """Measure samples by the named metrics; those that they do not have are left out.

    reference: None for those of `PER_SAMPLE` alone. Raises `UsageError` for an unknown metric, and
    for one that the reference cannot serve, `DkdmError` for features that are not finite.
    """
    check(names := tuple(names), reference)
    _check_finite(sampled.features)
    found = {name: METRICS[name].measure(sampled, reference) for name in names}
    _coverage.cache_clear()  # which holds the features
    values = {name: value for name, value in found.items() if value is not None}
    return Metrics(values, len(sampled.features.features), reference.name if reference else "")


def _check_finite(seen: Features) -> None:
    for column in (seen.features, seen.spatial, seen.logits):
        broken = 0 if column is None else int((~column.isfinite()).any(dim=1).sum())
        if broken:
            raise DkdmError(
                f"the features of {broken} of {len(seen.features)} images are not finite: check "
                "the feature network and its device"
            )


def usual(reference: Reference) -> tuple[str, ...]:
    """What is measured if nothing else is asked for: what needs no single real images."""
    return tuple(
        name
        for name, metric in METRICS.items()
        if "real" not in metric.needs and not missing(metric, reference) and name != "is"
    )


def check(names: Iterable[str], reference: Reference | None) -> None:
    """Raise `UsageError` for an unknown metric, and for one that the reference cannot serve."""
    for name in names:
        if name not in METRICS:
            raise UsageError(f"there is no metric {name!r}: use {', '.join(METRICS)}")
        if name in PER_SAMPLE:
            continue
        if reference is None:
            raise UsageError(f"{name} needs a reference: give --reference")
        lacks = missing(METRICS[name], reference)
        if lacks:
            raise UsageError(f"{name} cannot be measured against {reference.name}: {lacks}")


def missing(metric: Metric, reference: Reference) -> str:
    """What the reference lacks for a metric, in words; empty if nothing."""
    if reason := missing_of_network(metric, reference.network):
        return reason
    lacks = {
        "spatial": reference.spatial is None,
        "real": reference.features is None,
        "variance": reference.class_variance is None,
    }
    few = reference.num_images is not None and reference.num_images < metric.least
    if "real" in metric.needs and few:
        return f"it holds {reference.num_images} image(s); give at least {metric.least}"
    return next((_LACKS[need] for need in sorted(metric.needs) if lacks.get(need)), "")


def missing_of_network(metric: Metric, network: FeatureExtractor) -> str:
    """What a network of features does not give for a metric, in words; empty if nothing."""
    lacks = {
        "inception": not network.name.startswith("inception"),
        "other": network.name.startswith("inception"),
        "logits": "logits" not in network.gives,
        "spatial": "spatial" not in network.gives,
        "classes": network.class_names is None,
        "variance": "pixels" not in network.gives,
    }
    return next((_LACKS[need] for need in sorted(metric.needs) if lacks.get(need)), "")


_LACKS = {
    "inception": "its features are not those of the Inception network; use fd",
    "other": "its features are those of the Inception network; use fid",
    "logits": "its network gives no classes; give --feature-network the full file",
    "spatial": "it has no statistics of spatial features; make it from images",
    "real": "it holds statistics only; give a folder of images as --reference",
    "classes": "the classes of its network are not those of the model",
    "variance": "it does not know the variance of real images within a class",
}


def _frechet(sampled: Sampled, reference: Reference) -> float:
    found = FeatureStatistics.of(sampled.features.features)
    return frechet_distance(found, reference.statistics)


def _spatial(sampled: Sampled, reference: Reference) -> float:
    assert sampled.features.spatial is not None and reference.spatial is not None  # by `check`
    return frechet_distance(FeatureStatistics.of(sampled.features.spatial), reference.spatial)


def _kernel(sampled: Sampled, reference: Reference) -> float:
    assert reference.features is not None  # by `check`
    return kernel_distance(sampled.features.features, reference.features())


def _covered(part: str) -> Measure:
    def measure(sampled: Sampled, reference: Reference) -> float:
        return float(getattr(_coverage(sampled, reference), part))

    return measure


@lru_cache(maxsize=1)
def _coverage(sampled: Sampled, reference: Reference) -> Coverage:
    """All four at once: the distances of all pairs take the time."""
    assert reference.features is not None  # by `check`
    return coverage(reference.features(), sampled.features.features)


def _inception_score(sampled: Sampled, _: Reference) -> float:
    assert sampled.features.logits is not None  # by `check`
    return inception_score(sampled.features.logits)


def inception_score(logits: Tensor) -> float:
    """Return exp E KL(p(y | x) || p(y)) of logits [N, K], the mean over equal parts.

    A part has 5,000 images or more, 50,000 make the usual 10; fewer images are one part.

    Source: Salimans et al., Improved Techniques for Training GANs (2016), section 4.
    """
    scores = []
    for split in logits.double().tensor_split(max(1, len(logits) // SPLIT)):
        single = split.log_softmax(dim=1)
        mean = single.exp().mean(dim=0).log()
        each = kl_div(mean.expand_as(single), single, reduction="batchmean", log_target=True)
        scores.append(each.exp())
    return float(torch.stack(scores).mean())


def _class_accuracy(sampled: Sampled, reference: Reference) -> float | None:
    if sampled.labels is None:
        return None
    assert sampled.features.logits is not None and reference.network.class_names is not None
    names = reference.network.class_names
    labels = checked_labels(sampled.labels, len(sampled.features.logits), names)
    return float((sampled.features.logits.argmax(dim=1) == labels).double().mean())


def _diversity(summary: Callable[[Tensor], Tensor]) -> Measure:
    def measure(sampled: Sampled, reference: Reference) -> float | None:
        if sampled.labels is None:
            return None
        assert sampled.features.pixels is not None and reference.class_variance is not None
        real = reference.class_variance
        ratios = within_class_variance(sampled.features.pixels, sampled.labels, len(real)) / real
        ratios = ratios[ratios.isfinite()]
        return float(summary(ratios)) if len(ratios) else None

    return measure


def _mean_of(column: str) -> Measure:
    """The mean of a column of `Features` over the images that have a value."""

    def measure(sampled: Sampled, _: object) -> float | None:
        values = getattr(sampled.features, column)
        if values is None or values.isnan().all():
            return None
        return float(values.double().nanmean())

    return measure


PER_SAMPLE = ("lpips", "lpips_diversity", "clip")  # names of metrics, and columns of `Features`

METRICS: dict[str, Metric] = {
    "fd": Metric("Frechet distance", _frechet, frozenset({"other"}), better="lower"),
    "fid": Metric("FID", _frechet, frozenset({"inception"}), better="lower", least=2048),
    "sfid": Metric("sFID", _spatial, frozenset({"spatial"}), better="lower", least=2048),
    "is": Metric("Inception Score", _inception_score, frozenset({"logits"}), better="higher"),
    "kid": Metric("kernel distance (KID)", _kernel, frozenset({"real"}), better="lower"),
    "precision": Metric(
        "precision", _covered("precision"), frozenset({"real"}), percent, "higher", 6
    ),
    "recall": Metric("recall", _covered("recall"), frozenset({"real"}), percent, "higher", 6),
    "density": Metric("density", _covered("density"), frozenset({"real"}), least=6),
    "coverage": Metric("coverage", _covered("coverage"), frozenset({"real"}), percent, least=6),
    "class_accuracy": Metric(
        "class accuracy", _class_accuracy, frozenset({"logits", "classes"}), percent, "higher"
    ),
    "variance_ratio_mean": Metric(
        "diversity within a class (1 = real images)",
        _diversity(torch.mean),
        frozenset({"variance"}),
    ),
    "variance_ratio_min": Metric(
        "the same, least diverse class", _diversity(torch.min), frozenset({"variance"})
    ),
    "lpips": Metric("LPIPS to the teacher's, same noise", _mean_of("lpips"), better="lower"),
    "lpips_diversity": Metric("LPIPS between samples", _mean_of("lpips_diversity")),
    "clip": Metric("CLIP score", _mean_of("clip"), better="higher"),
}
