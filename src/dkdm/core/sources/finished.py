"""Finished samples on disk, in shards that are written as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.saving.checkpoint import read_tensors, write_tensors
from dkdm.core.saving.checksums import sums_of
from dkdm.core.saving.tolerance import tolerated
from dkdm.errors import DkdmError, UsageError
from dkdm.reading.fields import read_json
from dkdm.reading.files import atomic

ABOUT = "about.json"
SHARD = 256  # finished samples in a file
Samples = tuple[Tensor, Condition]


@dataclass(frozen=True)
class SampleShards:
    """A folder of samples [n, ...] with their conditions: shard-00000.safetensors, ..."""

    folder: Path

    def path(self, number: int) -> Path:
        """The file of one shard."""
        return self.folder / f"shard-{number:05d}.safetensors"

    def numbers(self) -> list[int]:
        """The shards that are there, in order."""
        names = (re.fullmatch(r"shard-(\d{5,9})\.safetensors", p.name) for p in self._files())
        return sorted(int(name[1]) for name in names if name)

    def _files(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def write(self, number: int, samples: Samples) -> None:
        """Write a shard, whole or not at all."""
        tensors = as_tensors(*samples)
        write_tensors(self.path(number), tensors, sums_of(tensors))

    def read(self, number: int) -> Samples:
        """Read a shard. Raises DkdmError if it is missing or damaged."""
        tensors = read_tensors(self.path(number))
        counts = {len(rows) if rows.ndim else 0 for rows in tensors.values()}
        if "samples" not in tensors or len(counts) != 1 or counts == {0}:
            raise DkdmError(f"{self.path(number)} holds no samples with conditions: remove it")
        return of_tensors(tensors)

    def hold(self, about: Mapping[str, Any]) -> bool:
        """Whether the shards are noted to hold this."""
        with suppress(UsageError):
            found = read_json(self.folder / ABOUT, "what a folder of samples holds")
            return found == json.loads(json.dumps(about))
        return False

    def claim(self, about: Mapping[str, Any]) -> None:
        """Note what the shards hold. Raises UsageError if they hold something else."""
        file, wanted = self.folder / ABOUT, json.loads(json.dumps(about))
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic(file) as partial:
                partial.write_text(json.dumps(wanted, indent=2) + "\n")
            return
        found = read_json(file, "what a folder of samples holds")
        other = [key for key in wanted if found.get(key) != wanted[key]]
        if other:
            raise UsageError(
                f"{self.folder} holds samples with {other[0]} {found.get(other[0])}, not "
                f"{wanted[other[0]]}: go on with the options it was begun with, or remove it"
            )


def as_tensors(samples: Tensor, cond: Condition) -> dict[str, Tensor]:
    """Samples and their conditions by the names of a shard."""
    return {"samples": samples, **{f"cond.{key}": value for key, value in cond.items()}}


def of_tensors(tensors: Mapping[str, Tensor]) -> Samples:
    """The inverse of `as_tensors`."""
    cond = {k.removeprefix("cond."): v for k, v in tensors.items() if k.startswith("cond.")}
    return tensors["samples"], cond


def joined_samples(parts: list[Samples]) -> Samples:
    """Samples one after the other."""
    cond = {key: torch.cat([each[key] for _, each in parts]) for key in parts[0][1]}
    return torch.cat([samples for samples, _ in parts]), cond


@dataclass(eq=False)
class Finished:
    """The last samples whose chains have ended, in a run's folder.

    limit: how many are kept; whole shards beyond it are deleted. count: how many there were.
    What fills no shard yet is in the run's checkpoint, so that a resumed run goes on from it and
    writes the same shards again.
    """

    shards: SampleShards
    limit: int
    count: int = 0
    rest: list[Samples] = field(default_factory=list, repr=False)

    def end_step(self, step: int, x: Tensor, cond: Condition, rows: Tensor) -> None:
        """Keep what a step has finished, which may be nothing; rows: its entries of the pool."""
        del step, rows
        if len(x):
            self.add(x, cond)

    def add(self, x: Tensor, cond: Condition) -> None:
        """Keep clean samples x [n, ...] and their conditions, one row each."""
        rows = {key: value.clone() for key, value in cond.items()}
        self.rest.append((x.detach().float().cpu(), rows))
        self.count += len(x)
        with tolerated("finished samples wait to be written", self.shards.folder.parent):
            while self._waiting() >= SHARD:
                self._write_shard()

    def _write_shard(self) -> None:
        samples, cond = joined_samples(self.rest)
        number = (self.count - len(samples)) // SHARD
        own = {key: value[:SHARD].clone() for key, value in cond.items()}
        self.shards.write(number, (samples[:SHARD].clone(), own))
        left = {key: value[SHARD:] for key, value in cond.items()}
        self.rest = [(samples[SHARD:], left)]
        self._delete_old(number)

    def _waiting(self) -> int:
        return sum(len(samples) for samples, _ in self.rest)

    def _delete_old(self, newest: int) -> None:
        """Delete shards beyond the limit, and later ones, which a killed run wrote."""
        for number in self.shards.numbers():
            if number > newest or (newest - number) * SHARD >= self.limit:
                self.shards.path(number).unlink()

    def state_dict(self) -> dict[str, Tensor]:
        """How many there were, and those in no shard yet."""
        waiting = as_tensors(*joined_samples(self.rest)) if self.rest else {}
        return {"count": torch.tensor(self.count), **waiting}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there; shards that a killed run wrote beyond it are written anew."""
        self.count = int(state["count"])
        self.rest = [of_tensors(state)] if "samples" in state else []
        whole = (self.count - self._waiting()) // SHARD
        for number in self.shards.numbers():
            if number >= whole:
                self.shards.path(number).unlink()
