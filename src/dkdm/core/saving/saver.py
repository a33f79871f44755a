"""Checkpoints of a run while it goes on: written by a thread, from a copy, and again after a fault.

The step waits for the copy only. Several processes write together, without a thread.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkdm.core import processes
from dkdm.core.saving import checkpoint
from dkdm.core.saving.checkpoint import Part
from dkdm.core.saving.folders import write_folder, write_together
from dkdm.core.saving.tolerance import DISK_FAULTS, free_space, tolerated, warn
from dkdm.errors import DkdmError, in_a_line
from dkdm.reading.machine import usable_memory

AGAIN = 60.0  # seconds until a checkpoint that could not be written is tried again
MOST_COPIED = 0.5  # share of the free memory that a copy may take; without one the step waits


@dataclass(frozen=True, eq=False)
class Copied:
    """A part as it was: what a thread writes while the part changes."""

    state: dict[str, Any]

    @classmethod
    def of(cls, part: Part) -> Copied:
        """A copy in the host's memory."""
        return cls({key: _copy(value) for key, value in part.state_dict().items()})

    def state_dict(self) -> dict[str, Any]:
        """The state at that time."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("a copy is only written")


def _copy(value: Any) -> Any:
    return (
        value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
    )


@dataclass(eq=False)
class Saver:
    """Writes checkpoints to the folder of a run, and deletes the oldest beyond `limit`.

    more: writes what a checkpoint has beside parts. every: seconds between two; None for no limit.
    A write that the disk does not take is a warning, and the training goes on: the former
    checkpoint stays, and the next try is a minute later. saved: step of the last that was begun.
    """

    output_dir: Path
    limit: int | None
    more: Callable[[Path], None]
    every: float | None = None
    saved: int = -1
    began: float = field(default_factory=time.monotonic)
    fault: str | None = None
    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    def is_due(self) -> bool:
        """Whether it is time to save, by the clock; together."""
        waited = time.monotonic() - self.began
        own = (self.every is not None and waited > self.every) or (
            self.fault is not None and waited > AGAIN
        )
        if processes.world() == 1 or (self.every is None and self.fault is None):
            return own
        return processes.any_of(own)

    def save(self, step: int, parts: Mapping[str, Part], about: Mapping[str, Any]) -> None:
        """Write checkpoint-STEP, in a thread if there is memory for a copy; together."""
        self.wait()
        self.saved, self.began = step, time.monotonic()
        if processes.world() > 1:
            self._together(step, parts, about)
            return
        size = sum(sizes_of(parts).values())
        if size > MOST_COPIED * usable_memory():
            self._write(step, parts, about, size)
            return
        copies = {name: Copied.of(part) for name, part in parts.items()}
        self._thread = threading.Thread(
            target=self._caught, args=(step, copies, about, size), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is written. Raises what went wrong, but for faults of the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """As `wait`. Raises DkdmError if the last checkpoint could not be written."""
        self.wait()
        if self.fault is not None:
            raise DkdmError(
                f"{self.fault}. Make room, and go on with --resume-from-checkpoint latest"
            )

    def _caught(self, *given: Any) -> None:
        try:
            self._write(*given)
        except BaseException as error:
            self._error = error

    def _write(
        self, step: int, parts: Mapping[str, Part], about: Mapping[str, Any], size: int
    ) -> None:
        def fill(partial: Path) -> None:
            checkpoint.write_parts(partial, parts, about)
            self.more(partial)

        folder = self._folder(step)
        try:
            write_folder(folder, fill)
            self.fault = None
        except DISK_FAULTS as error:
            self._failed(folder, size, error)
        else:
            self._rotate(step)

    def _together(self, step: int, parts: Mapping[str, Part], about: Mapping[str, Any]) -> None:
        writers = processes.owners(parts)

        def fill(partial: Path) -> None:
            checkpoint.write_parts(partial, parts, about, writers)
            if processes.is_main():
                self.more(partial)

        folder = self._folder(step)
        try:
            write_together(folder, fill)
            self.fault = None
        except OSError as error:
            sizes, here = sizes_of(parts), processes.rank()
            own = sum(size for name, size in sizes.items() if writers[name] == here)
            self._failed(folder, int(processes.total(torch.tensor(own))), error)
        else:
            processes.by_main(lambda: self._rotate(step))

    def _failed(self, folder: Path, size: int, error: Exception) -> None:
        """Say that a checkpoint of this many bytes could not be written, and remember it."""
        self.fault = (
            f"{folder.name} could not be written: it needs {size / 1e6:,.0f} MB, and "
            f"{free_space(self.output_dir)} ({in_a_line(error)})"
        )
        kept = checkpoint.checkpoints(self.output_dir)
        last = f"the last checkpoint is {kept[-1].name}" if kept else "there is no checkpoint"
        warn(f"{self.fault}; {last}; training goes on, and a minute later it is tried again")

    def _rotate(self, step: int) -> None:
        """Delete the oldest, after the new one was read again."""
        checkpoint.verify_checkpoint(self._folder(step))
        with tolerated("older checkpoints are not deleted", self.output_dir):
            checkpoint.rotate(self.output_dir, self.limit, step)

    def _folder(self, step: int) -> Path:
        return self.output_dir / f"checkpoint-{step}"


def sizes_of(parts: Mapping[str, Part]) -> dict[str, int]:
    """Bytes of the tensors in each of these parts."""
    states = {name: part.state_dict().values() for name, part in parts.items()}
    return {
        name: sum(value.nbytes for value in values if isinstance(value, Tensor))
        for name, values in states.items()
    }
