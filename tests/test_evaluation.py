"""The metrics: closed forms first, then the packaged assets, then the data they came from."""

import re
from importlib.resources import files

import pytest
import torch
from torch import Tensor

from dkdm.data.fashion import CLASS_NAMES, ROOT, halve, load_fashion_mnist
from dkdm.data.fashion.reference import load_feature_network
from dkdm.data.named import chosen_reference, load_reference
from dkdm.data.reference import FeatureStatistics
from dkdm.errors import DkdmError
from dkdm.evaluation.frechet import frechet_distance
from dkdm.evaluation.metrics import evaluate_images, known_labels, within_class_variance

TEST = load_reference("fashion-test")
ASSETS = files("dkdm") / "data" / "fashion" / "features"

needs_data = pytest.mark.skipif(not ROOT.is_dir(), reason="Fashion-MNIST is not installed")


def random_covariance(seed: int, size: int = 6) -> Tensor:
    factor = torch.randn(size, size, generator=generator(seed), dtype=torch.float64)
    return factor @ factor.T + 0.1 * torch.eye(size, dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    return frechet_distance(
        FeatureStatistics(mean_a, cov_a, 2), FeatureStatistics(mean_b, cov_b, 2)
    )


def noise_images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=generator(seed)).clamp(-1, 1)


def claimed(pattern: str) -> float:
    match = re.search(pattern, ASSETS.joinpath("README.md").read_text(encoding="utf-8"))
    assert match is not None
    return float(match[1])


def test_distance_of_a_gaussian_to_itself_is_zero() -> None:
    mean, cov = torch.ones(6), random_covariance(0)
    assert distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-10)


def test_distance_of_equal_covariances_is_the_squared_shift_of_the_mean() -> None:
    mean, cov, shift = torch.zeros(6), random_covariance(0), torch.arange(6.0)
    assert distance(mean, cov, mean + shift, cov) == pytest.approx(55, rel=1e-12)


def test_distance_of_commuting_covariances_is_that_of_their_standard_deviations() -> None:
    rotation, _ = torch.linalg.qr(random_covariance(1))
    std_a, std_b = torch.rand(2, 6, generator=generator(2), dtype=torch.float64)
    cov_a, cov_b = (rotation @ torch.diag(std.square()) @ rotation.T for std in (std_a, std_b))
    expected = (std_a - std_b).square().sum().item()
    mean = torch.zeros(6)
    assert distance(mean, cov_a, mean, cov_b) == pytest.approx(expected, rel=1e-9)


def test_distance_agrees_with_the_eigenvalues_of_the_plain_product() -> None:
    mean, cov_a, cov_b = torch.zeros(6), random_covariance(3), random_covariance(4)
    trace_root = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    expected = (cov_a.trace() + cov_b.trace() - 2 * trace_root).item()
    assert distance(mean, cov_a, mean, cov_b) == pytest.approx(expected, rel=1e-10)
    assert distance(mean, cov_b, mean, cov_a) == pytest.approx(expected, rel=1e-10)


def test_distance_to_a_point_is_the_trace_of_the_covariance() -> None:
    mean, cov = torch.zeros(6), random_covariance(5)
    point = torch.zeros(6, 6)
    assert distance(mean, cov, mean, point) == pytest.approx(cov.trace().item(), rel=1e-12)


def test_statistics_are_the_mean_and_the_unbiased_covariance() -> None:
    statistics = FeatureStatistics.of(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    assert statistics.count == 2
    assert statistics.mean.tolist() == [1, 2]
    assert statistics.covariance.tolist() == [[2, 4], [4, 8]]


def test_features_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise_images(70)
    one = TEST.network(images).features
    monkeypatch.setattr("dkdm.data.fashion.reference.BATCH", 32)
    torch.testing.assert_close(TEST.network(images).features, one, rtol=1e-5, atol=1e-6)


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
def test_reference_is_a_gaussian_of_the_stated_size(name: str, count: int) -> None:
    reference = load_reference(name)
    covariance = reference.statistics.covariance
    assert reference.statistics.count == count
    assert reference.statistics.mean.shape == (64,)
    assert covariance.dtype == torch.float64
    torch.testing.assert_close(covariance, covariance.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-9
    assert reference.class_variance.shape == (10,)
    assert (reference.class_variance > 0).all()


def test_distance_of_the_references_is_the_floor_of_the_card() -> None:
    floor = claimed(r"60,000 train \| `fashion-test` \| ([\d.]+)")
    assert frechet_distance(TEST.floor, TEST.statistics) == pytest.approx(floor, abs=6e-4)
    assert TEST.floor.count == 60_000


def test_within_class_variance_is_that_of_the_pixels() -> None:
    dark, bright = torch.full((2, 1, 16, 16), 0.5), torch.full((3, 1, 16, 16), -1.0)
    dark[0] = -0.5
    variance = within_class_variance(torch.cat([dark, bright]), torch.tensor([3, 3, 7, 7, 7]), 10)
    assert variance[3] == 0.5
    assert variance[7] == 0
    assert variance.isnan().sum() == 8


def test_noise_is_far_from_fashion_and_obeys_no_class() -> None:
    labels = torch.arange(1000) % 10
    metrics = evaluate_images(noise_images(1000), labels, TEST)
    floor = claimed(r"1,000 train \| `fashion-test` \| ([\d.]+)")
    assert metrics["fd"] > 100 * floor
    assert metrics.get("class_accuracy") is not None
    assert metrics["class_accuracy"] < 0.3
    assert metrics.num_samples == 1000
    assert metrics.reference == "fashion-test"


def test_class_accuracy_is_the_share_of_labels_the_network_predicts() -> None:
    images = noise_images(8)
    labels = load_feature_network()(images).argmax(dim=1)
    labels[:2] = (labels[:2] + 1) % 10
    assert evaluate_images(images, labels, TEST)["class_accuracy"] == 0.75


def test_collapsed_classes_have_no_variance() -> None:
    metrics = evaluate_images(noise_images(10).repeat(4, 1, 1, 1), torch.arange(40) % 10, TEST)
    assert metrics["variance_ratio_mean"] == pytest.approx(0, abs=1e-12)


def test_diversity_is_left_out_if_no_class_has_two_images() -> None:
    metrics = evaluate_images(noise_images(4), torch.arange(4), TEST)
    assert metrics.get("variance_ratio_mean") is None and metrics.get("variance_ratio_min") is None
    assert metrics.get("class_accuracy") is not None and metrics["fd"] > 0


def test_metrics_without_labels_are_the_distance_alone() -> None:
    metrics = evaluate_images(noise_images(10), None, TEST)
    assert metrics["fd"] > 0
    assert metrics.get("class_accuracy") is None
    assert metrics.get("variance_ratio_mean") is None
    assert metrics.get("variance_ratio_min") is None


def test_images_as_published_are_brought_to_the_size_of_the_features() -> None:
    large = noise_images(10).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, 2:30, 2:30]
    small = halve(large)
    assert evaluate_images(large, None, TEST) == evaluate_images(small, None, TEST)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 3, 16, 16), None, r"\[4, 3, 16, 16\]"),
        (torch.zeros(0, 1, 16, 16), None, "at least one image"),
        (torch.zeros(1, 1, 16, 16), None, "at least 2"),
        (torch.full((4, 1, 16, 16), torch.nan), None, "4 of 4 images hold NaN"),
        (torch.zeros(4, 1, 16, 16), torch.zeros(3, dtype=torch.long), r"\[3\]"),
        (torch.zeros(4, 1, 16, 16), torch.full((4,), 10), r"10\.\.10: use 0\.\.9"),
    ],
)
def test_wrong_images_are_refused(images: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(DkdmError, match=message):
        evaluate_images(images, labels, TEST)


def test_unknown_reference_is_refused() -> None:
    with pytest.raises(DkdmError, match="fashion-test or fashion-train"):
        load_reference("imagenet")


def test_a_reference_is_chosen_by_name_or_by_the_names_of_the_classes() -> None:
    assert chosen_reference("auto", CLASS_NAMES) == "fashion-test"
    assert chosen_reference("auto", ("cat", "dog")) is None
    assert chosen_reference("auto", None) is None
    assert chosen_reference("none", CLASS_NAMES) is None
    assert chosen_reference("some/folder", None) == "some/folder"


@needs_data
def test_card_and_statistics_are_those_of_the_data() -> None:
    images, labels = load_fashion_mnist("test")
    metrics = evaluate_images(images, labels, TEST)
    accuracy = claimed(r"Test accuracy \| ([\d.]+)%") / 100
    assert accuracy >= 0.9
    assert metrics["class_accuracy"] == pytest.approx(accuracy, abs=3e-4)
    assert metrics["fd"] == pytest.approx(0, abs=1e-5)
    assert metrics["variance_ratio_mean"] == pytest.approx(1, abs=1e-9)
    assert metrics["variance_ratio_min"] == pytest.approx(1, abs=1e-9)


def test_classes_that_the_reference_does_not_know_are_not_measured():
    images = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known, more = torch.arange(20) % 10, torch.arange(20)
    assert known_labels(known, TEST) is known
    measured = evaluate_images(images, known_labels(more, TEST), TEST)
    assert measured.get("class_accuracy") is None
    assert measured["fd"] == evaluate_images(images, known, TEST)["fd"]
