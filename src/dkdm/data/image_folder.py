"""A folder of real images: looked at as a whole before a network sees it, then read in batches."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dkdm.core.saving.progress import track
from dkdm.data.images import list_images, open_eight_bits, pixels_of, to_samples
from dkdm.data.real_images import AT_ONCE, Images, Source
from dkdm.data.reference import FeatureExtractor
from dkdm.errors import DkdmError
from dkdm.reading.fields import shown
from dkdm.reading.notes import say

FIRST = 5  # names in a message
MANY = 1000  # files that take a time
GREY = ("1", "L", "LA", "La")
Found = TypeVar("Found")
Shape = tuple[int, int, int]


def image_folder(path: Path, skip_bad: bool = False) -> Source:
    """The images of a folder, or of one folder for each class.

    skip_bad: leave out images that cannot be read, and say how many. Raises `DkdmError` for a
    folder without images, and for one that mixes both layouts.
    """
    try:
        files, labels = list_images(path)
    except OSError as error:
        raise DkdmError(f"{path} cannot be read ({error.strerror}): give another folder") from error
    return Source(
        name=path.resolve().name,
        digest=lambda: _digest(path, files),
        open=partial(_opened, path, files, labels, skip_bad),
        skips=skip_bad,
    )


def _digest(path: Path, files: Sequence[Path]) -> str:
    """A hash of the names and contents of all files."""

    def of_file(file: Path) -> str:
        try:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError:  # a link to nothing, or a folder: it counts as an image that cannot be read
            content = "unreadable"
        return f"{file.relative_to(path).as_posix()}\0{content}\n"

    lines = _each(of_file, files, f"hashing {path.name}")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _unseen(_: int) -> None:
    """The progress of work that takes no time."""


def _each(work: Callable[[Path], Found], files: Sequence[Path], label: str) -> list[Found]:
    """What `work` gives for each file, several at a time."""
    found: list[Found] = []
    showing = track(len(files), 0, label) if len(files) >= MANY else nullcontext(_unseen)
    with ThreadPoolExecutor() as pool, showing as progress:
        for each in pool.map(work, files):
            found.append(each)
            progress(len(found))
    return found


def _opened(
    path: Path,
    files: Sequence[Path],
    labels: Tensor | None,
    skip_bad: bool,
    network: FeatureExtractor,
) -> Images:
    looks = _each(_shape_of, files, f"checking {path.name}")
    bad = {file: look for file, look in zip(files, looks, strict=True) if isinstance(look, str)}
    if bad:
        _say_bad(path, bad, len(files), skip_bad)
    kept = [i for i, look in enumerate(looks) if not isinstance(look, str)]
    shapes = {files[i]: look for i in kept if not isinstance(look := looks[i], str)}
    shape = _shape_of_all(path, shapes, network)
    return Images(
        count=len(kept),
        shape=shape,
        batches=partial(_batches, list(shapes), "L" if shape[0] == 1 else "RGB"),
        labels=None if labels is None else labels[kept],
        bad=len(bad),
    )


def _say_bad(path: Path, bad: Mapping[Path, str], count: int, skip: bool) -> None:
    """Say which images cannot be read. Raises `DkdmError` unless they are skipped."""
    what = f"{len(bad)} of {count} images of {path} cannot be read ({_named(path, list(bad))})"
    if skip and len(bad) < count:
        say(f"note: {what}")
        return
    remedy = "give other images" if skip else "remove them, or give --skip-bad"
    raise DkdmError(f"{what}: {remedy}. The first: {next(iter(bad.values()))}")


def _named(path: Path, files: Sequence[Path]) -> str:
    """The first names, and how many more there are."""
    names = ", ".join(shown(file.relative_to(path).as_posix()) for file in files[:FIRST])
    return f"{names}, and {len(files) - FIRST} more" if len(files) > FIRST else names


def _shape_of_all(
    path: Path, shapes: Mapping[Path, Shape], network: FeatureExtractor
) -> tuple[int, ...]:
    """The shape of the images, (C,) if their sizes differ; grey ones among others are RGB.

    Raises `DkdmError` for sizes that the network cannot see.
    """
    channels = max(shape[0] for shape in shapes.values())
    grey = [file for file, shape in shapes.items() if shape[0] < channels]
    if grey:
        say(
            f"note: {len(grey)} of {len(shapes)} images of {path} are grey "
            f"({_named(path, grey)}): they are measured as RGB"
        )
    sizes = Counter(shape[1:] for shape in shapes.values())
    usual = (channels, *sizes.most_common(1)[0][0])
    if not network.fits(usual):
        raise DkdmError(
            f"the images of {path} have shape {usual}, {network.in_words} are of images of shape "
            f"{network.sizes}: convert the images, or give another --feature-network"
        )
    other = [file for file, shape in shapes.items() if shape[1:] != usual[1:]]
    if other and not network.resizes:
        height, width = usual[1:]
        raise DkdmError(
            f"{len(other)} of {len(shapes)} images of {path} are not {height}x{width} as the "
            f"others ({_named(path, other)}): resize them, or give a --feature-network that does"
        )
    return usual[:1] if other else usual


def _shape_of(file: Path) -> Shape | str:
    """The shape of an image, which is read whole for it; or what is wrong with it."""
    try:
        image = open_eight_bits(file)
    except DkdmError as error:
        return str(error)
    return (1 if image.mode in GREY else 3, image.height, image.width)


def _batches(files: Sequence[Path], mode: str, starts: Sequence[int]) -> Iterator[Tensor]:
    """The images in order; the next ones are read while a network sees these."""

    def read(file: Path) -> Tensor:
        return pixels_of(open_eight_bits(file).convert(mode))

    with ThreadPoolExecutor() as pool:
        reads = (pool.map(read, files[first : first + AT_ONCE]) for first in starts)
        for images, _ in pairwise(chain(reads, [None])):
            for _, same in groupby(images or (), key=lambda image: image.shape):
                yield to_samples(torch.stack(list(same)))
