"""Where batches come from: the two verbs `draw` and `advance`, and the target of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dkdm.core.conditioning import Condition, Conditioning, dropped
from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.prediction import Parameterization, Prediction, from_x_0_eps
from dkdm.core.process import Process
from dkdm.core.progress import track
from dkdm.core.randomness import generator
from dkdm.errors import UsageError


class Source(Protocol):
    """A stream of noisy samples with targets."""

    def draw(self, batch_size: int) -> Batch:
        """The next batch."""

    def target(self, batch: Batch) -> Prediction:
        """What a student should predict for it: one teacher evaluation, or the noise added."""

    def advance(self, batch: Batch, target: Prediction) -> Any:
        """Move the batch's states on; the same evaluation is the next state."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on exactly, as tensors."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore it."""


@dataclass(eq=False)
class Images:
    """Real images, noised to a uniform t; the target is the noise that was added.

    images: [N, C, H, W] in [-1, 1], or standardized latents; conditions: of each image, N rows.
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

    def state_dict(self) -> dict[str, Tensor]:
        """The step: everything random follows from it and the seed."""
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from that step."""
        self.step = int(state["step"])


@dataclass(eq=False)
class Synthetic(Images):
    """Finished samples of a teacher in place of real images: the paper's data-free training."""

    def state_dict(self) -> dict[str, Tensor]:
        """The whole set, which would be expensive to draw again, and the step."""
        conditions = {f"cond.{key}": value for key, value in self.conditions.items()}
        return {"images": self.images, **conditions, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the set. Raises UsageError for one of another size."""
        if state["images"].shape != self.images.shape:
            raise UsageError(
                f"the checkpoint's synthetic set is {tuple(state['images'].shape)}, this run's "
                f"{tuple(self.images.shape)}: expected the options it began with; "
                f"--synthetic-samples {len(state['images'])} keeps its size"
            )
        self.images = state["images"]
        self.conditions = {key: state[f"cond.{key}"] for key in self.conditions}
        super().load_state_dict(state)


def empty_set(teacher: Denoiser, student: Denoiser, size: int, **fields: Any) -> Synthetic:
    """A synthetic set of `size` samples that are still to be drawn, for a student.

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
    """Draw the samples of a set, `num_steps` teacher evaluations each (two with guidance)."""
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
            progress(chunk.stop)
