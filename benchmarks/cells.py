"""A queue of cells of a table: one JSON line each, resumable, in several processes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.data.named import load_reference
from dkdm.evaluation.metrics import evaluate_images
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.reading.files import atomic

Cell = dict[str, Any]
Line = dict[str, Any]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_lines(file: Path) -> list[Line]:
    """The finished cells of a file; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def missing(cells: Iterable[Cell], lines: Sequence[Line]) -> list[Cell]:
    """The cells without a line: a line holds all that its cell does, and what was found."""
    return [cell for cell in cells if not any(cell.items() <= line.items() for line in lines)]


def run_cells(
    file: Path,
    cells: Sequence[Cell],
    work: Callable[[Cell], Line],
    jobs: int,
    after: Callable[[list[Line]], object],
) -> bool:
    """Run the cells that have no line in `file`, in order, `jobs` at once; whether all succeeded.

    work: a function of a module, called in another process if there are several jobs. after: called
    with all lines after each cell. A cell that fails is named and leaves the others alone.
    """
    lines = read_lines(file)
    after(lines)
    succeeded = True
    for cell, result in _finished(work, missing(cells, lines), jobs):
        try:
            lines.append(cell | result())
        except Exception as error:
            succeeded = False
            print(f"{cell} failed: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        with atomic(file) as whole:
            whole.write_text("".join(json.dumps(line) + "\n" for line in lines))
        after(lines)
        print(f"{len(lines)} done, the last: {json.dumps(lines[-1])}", file=sys.stderr)
    return succeeded


def _finished(
    work: Callable[[Cell], Line], cells: list[Cell], jobs: int
) -> Iterator[tuple[Cell, Callable[[], Line]]]:
    """Each cell with what returns its line, or raises what its work raised, as they come."""
    one_thread()
    if jobs == 1:
        yield from ((cell, partial(_timed, work, cell)) for cell in cells)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=one_thread) as executor:
        futures = {executor.submit(_timed, work, cell): cell for cell in cells}
        yield from ((futures[done], done.result) for done in as_completed(futures))


def _timed(work: Callable[[Cell], Line], cell: Cell) -> Line:
    started, used = time.monotonic(), time.process_time()
    found = work(cell)
    seconds = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - used}
    return found | {key: round(value, 1) for key, value in seconds.items()}


def one_thread() -> None:
    """Let torch compute on one core: as many cells as cores run at once."""
    torch.set_num_threads(1)


def measured(
    model: Denoiser, num_samples: int = 1000, num_steps: int = 20, reference: str = "fashion-test"
) -> dict[str, float]:
    """Of a model's samples (DDIM, no guidance, seed 0): the distance, class accuracy, diversity."""
    cond = model.conditioning.in_turns(num_samples)
    images = decoded(model, draw(model, cond, Sampling(num_samples, num_steps, seed=0)))
    found = evaluate_images(images, cond.get("class_labels"), load_reference(reference))
    return dict(found.values)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and, of several values, their standard deviation."""
    several = f" ± {pstdev(values):{form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{several}"
