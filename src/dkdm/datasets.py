"""Real images for the baselines and the metrics: Fashion-MNIST at 16x16, or a folder of images."""

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from dkdm.errors import DkdmError

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_SHAPE = (1, 16, 16)
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")

_FILE_PREFIX = {"train": "train", "test": "t10k"}
_CONTENT_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def load_fashion_mnist(
    split: Literal["train", "test"], root: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Return the images and labels of Fashion-MNIST, at 16x16.

    The 28x28 images are padded with black to 32x32 and averaged over 2x2 pixels. Images are float32
    `[N, 1, 16, 16]` in [-1, 1], labels int64 `[N]` in 0..9, N is 60,000 or 10,000. `root` holds the
    four `*-ubyte.gz` files; None is where the Debian package dataset-fashion-mnist puts them.
    Raises `DkdmError` where a file is missing or is not the published one.

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST (2017).
    """
    if split not in _FILE_PREFIX:
        raise DkdmError(f"unknown split {split!r} of Fashion-MNIST: expected train or test")
    folder, prefix = root or FASHION_MNIST_ROOT, _FILE_PREFIX[split]
    pixels = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    images = avg_pool2d(pad(pixels.view(-1, 1, 28, 28), (2, 2, 2, 2)).float(), kernel_size=2)
    return images / 127.5 - 1, labels.long()


def load_image_folder(path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor | None]:
    """Return the images of a folder, and their labels where it is divided into class folders.

    Reads .jpg, .jpeg, .png and .webp of 8 bits a channel, in the order of their names. Each is
    converted to `shape` = (channels, height, width) with 1 (grey) or 3 (RGB) channels, and resized
    by area averaging; its aspect ratio is not kept. Images are float32 `[N, *shape]` in [-1, 1].
    Labels are int64 `[N]`, the place of the class folder among the sorted names; None where the
    images lie in `path` itself. Raises `DkdmError` for a folder without images, one that mixes both
    layouts, and a file that cannot be read.
    """
    if shape[0] not in (1, 3):
        raise DkdmError(f"images of {shape[0]} channels cannot be read: expected 1 or 3")
    if not path.is_dir():
        raise DkdmError(f"{path} is not a folder: give a folder of images")
    files, labels = _list_images(path)
    return torch.stack([_read_image(file, shape) for file in files]), labels


def load_images(spec: str | Path, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor | None]:
    """Return the training images that `spec` names, and their labels where they have any.

    `spec` is "fashion-mnist" (its training split, shape (1, 16, 16) only) or a folder. Images are
    float32 `[N, *shape]` in [-1, 1], labels int64 `[N]` or None. Raises `DkdmError` as
    `load_fashion_mnist` and `load_image_folder` do.
    """
    if str(spec) != "fashion-mnist":
        return load_image_folder(Path(spec), shape)
    if shape != FASHION_MNIST_SHAPE:
        raise DkdmError(f"fashion-mnist is read at {FASHION_MNIST_SHAPE}, the model wants {shape}")
    return load_fashion_mnist("train")


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


def _list_images(path: Path) -> tuple[list[Path], Tensor | None]:
    flat = _images_in(path)
    folders = sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    if flat and folders:
        raise DkdmError(
            f"{path} holds images and folders ({folders[0].name}, ...): "
            "keep the images in it, or one folder for each class"
        )
    if flat:
        return flat, None
    classes = [_images_in(folder) for folder in folders]
    empty = [f.name for f, files in zip(folders, classes, strict=True) if not files]
    if empty or not folders:
        where = path / empty[0] if empty else path
        raise DkdmError(f"{where} holds no images: expected {', '.join(IMAGE_SUFFIXES)}")
    counts = torch.tensor([len(files) for files in classes])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return [file for files in classes for file in files], labels


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)


def _read_image(file: Path, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
    except OSError as error:
        raise DkdmError(f"{file} cannot be read as an image ({error}): remove it") from error
    if image.mode.startswith(("I", "F")):
        raise DkdmError(f"{file} has more than 8 bits a channel: convert it to 8 bits")
    image = image.convert("L" if channels == 1 else "RGB")
    image = image.resize((width, height), Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, channels).permute(2, 0, 1).float() / 127.5 - 1
