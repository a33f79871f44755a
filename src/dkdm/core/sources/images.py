"""Real images as a source of batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition, Conditioning, dropped
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.devices import to_device
from dkdm.core.diffusion.prediction import Parameterization, Prediction, from_x_0_eps
from dkdm.core.diffusion.process import Process
from dkdm.core.randomness import generator
from dkdm.core.saving.checkpoint import Part
from dkdm.core.shards import Shards, this_process
from dkdm.errors import UsageError


@dataclass(eq=False)
class Images:
    """Real images, noised to a uniform t; the target is the noise that was added.

    images: [N, C, H, W] in [-1, 1], or standardized latents; conditions: N rows, one per image.
    condition_dropout: probability of the null condition. drawn_by: the process that draws; each
    draws a batch for all, and keeps its part.
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
    drawn_by: Shards = field(default_factory=this_process)
    evaluations: int | None = field(default=None, init=False)
    _size: int = field(default=0, init=False)
    _order: tuple[int, Tensor] | None = field(default=None, init=False, repr=False)

    def draw(self, batch_size: int) -> Batch:
        """Images in epochs of random order, at independent uniform levels."""
        if batch_size > len(self.images):
            raise UsageError(
                f"batch size {batch_size} is larger than the {len(self.images)} images"
            )
        rows, part = self._rows(batch_size), self.drawn_by.part(batch_size)
        random = generator("cpu", self.seed, "draw", self.step)
        t = torch.randint(self.process.num_levels, (batch_size,), generator=random)[part]
        cond = {key: value[rows] for key, value in self.conditions.items()}
        cond = dropped(self.conditioning, cond, random, self.condition_dropout if cond else 0.0)
        cond, rows, self._size = {k: v[part] for k, v in cond.items()}, rows[part], batch_size
        x_0 = to_device(self.images[rows], self.device)
        return Batch(self.process.add_noise(x_0, self._eps(x_0.shape), t), t, cond, rows)

    def places(self, batch_size: int) -> Tensor:
        """This process's part, in order."""
        return torch.arange(batch_size)[self.drawn_by.part(batch_size)]

    def target(self, batch: Batch) -> Prediction:
        """The image and the noise themselves."""
        x_0 = to_device(self.images[batch.rows], self.device)
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
        if self._order is None or self._order[0] != epoch:  # drawn once: it costs O(images)
            random = generator("cpu", self.seed, "epoch", epoch)
            self._order = epoch, torch.randperm(len(self.images), generator=random)
        return self._order[1][position * batch_size : (position + 1) * batch_size]

    def _eps(self, shape: torch.Size) -> Tensor:
        """Noise of this process's part of the last batch; shape: of that part."""
        random = generator(self.device, self.seed, "noise", self.step)
        whole = self._size, *shape[1:]
        noise = torch.randn(whole, generator=random, device=self.device)
        return noise[self.drawn_by.part(self._size)]

    def mend(self) -> int:
        """None: images are what they are."""
        return 0

    def parts(self) -> dict[str, Part]:
        """The whole source."""
        return {"images": self}

    def state_dict(self) -> dict[str, Tensor]:
        """The step, from which and the seed all that is random follows; how many images."""
        return {"step": torch.tensor(self.step), "size": torch.tensor(len(self.images))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from that step. Raises UsageError for a set of another size.

        Former checkpoints do not know their size.
        """
        size = int(state.get("size", len(self.images)))
        if size != len(self.images):
            raise UsageError(
                f"the checkpoint is of a run on {size} images, these are {len(self.images)}: "
                "resume with the --images and --images-share the run was started with"
            )
        self.step = int(state["step"])
