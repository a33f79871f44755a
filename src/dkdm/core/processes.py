"""The processes that a run is shared by, as `torchrun` and `accelerate launch` start them.

A process knows its rank; all start the same command. Functions that say "together" are called by
every process, in the same order. Without a launcher there is one process, and they do nothing.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, distributed

from dkdm.core.randomness import derived_seed

T = TypeVar("T")
GRACE = 10  # seconds
WHILE_SPEAKING = 2.0
FAILED = "failed"
_turns = itertools.count()
_alone = False


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _are_several() else 1


def rank() -> int:
    """The number of this one; 0 is the main process, which writes and speaks."""
    return distributed.get_rank() if _are_several() else 0


def is_main() -> bool:
    """Whether this is the main process."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """In here this process is the only one: what is done together elsewhere is done by itself."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _are_several() -> bool:
    return not _alone and distributed.is_available() and distributed.is_initialized()


def _device() -> torch.device:
    """Where values lie that the processes exchange."""
    there = torch.accelerator.current_accelerator()
    return torch.device("cpu") if there is None or distributed.get_backend() == "gloo" else there


def total(values: Tensor) -> Tensor:
    """The sum over all processes, together."""
    if world() == 1:
        return values
    found = values.detach().to(_device(), copy=True)
    distributed.all_reduce(found)
    return found.to(values.device)


def whole_of(part: Tensor, places: Tensor | slice, size: int) -> Tensor:
    """The rows [size, ...] of all processes, of which each has those at its `places`; together."""
    if world() == 1:
        return part
    found = part.new_zeros(size, *part.shape[1:])
    found[places] = part
    return total(found)


def mean(value: Tensor) -> Tensor:
    """The mean over all processes, together."""
    return total(value) / world() if world() > 1 else value


def mean_of_all(values: Tensor) -> Tensor:
    """The mean of the values of all processes, which may have different numbers; together."""
    if world() == 1:
        return values.mean()
    found, count = total(torch.stack([values.sum(), values.new_tensor(values.numel())]))
    return found / count


def least(value: int) -> int:
    """The smallest of all processes' values, together."""
    if world() == 1:
        return value
    found = torch.tensor(value, device=_device())
    distributed.all_reduce(found, distributed.ReduceOp.MIN)
    return int(found)


def any_of(flag: bool) -> bool:
    """Whether a flag is set in any process, together; the devices need not wait."""
    found = torch.tensor(int(flag))
    distributed.all_reduce(found, distributed.ReduceOp.MAX, _on_hosts())
    return bool(found)


@cache
def _on_hosts() -> distributed.ProcessGroup:
    """All processes, connected on their hosts."""
    return distributed.new_group(backend="gloo")


def own_randomness(seed: int) -> None:
    """Give every process but the main one a global random state of its own, for dropout."""
    if not is_main():
        torch.manual_seed(derived_seed(seed, "process", rank()))


def part_of_mean(count: int, batch_size: int) -> float:
    """What the mean loss of this process's `count` samples is multiplied by.

    The mean over the processes is then the mean over the batch, if their parts differ in size too.
    """
    return 1.0 if world() == 1 else count * world() / batch_size


def owners(names: Collection[str]) -> dict[str, int]:
    """All processes' names, each with the first process that has it, together."""
    if world() == 1:
        return dict.fromkeys(names, 0)
    each: list[list[str]] = [[] for _ in range(world())]
    distributed.all_gather_object(each, list(names), _on_hosts())
    found: dict[str, int] = {}
    for number, own in enumerate(each):
        for name in own:
            found.setdefault(name, number)
    return found


def gathered(value: T) -> list[T]:
    """The values of all processes in the main one, together; empty in the others."""
    each: list[T] | None = [value] * world() if is_main() else None
    distributed.gather_object(value, each, group=_on_hosts())
    return each or []


def wait() -> None:
    """Wait until every process has come here, however long that takes."""
    if world() == 1:
        return
    store, key = _connected(), f"dkdm/wait/{next(_turns)}"
    if store.add(key, 1) == world():
        store.set(f"{key}/all", "here")
    _come(store, f"{key}/all")


def succeed(work: Callable[[], object], faults: tuple[type[Exception], ...]) -> None:
    """Work in every process, together. Raises an OSError in all if one of them meets a fault."""
    said = ""
    try:
        work()
    except faults as error:
        said = str(error) or type(error).__name__
    wait()
    each = [said] * world()
    distributed.all_gather_object(each, said, group=_on_hosts())
    if found := next(filter(None, each), ""):
        raise OSError(found)


def _come(store: distributed.Store, key: str) -> None:
    """Wait for a word, so that signals are answered."""
    pause = 0.001
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def by_main(work: Callable[[], T]) -> T | None:
    """Let the main process work while the others wait, together; None for the others.

    They wait for a word in the launcher's store, not in a collective, which has a time limit and
    keeps a device busy. If the work fails, the others end without a word.
    """
    if world() == 1:
        return work()
    store, key = _connected(), f"dkdm/main/{next(_turns)}"
    if not is_main():
        _come(store, key)
        if store.get(key) == FAILED.encode():
            time.sleep(
                GRACE
            )  # the launcher ends all as soon as one ends: the main one speaks first
            raise SystemExit(1)
        return None
    said = FAILED
    try:
        found = work()
        said = "done"
    finally:
        store.set(key, said)
    return found


def main_first(work: Callable[[], T]) -> T:
    """Let the main process work first, then the others, which find what it keeps; together."""
    found = by_main(work)
    return found if is_main() else work()  # type: ignore[return-value]


@contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Notes and progress of the other processes go nowhere: the main one says the same."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        yield


def leave() -> bool:
    """Part from the others when all is done, together; whether this was the main process."""
    was_main = is_main()
    if _are_several():
        wait()
        _on_hosts.cache_clear()
        distributed.destroy_process_group()
    return was_main


def speaks_of_failure() -> bool:
    """Whether this process is the first to fail, which says why; what follows in others is silent.

    A process that fails ends, and the launcher then ends the others: those that are silent leave
    the first one time to speak.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    with suppress(RuntimeError):
        store = _store()
        if store is None:
            return os.environ.get("RANK", "0") == "0"
        if store.add(f"dkdm/failed/{attempt}", 1) == 1:
            return True
    time.sleep(WHILE_SPEAKING)
    return False  # or the main process, which keeps the store, has gone


def _connected() -> distributed.Store:
    store = _store()
    assert store is not None
    return store


def _store() -> distributed.Store | None:
    """Where the processes leave words for each other: the launcher's, before they are connected.

    None for processes that are not connected, and whose launcher keeps none.
    """
    if _are_several():
        store: distributed.Store = distributed.distributed_c10d._get_default_store()
        return store
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(place, port, is_master=False, timeout=timedelta(seconds=GRACE))
