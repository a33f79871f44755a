"""Sources of batches: `draw` a batch, give its `target`, `advance` its states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dkdm.core.checkpoint import Part
from dkdm.core.conditioning import Condition, Conditioning, dropped
from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.prediction import Parameterization, Prediction, from_x_0_eps
from dkdm.core.process import Process
from dkdm.core.progress import track
from dkdm.core.randomness import generator
from dkdm.errors import UsageError


class Source(Protocol):
    """A stream of noisy samples with targets."""

    @property
    def process(self) -> Process:
        """The noise process that its samples lie on."""

    def draw(self, batch_size: int) -> Batch:
        """The next batch."""

    def target(self, batch: Batch) -> Prediction:
        """What a student should predict for it: one teacher evaluation, or the noise added."""

    def advance(self, batch: Batch, target: Prediction) -> None:
        """Move the batch's states on; the same evaluation is the next state."""

    @property
    def evaluations(self) -> int | None:
        """Samples that a teacher has evaluated so far; None if there is no teacher."""

    def parts(self) -> Mapping[str, Part]:
        """What a checkpoint keeps of it, by name, each in a separate file."""


@dataclass(eq=False)
class Images:
    """Real images, noised to a uniform t; the target is the noise that was added.

    images: [N, C, H, W] in [-1, 1], or standardized latents; conditions: N rows, one per image.
    condition_dropout: probability of the null condition.
    """

    images: Tensor
    conditions: Condition
    process: Process
    parameterization: Parameterization
    conditioning: Conditioning
    seed: int = 0
    condition_dropout: float = 0.0
    device: torch.device = torch.device("cpu")
    step: int = 0
    evaluations: int | None = field(default=None, init=False)

    def draw(self, batch_size: int) -> Batch:
        """Images in epochs of random order, at independent uniform levels."""
        if batch_size > len(self.images):
            raise UsageError(
                f"batch size {batch_size} is larger than the {len(self.images)} images"
            )
        rows = self._rows(batch_size)
        random = generator("cpu", self.seed, "draw", self.step)
        t = torch.randint(self.process.num_levels, (batch_size,), generator=random)
        x_0 = self.images[rows].to(self.device)
        x = self.process.add_noise(x_0, self._eps(x_0.shape), t)
        cond = {key: value[rows] for key, value in self.conditions.items()}
        cond = dropped(self.conditioning, cond, random, self.condition_dropout if cond else 0.0)
        return Batch(x, t, cond, rows)

    def target(self, batch: Batch) -> Prediction:
        """The image and the noise themselves."""
        x_0 = self.images[batch.rows].to(self.device)
        eps = self._eps(x_0.shape)
        alpha, sigma = self.process.at(batch.t)
        own = self.parameterization
        output = from_x_0_eps(own.prediction, x_0, eps, alpha, sigma, own.sigma_data)
        return Prediction(output, x_0, eps)

    def advance(self, batch: Batch, target: Prediction) -> None:
        """On to the next images."""
        del batch, target
        self.step += 1

    def _rows(self, batch_size: int) -> Tensor:
        per_epoch = len(self.images) // batch_size
        epoch, position = divmod(self.step, per_epoch)
        order = torch.randperm(
            len(self.images), generator=generator("cpu", self.seed, "epoch", epoch)
        )
        return order[position * batch_size : (position + 1) * batch_size]

    def _eps(self, shape: torch.Size) -> Tensor:
        random = generator(self.device, self.seed, "noise", self.step)
        return torch.randn(shape, generator=random, device=self.device)

    def parts(self) -> dict[str, Part]:
        """The whole source."""
        return {"images": self}

    def state_dict(self) -> dict[str, Tensor]:
        """The step: everything random follows from it and the seed."""
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from that step."""
        self.step = int(state["step"])


@dataclass(eq=False)
class Synthetic(Images):
    """Finished samples of a teacher in place of real images: the paper's data-free training."""

    evaluations: int = field(default=0, init=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole set, which would be expensive to draw again, and the step."""
        conditions = {f"cond.{key}": value for key, value in self.conditions.items()}
        evaluations = torch.tensor(self.evaluations)
        own = {"images": self.images, **conditions, "evaluations": evaluations}
        return own | super().state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the set. Raises UsageError for one of another size."""
        if state["images"].shape != self.images.shape:
            raise UsageError(
                f"the checkpoint's synthetic set is {tuple(state['images'].shape)}, this run's "
                f"{tuple(self.images.shape)}: resume with the options the run was started with; "
                f"--synthetic-samples {len(state['images'])} keeps its size"
            )
        self.images = state["images"]
        self.conditions = {key: state[f"cond.{key}"] for key in self.conditions}
        self.evaluations = int(state["evaluations"])
        super().load_state_dict(state)


def empty_set(teacher: Denoiser, student: Denoiser, size: int, **fields: Any) -> Synthetic:
    """A synthetic set for a student; its `size` samples are not drawn yet.

    fields: seed, condition_dropout and device of `Images`.
    """
    host = generator("cpu", fields.get("seed", 0), "synthetic")
    return Synthetic(
        torch.zeros(size, *teacher.sample_shape),
        teacher.conditioning.draw(size, host),
        student.process,
        student.parameterization,
        student.conditioning,
        **fields,
    )


def draw_set(
    source: Synthetic, teacher: Denoiser, num_steps: int, guidance_scale: float, batch_size: int
) -> None:
    """Draw the samples of a set, with `num_steps` teacher evaluations each (twice if guided)."""
    size = len(source.images)
    with track(size, 0, "drawing samples") as progress:
        for first in range(0, size, batch_size):
            chunk = slice(first, min(first + batch_size, size))
            shape = source.images[chunk].shape

            def noise(step: int, first: int = first, shape: torch.Size = shape) -> Tensor:
                random = generator("cpu", source.seed, "synthetic", first, step)
                return torch.randn(shape, generator=random).to(teacher.device)

            cond = {key: value[chunk] for key, value in source.conditions.items()}
            drawn = teacher.sample(noise, cond, num_steps, guidance_scale=guidance_scale)
            source.images[chunk] = drawn.cpu()
            for level in teacher.process.timesteps(num_steps):
                t = torch.full((len(drawn),), level)
                source.evaluations += int(teacher.evaluations_at(t, guidance_scale != 1).sum())
            progress(chunk.stop)
