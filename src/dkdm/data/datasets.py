"""Real images for the baselines and the metrics: Fashion-MNIST, or a folder of images."""

import gzip
import hashlib
import warnings
import zlib
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from dkdm.errors import DkdmError
from dkdm.reading.sizes import in_a_line

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_SIZES = (16, 28)
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**27

_FILE_PREFIX = {"train": "train", "test": "t10k"}
_CONTENT_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def load_fashion_mnist(
    split: Literal["train", "test"], root: Path | None = None, size: int = 16
) -> tuple[Tensor, Tensor]:
    """Return the images and labels of Fashion-MNIST, at 16x16 or as published.

    Images are float32 `[N, 1, size, size]` in [-1, 1], labels int64 `[N]` in 0..9, N is 60,000 or
    10,000. `size` is 28, or 16 for `halve` of it. `root` holds the four `*-ubyte.gz` files; None is
    where the Debian package dataset-fashion-mnist puts them. Raises `DkdmError` where a file is
    missing or is not the published one, and for another size.

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST (2017).
    """
    if split not in _FILE_PREFIX:
        raise DkdmError(f"unknown split {split!r} of Fashion-MNIST: expected train or test")
    if size not in FASHION_MNIST_SIZES:
        raise DkdmError(f"fashion-mnist is read at 16x16 or 28x28, the model wants {size}x{size}")
    folder, prefix = root or FASHION_MNIST_ROOT, _FILE_PREFIX[split]
    pixels = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    images = pixels.view(-1, 1, 28, 28).float()
    images = images if size == 28 else halve(images, black=0.0)
    return images / 127.5 - 1, labels.long()


def halve(images: Tensor, black: float = -1.0) -> Tensor:
    """Bring 28x28 images `[N, C, 28, 28]` to 16x16: padded with black, 2x2 pixels averaged."""
    return avg_pool2d(pad(images, (2, 2, 2, 2), value=black), kernel_size=2)


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

    `spec` is "fashion-mnist" (its training split, at 16x16 or 28x28) or a folder. Images are
    float32 `[N, *shape]` in [-1, 1], labels int64 `[N]` or None. Raises `DkdmError` as
    `load_fashion_mnist` and `load_image_folder` do.
    """
    if str(spec) != "fashion-mnist":
        return load_image_folder(Path(spec), shape)
    if shape not in ((1, size, size) for size in FASHION_MNIST_SIZES):
        raise DkdmError(
            f"fashion-mnist is read at (1, 16, 16) or (1, 28, 28), the model wants {shape}"
        )
    return load_fashion_mnist("train", size=shape[1])


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
    image = open_picture(file)
    if image.mode.startswith(("I", "F")):
        raise DkdmError(f"{file} has more than 8 bits a channel: convert it to 8 bits")
    image = image.convert("L" if channels == 1 else "RGB")
    image = image.resize((width, height), Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, channels).permute(2, 0, 1).float() / 127.5 - 1


def open_picture(file: Path) -> Image.Image:
    """A PNG, JPEG or WebP picture of at most 2^27 pixels, turned upright.

    Raises DkdmError for one that is larger, damaged, of another format or no file.
    """
    try:
        if not file.is_file():
            raise OSError("it is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(file, formats=PICTURE_FORMATS)
        with opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise OSError(f"{opened.width}x{opened.height} pixels are more than {MAX_PIXELS:,}")
            opened.load()
            return ImageOps.exif_transpose(opened)
    except Exception as error:  # a decoder may raise anything for a damaged file
        raise DkdmError(
            f"{file} cannot be read as an image ({in_a_line(error)}): remove it"
        ) from error


FASHION_WORDS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
FASHION_TONES = ("dark", "grey", "white")
_TONE_BOUNDS = torch.tensor([-0.1, 0.35])  # terciles, about, of the garments' mean brightness


def fashion_captions(images: Tensor, labels: Tensor) -> tuple[str, ...]:
    """Captions such as "a white sneaker" of Fashion-MNIST images `[N, 1, H, W]` in [-1, 1].

    The tone is the mean brightness of the garment's own pixels. Every fifth caption leaves it out.
    """
    inside = images > -0.9
    total = torch.where(inside, images, torch.zeros_like(images)).flatten(1).sum(1)
    tones = torch.bucketize(total / inside.flatten(1).sum(1).clamp(min=1), _TONE_BOUNDS)
    pairs = zip(tones.tolist(), labels.tolist(), strict=True)
    return tuple(
        f"a {FASHION_WORDS[label]}" if i % 5 == 4 else _caption(tone, label)
        for i, (tone, label) in enumerate(pairs)
    )


def _caption(tone: int, label: int) -> str:
    return f"a {FASHION_TONES[tone]} {FASHION_WORDS[label]}"


def load_captions(spec: str | Path, images: Tensor, labels: Tensor | None) -> tuple[str, ...]:
    """One caption for each image that `load_images` returned for `spec`, in its order.

    Those of Fashion-MNIST are made from its labels; those of a folder are read from a text file
    beside each image (cat.txt for cat.png). Raises `DkdmError` where one is missing or not UTF-8.
    """
    if str(spec) == "fashion-mnist" and labels is not None:
        return fashion_captions(images, labels)
    files = [file.with_suffix(".txt") for file in _list_images(Path(spec))[0]]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DkdmError(
            f"{missing[0]} is missing, and {len(missing) - 1} more captions: a text model is "
            "trained on images with a text file of the same name beside each"
        )
    return tuple(_read_caption(file) for file in files)


def _read_caption(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DkdmError(f"{file} cannot be read as UTF-8 text ({error}): save it again") from error
