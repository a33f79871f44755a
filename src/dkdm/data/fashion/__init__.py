"""Fashion-MNIST: its files, class names and captions; `reference` measures against it."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from dkdm.data.images import ImageSet
from dkdm.errors import DkdmError

NAME = "fashion-mnist"
ROOT = Path("/usr/share/datasets/fashion-mnist")
SHAPES = ((1, 16, 16), (1, 28, 28))
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
WORDS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
TONES = ("dark", "grey", "white")

_TONE_BOUNDS = torch.tensor([-0.1, 0.35])  # terciles, about, of the garments' mean brightness
_FILE_PREFIX = {"train": "train", "test": "t10k"}
_CONTENT_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def image_set(shape: tuple[int, ...]) -> ImageSet:
    """The 60,000 training images, at the shape of a model's samples.

    Raises `DkdmError` for shapes other than (1, 16, 16) and (1, 28, 28), and as
    `load_fashion_mnist` does.
    """
    if shape not in SHAPES:
        raise DkdmError(
            f"{NAME} has images of shape (1, 16, 16) or (1, 28, 28), the model takes {shape}: "
            "use one of these, or another --images"
        )
    images, labels = load_fashion_mnist("train", size=shape[1])
    return ImageSet(images, labels, lambda: fashion_captions(images, labels), CLASS_NAMES)


def load_fashion_mnist(
    split: Literal["train", "test"], root: Path | None = None, size: int = 16
) -> tuple[Tensor, Tensor]:
    """Return the images and labels of Fashion-MNIST, at 16x16 or as published.

    Images are float32 `[N, 1, size, size]` in [-1, 1], labels int64 `[N]` in 0..9, N is 60,000 or
    10,000. `size` is 28, or 16 for `halve` of it. `root` holds the four `*-ubyte.gz` files; None is
    the folder of the Debian package dataset-fashion-mnist. Raises `DkdmError` if a file is missing
    or is not the published one.

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST (2017).
    """
    if split not in _FILE_PREFIX:
        raise DkdmError(f"Fashion-MNIST has no split {split!r}: use train or test")
    folder, prefix = root or ROOT, _FILE_PREFIX[split]
    pixels = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    images = pixels.view(-1, 1, 28, 28).float()
    images = images if size == 28 else halve(images, black=0.0)
    return images / 127.5 - 1, labels.long()


def halve(images: Tensor, black: float = -1.0) -> Tensor:
    """Bring 28x28 images `[N, C, 28, 28]` to 16x16: padded with black, 2x2 pixels averaged."""
    return avg_pool2d(pad(images, (2, 2, 2, 2), value=black), kernel_size=2)


def fashion_captions(images: Tensor, labels: Tensor) -> tuple[str, ...]:
    """Captions such as "a white sneaker" of Fashion-MNIST images `[N, 1, H, W]` in [-1, 1].

    The tone is the mean brightness of the garment's pixels. Every fifth caption leaves it out.
    """
    inside = images > -0.9
    total = torch.where(inside, images, torch.zeros_like(images)).flatten(1).sum(1)
    tones = torch.bucketize(total / inside.flatten(1).sum(1).clamp(min=1), _TONE_BOUNDS)
    pairs = zip(tones.tolist(), labels.tolist(), strict=True)
    return tuple(
        f"a {WORDS[label]}" if i % 5 == 4 else f"a {TONES[tone]} {WORDS[label]}"
        for i, (tone, label) in enumerate(pairs)
    )


def _read_idx(file: Path, dimensions: int) -> Tensor:
    try:
        content = gzip.decompress(file.read_bytes())
    except FileNotFoundError:
        raise DkdmError(
            f"Fashion-MNIST is not installed: {file} is missing. On Debian or Ubuntu run "
            "`apt-get install dataset-fashion-mnist`, or pass --images with a folder of images"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DkdmError(f"{file} cannot be read ({error}): install it again") from error
    if hashlib.sha256(content).hexdigest() != _CONTENT_SHA256[file.stem]:
        raise DkdmError(f"{file} is not the published Fashion-MNIST (SHA-256): install it again")
    header = 4 * (1 + dimensions)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)
