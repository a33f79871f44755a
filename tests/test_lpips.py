"""LPIPS: numbers of its authors' code, the formula by hand, files, and pairs of samples."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from dkdm.data import perceptual
from dkdm.data.lpips import BACKBONES, Backbone, Lpips
from dkdm.data.perceptual import PerceptualDistance, lpips_network, perceptual_distance
from dkdm.errors import UsageError
from dkdm.evaluation.pairs import Pairs, next_of_class
from formula_weights import numbers, state_of

# The lpips package (0.1) with these weights: three pairs of 40x33 pixels.
NUMBERS = {
    "alex": [1.4007955, 1.4089699, 1.3659259],
    "vgg": [1.1808095, 1.1693048, 1.1781048],
}
A, B = (numbers(name, 3, 3, 40, 33).clamp(-1, 1) for name in "ab")
TINY = Backbone(((4, 3, 1, 1), None, (5, 3, 2, 0)), pool=2, taps=(1, 4))


def files(folder, name):
    """Weights as torchvision and the authors write them, with more than is needed in both."""
    network = Lpips(BACKBONES[name])
    shapes = {f"features.{key}": value for key, value in network.features.state_dict().items()}
    torch.save(
        state_of(shapes) | {"classifier.1.weight": torch.zeros(2)}, folder / f"{name}-backbone.pth"
    )
    heads = {
        f"lin{i}.model.1.weight": numbers(f"lin{i}", 1, len(head), 1, 1).abs()
        for i, head in enumerate(network.heads)
    }
    torch.save(heads, folder / f"{name}-heads.pth")
    return folder / f"{name}-backbone.pth", folder / f"{name}-heads.pth"


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    """The distance, found in a folder by the hashes of its files."""
    folder = tmp_path_factory.mktemp("lpips")
    paths = files(folder, "alex")
    known = [
        replace(published, forms={hashlib.sha256(path.read_bytes()).hexdigest(): "test"})
        for published, path in zip(perceptual.FILES["alex"], paths, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DKDM_CACHE", str(folder / "cache"))
        patch.setitem(perceptual.FILES, "alex", tuple(known))
        yield perceptual_distance(folder)
    lpips_network.cache_clear()


def test_numbers_of_the_authors_code(alex):
    assert alex(A, B).tolist() == pytest.approx(NUMBERS["alex"], abs=2e-6)


@pytest.mark.slow
def test_numbers_of_the_authors_code_with_vgg(tmp_path):
    network = lpips_network("vgg", *files(tmp_path, "vgg"))
    assert network(A, B).tolist() == pytest.approx(NUMBERS["vgg"], abs=2e-6)
    lpips_network.cache_clear()


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("alex", [0, 3, 6, 8, 10]),
        ("vgg", [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]),
    ],
)
def test_layers_have_the_names_of_torchvision(name, places):
    with torch.device("meta"):
        network = Lpips(BACKBONES[name])
    names = {f"{i}.{kind}" for i in places for kind in ("weight", "bias")}
    assert network.features.state_dict().keys() == names
    widths = {"alex": [64, 192, 384, 256, 256], "vgg": [64, 128, 256, 512, 512]}
    assert [len(head) for head in network.heads] == widths[name]


def test_formula_by_hand():
    network = Lpips(TINY)
    network.heads[0].data, network.heads[1].data = numbers("0", 4).abs(), numbers("1", 5).abs()
    a, b = A[:, :, :9, :8], B[:, :, :9, :8]
    expected = np.zeros(3)
    with torch.no_grad():
        for last, head in zip((2, 5), network.heads, strict=True):
            x, y = (
                network.features[:last](
                    (image - torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
                    / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
                )
                .double()
                .numpy()
                for image in (a, b)
            )
            x, y = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-9) for v in (x, y))
            weighted = (x - y) ** 2 * head.double().numpy()[:, None, None]
            expected += weighted.sum(axis=1).mean(axis=(1, 2))
        found = network(a, b)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_it_is_a_distance(alex):
    assert alex(A, A).tolist() == [0, 0, 0]
    torch.testing.assert_close(alex(A, B), alex(B, A))
    nearer = alex(A, A + 0.1 * (B - A))
    assert (nearer > 0).all() and (nearer < alex(A, B)).all()


def test_batches_grey_and_small_images(alex, monkeypatch):
    grey = A[:, :1]
    whole = alex(grey, -grey)
    torch.testing.assert_close(whole, alex(*(x.expand(-1, 3, -1, -1) for x in (grey, -grey))))
    monkeypatch.setattr(perceptual, "BATCH", 2)
    torch.testing.assert_close(alex(grey, -grey), whole)
    small, large = (
        torch.nn.functional.interpolate(A, size, mode="nearest") for size in ((16, 24), (32, 48))
    )
    assert perceptual._prepared(small, "cpu").shape == (3, 3, 32, 48)
    assert torch.equal(perceptual._prepared(large, "cpu"), large)
    assert (alex(small, small.flip(0)) > 0).any()


@pytest.mark.parametrize(
    ("a", "b"), [(A, B[:2]), (A[:, :2], B[:, :2]), (A[0], B[0]), (A, B[:, :, :32])]
)
def test_pairs_that_do_not_fit(alex, a, b):
    with pytest.raises(UsageError, match="compares grey or RGB images of one shape"):
        alex(a, b)


def test_an_unknown_backbone_and_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="no backbone 'squeeze': use alex, vgg"):
        perceptual_distance(backbone="squeeze")
    with pytest.raises(
        UsageError, match=r"VGG16 \(ImageNet\) is not in .*--lpips-weights download"
    ):
        perceptual_distance(backbone="vgg")
    with pytest.raises(UsageError, match=r"VGG16 \(ImageNet\) is not in it"):
        perceptual_distance(tmp_path, "vgg")


BRIGHTNESS = PerceptualDistance("test", "a test", lambda a, b: (a - b).flatten(1).mean(dim=1).abs())


def flat(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 4, 4)


def diversity(images, labels, batch=2):
    pairs, most = Pairs(len(images), labels, BRIGHTNESS), 0
    for part in images.split(batch):
        pairs.add(part)
        most = max(most, len(pairs._kept))
    return pairs.distances, most


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_diversity_goes_to_the_next_of_the_class(batch):
    images, labels = flat(0.0, 0.1, 0.4, -1.0, 0.2), torch.tensor([0, 1, 0, 2, 0])
    assert next_of_class(5, labels).tolist() == [2, 1, 4, 3, 0]
    found, _ = diversity(images, labels, batch)
    torch.testing.assert_close(
        found, torch.tensor([0.4, torch.nan, 0.2, torch.nan, 0.2]), equal_nan=True
    )


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_diversity_without_classes_goes_to_the_next(batch):
    found, _ = diversity(flat(0.0, 0.5, -0.5), None, batch)
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, 0.5]))
    assert diversity(flat(0.3), None)[0].isnan().all()
    assert diversity(flat(0.3, 0.3, 0.3), None)[0].tolist() == [0, 0, 0]


def test_images_are_kept_no_longer_than_their_pairs_need():
    images, labels = flat(*[0.0] * 60), torch.arange(60) % 3
    assert diversity(images, labels)[1] == 6  # the first and the latest of each class
    assert diversity(images, None)[1] == 2
    assert diversity(images, torch.arange(60))[1] == 0
    pairs = Pairs(60, labels, BRIGHTNESS)
    pairs.add(images[:20].clone())
    assert all(image.untyped_storage().nbytes() == 16 * 4 for image in pairs._kept.values())
