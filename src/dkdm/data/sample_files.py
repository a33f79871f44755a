"""Sets of samples on disk, as others read them: PNG in class folders, webdataset, safetensors."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dkdm.core.saving.checkpoint import read_tensors, write_tensors
from dkdm.core.saving.checksums import sums_of
from dkdm.errors import DkdmError
from dkdm.reading.files import atomic, write_text

LABELS = "labels.json"


@dataclass(frozen=True)
class Part:
    """A part of a set of samples.

    rows: their places in the set. images: [n, C, H, W] in about [-1, 1]. samples: as a network has
    them, [n, ...]. labels: class ids [n], captions: n texts; None where there are none.
    """

    rows: range
    images: Tensor
    samples: Tensor
    labels: Tensor | None = None
    captions: Sequence[str] | None = None

    def keys(self) -> list[str]:
        """A name for each sample."""
        return [f"{row:08d}" for row in self.rows]

    def texts(self) -> list[str | None]:
        """The caption of each sample, or None."""
        return [None] * len(self.rows) if self.captions is None else list(self.captions)

    def ids(self) -> list[int | None]:
        """The class of each sample, or None."""
        return [None] * len(self.rows) if self.labels is None else self.labels.tolist()


@dataclass(frozen=True)
class SampleFiles(ABC):
    """A way of writing a set; `folder` holds it.

    classes: how many class ids there are; None without classes. images: whether it holds pictures.
    """

    folder: Path
    classes: int | None = None
    images = True

    @abstractmethod
    def has(self, number: int, rows: range) -> bool:
        """Whether a part was written before."""

    @abstractmethod
    def write(self, number: int, part: Part) -> None:
        """Write a part, whole or not at all."""

    @abstractmethod
    def read(self, number: int, rows: range) -> tuple[Tensor, Tensor | None]:
        """Images [n, C, H, W] (or samples) of a part that was written, and their class ids."""

    def finish(self, rows: range) -> None:
        """Write what is known of all parts; most have nothing more."""
        del rows

    @abstractmethod
    def usage(self, shape: Sequence[int]) -> str:
        """How to train on it; shape: of a picture."""


class PngFolder(SampleFiles):
    """PNG files, in one folder for each class; captions beside them; labels.json names all ids."""

    def _place(self, key: str, label: int | None) -> Path:
        width = len(str((self.classes or 1) - 1))
        inner = self.folder if label is None else self.folder / f"{label:0{width}d}"
        return inner / f"{key}.png"

    def _written(self) -> dict[str, Path]:
        depth = "*.png" if self.classes is None else "*/*.png"
        return {path.stem: path for path in self.folder.glob(depth) if path.stem.isdigit()}

    def _paths(self, rows: range) -> list[Path] | None:
        found = self._written()
        keys = [f"{row:08d}" for row in rows]
        return [found[key] for key in keys] if all(key in found for key in keys) else None

    def has(self, number: int, rows: range) -> bool:
        """As `SampleFiles.has`."""
        del number
        return self._paths(rows) is not None

    def write(self, number: int, part: Part) -> None:
        """As `SampleFiles.write`; captions before their images."""
        del number
        for key, label, image, text in zip(
            part.keys(), part.ids(), part.images, part.texts(), strict=True
        ):
            place = self._place(key, label)
            place.parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                write_text(place.with_suffix(".txt"), text + "\n")
            with atomic(place) as partial:
                picture(image).save(partial)

    def read(self, number: int, rows: range) -> tuple[Tensor, Tensor | None]:
        """As `SampleFiles.read`."""
        del number
        paths = self._paths(rows)
        if paths is None:
            raise DkdmError(f"{self.folder} lacks images that were written to it: start anew")
        images = torch.stack([pixels(path.read_bytes(), path) for path in paths])
        return images, None if self.classes is None else torch.tensor(
            [int(p.parent.name) for p in paths]
        )

    def finish(self, rows: range) -> None:
        """Write labels.json, {file: class id}."""
        if self.classes is None:
            return
        paths = self._paths(rows) or []
        labels = {str(p.relative_to(self.folder)): int(p.parent.name) for p in paths}
        with atomic(self.folder / LABELS) as partial:
            partial.write_text(json.dumps(labels, indent=1) + "\n")

    def usage(self, shape: Sequence[int]) -> str:
        """As `SampleFiles.usage`."""
        sizes, folder = " ".join(map(str, shape)), shlex.quote(str(self.folder))
        return (
            f"dkdm distill --source images --images {folder} ..., or "
            f"dkdm train --images {folder} --sample-shape {sizes}"
        )


class WebDataset(SampleFiles):
    """Tar files of 00000000.png, .cls (the class id) and .txt (the caption)."""

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.tar"

    def has(self, number: int, rows: range) -> bool:
        """As `SampleFiles.has`."""
        del rows
        return self._path(number).is_file()

    def write(self, number: int, part: Part) -> None:
        """As `SampleFiles.write`; the same samples give the same bytes."""
        with atomic(self._path(number)) as partial, tarfile.open(partial, "w") as tar:
            for key, label, image, text in zip(
                part.keys(), part.ids(), part.images, part.texts(), strict=True
            ):
                encoded = io.BytesIO()
                picture(image).save(encoded, "PNG")
                _add(tar, f"{key}.png", encoded.getvalue())
                if label is not None:
                    _add(tar, f"{key}.cls", str(label).encode())
                if text is not None:
                    _add(tar, f"{key}.txt", text.encode())

    def read(self, number: int, rows: range) -> tuple[Tensor, Tensor | None]:
        """As `SampleFiles.read`."""
        images, labels = [], []
        for name, data in _members(self._path(number)):
            if name.endswith(".png"):
                images.append(pixels(data, self._path(number)))
            elif name.endswith(".cls"):
                labels.append(_class_id(data, self._path(number)))
        if len(images) != len(rows):
            raise DkdmError(f"{self._path(number)} holds {len(images)} images, not {len(rows)}")
        return torch.stack(images), torch.tensor(labels) if labels else None

    def usage(self, shape: Sequence[int]) -> str:
        """As `SampleFiles.usage`."""
        del shape
        shards = str(self.folder / "shard-*.tar")
        return f"webdataset.WebDataset(sorted(glob({shards!r}))).decode('pil')"


class TensorShards(SampleFiles):
    """Safetensors files of samples as the network has them (latents stay latents) and class ids."""

    images = False

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def has(self, number: int, rows: range) -> bool:
        """As `SampleFiles.has`."""
        del rows
        return self._path(number).is_file()

    def write(self, number: int, part: Part) -> None:
        """As `SampleFiles.write`; captions before their samples."""
        if part.captions is not None:
            text = json.dumps(list(part.captions), ensure_ascii=False)
            write_text(self._path(number).with_suffix(".json"), text + "\n")
        labels = {} if part.labels is None else {"class_labels": part.labels.clone()}
        tensors = {"samples": part.samples.clone(), **labels}
        write_tensors(self._path(number), tensors, sums_of(tensors))

    def read(self, number: int, rows: range) -> tuple[Tensor, Tensor | None]:
        """As `SampleFiles.read`: samples, which are not decoded."""
        del rows
        found = read_tensors(self._path(number))
        if "samples" not in found:
            raise DkdmError(f"{self._path(number)} holds no samples: remove it")
        return found["samples"], found.get("class_labels")

    def usage(self, shape: Sequence[int]) -> str:
        """As `SampleFiles.usage`."""
        del shape
        return f"safetensors.torch.load_file({str(self._path(0))!r})['samples']"


FORMATS: dict[str, Callable[[Path, int | None], SampleFiles]] = {
    "png": PngFolder,
    "webdataset": WebDataset,
    "safetensors": TensorShards,
}


def picture(image: Tensor) -> Image.Image:
    """An image [1 or 3, H, W] in [-1, 1] with 8 bits a channel."""
    levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, 2))


def pixels(data: bytes, place: Path) -> Tensor:
    """The inverse of `picture`, from the bytes of a PNG. Raises DkdmError for other bytes."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            levels = torch.from_numpy(np.array(opened)).float()
    except Exception as error:  # a decoder may raise anything for a damaged file
        raise DkdmError(f"{place} cannot be read as PNG ({error}): remove it") from error
    return (levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)) / 127.5 - 1


def _class_id(data: bytes, place: Path) -> int:
    if not data.isdigit():
        raise DkdmError(f"{place} holds a class id that is no number: remove it")
    return int(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a tar and their bytes; nothing is unpacked. Raises DkdmError if damaged."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                opened = tar.extractfile(member)
                if opened is not None:
                    yield member.name, opened.read()
    except (OSError, tarfile.TarError) as error:
        raise DkdmError(f"{path} cannot be read as a tar file ({error}): remove it") from error
