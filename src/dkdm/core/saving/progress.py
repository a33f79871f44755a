"""What a running training shows and writes: the progress line, metrics.jsonl, loss per level."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from dkdm.core import processes
from dkdm.core.devices import to_device
from dkdm.core.saving.tolerance import tolerated, warn
from dkdm.errors import DkdmError
from dkdm.reading.fields import Fields
from dkdm.reading.files import atomic

BUCKETS = 10
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[rate]}"),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[loss]}"),
)
MAX_LINE = 2**20  # characters of a line of metrics


class LossPerLevel:
    """Mean loss in ten equal ranges of t, summed on the device between two lines of metrics."""

    def __init__(self, num_levels: int, device: torch.device) -> None:
        self.num_levels = num_levels
        self.sums = torch.zeros(2, BUCKETS, device=device)

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Count the losses [B] of samples at t [B], but for those that are not finite."""
        bucket = to_device(t * BUCKETS // self.num_levels, losses.device)
        finite = losses.isfinite()
        both = torch.stack([torch.where(finite, losses.float(), 0.0), finite.float()])
        own = bucket == torch.arange(BUCKETS, device=losses.device)[:, None]
        # not index_add_, whose order of sums a CUDA device does not promise
        self.sums += torch.where(own, both[:, None], 0.0).sum(2)

    def take(self) -> list[float | None]:
        """The means since the last call, least noise first; None for a range without samples.

        Over all processes, together.
        """
        totals, counts = processes.total(self.sums).tolist()
        self.sums.zero_()
        return [total / n if n else None for total, n in zip(totals, counts, strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        """Sums of losses and counts since the last call of `take`, of all processes; together."""
        return {"sums": processes.total(self.sums)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.sums.copy_(state["sums"] * processes.is_main())


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, appended.

    The main process writes it. every: steps between two lines; 0 for the last step alone. waiting:
    lines that the disk did not take; a checkpoint keeps them.
    """

    def __init__(self, path: Path, every: int = 0) -> None:
        self.path, self.every, self.waiting = path, every, b""

    def drop_after(self, step: int, noted: bool = True) -> None:
        """Drop the lines after a step, to which the run has gone back; write those that wait.

        noted: whether the step's own line is among them, or still to come. stderr says so if lines
        up to it cannot be read, or are missing at the end.
        """
        if not processes.is_main():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known, lost = lines_to(self.path, step)
        if lost:
            warn(f"{lost} lines of {self.path} cannot be read, and are left out")
        waiting = map(json.loads, self.waiting.splitlines())
        kept = known + [each for each in waiting if each["step"] <= step and each not in known]
        last, due = kept[-1]["step"] if kept else 0, step if noted else step - 1
        if self.every and last < due - due % self.every:
            warn(f"{self.path} ends at step {last}, and the run goes on from step {step}")
        with atomic(self.path) as partial:
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept if step))
        self.waiting = b""

    def kept(self) -> dict[str, str]:
        """What a checkpoint says of the lines that wait; empty if none do."""
        return {"waiting_metrics": self.waiting.decode()} if self.waiting else {}

    def restore(self, about: Mapping[str, Any]) -> None:
        """Let the lines wait that waited at a checkpoint. Raises DkdmError if they are none."""
        lines = Fields(about, "a checkpoint").text("waiting_metrics", "").splitlines()
        if any(_metrics_of(line) is None for line in lines):
            raise DkdmError("its waiting_metrics are no lines of metrics")
        self.waiting = "".join(f"{line}\n" for line in lines).encode()

    def flush(self) -> None:
        """Wait until all lines are on the disk, as a checkpoint of their steps will be."""
        if self.path.is_file():
            with self.path.open("rb") as handle:
                os.fsync(handle.fileno())

    def finish(self) -> None:
        """Try once more to write lines that wait; stderr says what becomes of them."""
        if self.waiting and processes.is_main():
            self._append()
            if self.waiting:
                warn(
                    f"metrics.jsonl lacks {len(self.waiting.splitlines())} lines, which the last "
                    "checkpoint keeps: make room, and --resume-from-checkpoint latest writes them"
                )

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line; a line that the disk does not take is written with the next one."""
        if processes.is_main():
            self.waiting += json.dumps(entry).encode() + b"\n"
            self._append()

    def _append(self) -> None:
        with tolerated("metrics.jsonl: lines wait to be written", self.path.parent):
            with self.path.open("ab", buffering=0) as handle:
                size = handle.tell()
                try:
                    _write_all(handle, self.waiting)
                except OSError:
                    handle.truncate(size)
                    raise
            self.waiting = b""


def _write_all(handle: FileIO, data: bytes) -> None:
    while data:
        data = data[handle.write(data) :]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, objects with a `step`.

    Any other line, such as one cut off by a crash, is left out.
    """
    return [entry for line in _lines(path) if (entry := _metrics_of(line)) is not None]


def lines_to(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl up to a step, and how many before the last of them are damaged."""
    found = [_metrics_of(line) for line in _lines(path)]
    to = [i for i, entry in enumerate(found) if entry is not None and entry["step"] <= step]
    known = [entry for entry in (found[i] for i in to) if entry is not None]
    lost = sum(entry is None for entry in found[: to[-1] if to else 0])
    return known, lost


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as lines:
        return list(iter(lambda: lines.readline(MAX_LINE), ""))


def _metrics_of(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    legal = isinstance(entry, dict) and type(entry.get("step")) is int
    return entry if legal and 0 <= entry["step"] < 2**63 else None


@contextmanager
def track(total: int, done: int, label: str = "training") -> Iterator[Callable[..., None]]:
    """Show progress with rate and ETA on stderr; yields `update(done, loss=None)`.

    On a terminal a bar; elsewhere a line every ten seconds.
    """
    console = Console(stderr=True)
    bar = Progress(*COLUMNS, console=console, disable=not console.is_terminal)
    task = bar.add_task(label, total=total, completed=done, loss="", rate="")
    started = last_shown = time.monotonic()

    def update(now_done: int, loss: Tensor | None = None) -> None:
        nonlocal last_shown
        now = time.monotonic()
        if now_done < total and now - last_shown < (10 if bar.disable else 0.5):
            return
        last_shown = now
        rate = (now_done - done) / max(now - started, 1e-9)
        shown = "" if loss is None else f"loss {float(loss):.4f}"
        if bar.disable:
            minutes = (total - now_done) / max(rate, 1e-9) / 60
            line = f"{label}: {now_done}/{total}{shown and f', {shown}'}, {rate:.2f}/s"
            print(f"{line}, {minutes:.1f} min left", file=sys.stderr, flush=True)
        bar.update(task, completed=now_done, loss=shown, rate=f"{rate:.1f}/s")

    with bar:
        yield update
