"""What is drawn from a model, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from dkdm.config.values import ClassId, Count, Sampler, Scale, Seed, parse_interval
from dkdm.reading.options import Options
from dkdm.reading.values import Range


class SampleFile(Options):
    """Where samples are written."""

    output: Path = Path("samples.png")
    """Image to write (.png, .jpg, .webp), or the tensor [N, C, ...] (.safetensors)."""


USUAL_STEPS = 25  # of samples that are drawn


class DrawOptions(Options, title="Sampling"):
    """What to draw, and how."""

    num_samples: Annotated[int, Range(1, 10**6)] = 40
    """Number of samples."""
    steps: Count | None = None
    """Sampler steps. Each is one network evaluation per sample, with heun two. Default: 25; of a
    few-step model, the most that it draws in."""
    sampler: Sampler = "ddim"
    """ddim; euler, which is the same; ddpm, which adds noise; heun and dpm (DPM-Solver++), which
    are of second order and need fewer steps."""
    seed: Seed = 0
    """Random seed. Sample i depends on nothing but the seed and i."""
    classes: tuple[ClassId, ...] | None = None
    """Class ids, repeated in turn. Default: all classes in turn."""
    guidance_interval: str | None = None
    """LOW:HIGH, the shares of noise (0 clean, 1 noise) between which guidance acts. Default:
    everywhere."""
    cuda_graphs: bool = True
    """On a CUDA device, start all kernels of a network's call at once, as a CUDA graph. Samples are
    the same up to rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_interval(self.guidance_interval)

    @property
    def num_steps(self) -> int:
        """Sampler steps; 25 if they were left open."""
        return self.steps or USUAL_STEPS


class SamplingOptions(DrawOptions, SampleFile):
    """What to draw, and how."""

    guidance_scale: Scale = 1.0
    """Scale of classifier-free guidance; 1 turns it off."""
    overwrite: bool = False
    """Replace a file that exists."""
