"""A pool whose next batch and target are made while the student learns from the last ones.

A pool does not know the student. So its teacher can work on another stream, or another device: when
a batch has been drawn for the student, the pool moves on and its teacher evaluates the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.graphs import Replayed
from dkdm.core.devices import to_device
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.diffusion.process import Process
from dkdm.core.saving.checkpoint import Part
from dkdm.core.sources.moves import answer
from dkdm.core.sources.pool import Pool

Drawn = tuple[Batch, Prediction]


@dataclass(eq=False)
class Ahead:
    """A source of the same batches as its pool, made one ahead; its state is the pool's.

    source: the pool, beside its teacher. device: the student's. batches: of the whole run; after
    the last one nothing is made.
    """

    source: Pool
    device: torch.device
    batches: int
    _coming: Drawn | None = field(default=None, init=False, repr=False)
    _drawn: Drawn | None = field(default=None, init=False, repr=False)
    _seen: Prediction | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        teacher = self.source.teacher
        self._batch_size, self._made_at = 0, -1
        self.stream = torch.cuda.Stream(teacher.device) if teacher.device.type == "cuda" else None
        if isinstance(teacher.call, Replayed):  # graphs write to fixed places: others keep theirs
            self.source.teacher = replace(teacher, call=type(teacher.call)(teacher.call.call))

    @property
    def process(self) -> Process:
        """The pool's."""
        return self.source.process

    @property
    def evaluations(self) -> int:
        """The pool's; what is made ahead counts when it is used."""
        return self.source.evaluations

    @torch.no_grad()
    def draw(self, batch_size: int) -> Batch:
        """The batch that was made ahead, beside the student."""
        self._batch_size = batch_size
        if self._made_at != self.source.step:  # the pool went back
            self._coming = None
        if self._coming is None:
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            self._make(batch_size)
        assert self._coming is not None
        self._wait()
        self._drawn, self._coming = self._coming, None
        batch, target = self._drawn
        variance = None if target.variance_output is None else self._sent(target.variance_output)
        output, x_0, eps = (self._sent(value) for value in target[:3])
        self._seen = Prediction(output, x_0, eps, variance)
        return batch._replace(x=self._sent(batch.x))

    def places(self, batch_size: int) -> Tensor:
        """The pool's."""
        return self.source.places(batch_size)

    def target(self, batch: Batch) -> Prediction:
        """Its target, beside the student."""
        assert self._seen is not None
        self.source.count(batch.rows, batch.t)
        return self._seen

    def advance(self, batch: Batch, target: Prediction) -> None:
        """Move the pool on, and let the teacher evaluate its next batch."""
        del batch, target
        assert self._drawn is not None
        with self._aside():
            self.source.advance(*self._drawn)
        self._drawn = self._seen = None
        if self.source.step < self.batches:
            self._make(self._batch_size)

    @torch.no_grad()
    def _make(self, batch_size: int) -> None:
        with self._aside():
            batch = self.source.draw(batch_size)
            target = answer(self.source.teacher, self.source.guidance, batch)
        self._coming, self._made_at = (batch, target), self.source.step

    def _aside(self) -> AbstractContextManager[object]:
        """The teacher's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _wait(self) -> None:
        """Let what follows on either device wait for the teacher's stream."""
        if self.stream is not None:
            for device in (self.stream.device, self.device):
                if device.type == "cuda":
                    torch.cuda.current_stream(device).wait_stream(self.stream)

    def _sent(self, value: Tensor) -> Tensor:
        """The same values beside the student, whose memory stays while they are in use."""
        if self.stream is not None:
            value.record_stream(torch.cuda.current_stream(value.device))
        return to_device(value, self.device)

    def mend(self) -> int:
        """Mend the pool, and forget what was made of bad entries; returns how many."""
        self._wait()
        count = self.source.mend()
        self._coming = None if count else self._coming
        return count

    def parts(self) -> Mapping[str, Part]:
        """The pool's."""
        self._wait()
        return self.source.parts()
