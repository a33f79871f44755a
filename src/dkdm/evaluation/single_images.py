"""Numbers of single images of a model, made while a shard's images are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dkdm.core.conditioning import Condition
from dkdm.core.denoiser import Denoiser
from dkdm.core.modes import evaluating
from dkdm.data.clip import ClipScore
from dkdm.data.perceptual import PerceptualDistance
from dkdm.evaluation.per_sample import per_sample
from dkdm.evaluation.same_noise import Sampling, batches, decoded


@dataclass(frozen=True, eq=False)
class SingleImages:
    """LPIPS and CLIP score of a model's images, as columns of `Features`.

    - `perceptual`, `clip`: None leaves their columns out.
    - `cond`, `sampling`: of the model; the teacher draws from the same noise.
    - `teacher`, `scale`: whose images are compared with the model's; None compares none.
    - `prompts`: those that `cond` numbers, number 0 the negative one.
    """

    cond: Condition
    sampling: Sampling
    perceptual: PerceptualDistance | None = None
    clip: ClipScore | None = None
    teacher: Denoiser | None = None
    scale: float = 1.0
    prompts: Sequence[str] | None = None

    @property
    def name(self) -> str:
        """What the columns depend on, beside the model."""
        networks = [each.name for each in (self.perceptual, self.clip) if each]
        teacher = f"{self.teacher.name} {self.scale:g}" if self.teacher else ""
        return " ".join([*networks, teacher]).strip()

    def __call__(self, images: Tensor, indices: range) -> dict[str, Tensor]:
        """The columns of the images [N, C, H, W] of the samples of these numbers."""
        rows = {key: value[indices.start : indices.stop] for key, value in self.cond.items()}
        numbers = rows["prompt"].tolist() if "prompt" in rows else []
        return per_sample(
            images,
            perceptual=self.perceptual,
            beside=self._beside(indices),
            labels=rows.get("class_labels", rows.get("prompt")),
            clip=self.clip,
            prompts=[self.prompts[n] for n in numbers] if self.prompts else None,
        )

    def _beside(self, indices: range) -> Tensor | None:
        """The teacher's images of the same noise."""
        if self.teacher is None:
            return None
        with evaluating(self.teacher.network, self.teacher.call):
            drawn = batches(self.teacher, self.cond, self.sampling, self.scale, indices)
            return torch.cat([decoded(self.teacher, batch) for _, batch in drawn])
