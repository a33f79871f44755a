"""Samples of a model and their features on disk, in shards of 1,000 that processes share.

A shard is one safetensors file, written whole or not at all. Its samples are a function of the
model, the seed and their numbers, so that any process may draw it at any time, in any batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.modes import evaluating
from dkdm.core.saving.checkpoint import read_tensors, write_tensors
from dkdm.core.saving.checksums import sums_of
from dkdm.data.reference import FeatureExtractor, Features
from dkdm.errors import DkdmError
from dkdm.evaluation.fingerprint import fingerprint, hash_of
from dkdm.evaluation.same_noise import Sampling, batches, decoded
from dkdm.evaluation.single_images import SingleImages
from dkdm.reading.files import atomic
from dkdm.version import __version__

SHARD = 1000
ABOUT = "about.json"
SAMPLES, LABELS = "samples", "class_labels"


class Drawn(NamedTuple):
    """What is kept of samples: their features, the classes asked for [N], the first samples."""

    features: Features | None
    labels: Tensor | None
    samples: Tensor | None


@dataclass(frozen=True)
class Shard:
    """Samples of these numbers, and the file that keeps what is kept of them."""

    indices: range
    file: Path


@dataclass(frozen=True, eq=False)
class Drawing:
    """The samples of a model that a measurement takes, and what is kept of them.

    - `cond`: one row a sample.
    - `network`: whose features of the (decoded) samples are kept; None keeps none, [N, 0].
    - `keep`: how many samples, the first ones, are kept themselves.
    - `single`: makes further columns of `Features`, numbers of single images.
    """

    denoiser: Denoiser
    cond: Condition
    sampling: Sampling
    guidance_scale: float = 1.0
    network: FeatureExtractor | None = None
    keep: int = 0
    single: SingleImages | None = None

    @cached_property
    def about(self) -> dict[str, Any]:
        """All that features depend on; not how many samples or how many at once."""
        how = asdict(self.sampling)
        del how["num_samples"], how["batch_size"]
        return {
            "model": self.denoiser.name,
            "fingerprint": fingerprint(self.denoiser),
            **how,
            "guidance_scale": self.guidance_scale,
            "features": self.network and self.network.name,
            "single": self.single and self.single.name,
            "dkdm": __version__,
        }

    def folder(self, root: Path) -> Path:
        """Where its shards lie below `root`, by a hash of all that they depend on."""
        known = {key: value for key, value in self.about.items() if key != "model"}
        text = json.dumps(known, sort_keys=True)
        return root / hashlib.sha256(text.encode()).hexdigest()[:16]

    def shards(self, root: Path) -> list[Shard]:
        """All of them, in their order. A file is named by the samples' numbers and conditions."""
        count, folder = self.sampling.num_samples, self.folder(root)
        found = []
        for first in range(0, count, SHARD):
            indices = range(first, min(first + SHARD, count))
            name = f"{indices.start:07d}-{indices.stop:07d}-{hash_of(self.rows(indices))}"
            found.append(Shard(indices, folder / f"{name}.safetensors"))
        return found

    def rows(self, indices: range) -> Condition:
        """The conditions of these samples."""
        return {key: value[indices.start : indices.stop] for key, value in self.cond.items()}

    @property
    def is_seen(self) -> bool:
        """Whether anything is kept of the (decoded) samples as images."""
        return self.network is not None or self.single is not None

    def kept(self, indices: range) -> int:
        """How many of these samples are kept themselves."""
        return max(0, min(self.keep, indices.stop) - indices.start)


def missing_shards(drawing: Drawing, root: Path, rank: int = 0, world: int = 1) -> list[Shard]:
    """Those of the shards rank, rank + world, ... that are not on disk yet.

    Raises `DkdmError` for a file that cannot be read.
    """
    own = drawing.shards(root)[rank::world]
    return [shard for shard in own if not is_finished(drawing, shard)]


def draw_shards(
    drawing: Drawing,
    root: Path,
    shards: Sequence[Shard],
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Draw these shards and write them, one after the other.

    progress: called with the number of samples drawn so far. Raises `DkdmError` for samples or
    features that are not finite.
    """
    done = 0
    if shards:
        _describe(drawing, root)
    with evaluating(drawing.denoiser.network, drawing.denoiser.call):
        for shard in shards:
            drawn = _drawn(drawing, shard.indices, done, progress)
            write_tensors(shard.file, drawn, sums_of(drawn))
            done += len(shard.indices)


def is_finished(drawing: Drawing, shard: Shard) -> bool:
    """Whether a shard is on disk with all that is to be kept. Raises `DkdmError` if damaged."""
    if not shard.file.is_file():
        return False
    try:
        samples = len(read_tensors(shard.file).get(SAMPLES, ()))
    except DkdmError as error:
        raise DkdmError(f"{error}: remove it, and it is drawn again") from error
    return samples >= drawing.kept(shard.indices)


def read_shards(drawing: Drawing, root: Path) -> Drawn:
    """What all shards keep, in the order of the samples. Raises `DkdmError` if one is missing."""
    parts = [read_tensors(shard.file) for shard in drawing.shards(root)]
    kept = [part.pop(SAMPLES) for part in parts if SAMPLES in part]
    labels = [part.pop(LABELS) for part in parts if LABELS in part]
    features = None
    if drawing.is_seen:
        columns = set.intersection(*map(set, parts))
        features = Features(**{name: torch.cat([p.pop(name) for p in parts]) for name in columns})
    return Drawn(
        features,
        torch.cat(labels) if labels else None,
        torch.cat(kept)[: drawing.keep] if kept and drawing.keep else None,
    )


def _drawn(
    drawing: Drawing, indices: range, done: int, progress: Callable[[int], object]
) -> dict[str, Tensor]:
    """What is kept of the samples of these numbers, by name."""
    model, kept = drawing.denoiser, drawing.kept(indices)
    single = drawing.single.of(indices) if drawing.single else None
    samples, features = [], []
    drawn = batches(model, drawing.cond, drawing.sampling, drawing.guidance_scale, indices)
    for these, batch in drawn:
        check_finite(model, batch)
        if drawing.is_seen:
            shown = decoded(model, batch)
            features.append(_seen(drawing.network, shown))
            if single is not None:
                single.add(shown, these)
        if these.start - indices.start < kept:
            samples.append(batch)
        progress(done + these.stop - indices.start)
    columns = Features.joined(features)._asdict() if features else {}
    columns |= single.whole() if single is not None else {}
    found = {name: column for name, column in columns.items() if column is not None}
    labels = drawing.rows(indices).get(LABELS)
    found |= {LABELS: labels} if labels is not None else {}
    return found | ({SAMPLES: torch.cat(samples)[:kept]} if samples else {})


def _seen(network: FeatureExtractor | None, images: Tensor) -> Features:
    return network(images) if network is not None else Features(torch.zeros(len(images), 0))


def check_finite(model: Denoiser, samples: Tensor) -> None:
    """Raise `DkdmError` for samples that hold NaN or infinity."""
    broken = int((~samples.isfinite()).flatten(1).any(dim=1).sum())
    if broken:
        raise DkdmError(
            f"{broken} of {len(samples)} samples of {model.name} hold NaN or infinity: check the "
            "model with dkdm inspect, or take an earlier checkpoint"
        )


def _describe(drawing: Drawing, root: Path) -> None:
    """Say in the folder what its shards are of."""
    folder = drawing.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / ABOUT) as partial:
        partial.write_text(json.dumps(drawing.about, indent=2) + "\n", encoding="utf-8")
