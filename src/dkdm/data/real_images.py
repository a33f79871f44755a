"""Real images however many: read in batches, seen by a network once, kept under their hash."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dkdm.core import processes
from dkdm.core.randomness import generator
from dkdm.core.saving.checkpoint import read_tensors, write_tensors
from dkdm.core.saving.checksums import sums_of
from dkdm.core.saving.progress import track
from dkdm.core.saving.tolerance import DISK_FAULTS
from dkdm.core.shards import this_process
from dkdm.data.reference import (
    Apart,
    FeatureExtractor,
    Features,
    FeatureStatistics,
    Reference,
    mismatch,
    within_class_variance,
)
from dkdm.errors import DkdmError, in_a_line
from dkdm.reading.files import atomic, cache_dir

AT_ONCE = 50  # images of a batch
SHARD = 1000  # images whose features are kept at once, whole batches
FORMAT = "1"


@dataclass(frozen=True)
class Images:
    """Images that are read in batches, never all at once.

    - `shape`: (C, H, W), or (C,) if their sizes differ.
    - `batches`: gives the `AT_ONCE` images from each of these numbers on, which rise, and decodes
      no others: float32 [B, C, H, W] in [-1, 1], in order, each of one size.
    - `labels`: int64 [count].
    - `bad`: how many more there are that cannot be read.
    """

    count: int
    shape: tuple[int, ...]
    batches: Callable[[Sequence[int]], Iterator[Tensor]]
    labels: Tensor | None = None
    bad: int = 0


@dataclass(frozen=True)
class Source:
    """Where images lie.

    - `name`: what they are called, without the path of this machine.
    - `digest`: gives the hash of their content.
    - `open`: gives the images. Raises `DkdmError` if they cannot be measured by the network.
    - `skips`: whether images that cannot be read are left out.
    """

    name: str
    digest: Callable[[], str]
    open: Callable[[FeatureExtractor], Images]
    skips: bool = False


@dataclass(frozen=True)
class Summary:
    """What a network saw in real images: `Reference` says what each is."""

    features: Features
    statistics: FeatureStatistics
    spatial: FeatureStatistics | None
    class_variance: Tensor | None
    shape: tuple[int, ...]
    bad: int

    def reference(self, name: str, network: FeatureExtractor) -> Reference:
        """The images as a reference."""
        return Reference(
            name=name,
            network=network,
            statistics=self.statistics,
            spatial=self.spatial,
            features=lambda: self.features.features,
            num_images=len(self.features.features),
            floor_features=self.drawn,
            floor_apart=self.apart,
            class_variance=self.class_variance,
            dataset={"type": name, "name": name},
            shape=self.shape,
            warnings=tuple(self._warnings(name, network)),
        )

    def _warnings(self, name: str, network: FeatureExtractor) -> Iterator[str]:
        if self.bad:
            yield f"{self.bad} images of {name} cannot be read and are left out"
        if len(self.shape) == 1:
            yield (
                f"the images of {name} differ in size and are each resized to what the network "
                "sees: bring them to the samples' size for numbers that compare with others"
            )
        if self._total <= network.num_features:
            yield (
                f"{name} holds {self._total:,} images, which do not determine the covariance of "
                f"{network.num_features:,} features: distances to it compare with no others"
            )

    def drawn(self, count: int) -> Features | None:
        """The features of so many of the images, the same for a number; None without as many."""
        return (
            self.features.rows(self._order()[:count].sort().values) if count < self._total else None
        )

    def apart(self, count: int) -> Apart | None:
        """The features of so many of the images, at most half of them, and those of the others."""
        count = min(count, self._total // 2)
        order = self._order()
        chosen = self.features.rows(order[:count].sort().values)
        return Apart(chosen, self.features.features[order[count:]]) if count else None

    @property
    def _total(self) -> int:
        return len(self.features.features)

    def _order(self) -> Tensor:
        return torch.randperm(self._total, generator=generator("cpu", 0, "floor"))


Look = Callable[[Source, FeatureExtractor, bool, Sequence[int] | None], Summary]


def summarized(
    source: Source,
    network: FeatureExtractor,
    cache: bool = True,
    shape: Sequence[int] | None = None,
) -> Summary:
    """What a network sees in the images of a source.

    cache: read it from the cache folder if it is there and whole, and keep it there, as well as
    what a killed process had seen. shape: of the samples that are to be measured. Raises
    `DkdmError` for images that cannot be measured, and before the network sees any for samples that
    they cannot be compared with.
    """
    if not cache:
        return _computed(source, network, shape, None)
    file = _file(source, network)
    found = _known(file, source)
    if found is None:
        shards = file.with_suffix("")
        found = _computed(source, network, shape, shards)
        if _write(file, found):
            shutil.rmtree(shards, ignore_errors=True)
    return found


def summarized_by_all(
    source: Source,
    network: FeatureExtractor,
    cache: bool = True,
    shape: Sequence[int] | None = None,
) -> Summary:
    """As `summarized`, with the images shared by all processes, together.

    Each process sees every world-th shard, which the cache folder keeps; the main one summarizes
    all, and sees those that are not there.
    """
    source = replace(source, digest=once(source.digest), open=once(source.open))
    if cache and processes.world() > 1:
        file, this = _file(source, network), this_process()
        if _known(file, source) is None:
            images = _checked(source, network, shape)
            own = _shards(images)[this.rank :: this.world]
            _seen(images, network, source.name, own, file.with_suffix(""))
        processes.wait()
    return processes.main_first(lambda: summarized(source, network, cache, shape))


def _known(file: Path, source: Source) -> Summary | None:
    """What is kept of a source, unless it leaves out images that the source does not skip."""
    found = _read(file)
    return None if found and found.bad and not source.skips else found


def _checked(source: Source, network: FeatureExtractor, shape: Sequence[int] | None) -> Images:
    """The images. Raises `DkdmError` if samples of this shape cannot be compared with them."""
    images = source.open(network)
    reason = shape and mismatch(network, images.shape, tuple(shape))
    if reason:
        raise DkdmError(f"{source.name} {reason}")
    return images


def _computed(
    source: Source, network: FeatureExtractor, shape: Sequence[int] | None, folder: Path | None
) -> Summary:
    images = _checked(source, network, shape)
    features = Features.joined(_seen(images, network, source.name, _shards(images), folder))
    return Summary(
        features,
        FeatureStatistics.of(features.features),
        None if features.spatial is None else FeatureStatistics.of(features.spatial),
        _class_variance(features.pixels, images.labels),
        images.shape,
        images.bad,
    )


def _shards(images: Images) -> list[range]:
    """The numbers of the images in each shard."""
    return [
        range(first, min(first + SHARD, images.count)) for first in range(0, images.count, SHARD)
    ]


def _seen(
    images: Images,
    network: FeatureExtractor,
    name: str,
    shards: Sequence[range],
    folder: Path | None,
) -> list[Features]:
    """The features of these shards.

    name: of the source. folder: where each shard is kept as soon as it is computed, until the disk
    does not take one; what is there is not shown to the network again.
    """
    found = {shard: _shard_in(folder, shard) for shard in shards}
    missing = [shard for shard in shards if found[shard] is None]
    batches = images.batches([first for shard in missing for first in shard[::AT_ONCE]])
    total = sum(map(len, shards))
    done = total - sum(map(len, missing))
    with track(total, done, f"features of {name}") as progress:
        for shard in missing:
            parts, end = list[Features](), done + len(shard)
            while done < end:
                batch = next(batches)
                parts.append(network(batch))
                done += len(batch)
                progress(done)
            found[shard] = seen = Features.joined(parts)
            folder = _kept_in(folder, shard, seen)
    return [each for each in found.values() if each is not None]


def _file_of(folder: Path, shard: range) -> Path:
    return folder / f"{shard.start:08d}.safetensors"


def _shard_in(folder: Path | None, shard: range) -> Features | None:
    """The features in a folder; None if they are missing or damaged, they are computed then."""
    if folder is None:
        return None
    try:
        return Features(**read_tensors(_file_of(folder, shard)))
    except (DkdmError, TypeError):
        return None


def _kept_in(folder: Path | None, shard: range, features: Features) -> Path | None:
    """Write features; returns the folder if the disk took them."""
    if folder is None:
        return None
    tensors = {name: each for name, each in features._asdict().items() if each is not None}
    try:
        write_tensors(_file_of(folder, shard), tensors, sums_of(tensors))
    except DISK_FAULTS:  # the summary will say it
        return None
    return folder


def _class_variance(pixels: Tensor | None, labels: Tensor | None) -> Tensor | None:
    if pixels is None or labels is None:
        return None
    return within_class_variance(pixels, labels, int(labels.max()) + 1)


def _file(source: Source, network: FeatureExtractor) -> Path:
    seen_by = [FORMAT, source.digest(), network.name, *sorted(network.gives)]
    key = hashlib.sha256(json.dumps(seen_by).encode()).hexdigest()
    return cache_dir("references") / f"{key}.safetensors"


def _write(file: Path, summary: Summary) -> bool:
    """Keep what was computed; returns whether the disk took it."""
    tensors = {
        name: tensor.contiguous()
        for name, tensor in _tensors(summary).items()
        if tensor is not None
    }
    about = {"shape": summary.shape, "bad": summary.bad}
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as partial:
            save_file(tensors, partial, {"about": json.dumps(about), "sums": json.dumps(sums)})
    except DISK_FAULTS as error:
        print(
            f"warning: what was computed cannot be kept in {file.parent} ({in_a_line(error)}): set "
            "DKDM_CACHE to a folder with room",
            file=sys.stderr,
        )
        return False
    return True


def _tensors(summary: Summary) -> dict[str, Tensor | None]:
    statistics = {"features": summary.statistics, "spatial": summary.spatial}
    return {
        **summary.features._asdict(),
        **{f"{key}.mean": x and x.mean for key, x in statistics.items()},
        **{f"{key}.covariance": x and x.covariance for key, x in statistics.items()},
        "class_variance": summary.class_variance,
    }


def _read(file: Path) -> Summary | None:
    """What `_write` wrote; None if it is missing or damaged, it is made again then."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        if json.loads(metadata["sums"]) != {name: _checksum(x) for name, x in tensors.items()}:
            return None
        return _summary(tensors, json.loads(metadata["about"]))
    except Exception:  # a damaged file may raise anything
        return None


def _summary(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Summary:
    features = Features(tensors["features"], *map(tensors.get, Features._fields[1:]))
    spatial = None if features.spatial is None else _statistics(tensors, "spatial")
    return Summary(
        features,
        _statistics(tensors, "features"),
        spatial,
        tensors.get("class_variance"),
        tuple(about["shape"]),
        about["bad"],
    )


def _statistics(tensors: Mapping[str, Tensor], key: str) -> FeatureStatistics:
    return FeatureStatistics(
        tensors[f"{key}.mean"], tensors[f"{key}.covariance"], len(tensors[key])
    )


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.numpy().data)
