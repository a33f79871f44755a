"""How many samples a device evaluates at once in the least time a sample."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.evaluation.cost import probe, undisturbed

GAIN = 0.05  # share of the time that a doubling has to save
REPEATS = 2


def fastest(seconds: Callable[[int], float | None], first: int, most: int) -> int:
    """The batch, doubled from `first` while that saves time and memory suffices; at most `most`.

    seconds: for a sample of a batch of this size; None if memory does not suffice.
    """
    best, least, size = first, math.inf, first
    while size <= most:
        needed = seconds(size)
        if needed is None or needed > (1 - GAIN) * least:
            break
        best, least, size = size, needed, 2 * size
    return best


def seconds_a_sample(model: Denoiser, size: int) -> float | None:
    """Seconds for a sample in a batch of this size, the faster of two after one that warms up; None
    if the device's memory does not suffice. Counters and the global random state stay."""
    try:
        with undisturbed(model), torch.no_grad(), torch.random.fork_rng():
            batch = probe(model, size)
            return min(_seconds(lambda: model.predict(batch)) for _ in range(1 + REPEATS)) / size
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started
