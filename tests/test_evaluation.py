"""The metrics: closed forms first, then the packaged assets, then the data they came from."""

import json
import re
from importlib.resources import files

import pytest
import torch
from torch import Tensor

from dkdm.data.datasets import FASHION_MNIST_ROOT, load_fashion_mnist
from dkdm.errors import DkdmError
from dkdm.evaluation import (
    FeatureStatistics,
    ReferenceName,
    class_agreement,
    evaluate_images,
    feature_statistics,
    frechet_distance,
    load_feature_network,
    load_reference,
    within_class_variance,
)

ASSETS = files("dkdm") / "data" / "fashion" / "features"

needs_data = pytest.mark.skipif(
    not FASHION_MNIST_ROOT.is_dir(), reason="Fashion-MNIST is not installed"
)


def random_covariance(seed: int, size: int = 6) -> Tensor:
    factor = torch.randn(size, size, generator=generator(seed), dtype=torch.float64)
    return factor @ factor.T + 0.1 * torch.eye(size, dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=generator(seed)).clamp(-1, 1)


def claimed(pattern: str) -> float:
    match = re.search(pattern, ASSETS.joinpath("README.md").read_text(encoding="utf-8"))
    assert match is not None
    return float(match[1])


def test_distance_of_a_gaussian_to_itself_is_zero() -> None:
    mean, cov = torch.ones(6), random_covariance(0)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-10)


def test_distance_of_equal_covariances_is_the_squared_shift_of_the_mean() -> None:
    mean, cov, shift = torch.zeros(6), random_covariance(0), torch.arange(6.0)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(55, rel=1e-12)


def test_distance_of_commuting_covariances_is_that_of_their_standard_deviations() -> None:
    rotation, _ = torch.linalg.qr(random_covariance(1))
    std_a, std_b = torch.rand(2, 6, generator=generator(2), dtype=torch.float64)
    cov_a, cov_b = (rotation @ torch.diag(std.square()) @ rotation.T for std in (std_a, std_b))
    expected = (std_a - std_b).square().sum().item()
    mean = torch.zeros(6)
    assert frechet_distance(mean, cov_a, mean, cov_b) == pytest.approx(expected, rel=1e-9)


def test_distance_agrees_with_the_eigenvalues_of_the_plain_product() -> None:
    mean, cov_a, cov_b = torch.zeros(6), random_covariance(3), random_covariance(4)
    trace_root = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    expected = (cov_a.trace() + cov_b.trace() - 2 * trace_root).item()
    assert frechet_distance(mean, cov_a, mean, cov_b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(mean, cov_b, mean, cov_a) == pytest.approx(expected, rel=1e-10)


def test_distance_to_a_point_is_the_trace_of_the_covariance() -> None:
    mean, cov = torch.zeros(6), random_covariance(5)
    point = torch.zeros(6, 6)
    assert frechet_distance(mean, cov, mean, point) == pytest.approx(cov.trace().item(), rel=1e-12)


def test_statistics_are_the_mean_and_the_unbiased_covariance() -> None:
    statistics = FeatureStatistics.of(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    assert statistics.count == 2
    assert statistics.mean.tolist() == [1, 2]
    assert statistics.covariance.tolist() == [[2, 4], [4, 8]]


def test_feature_statistics_do_not_depend_on_the_batch_size() -> None:
    images = noise_images(70)
    one, many = feature_statistics(images, batch_size=70), feature_statistics(images, batch_size=32)
    torch.testing.assert_close(one.mean, many.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.covariance, many.covariance, rtol=1e-4, atol=1e-6)


def test_network_is_small_frozen_and_consistent() -> None:
    network, images = load_feature_network(), noise_images(5)
    assert len(ASSETS.joinpath("model.safetensors").read_bytes()) <= 1_000_000
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    features = network.features(images)
    assert features.shape == (5, 64)
    assert features.min() >= 0
    torch.testing.assert_close(network.head(features), network(images))


@pytest.mark.parametrize(("name", "count"), [("fashion-test", 10_000), ("fashion-train", 60_000)])
def test_reference_is_a_gaussian_of_the_stated_size(name: ReferenceName, count: int) -> None:
    reference = load_reference(name)
    covariance = reference.features.covariance
    assert reference.features.count == count
    assert reference.features.mean.shape == (64,)
    assert covariance.dtype == torch.float64
    torch.testing.assert_close(covariance, covariance.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-9
    assert reference.class_variance.shape == (10,)
    assert (reference.class_variance > 0).all()


def test_distance_of_the_references_is_the_floor_of_the_card() -> None:
    a, b = load_reference("fashion-train").features, load_reference("fashion-test").features
    distance = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    floor = claimed(r"60,000 train \| `fashion-test` \| ([\d.]+)")
    assert distance == pytest.approx(floor, abs=6e-4)


def test_within_class_variance_is_that_of_the_pixels() -> None:
    dark, bright = torch.full((2, 1, 16, 16), 0.5), torch.full((3, 1, 16, 16), -1.0)
    dark[0] = -0.5
    variance = within_class_variance(torch.cat([dark, bright]), torch.tensor([3, 3, 7, 7, 7]))
    assert variance[3] == 0.5
    assert variance[7] == 0
    assert variance.isnan().sum() == 8


def test_noise_is_far_from_fashion_and_obeys_no_class() -> None:
    labels = torch.arange(1000) % 10
    metrics = evaluate_images(noise_images(1000), labels)
    floor = claimed(r"1,000 train \| `fashion-test` \| ([\d.]+)")
    assert metrics.fd > 100 * floor
    assert metrics.class_agreement is not None
    assert metrics.class_agreement < 0.3
    assert metrics.num_samples == 1000
    assert metrics.reference == "fashion-test"


def test_class_agreement_is_the_share_of_labels_the_network_predicts() -> None:
    images = noise_images(8)
    labels = load_feature_network()(images).argmax(dim=1)
    labels[:2] = (labels[:2] + 1) % 10
    assert class_agreement(images, labels) == 0.75


def test_collapsed_classes_have_no_variance() -> None:
    metrics = evaluate_images(noise_images(10).repeat(4, 1, 1, 1), torch.arange(40) % 10)
    assert metrics.variance_ratio_mean == pytest.approx(0, abs=1e-12)


def test_metrics_without_labels_are_json_with_nulls() -> None:
    record = json.loads(json.dumps(evaluate_images(noise_images(10)).as_dict()))
    assert record["fd"] > 0
    assert record["class_agreement"] is None
    assert record["variance_ratio_mean"] is None
    assert record["variance_ratio_min"] is None


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 3, 16, 16), None, r"\[4, 3, 16, 16\]"),
        (torch.zeros(0, 1, 16, 16), None, "N >= 1"),
        (torch.zeros(1, 1, 16, 16), None, "at least 2"),
        (torch.full((4, 1, 16, 16), torch.nan), None, "4 of 4 images hold NaN"),
        (torch.zeros(4, 1, 16, 16), torch.zeros(3, dtype=torch.long), r"\[3\]"),
        (torch.zeros(4, 1, 16, 16), torch.full((4,), 10), r"10\.\.10, expected 0\.\.9"),
        (torch.zeros(4, 1, 16, 16), torch.arange(4), "no class has 2"),
    ],
)
def test_wrong_images_are_refused(images: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(DkdmError, match=message):
        evaluate_images(images, labels)


def test_unknown_reference_is_refused() -> None:
    with pytest.raises(DkdmError, match="fashion-test, fashion-train"):
        load_reference("imagenet")  # type: ignore[arg-type]


@needs_data
def test_card_and_statistics_are_those_of_the_data() -> None:
    images, labels = load_fashion_mnist("test")
    metrics = evaluate_images(images, labels)
    accuracy = claimed(r"Test accuracy \| ([\d.]+)%") / 100
    assert accuracy >= 0.9
    assert metrics.class_agreement == pytest.approx(accuracy, abs=3e-4)
    assert metrics.fd == pytest.approx(0, abs=1e-5)
    assert metrics.variance_ratio_mean == pytest.approx(1, abs=1e-9)
    assert metrics.variance_ratio_min == pytest.approx(1, abs=1e-9)
