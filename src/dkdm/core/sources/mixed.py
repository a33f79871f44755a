"""Sources made of others: images that a teacher evaluates, and a pool beside images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dkdm.core import processes
from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.diffusion.process import Process
from dkdm.core.randomness import generator
from dkdm.core.saving.checkpoint import Part
from dkdm.core.sources.chains import Guidance
from dkdm.core.sources.images import Images
from dkdm.core.sources.pool import Pool


@dataclass(eq=False)
class Taught:
    """Noised images whose target is what a teacher makes of them, not the noise that was added.

    images: on the teacher's levels, with its conditions. Each image is evaluated under a scale of
    `guidance`, as a pool's chains are.
    """

    images: Images
    teacher: Denoiser
    guidance: Guidance = Guidance()
    evaluations: int = 0

    @property
    def process(self) -> Process:
        """The teacher's."""
        return self.images.process

    def draw(self, batch_size: int) -> Batch:
        """Noised images, and the scales they are evaluated under."""
        batch = self.images.draw(batch_size)
        random = generator("cpu", self.images.seed, "scale", self.images.step)
        scales, part = self.guidance.draw(batch_size, random), self.images.drawn_by.part(batch_size)
        return batch._replace(cond=batch.cond | {k: v[part] for k, v in scales.items()})

    def places(self, batch_size: int) -> Tensor:
        """As of the images."""
        return self.images.places(batch_size)

    @torch.no_grad()
    def target(self, batch: Batch) -> Prediction:
        """One teacher evaluation of each image (two with guidance)."""
        guided = not self.guidance.is_off
        self.evaluations += int(self.teacher.evaluations_at(batch.t, guided).sum())
        plain, guided_ = self.teacher.predict_both(batch, self.guidance.of(batch.cond))
        return plain if self.guidance.chain_only else guided_

    def advance(self, batch: Batch, target: Prediction) -> None:
        """On to the next images."""
        self.images.advance(batch, target)

    def mend(self) -> int:
        """None: images are what they are."""
        return 0

    def parts(self) -> dict[str, Part]:
        """The whole source."""
        return {"images": self}

    def state_dict(self) -> dict[str, Tensor]:
        """The images' step, and the evaluations of all processes so far; together."""
        evaluations = processes.total(torch.tensor(self.evaluations))
        return {**self.images.state_dict(), "evaluations": evaluations}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from that step."""
        self.images.load_state_dict(state)
        self.evaluations = int(state["evaluations"]) * processes.is_main()


@dataclass(eq=False)
class Mixed:
    """Batches of which a share comes from images, the rest from a pool.

    images: on the levels of the pool's teacher. share: of a batch, at least one sample of each.
    """

    pool: Pool
    images: Images | Taught
    share: float = 0.5

    @property
    def process(self) -> Process:
        """The teacher's."""
        return self.pool.process

    @property
    def evaluations(self) -> int:
        """Of the pool, and of the images if their teacher evaluates them."""
        return self.pool.evaluations + (self.images.evaluations or 0)

    def draw(self, batch_size: int) -> Batch:
        """Samples of the pool, then noised images."""
        count = images_in_batch(batch_size, self.share)
        parts = self.pool.draw(batch_size - count), self.images.draw(count)
        unguided = {"guidance": torch.ones(len(parts[1].t))} if "guidance" in parts[0].cond else {}
        parts = parts[0], parts[1]._replace(cond=unguided | parts[1].cond)
        x, t = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "t"))
        return Batch(x, t, _joined(parts[0].cond, parts[1].cond), parts)

    def places(self, batch_size: int) -> Tensor:
        """Of the pool's samples, then of the images."""
        count = images_in_batch(batch_size, self.share)
        pooled = batch_size - count
        return torch.cat([self.pool.places(pooled), pooled + self.images.places(count)])

    def target(self, batch: Batch) -> Prediction:
        """The targets of both; `chain` is the pool's alone."""
        pooled, imaged = batch.rows
        first, second = self.pool.target(pooled), self.images.target(imaged)
        output, x_0, eps = (torch.cat(pair) for pair in zip(first[:3], second[:3], strict=True))
        own, other = first.variance_output, second.variance_output
        variance = None if own is None or other is None else torch.cat([own, other])
        return Prediction(output, x_0, eps, variance, first)

    def advance(self, batch: Batch, target: Prediction) -> None:
        """Move the pool's samples on, and go on to the next images."""
        pooled, imaged = batch.rows
        assert target.chain is not None
        self.pool.advance(pooled, target.chain)
        self.images.advance(imaged, target)

    def mend(self) -> int:
        """Mend the pool; returns how many entries."""
        return self.pool.mend()

    def parts(self) -> dict[str, Part]:
        """Of the pool and of the images."""
        return {**self.pool.parts(), **self.images.parts()}


def images_in_batch(batch_size: int, share: float) -> int:
    """How many of a batch are images, if a share of it is."""
    return min(max(round(share * batch_size), 1), batch_size - 1)


def _joined(first: Condition, second: Condition) -> Condition:
    return {key: torch.cat([value, second[key]]) for key, value in first.items()}
