"""LPIPS from the published weights: the backbone's and the heads', each by its hash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dkdm.data.lpips import BACKBONES, Lpips
from dkdm.data.published import Published
from dkdm.errors import UsageError

BATCH = 50
SMALLEST = 32  # pixels of the shorter side; AlexNet needs 31
OPTION = "--lpips-weights"
_WEIGHTS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights"
FILES = {
    "alex": (
        Published(
            name="AlexNet (ImageNet)",
            option=OPTION,
            forms={"4df8aa71": "state dict", "7be5be79": "state dict"},
            address="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        ),
        Published(
            name="the heads of LPIPS v0.1 for AlexNet",
            option=OPTION,
            forms={"df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0": "heads"},
            address=f"{_WEIGHTS}/v0.1/alex.pth",
        ),
    ),
    "vgg": (
        Published(
            name="VGG16 (ImageNet)",
            option=OPTION,
            forms={"397923af": "state dict"},
            address="https://download.pytorch.org/models/vgg16-397923af.pth",
        ),
        Published(
            name="the heads of LPIPS v0.1 for VGG16",
            option=OPTION,
            forms={"a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868": "heads"},
            address=f"{_WEIGHTS}/v0.1/vgg.pth",
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class PerceptualDistance:
    """How different two images look to a network.

    - `name`: its version, the same for the same distances.
    - `in_words`: what a reader of the distances reads.
    - `compute`: [N] for images a and b, [N, 1 or 3, H, W] in [-1, 1].
    """

    name: str
    in_words: str
    compute: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return [N] float32 on the CPU; values outside [-1, 1] are clipped.

        Raises `UsageError` for what is not two sets of as many grey or RGB images of one shape.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] not in (1, 3):
            raise UsageError(
                f"{self.in_words} compares grey or RGB images of one shape, not "
                f"{list(a.shape)} with {list(b.shape)}"
            )
        with torch.no_grad():
            return self.compute(a.clamp(-1, 1), b.clamp(-1, 1))


def perceptual_distance(
    given: str | Path | None = None, backbone: str = "alex", device: str = "cpu"
) -> PerceptualDistance:
    """LPIPS v0.1 with "alex" or "vgg".

    given: "download", a folder that holds the weights of the backbone and of the heads, or None for
    what is in the cache folder. Images whose shorter side is below 32 pixels are enlarged to it
    (bilinear): AlexNet sees nothing smaller. Raises `UsageError` for an unknown backbone and for
    other files, `DkdmError` if they cannot be fetched.
    """
    if backbone not in FILES:
        raise UsageError(f"LPIPS has no backbone {backbone!r}: use {', '.join(FILES)}")
    weights, heads = (published.find(given)[0] for published in FILES[backbone])
    network = lpips_network(backbone, weights, heads, device)

    def compute(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(a.split(BATCH), b.split(BATCH), strict=True)
        return torch.cat(
            [network(_prepared(x, device), _prepared(y, device)).cpu() for x, y in pairs]
        )

    return PerceptualDistance(f"lpips-v0.1/{backbone}", f"LPIPS v0.1 ({backbone})", compute)


def _prepared(images: Tensor, device: str) -> Tensor:
    images = images.to(device).float().expand(-1, 3, -1, -1)
    height, width = images.shape[-2:]
    larger = max(1.0, SMALLEST / min(height, width))
    if larger == 1:
        return images
    size = round(height * larger), round(width * larger)
    return functional.interpolate(images, size, mode="bilinear", align_corners=False)


@cache
def lpips_network(backbone: str, weights: Path, heads: Path, device: str = "cpu") -> Lpips:
    """The network with the weights of two files as torchvision and the authors of LPIPS write."""
    network = Lpips(BACKBONES[backbone])
    loaded, found = (
        torch.load(path, map_location="cpu", weights_only=True) for path in (weights, heads)
    )
    inner = {
        key.removeprefix("features."): value
        for key, value in loaded.items()
        if key.startswith("features.")
    }
    network.features.load_state_dict(inner)
    network.heads.load_state_dict(
        {str(i): found[f"lin{i}.model.1.weight"].flatten() for i in range(len(network.taps))}
    )
    return network.to(device).eval().requires_grad_(False)
