"""Real images however many: read in batches, seen by a network once, kept under their hash."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dkdm.core.randomness import generator
from dkdm.core.saving.checkpoint import read_tensors, write_tensors
from dkdm.core.saving.checksums import sums_of
from dkdm.core.saving.progress import track
from dkdm.core.saving.tolerance import DISK_FAULTS
from dkdm.data.reference import (
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
    - `batches`: float32 [B, C, H, W] in [-1, 1], in order, each of one size.
    - `labels`: int64 [count].
    - `bad`: how many more there are that cannot be read.
    """

    count: int
    shape: tuple[int, ...]
    batches: Callable[[], Iterator[Tensor]]
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
            class_variance=self.class_variance,
            dataset={"type": name, "name": name},
            shape=self.shape,
        )

    def drawn(self, count: int) -> Features | None:
        """The features of so many of the images, the same for a number; None without as many."""
        total = len(self.features.features)
        if count >= total:
            return None
        order = torch.randperm(total, generator=generator("cpu", 0, "floor"))
        return self.features.rows(order[:count].sort().values)


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
    found = _read(file)
    if found is None or (found.bad and not source.skips):
        shards = file.with_suffix("")
        found = _computed(source, network, shape, shards)
        if _write(file, found):
            shutil.rmtree(shards, ignore_errors=True)
    elif found.bad:
        print(
            f"warning: {found.bad} images of {source.name} cannot be read and are left out",
            file=sys.stderr,
        )
    return found


def _computed(
    source: Source, network: FeatureExtractor, shape: Sequence[int] | None, shards: Path | None
) -> Summary:
    images = source.open(network)
    reason = shape and mismatch(network, images.shape, tuple(shape))
    if reason:
        raise DkdmError(f"{source.name} {reason}")
    with track(images.count, 0, f"features of {source.name}") as progress:
        features = _seen(images, network, shards, progress)
    return Summary(
        features,
        FeatureStatistics.of(features.features),
        None if features.spatial is None else FeatureStatistics.of(features.spatial),
        _class_variance(features.pixels, images.labels),
        images.shape,
        images.bad,
    )


def _seen(
    images: Images,
    network: FeatureExtractor,
    shards: Path | None,
    progress: Callable[[int], object],
) -> Features:
    """The features of all images.

    shards: the folder that keeps those of `SHARD` images at a time. Images whose features are there
    are read, which takes little time, and not shown to the network.
    """
    parts: list[Features] = []
    new: list[Features] = []
    done, known = 0, None
    for batch in images.batches():
        if done % SHARD == 0:
            file = shards / f"{done:08d}.safetensors" if shards else None
            known = _shard_in(file) if file else None
        if known is None:
            new.append(network(batch))
        done += len(batch)
        progress(done)
        if done % SHARD and done < images.count:
            continue
        if known is None:
            known = Features.joined(new)
            is_sound = bool(known.features.isfinite().all())  # what is not is refused in the end
            if file and is_sound and not _keep(file, known):
                shards = None
        parts.append(known)
        new = []
    return Features.joined(parts)


def _shard_in(file: Path) -> Features | None:
    """The features in a file; None if it is missing or damaged, they are computed then."""
    try:
        return Features(**read_tensors(file))
    except (DkdmError, TypeError):
        return None


def _keep(file: Path, features: Features) -> bool:
    """Write features; returns whether the disk took them."""
    tensors = {name: each for name, each in features._asdict().items() if each is not None}
    try:
        write_tensors(file, tensors, sums_of(tensors))
    except DISK_FAULTS:  # the summary will say it
        return False
    return True


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
