"""Real images as arrays in a file (.npz, .npy, .safetensors), read in batches, never whole."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dkdm.data.images import to_samples
from dkdm.data.real_images import AT_ONCE, Images, Source
from dkdm.data.reference import FeatureExtractor
from dkdm.errors import DkdmError, in_a_line
from dkdm.reading.fields import shown

IMAGES, LABELS = "arr_0", "arr_1"  # of ADM's .npz
SAMPLES, CLASSES = "samples", "class_labels"  # of a .safetensors by dkdm
MOST_CLASSES = 100_000
PIECE = 2**20  # bytes
FARTHEST = 16.0  # from 0, of samples in [-1, 1]: beyond it they are on another scale
_HEADERS: dict[tuple[int, int], Callable[..., Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Member(NamedTuple):
    """An array of an .npz whose header is read: its numbers follow in `file`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: IO[bytes]

    def read(self, count: int) -> np.ndarray[Any, Any]:
        """The next `count` numbers. Raises `EOFError` if there are fewer."""
        content = self.file.read(count * self.dtype.itemsize)
        if len(content) < count * self.dtype.itemsize:
            raise EOFError("it ends too early")
        return np.frombuffer(bytearray(content), self.dtype)

    def skip(self, count: int) -> None:
        """Go over the next `count` numbers; they are read, so that the checksum is looked at."""
        left = count * self.dtype.itemsize
        while left:
            read = len(self.file.read(min(left, PIECE)))
            if not read:
                raise EOFError("it ends too early")
            left -= read


def array_names(path: Path) -> tuple[str, ...]:
    """The names of the arrays in an .npz. Raises `DkdmError` if it is none."""
    with readable(path), zipfile.ZipFile(path) as archive:
        return tuple(name.removesuffix(".npy") for name in archive.namelist())


@contextmanager
def opened_array(path: Path, name: str) -> Iterator[Member]:
    """An array of an .npz, nothing of which is unpickled.

    Raises `DkdmError` for what cannot be read, and for anything but plain numbers.
    """
    with readable(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        shape, by_columns, dtype = _HEADERS[version](file)
        if dtype.kind not in "uif" or (by_columns and len(shape) > 1):
            raise DkdmError(f"{path}: give {name} as numbers, in rows, not as {dtype}")
        yield Member(shape, dtype, file)


def read_array(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A whole array of an .npz. Raises `DkdmError` if it has another shape."""
    with opened_array(path, name) as member:
        if member.shape != shape:
            raise DkdmError(
                f"{path}: {name} has shape {list(member.shape)}, not {list(shape)}: give arrays "
                "that fit the images and the feature network"
            )
        return member.read(math.prod(shape)).reshape(shape)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around the reading of a file: whatever is raised becomes one `DkdmError` that names it."""
    try:
        yield
    except DkdmError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise DkdmError(f"{path} cannot be read ({in_a_line(error)}): give another file") from error


def array_images(path: Path) -> Source:
    """The images of a file.

    - .npz: `arr_0` uint8 [N, H, W, C], and perhaps labels `arr_1` [N].
    - .npy, .safetensors (`samples`, or the only tensor; perhaps `class_labels`): [N, C, H, W] in
      [-1, 1].
    """
    opened = _opened_npz if path.suffix.lower() == ".npz" else _opened_samples
    return Source(path.name, partial(_digest, path), partial(opened, path))


def _digest(path: Path) -> str:
    with readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened_npz(path: Path, network: FeatureExtractor) -> Images:
    names = array_names(path)
    if IMAGES not in names:
        raise DkdmError(
            f"{path} holds {shown(', '.join(names[:5]))}: give images as {IMAGES}, or statistics "
            "as mu and sigma"
        )
    with opened_array(path, IMAGES) as member:
        shape, dtype = member.shape, member.dtype
    if dtype != np.uint8 or len(shape) != 4:
        raise DkdmError(
            f"{path}: {IMAGES} is {dtype} {list(shape)}: give images as uint8 [N, H, W, C]"
        )
    count, height, width, channels = shape
    labels = None
    if LABELS in names:
        labels = _labels(path, read_array(path, LABELS, (count,)), count)
    batches = partial(_batches_of_npz, path)
    return _images(path, count, (channels, height, width), batches, labels, network)


def _labels(path: Path, values: np.ndarray[Any, Any], count: int) -> Tensor:
    legal = values.shape == (count,) and values.dtype.kind in "ui"
    if not legal or (count and not 0 <= int(values.min()) <= int(values.max()) < MOST_CLASSES):
        raise DkdmError(
            f"{path}: give labels as {count} whole numbers from 0 to {MOST_CLASSES - 1:,}, one for "
            "each image"
        )
    return torch.from_numpy(values.astype(np.int64))


def _batches_of_npz(path: Path, starts: Sequence[int]) -> Iterator[Tensor]:
    with opened_array(path, IMAGES) as member:
        count, *rest = member.shape
        at = 0
        for first in starts:
            part = min(AT_ONCE, count - first)
            member.skip((first - at) * math.prod(rest))
            pixels = torch.from_numpy(member.read(part * math.prod(rest)))
            at = first + part
            yield to_samples(pixels.view(part, *rest).permute(0, 3, 1, 2))


def _opened_samples(path: Path, network: FeatureExtractor) -> Images:
    with readable(path):
        samples, classes = _mapped(path)
    if samples.ndim != 4 or not samples.is_floating_point():
        raise DkdmError(
            f"{path} holds {samples.dtype} {list(samples.shape)}: give samples as floating-point "
            f"numbers [N, C, H, W] in [-1, 1], or an .npz with {IMAGES} uint8 [N, H, W, C]"
        )
    count, *shape = samples.shape
    labels = None if classes is None else _labels(path, classes, count)
    return _images(path, count, tuple(shape), partial(_batches_of, path, samples), labels, network)


def _mapped(path: Path) -> tuple[Tensor, np.ndarray[Any, Any] | None]:
    """The samples and labels of a file, which stay on the disk until they are looked at."""
    if path.suffix.lower() == ".npy":
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)), None
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        name = names[0] if len(names) == 1 else SAMPLES
        if name not in names:
            raise ValueError(f"it holds {len(names)} tensors, none of them named {SAMPLES}")
        labels = file.get_tensor(CLASSES).numpy() if CLASSES in names else None
        return file.get_tensor(name), labels


def _batches_of(path: Path, samples: Tensor, starts: Sequence[int]) -> Iterator[Tensor]:
    for first in starts:
        wide = samples[first : first + AT_ONCE].float()
        if not wide.isfinite().all():
            raise DkdmError(f"{path} holds NaN or infinity: give finite samples")
        if wide.abs().max() > FARTHEST:
            raise DkdmError(
                f"{path} holds values as large as {wide.abs().max():.4g}: give samples in [-1, 1]"
            )
        yield wide


def _images(
    path: Path,
    count: int,
    shape: tuple[int, ...],
    batches: Callable[[Sequence[int]], Iterator[Tensor]],
    labels: Tensor | None,
    network: FeatureExtractor,
) -> Images:
    if not count or 0 in shape or not network.fits(shape):
        raise DkdmError(
            f"{path} holds {count} images of shape {shape}: {network.in_words} need images of "
            f"shape {network.sizes}"
        )
    return Images(count, shape, batches, labels)
