"""The published Inception network as a feature extractor: weights by their hash, images to 299."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from dkdm.data.inception import FEATURES, SIZE, SPATIAL, Inception
from dkdm.data.published import Published
from dkdm.data.reference import FeatureExtractor, Features
from dkdm.data.resizing import RESIZES, eight_bits, resized
from dkdm.errors import UsageError

BATCH = 50
PUBLISHED = Published(
    name="the Inception network of FID (inception-2015-12-05)",
    option="--feature-network",
    forms={
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "torchscript",
        "6726825d": "state dict",
    },
    address="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
)
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_BLOCKS = {  # the convolutions of a block in the order of `Inception.convolutions`
    ("Mixed_5b", "Mixed_5c", "Mixed_5d"): "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 "
    "branch3x3dbl_2 branch3x3dbl_3 branch_pool",
    ("Mixed_6a",): "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"): "branch1x1 branch7x7_1 branch7x7_2 "
    "branch7x7_3 branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 "
    "branch_pool",
    ("Mixed_7a",): "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 "
    "branch7x7x3_4",
    ("Mixed_7b", "Mixed_7c"): "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 "
    "branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b branch_pool",
}


def inception_extractor(
    given: str | Path | None = None, resize: str = "bilinear", device: str = "cpu"
) -> FeatureExtractor:
    """The features that FID, sFID and the Inception Score rest on.

    given: see `Published.find`. resize: see `resizing.resized`. Images are rounded to whole pixels
    in 0..255 first, as files hold them; grey ones are seen as RGB. Raises `UsageError` for an
    unknown resize or another file.
    """
    if resize not in RESIZES:
        raise UsageError(f"there is no resize {resize!r}: use {', '.join(RESIZES)}")
    path, form = PUBLISHED.find(given)
    network = _network(path, form, device)

    def compute(images: Tensor) -> Features:
        parts = [network(_prepared(batch, resize, device)) for batch in images.split(BATCH)]
        features, spatial, logits = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return Features(features, spatial, logits if form == "state dict" else None)

    return FeatureExtractor(
        name=f"inception-2015-12-05/{resize}",
        in_words=f"2,048 Inception features (2015-12-05) of 8-bit images, {resize} to 299x299",
        compute=compute,
        fits=lambda shape: len(shape) == 3 and shape[0] in (1, 3),
        sizes="(3, H, W) or (1, H, W)",
        num_features=FEATURES,
        num_spatial=SPATIAL,
        resizes=True,
        gives=frozenset({"spatial", "logits"} if form == "state dict" else {"spatial"}),
    )


def _prepared(images: Tensor, resize: str, device: str) -> Tensor:
    return (resized(eight_bits(images.to(device)), resize, SIZE, SIZE) - 128) / 128


@cache
def _network(path: Path, form: str, device: str) -> Inception:
    network = Inception()
    if form == "torchscript":
        _fill(network, _of_torchscript(path))
    else:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        _fill(network, [_of_state_dict(loaded, name) for name in names_in_state_dict()])
        network.head.load_state_dict({"weight": loaded["fc.weight"]})
    return network.to(device).eval().requires_grad_(False)


def _of_torchscript(path: Path) -> list[dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch will drop its old format
        found = torch.jit.load(path, map_location="cpu").state_dict()
    names = [key.removesuffix(".weight") for key in found if key.endswith(".weight")]
    return [
        {
            "0.weight": found[f"{name}.weight"],
            "1.bias": found[f"{name}.beta"],
            "1.running_mean": found[f"{name}.mean"],
            "1.running_var": found[f"{name}.var"],
        }
        for name in names
    ]


def names_in_state_dict() -> list[str]:
    """The names of the 94 convolutions in pytorch-fid's and torch-fidelity's file."""
    inside = [
        f"{block}.{name}"
        for blocks, names in _BLOCKS.items()
        for block in blocks
        for name in names.split()
    ]
    return [*_STEM, *inside]


def _of_state_dict(loaded: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    normalization = ("weight", "bias", "running_mean", "running_var")
    return {"0.weight": loaded[f"{name}.conv.weight"]} | {
        f"1.{key}": loaded[f"{name}.bn.{key}"] for key in normalization
    }


def _fill(network: nn.Module, weights: list[dict[str, Tensor]]) -> None:
    assert isinstance(network, Inception)
    for convolution, tensors in zip(network.convolutions(), weights, strict=True):
        missing = convolution.load_state_dict(tensors, strict=False)
        assert set(missing.missing_keys) <= {"1.weight", "1.num_batches_tracked"}
