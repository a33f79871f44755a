"""Folders of images: their pixels, classes and captions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dkdm.errors import DkdmError, in_a_line

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**27


class ImageSet(NamedTuple):
    """Images to train on.

    - `images`: float32 `[N, C, H, W]` in [-1, 1].
    - `labels`: int64 `[N]`; None without classes.
    - `captions`: reads one caption for each image. Raises `DkdmError` if one is missing.
    - `class_names`: one for each class, if known.
    """

    images: Tensor
    labels: Tensor | None
    captions: Callable[[], tuple[str, ...]]
    class_names: tuple[str, ...] | None = None


def load_image_folder(path: Path, shape: tuple[int, ...]) -> ImageSet:
    """Return the images of a folder, and their labels if it is divided into class folders.

    Reads .jpg, .jpeg, .png and .webp of 8 bits a channel, in the order of their names. Each is
    converted to `shape` = (channels, height, width) with 1 (grey) or 3 (RGB) channels, and resized
    by area averaging; its aspect ratio is not kept. A label is the place of the class folder among
    the sorted names. A caption is the text file beside an image (cat.txt for cat.png). Raises
    `DkdmError` for a folder without images, one that mixes both layouts, and a file that cannot be
    read.
    """
    if shape[0] not in (1, 3):
        raise DkdmError(f"images have 1 or 3 channels, the model takes {shape[0]}")
    if not path.is_dir():
        raise DkdmError(f"{path} is not a folder: give a folder of images")
    files, labels = list_images(path)
    images = torch.stack([_read_image(file, shape) for file in files])
    return ImageSet(images, labels, partial(_read_captions, files))


def list_images(path: Path) -> tuple[list[Path], Tensor | None]:
    """The images of a folder in the order of their names, and their labels [N], see above.

    Hidden files are no images: a killed write may leave one behind, and macOS does. Raises
    `DkdmError` for a folder without images, and for one that mixes both layouts.
    """
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
        raise DkdmError(f"{where} holds no images: add {', '.join(IMAGE_SUFFIXES)} files")
    counts = torch.tensor([len(files) for files in classes])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return [file for files in classes for file in files], labels


def _images_in(folder: Path) -> list[Path]:
    files = (f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(f for f in files if not f.name.startswith("."))


def _read_image(file: Path, shape: tuple[int, ...]) -> Tensor:
    channels, height, width = shape
    image = open_eight_bits(file).convert("L" if channels == 1 else "RGB")
    return to_samples(pixels_of(image.resize((width, height), Image.Resampling.BOX)))


def open_eight_bits(file: Path) -> Image.Image:
    """`open_image`; raises `DkdmError` for more than 8 bits a channel too."""
    image = open_image(file)
    if image.mode.startswith(("I", "F")):
        raise DkdmError(f"{file} has more than 8 bits a channel: convert it to 8 bits")
    return image


def to_samples(pixels: Tensor) -> Tensor:
    """Whole pixels in 0..255 as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def pixels_of(image: Image.Image) -> Tensor:
    """The pixels of a grey or RGB image, uint8 [C, H, W]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


def open_image(file: Path) -> Image.Image:
    """Open a PNG, JPEG or WebP image of at most 2^27 pixels, turned upright.

    Raises `DkdmError` for one that is larger, damaged or of another format.
    """
    try:
        if not file.is_file():
            raise OSError("it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(file, formats=IMAGE_FORMATS)
        with opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise OSError(f"{opened.width}x{opened.height} pixels are more than {MAX_PIXELS:,}")
            opened.load()
            return ImageOps.exif_transpose(opened)
    except Exception as error:  # a decoder may raise anything for a damaged file
        raise DkdmError(
            f"{file} cannot be read as an image ({in_a_line(error)}): remove it"
        ) from error


def _read_captions(files: list[Path]) -> tuple[str, ...]:
    texts = [file.with_suffix(".txt") for file in files]
    missing = [text for text in texts if not text.is_file()]
    if missing:
        raise DkdmError(
            f"{missing[0]} is missing, and {len(missing) - 1} more captions: give each image a "
            "text file of the same name, or train a model without text"
        )
    return tuple(_read_caption(text) for text in texts)


def _read_caption(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DkdmError(f"{file} cannot be read as UTF-8 text ({error}): save it again") from error
