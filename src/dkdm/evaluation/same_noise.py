"""Draw from several models with the same noise: sample i is a function of (seed, i)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dkdm.config import Sampler
from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.solvers import SOLVERS, spacing_of
from dkdm.core.randomness import derived_seeds
from dkdm.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: sample i depends on (seed, i) and never on `batch_size`.

    sampler: ddim and euler are one step of first order, ddpm adds noise, heun and dpm are of second
    order (see `core.diffusion.solvers`).
    """

    num_samples: int
    num_steps: int
    seed: int
    sampler: Sampler = "ddim"
    batch_size: int = 256

    def __post_init__(self) -> None:
        for what in ("num_samples", "num_steps", "batch_size"):
            if getattr(self, what) < 1:
                raise UsageError(f"{what} is {getattr(self, what)}: give 1 or more")


def draw(
    denoiser: Denoiser,
    cond: Condition,
    sampling: Sampling,
    guidance_scale: float = 1.0,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw samples [num_samples, ...] for the conditions, one row a sample; they are on the CPU.

    progress: called with the number of samples drawn so far.
    """
    parts = []
    for indices, samples in batches(
        denoiser, cond, sampling, guidance_scale, range(sampling.num_samples)
    ):
        parts.append(samples)
        if progress is not None:
            progress(indices.stop)
    return torch.cat(parts)


def batches(
    denoiser: Denoiser,
    cond: Condition,
    sampling: Sampling,
    guidance_scale: float,
    indices: range,
) -> Iterator[tuple[range, Tensor]]:
    """Draw the samples of these numbers in batches: which numbers, and [B, ...] on the CPU.

    cond: one row for each sample from number 0 on.
    """
    meaning, name = denoiser.parameterization.prediction, sampling.sampler
    spacing = spacing_of(name, denoiser.process, meaning)
    for first in range(indices.start, indices.stop, sampling.batch_size):
        these = range(first, min(first + sampling.batch_size, indices.stop))
        rows = {key: value[these.start : these.stop] for key, value in cond.items()}
        noise = shared_noise(denoiser, sampling.seed, these)
        sampled = denoiser.sample(
            noise,
            rows,
            sampling.num_steps,
            eta=float(name == "ddpm"),
            guidance_scale=guidance_scale,
            spacing=spacing,
            solver=SOLVERS.get(name),
        )
        yield these, sampled.cpu()


@torch.no_grad()
def decoded(denoiser: Denoiser, samples: Tensor, batch_size: int = 64) -> Tensor:
    """Pixels in about [-1, 1] of samples [N, ...], on the CPU; latents are decoded in batches."""
    parts = samples.split(batch_size)
    images = torch.cat([denoiser.to_pixels(part.to(denoiser.device)).cpu() for part in parts])
    if denoiser.bundle.autoencoder is not None:
        denoiser.bundle.autoencoder.idle()
    return images


def shown_shape(denoiser: Denoiser) -> tuple[int, ...]:
    """The shape of one sample as it is shown: decoded, if it is a latent."""
    return tuple(decoded(denoiser, torch.zeros(1, *denoiser.sample_shape)).shape[1:])


def shared_noise(denoiser: Denoiser, seed: int, indices: range) -> Callable[[int], Tensor]:
    """The noise of samples `indices`: step -> [B, ...], step -1 the start, whatever the model.

    It is drawn on the CPU, so that every device starts from the same.
    """
    random, device = torch.Generator(), denoiser.device
    drawn = torch.empty(len(indices), *denoiser.sample_shape)
    seeds = [derived_seeds(seed, "comparison", index) for index in indices]
    rows = list(zip(seeds, drawn, strict=True))

    def noise(step: int) -> Tensor:
        for seed_of, row in rows:
            row.normal_(generator=random.manual_seed(seed_of(step)))
        return drawn.to(device, copy=True)

    return noise
