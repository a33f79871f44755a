"""What a network costs: multiply-accumulates and network evaluations per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.modes import evaluating
from dkdm.core.denoisers.teachers import parts_of


def undisturbed(denoiser: Denoiser) -> AbstractContextManager[bool]:
    """Evaluate in evaluation mode, with the mode restored.

    Yields whether the model was in training mode.
    """
    return evaluating(denoiser.network, denoiser.call)


@torch.no_grad()
def count_macs(denoiser: Denoiser) -> int:
    """Count the multiply-accumulates of one network evaluation of one sample.

    Convolutions, matrix products and attention count; elementwise arithmetic does not. Attention is
    computed by its plain formula here, since torch does not count its fused form on the CPU. Of
    several teachers it is the mean.
    """
    parts = parts_of(denoiser)
    if len(parts) > 1:
        return sum(map(count_macs, parts)) // len(parts)
    counter = FlopCounterMode(display=False)
    with undisturbed(denoiser), _plain_attention(), counter:
        denoiser.predict(probe(denoiser, 1))
    return counter.get_total_flops() // 2


def evaluations_per_second(denoiser: Denoiser, batch_size: int = 64, seconds: float = 1.0) -> float:
    """Measure how many samples a second pass through the network, in batches of `batch_size`.

    The median of the batches that fit into `seconds` after a warm-up; at least one.
    """
    return evaluations_in_turns([denoiser], batch_size, seconds)[0]


@torch.no_grad()
def evaluations_in_turns(
    denoisers: Sequence[Denoiser], batch_size: int = 64, seconds: float = 1.0
) -> list[float]:
    """Measure several networks whose batches take turns: other work slows all of them alike."""
    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(undisturbed(denoiser))
        batches = [probe(denoiser, batch_size) for denoiser in denoisers]

        def turn() -> list[float]:
            return [_timed(*pair) for pair in zip(denoisers, batches, strict=True)]

        turn()
        deadline, durations = time.perf_counter() + seconds, [turn()]
        while time.perf_counter() + sum(durations[-1]) < deadline:
            durations.append(turn())
    return [batch_size / statistics.median(each) for each in zip(*durations, strict=True)]


def evaluations_per_step(denoiser: Denoiser, num_steps: int, guidance_scale: float) -> float:
    """Count the network evaluations of one sample in a sampling step, averaged over the steps.

    Guidance adds one inside its interval; a network that embeds the scale needs no second.
    """
    levels = torch.tensor(denoiser.process.timesteps(num_steps))
    return float(denoiser.evaluations_at(levels, guided=guidance_scale != 1).double().mean())


def _timed(denoiser: Denoiser, batch: Batch) -> float:
    started = time.perf_counter()
    denoiser.predict(batch)
    if denoiser.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def probe(denoiser: Denoiser, count: int) -> Batch:
    """A batch to try a model with, at its middle level."""
    cond = denoiser.conditioning.draw(count, torch.Generator().manual_seed(0))
    x = torch.zeros(count, *denoiser.sample_shape, device=denoiser.device)
    t = torch.full((count,), denoiser.process.num_levels // 2)
    return Batch(x, t, cond, t)


@contextmanager
def _plain_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
