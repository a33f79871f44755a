"""A fill that a kill or a signal does not lose: what is done lies beside the run until it ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dkdm.core import processes
from dkdm.core.saving import checkpoint
from dkdm.core.saving.folders import restore_folder, verify_folder, write_folder
from dkdm.core.saving.stopping import Stopped, whole
from dkdm.core.saving.tolerance import tolerated
from dkdm.core.sources.pool import Pool
from dkdm.errors import DkdmError
from dkdm.reading.fields import Fields, read_json

EVERY = 600.0  # seconds between two times that it is saved


@dataclass(eq=False)
class Filling:
    """How far a pool is filled, in batches, saved with its entries.

    folder: None saves nothing. how: what its batches depend on; what was filled in another way is
    begun anew. others: whether other pools are filled beside or after this one, so that a signal
    may come when it is done, and no checkpoint has it yet.
    """

    pool: Pool
    folder: Path | None = None
    how: Mapping[str, Any] = field(default_factory=dict)
    others: bool = False
    done: int = 0
    saved_at: float = field(default_factory=time.monotonic)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Go on with what is there; a signal saves what is done."""
        self._restore()
        before = self.done
        try:
            yield
            if self.others and self.done > before:
                self.save()
        except Stopped:
            self.save()
            raise

    @contextmanager
    def batch(self, count: int = 1) -> Iterator[None]:
        """The next batch, or several together, which a signal waits for."""
        with whole():
            yield
            self.done += count
        if time.monotonic() - self.saved_at > EVERY:
            self.save()

    def save(self) -> None:
        """Write what is filled; a disk that does not take it is a warning."""
        if self.folder is not None:
            with tolerated("what is filled is not saved", self.folder.parent.parent):
                write_folder(self.folder, self._write)
        self.saved_at = time.monotonic()

    def _write(self, folder: Path) -> None:
        about = {"done": self.done, "how": dict(self.how)}
        with processes.alone():
            checkpoint.write_parts(folder, self.pool.parts(), about)

    def _restore(self) -> None:
        """Go on from what was saved, if it is whole and was made in the same way."""
        if self.folder is None:
            return
        restore_folder(self.folder)
        if not self.folder.is_dir():
            return
        try:
            verify_folder(self.folder, checkpoint.STATE)
            state = read_json(self.folder / checkpoint.STATE, "how far a pool is filled")
            if state.get("how") != dict(self.how):
                return
            done = Fields(state, str(self.folder / checkpoint.STATE)).whole("done")
            with checkpoint.restoring(self.folder):
                checkpoint.read_parts(self.folder, self.pool.parts())
            self.done = done
        except DkdmError as error:
            print(f"warning: {error}; the pool is filled anew", file=sys.stderr)
