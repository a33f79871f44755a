"""Numbers of single images of a model, made of each batch as it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.modes import evaluating
from dkdm.data.clip import ClipScore
from dkdm.data.perceptual import PerceptualDistance
from dkdm.evaluation.fingerprint import fingerprint, hash_of
from dkdm.evaluation.pairs import Pairs
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

    @cached_property
    def name(self) -> str:
        """What the columns depend on, beside the model."""
        found = [self.perceptual.name] if self.perceptual else []
        found += [self.clip.name, hash_of(self.clip.model.state_dict())] if self.clip else []
        found += [fingerprint(self.teacher), f"{self.scale:g}"] if self.teacher else []
        return " ".join(found)

    @property
    def judges(self) -> dict[str, str]:
        """The networks in words, by the names of the columns that they make."""
        perceptual = self.perceptual.in_words if self.perceptual else None
        names = {
            "lpips": perceptual if self.teacher else None,
            "lpips_diversity": perceptual,
            "clip": self.clip.name if self.clip else None,
        }
        return {column: name for column, name in names.items() if name is not None}

    def of(self, indices: range) -> Columns:
        """The columns of the samples of these numbers, which are yet to be drawn."""
        rows = self._rows(indices)
        labels, pairs = rows.get("class_labels", rows.get("prompt")), None
        if self.perceptual is not None:
            pairs = Pairs(len(indices), labels, self.perceptual)
        return Columns(self, pairs, {})

    def of_batch(self, images: Tensor, these: range) -> dict[str, Tensor]:
        """The columns that need no other of the model's images [N, C, H, W]."""
        found = {}
        if self.perceptual is not None and self.teacher is not None:
            found["lpips"] = self.perceptual(images, self._beside(self.teacher, these))
        if self.clip is not None and self.prompts is not None:
            asked = self._rows(these)["prompt"].tolist()
            found["clip"] = self.clip(images, [self.prompts[number] for number in asked])
        return found

    def _rows(self, indices: range) -> Condition:
        return {key: value[indices.start : indices.stop] for key, value in self.cond.items()}

    def _beside(self, teacher: Denoiser, these: range) -> Tensor:
        """The teacher's images of the same noise."""
        with evaluating(teacher.network, teacher.call):
            drawn = batches(teacher, self.cond, self.sampling, self.scale, these)
            return torch.cat([decoded(teacher, batch) for _, batch in drawn])


@dataclass(eq=False)
class Columns:
    """The columns of a shard, while its batches are drawn."""

    single: SingleImages
    pairs: Pairs | None
    parts: dict[str, list[Tensor]]

    def add(self, images: Tensor, these: range) -> None:
        """Take the next images [N, C, H, W], those of the samples of these numbers."""
        if self.pairs is not None:
            self.pairs.add(images)
        for name, values in self.single.of_batch(images, these).items():
            self.parts.setdefault(name, []).append(values)

    def whole(self) -> dict[str, Tensor]:
        """Every column, a number for each image."""
        found = {name: torch.cat(values) for name, values in self.parts.items()}
        return found if self.pairs is None else found | {"lpips_diversity": self.pairs.distances}
