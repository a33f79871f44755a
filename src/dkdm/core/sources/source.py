"""What a source of batches is: `draw` a batch, give its `target`, `advance` its states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.diffusion.process import Process
from dkdm.core.saving.checkpoint import Part


class Source(Protocol):
    """A stream of noisy samples with targets."""

    @property
    def process(self) -> Process:
        """The noise process that its samples lie on."""

    def draw(self, batch_size: int) -> Batch:
        """The next batch."""

    def places(self, batch_size: int) -> Tensor:
        """Where this process's samples lie in the next batch of all processes, int64 [part]."""

    def target(self, batch: Batch) -> Prediction:
        """What a student should predict for it: one teacher evaluation, or the noise added."""

    def advance(self, batch: Batch, target: Prediction) -> None:
        """Move the batch's states on; the same evaluation is the next state."""

    @property
    def evaluations(self) -> int | None:
        """Samples that a teacher has evaluated so far; None if there is no teacher."""

    def mend(self) -> int:
        """Begin entries anew whose states are not finite; returns how many."""

    def parts(self) -> Mapping[str, Part]:
        """What a checkpoint keeps of it, by name, each in a separate file."""
