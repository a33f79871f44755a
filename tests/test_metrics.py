"""Every metric against a computation of its own: numpy, loops, closed forms."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from dkdm.data.reference import FeatureExtractor, Features, FeatureStatistics, Reference
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation import kernel, neighbours
from dkdm.evaluation.kernel import kernel_distance
from dkdm.evaluation.metrics import (
    METRICS,
    Sampled,
    check,
    inception_score,
    measure,
    usual,
)
from dkdm.evaluation.neighbours import coverage

RANDOM = torch.Generator().manual_seed(0)
REAL, DRAWN = torch.randn(60, 6, generator=RANDOM), 1.2 * torch.randn(50, 6, generator=RANDOM) + 0.3
REAL_SPATIAL = torch.rand(60, 5, generator=RANDOM)
SPATIAL = torch.rand(50, 5, generator=RANDOM).square()
LOGITS, LABELS = torch.randn(50, 3, generator=RANDOM), torch.arange(50) % 3
PIXELS = torch.randn(50, 4, generator=RANDOM)
VARIANCE = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
SINGLE = torch.tensor([0.25, 0.5, math.nan] * 16 + [0.25, 0.5])

SAMPLED = Sampled(
    Features(DRAWN, SPATIAL, LOGITS, PIXELS, SINGLE, 2 * SINGLE, 100 * SINGLE), LABELS
)


def reference(name="inception-test", **changes):
    extractor = FeatureExtractor(
        name=name,
        in_words="a test",
        num_features=6,
        compute=lambda images: Features(images.flatten(1)),
        fits=lambda shape: True,
        sizes="any",
        gives=frozenset({"spatial", "logits", "pixels"}),
        class_names=("a", "b", "c"),
    )
    known = Reference(
        name="real",
        network=extractor,
        statistics=FeatureStatistics.of(REAL),
        spatial=FeatureStatistics.of(REAL_SPATIAL),
        features=lambda: REAL,
        class_variance=VARIANCE,
    )
    return replace(known, **changes)


def frechet_by_numpy(a, b):
    """tr (A B)^(1/2) by the eigenvalues of the product, as the first FID code has it."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root


def kernel_by_loops(a, b):
    def k(x, y):
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    a, b = a.double().numpy(), b.double().numpy()
    within = [
        sum(k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j)
        / (len(s) * (len(s) - 1))
        for s in (a, b)
    ]
    return sum(within) - 2 * np.mean([[k(x, y) for y in b] for x in a])


def inside(points, centres, neighbours):
    """[points, centres]: whether a point is in the ball that reaches to a centre's neighbour."""
    points, centres = points.double().numpy(), centres.double().numpy()
    among = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    radii = np.sort(among, axis=1)[:, neighbours]
    return np.linalg.norm(points[:, None] - centres[None], axis=2) <= radii


def score_by_numpy(logits):
    shares = np.exp(logits.double().numpy())
    shares /= shares.sum(axis=1, keepdims=True)
    return np.exp((shares * np.log(shares / shares.mean(axis=0))).sum(axis=1).mean())


def variance_ratios():
    classes = [PIXELS[c == LABELS].double().numpy() for c in range(3)]
    return np.array([x.var(axis=0, ddof=1).mean() for x in classes]) / VARIANCE.numpy()


EXPECTED = {
    "fd": lambda: frechet_by_numpy(DRAWN, REAL),
    "fid": lambda: frechet_by_numpy(DRAWN, REAL),
    "sfid": lambda: frechet_by_numpy(SPATIAL, REAL_SPATIAL),
    "is": lambda: score_by_numpy(LOGITS),
    "kid": lambda: kernel_by_loops(DRAWN, REAL),
    "precision": lambda: inside(DRAWN, REAL, 3).any(axis=1).mean(),
    "recall": lambda: inside(REAL, DRAWN, 3).any(axis=1).mean(),
    "density": lambda: inside(DRAWN, REAL, 5).sum(axis=1).mean() / 5,
    "coverage": lambda: inside(DRAWN, REAL, 5).any(axis=0).mean(),
    "class_accuracy": lambda: (LOGITS.numpy().argmax(axis=1) == LABELS.numpy()).mean(),
    "variance_ratio_mean": lambda: variance_ratios().mean(),
    "variance_ratio_min": lambda: variance_ratios().min(),
    "lpips": lambda: 0.375,
    "lpips_diversity": lambda: 0.75,
    "clip": lambda: 37.5,
}


@pytest.mark.parametrize("name", METRICS)
def test_an_independent_computation(name):
    against = reference("other") if name == "fd" else reference()
    found = measure(SAMPLED, against, [name])
    assert found[name] == pytest.approx(EXPECTED[name](), rel=1e-9)
    assert (found.num_samples, found.reference) == (50, "real")


def test_fewer_images_than_features():
    few = DRAWN[:4]
    found = measure(Sampled(Features(few)), reference(), ["fid"])["fid"]
    assert found == pytest.approx(frechet_by_numpy(few, REAL), abs=1e-5)


def test_kernel_distance_by_hand():
    # k(1, 1) = 8, k(1, 3) = 64, k(3, 3) = 1000; of 0 and anything 1.
    ones, others = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    assert kernel_distance(ones, others) == 64 + 1 - 2
    assert kernel_distance(ones, ones) == 64 + 64 - 2 * (8 + 64 + 64 + 1000) / 4


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    draws = torch.randn(200, 2, 20, 3, generator=torch.Generator().manual_seed(1))
    distances = torch.tensor([kernel_distance(a, b) for a, b in draws])
    assert abs(distances.mean()) < 3 * distances.std() / math.sqrt(200)
    assert (distances < 0).any()


def test_blocks_change_nothing(monkeypatch):
    whole = kernel_distance(DRAWN, REAL), coverage(REAL, DRAWN)
    monkeypatch.setattr(kernel, "BLOCK", 7)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    assert kernel_distance(DRAWN, REAL) == pytest.approx(whole[0], rel=1e-12)
    assert coverage(REAL, DRAWN) == whole[1]


def test_coverage_of_equal_and_of_distant_sets():
    line = torch.arange(20.0)[:, None]
    same = coverage(line, line)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert coverage(line, line + 1000) == (0, 0, 0, 0)


def test_a_model_that_draws_one_image_is_precise_and_recalls_nothing():
    line = torch.arange(20.0)[:, None]
    found = coverage(line, torch.full((20, 1), 10.0) + torch.arange(20)[:, None] * 1e-3)
    assert found.precision == 1
    assert found.recall == 1 / 20
    assert found.coverage < 0.5


def test_density_counts_all_balls():
    # A ball of the line reaches to the 5th neighbour, 3 away inside: 7 of them hold the middle.
    line, middle = torch.arange(101.0)[:, None], torch.full((6, 1), 50.0)
    assert coverage(line, middle).density == pytest.approx(7 / 5)


@pytest.mark.parametrize(("classes", "score"), [(1, 1.0), (4, 4.0), (10, 10.0)])
def test_score_of_sure_answers_is_the_number_of_classes(classes, score):
    logits = 100 * torch.eye(10)[torch.arange(40) % classes]
    assert inception_score(logits) == pytest.approx(score, rel=1e-9)


def test_score_is_the_mean_of_equal_parts(monkeypatch):
    monkeypatch.setattr("dkdm.evaluation.metrics.SPLIT", 20)
    parts = [score_by_numpy(LOGITS[:25]), score_by_numpy(LOGITS[25:])]
    assert inception_score(LOGITS) == pytest.approx(np.mean(parts), rel=1e-9)


def test_too_few_images():
    with pytest.raises(DkdmError, match=r"1 image\(s\) have no kernel distance: give at least 2"):
        kernel_distance(REAL, DRAWN[:1])
    with pytest.raises(DkdmError, match=r"5 image\(s\) have too few neighbours: give at least 6"):
        coverage(REAL, DRAWN[:5])


@pytest.mark.parametrize("name", ["fid", "kid", "precision"])
def test_features_that_are_not_finite(name):
    broken = DRAWN.clone()
    broken[3, 2] = math.nan
    with pytest.raises(DkdmError, match="the features of 1 of 50 images are not finite"):
        measure(Sampled(Features(broken)), reference(), [name])


def test_logits_that_are_not_finite():
    broken = Features(DRAWN, logits=LOGITS.where(LABELS[:, None] > 0, math.nan))
    with pytest.raises(DkdmError, match="the features of 17 of 50 images are not finite: check"):
        measure(Sampled(broken), reference(), ["is"])


def test_features_are_not_kept_after_they_were_measured():
    seen = Features(DRAWN.clone())
    kept = weakref.ref(seen.features)
    measure(Sampled(seen), reference(), ["precision", "recall"])
    del seen
    assert kept() is None


def test_numbers_of_single_images_need_no_reference():
    found = measure(Sampled(SAMPLED.features), None, ["lpips", "clip"])
    assert found.values == {"lpips": pytest.approx(0.375), "clip": pytest.approx(37.5)}
    with pytest.raises(UsageError, match="kid needs a reference"):
        measure(SAMPLED, None, ["lpips", "kid"])


def test_columns_that_are_absent_are_left_out():
    names = ["fid", "lpips", "lpips_diversity", "clip"]
    nothing = Features(DRAWN, lpips_diversity=torch.full((50,), math.nan))
    assert measure(Sampled(nothing), reference(), names).values.keys() == {"fid"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fids", {}, "there is no metric 'fids': use fd, fid"),
        ("fd", {}, "those of the Inception network; use fid"),
        ("kid", {"features": None}, "statistics only; give a folder of images"),
        ("sfid", {"spatial": None}, "no statistics of spatial features"),
        ("variance_ratio_min", {"class_variance": None}, "does not know the variance"),
    ],
)
def test_what_a_reference_lacks(name, changes, message):
    with pytest.raises(UsageError, match=message):
        check([name], reference(**changes))


def test_what_a_network_lacks():
    bare = replace(reference().network, gives=frozenset(), class_names=None)
    for name in ("is", "sfid", "class_accuracy"):
        with pytest.raises(UsageError, match=f"^{name} cannot be measured against real"):
            check([name], reference(network=bare))
    other = replace(bare, name="other")
    with pytest.raises(UsageError, match="not those of the Inception network; use fd"):
        check(["fid"], reference(network=other))
    assert usual(reference(network=other)) == ("fd", "lpips", "lpips_diversity", "clip")


def test_joined_features_keep_every_column():
    parts = [Features(*(x[a:b] for x in SAMPLED.features)) for a, b in ((0, 20), (20, 50))]
    for whole, joined in zip(SAMPLED.features, Features.joined(parts), strict=True):
        torch.testing.assert_close(joined, whole, equal_nan=True)
    assert Features.joined([Features(DRAWN), Features(DRAWN)])[1:] == (None,) * 6
