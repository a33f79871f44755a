"""The Inception network against its architecture written out, and the published file if it is here.

DKDM_INCEPTION=FILE names the published TorchScript of inception-2015-12-05 for the slow test.
"""

import hashlib
import os
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from dkdm.data import inception_features
from dkdm.data.inception import Convolution, Inception
from dkdm.data.inception_features import inception_extractor, names_in_state_dict
from dkdm.data.resizing import RESIZES
from dkdm.errors import DkdmError, UsageError

PUBLISHED, SIZE = inception_features.PUBLISHED, inception_features.SIZE
SMALL = 75  # the least size that every layer takes


def weights():
    """A state dict in pytorch-fid's naming, of a random network; half as large as the real one."""
    random = torch.Generator().manual_seed(0)
    state = {}
    with torch.device("meta"):
        layers = Inception().convolutions()
    for name, layer in zip(names_in_state_dict(), layers, strict=True):
        shape = layer[0].weight.shape
        state[f"{name}.conv.weight"] = torch.empty(shape).normal_(generator=random) / (
            0.6 * shape[1:].numel() ** 0.5
        )
        state[f"{name}.bn.weight"] = torch.ones(shape[0])
        state[f"{name}.bn.bias"] = 0.1 * torch.randn(shape[0], generator=random)
        state[f"{name}.bn.running_mean"] = 0.1 * torch.randn(shape[0], generator=random)
        state[f"{name}.bn.running_var"] = 0.5 + torch.rand(shape[0], generator=random)
    state["fc.weight"] = 0.1 * torch.randn(1008, 2048, generator=random)
    return {name: value.half() for name, value in state.items()}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The weights, and the features of the file that holds them, of images brought to 75x75."""
    folder, state = tmp_path_factory.mktemp("inception"), weights()
    torch.save(state, folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DKDM_CACHE", str(folder))
        patch.setattr(inception_features, "SIZE", SMALL)
        known = replace(PUBLISHED, forms={digest: "state dict"})
        patch.setattr(inception_features, "PUBLISHED", known)
        inception_extractor(folder / "weights.pth")
        wide = {name: value.float() for name, value in state.items()}
        yield wide, {how: inception_extractor(resize=how) for how in RESIZES}
    inception_features._network.cache_clear()


class ByName:
    """The network as Szegedy et al. draw it, with the changes of the FID graph, from named weights.

    Every call names its convolutions, so that a weight in a wrong place changes the result.
    """

    def __init__(self, state):
        self.state = state

    def conv(self, x, name, stride=1, padding=0):
        part = {key: self.state[f"{name}.bn.{key}"] for key in ("running_mean", "running_var")}
        scale, shift = (self.state[f"{name}.bn.{key}"] for key in ("weight", "bias"))
        x = functional.conv2d(x, self.state[f"{name}.conv.weight"], None, stride, padding)
        return functional.batch_norm(x, **part, weight=scale, bias=shift, eps=1e-3).relu()

    def chain(self, x, block, *steps):
        for name, padding in steps:
            x = self.conv(x, f"{block}.{name}", padding=padding)
        return x

    def pooled(self, x, block):
        x = functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return self.conv(x, f"{block}.branch_pool")

    def block_a(self, x, name):
        dbl = [(f"branch3x3dbl_{i}", int(i > 1)) for i in (1, 2, 3)]
        parts = [
            self.conv(x, f"{name}.branch1x1"),
            self.chain(x, name, ("branch5x5_1", 0), ("branch5x5_2", 2)),
            self.chain(x, name, *dbl),
            self.pooled(x, name),
        ]
        return torch.cat(parts, 1)

    def block_b(self, x, name):
        dbl = self.chain(x, name, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
        parts = [
            self.conv(x, f"{name}.branch3x3", stride=2),
            self.conv(dbl, f"{name}.branch3x3dbl_3", stride=2),
            functional.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(parts, 1)

    def branch_1x1(self, x, name):
        return self.conv(x, f"{name}.branch1x1")

    def block_c(self, x, name):
        row, column = (0, 3), (3, 0)
        seven = [("branch7x7_1", 0), ("branch7x7_2", row), ("branch7x7_3", column)]
        paddings = (0, column, row, column, row)
        dbl = [(f"branch7x7dbl_{i + 1}", padding) for i, padding in enumerate(paddings)]
        parts = [
            self.branch_1x1(x, name),
            self.chain(x, name, *seven),
            self.chain(x, name, *dbl),
            self.pooled(x, name),
        ]
        return torch.cat(parts, 1)

    def block_d(self, x, name):
        seven = [("branch7x7x3_1", 0), ("branch7x7x3_2", (0, 3)), ("branch7x7x3_3", (3, 0))]
        parts = [
            self.conv(self.conv(x, f"{name}.branch3x3_1"), f"{name}.branch3x3_2", stride=2),
            self.conv(self.chain(x, name, *seven), f"{name}.branch7x7x3_4", stride=2),
            functional.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(parts, 1)

    def block_e(self, x, name, pooled):
        def both(x, start, a, b):
            row, column = (0, 1), (1, 0)
            return [
                self.conv(x, f"{name}.{start}{a}", padding=row),
                self.conv(x, f"{name}.{start}{b}", padding=column),
            ]

        three = self.conv(x, f"{name}.branch3x3_1")
        dbl = self.chain(x, name, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
        parts = [
            self.conv(x, f"{name}.branch1x1"),
            *both(three, "branch3x3_", "2a", "2b"),
            *both(dbl, "branch3x3dbl_", "3a", "3b"),
            pooled(x),
        ]
        return torch.cat(parts, 1)

    def __call__(self, x):
        x = self.conv(x, "Conv2d_1a_3x3", stride=2)
        x = self.conv(self.conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.conv(self.conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
        x = functional.max_pool2d(x, 3, stride=2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.block_a(x, name)
        x = self.block_b(x, "Mixed_6a")
        for name in ("Mixed_6b", "Mixed_6c"):
            x = self.block_c(x, name)
        spatial = self.branch_1x1(x, "Mixed_6d")  # mixed_6/conv in the graph
        x = self.block_c(self.block_c(x, "Mixed_6d"), "Mixed_6e")
        x = self.block_d(x, "Mixed_7a")
        x = self.block_e(x, "Mixed_7b", lambda x: self.pooled(x, "Mixed_7b"))

        def largest(x):
            x = functional.max_pool2d(x, 3, stride=1, padding=1)
            return self.conv(x, "Mixed_7c.branch_pool")

        features = self.block_e(x, "Mixed_7c", largest).mean(dim=(2, 3))
        spatial = [spatial[:, c, i, j] for i in range(3) for j in range(3) for c in range(7)]
        return features, torch.stack(spatial, 1), features @ self.state["fc.weight"].T


def images(count=2, channels=3, size=SMALL):
    pixels = torch.randint(
        0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(1)
    )
    return pixels / 127.5 - 1


def test_the_names_are_94_and_differ():
    names = names_in_state_dict()
    assert len(names) == len(set(names)) == 94
    with torch.device("meta"):
        assert len(Inception().convolutions()) == 94


def test_shapes_of_the_published_graph():
    with torch.device("meta"):
        found = Inception().eval()(torch.empty(2, 3, 299, 299))
    assert [tuple(part.shape) for part in found] == [(2, 2048), (2, 2023), (2, 1008)]


def test_features_spatial_features_and_logits_by_name(full):
    state, extractors = full
    found = extractors["bilinear"](images())
    expected = ByName(state)((images() * 127.5 + 127.5 - 128) / 128)
    for part, by_name in zip(found, expected, strict=False):
        assert by_name.std() > 1e-3
        torch.testing.assert_close(part, by_name, rtol=1e-4, atol=1e-4 * float(by_name.std()))
    assert extractors["bilinear"].gives == {"spatial", "logits"}


def test_grey_images_are_seen_as_rgb(full):
    grey = images(2, channels=1, size=20)
    extractor = full[1]["tensorflow"]
    assert torch.equal(extractor(grey).features, extractor(grey.expand(-1, 3, -1, -1)).features)


def test_images_are_rounded_before_they_are_resized(full):
    extractor, exact = full[1]["bicubic"], images(2, size=20)
    nearly = exact + (torch.rand(exact.shape) - 0.5) * 0.9 / 127.5
    assert not torch.equal(exact, nearly)
    torch.testing.assert_close(
        extractor(nearly.clamp(-1, 1)).features, extractor(exact).features, rtol=0, atol=1e-5
    )


def test_batches_change_nothing(full, monkeypatch):
    extractor, three = full[1]["bilinear"], images(3, size=20)
    whole = extractor(three)
    monkeypatch.setattr(inception_features, "BATCH", 2)
    for part, other in zip(extractor(three)[:3], whole[:3], strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-4)


def test_resizes_have_names_of_their_own(full):
    assert len({extractor.name for extractor in full[1].values()}) == len(RESIZES)
    with pytest.raises(UsageError, match="no resize 'nearest': use bilinear, tensorflow, bicubic"):
        inception_extractor(resize="nearest")


@pytest.mark.parametrize("shape", [(2, 2, 20, 20), (0, 3, 20, 20), (3, 20, 20)])
def test_images_that_do_not_fit(full, shape):
    with pytest.raises(DkdmError, match=r"of shape \(3, H, W\) or \(1, H, W\)"):
        full[1]["bilinear"](torch.zeros(shape))


def test_normalizations_have_no_scale_of_their_own():
    layer = Convolution(2, 3, 1)
    assert torch.equal(layer[1].weight, torch.ones(3))
    assert layer[1].eps == 1e-3


@pytest.mark.slow
@pytest.mark.skipif("DKDM_INCEPTION" not in os.environ, reason="DKDM_INCEPTION names no file")
def test_the_published_file(tmp_path, monkeypatch):
    """Our network and the published program give the same features of the same pixels."""
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path))
    monkeypatch.setattr(inception_features, "PUBLISHED", PUBLISHED)
    monkeypatch.setattr(inception_features, "SIZE", SIZE)
    given = os.environ["DKDM_INCEPTION"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.load(given).eval()
    extractor, small = inception_extractor(given), images(3, size=32)
    pixels = functional.interpolate((small * 127.5 + 127.5).round(), (299, 299), mode="bilinear")
    with torch.no_grad():
        expected = program((pixels - 128) / 128)
    found = extractor(small)
    torch.testing.assert_close(found.features, expected, rtol=0, atol=1e-5)
    assert found.logits is None and extractor.gives == {"spatial"}
    assert found.spatial.shape == (3, 2023)
    inception_features._network.cache_clear()
