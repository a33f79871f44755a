"""Shards: the logical parts of a source, which any number of processes can share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dkdm.core import processes
from dkdm.core.mapped import read_in_order, used_at_random
from dkdm.errors import UsageError


@dataclass(frozen=True)
class Shards:
    """Which parts of a source this process keeps.

    total: shards over all processes. rank: this process, one of `world`; it keeps every world-th
    shard. A source seeds each shard by its number over all processes and saves it by itself, so
    that a run can be resumed by another number of processes.
    """

    total: int = 8
    rank: int = 0
    world: int = 1

    def check(self, batch_size: int) -> None:
        """Raise UsageError unless every process has a part of every batch."""
        in_turns = batch_size < self.total and self.total % self.world
        if self.world > min(self.total, batch_size) or in_turns:
            raise UsageError(
                f"{self.world} processes cannot share {self.total} shards and batches of "
                f"{batch_size}: give --shards {self.world} or a multiple of it, and a "
                f"--train-batch-size of {self.world} or more"
            )

    @property
    def own(self) -> range:
        """Numbers of the shards that this process keeps."""
        return range(self.rank, self.total, self.world)

    def sizes(self, count: int) -> dict[int, int]:
        """How many of `count` entries each shard of this process has, by its number."""
        return {n: count // self.total + (n < count % self.total) for n in self.own}

    def shares(self, batch_size: int, step: int) -> dict[int, int]:
        """How many entries of a batch each shard gives; a small batch takes the shards in turns."""
        if batch_size >= self.total:
            return self.sizes(batch_size)
        turns = [(step * batch_size + i) % self.total for i in range(batch_size)]
        return {number: 1 for number in turns if number in self.own}

    def places(self, batch_size: int, step: int) -> Tensor:
        """Where this process's entries lie in a batch, one shard after the other, int64 [part]."""
        found, first = list[int](), 0
        for number, count in replace(self, rank=0, world=1).shares(batch_size, step).items():
            if number in self.own:
                found += range(first, first + count)
            first += count
        return torch.tensor(found, dtype=torch.int64)

    def part(self, batch_size: int) -> slice:
        """Which of a batch's samples this process has, if they lie in no shards.

        Raises UsageError for a batch of fewer samples than processes.
        """
        if batch_size < self.world:
            raise UsageError(
                f"{self.world} processes cannot share {batch_size} samples of a batch: give a "
                "larger --train-batch-size, or start fewer processes"
            )
        return self.share(batch_size)

    def share(self, count: int) -> slice:
        """Which of so many samples this process has; none, if there are fewer than processes."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)


ONE_PROCESS = Shards()


def this_process() -> Shards:
    """Which process this is."""
    return Shards(rank=processes.rank(), world=processes.world())


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of a process's shards, one shard after the other.

    slices: of each shard, by its number. ends: of each, int64 [shards].
    """

    slices: dict[int, slice]
    ends: Tensor

    @classmethod
    def of(cls, sizes: Mapping[int, int]) -> Entries:
        """Shards of these sizes."""
        ends = torch.tensor(list(sizes.values())).cumsum(0)
        each = zip(sizes.items(), ends.tolist(), strict=True)
        return cls({number: slice(end - size, end) for (number, size), end in each}, ends)

    def places(self, rows: Tensor) -> Tensor:
        """Which of the process's shards each row is in: first, second, ..., int64 [B]."""
        return torch.bucketize(rows, self.ends, right=True)

    def by_shard(self, rows: Tensor) -> list[tuple[int, int]]:
        """The shards that the rows of a batch come from, in their order: (number, rows of it)."""
        numbers = list(self.slices)
        found, counts = torch.unique_consecutive(self.places(rows), return_counts=True)
        return [(numbers[i], n) for i, n in zip(found.tolist(), counts.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class ShardState:
    """The state of one shard, saved by itself.

    number: over all processes. here: its entries among those of this process. views: tensors of the
    source that a checkpoint keeps and overwrites; `size` and `shards` say what they are a part of.
    """

    number: int
    here: slice
    views: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors; they share memory with the source, and are read one after the other."""
        for view in self.views.values():
            read_in_order(view)
        return self.views

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore them. Raises UsageError for a pool of another size or with other conditions."""
        state = {**_unknown(self.views), **state}
        theirs, ours = _layout(state), _layout(self.views)
        if theirs != ours:
            size, shards = int(state["size"]), int(state["shards"])
            raise UsageError(
                f"the checkpoint's pool is {theirs}, this run's {ours}: resume with the options "
                f"the run was started with; --pool-size {size} --shards {shards} keep its size"
            )
        for key, view in self.views.items():
            used_at_random(view)
            view.copy_(state[key])

    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Restore it from a whole pool in one file, which versions before shards wrote."""
        own = {k: v[self.here] for k, v in state.items() if k in ("x", "t") or k[:5] == "cond."}
        evaluations = state["evaluations"] * (self.number == 0)
        counts = {"step": state["step"], "evaluations": evaluations}
        sizes = {"size": torch.tensor(len(state["t"])), "shards": self.views["shards"]}
        self.load_state_dict({**own, **counts, **sizes})


def _unknown(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """When chains began, for checkpoints of versions that did not note it."""
    return {"born": torch.full_like(views["born"], -1)} if "born" in views else {}


def _layout(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Shape and type of each tensor; the number of entries and shards as it is."""
    found = {key: f"{tuple(state[key].shape)} {state[key].dtype}" for key in sorted(state)}
    return found | {key: str(int(state[key])) for key in ("size", "shards")}
