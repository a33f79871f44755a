"""A set of samples that the teacher has drawn, as a source of batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.randomness import generator
from dkdm.core.saving.progress import track
from dkdm.core.saving.tolerance import warn
from dkdm.core.sources.finished import (
    Samples,
    SampleShards,
    as_tensors,
    joined_samples,
    of_tensors,
)
from dkdm.core.sources.images import Images
from dkdm.errors import DkdmError, UsageError


class Drawing(NamedTuple):
    """How the samples of a set are drawn: by whom, in how many evaluations, how many at once."""

    teacher: Denoiser
    num_steps: int
    guidance_scale: float
    batch_size: int

    def about(self, source: Synthetic) -> dict[str, Any]:
        """What the shards of a set are noted to hold."""
        asked = {"steps": self.num_steps, "guidance scale": self.guidance_scale}
        size, teacher = len(source.images), self.teacher.name
        batch = {"batch size": self.batch_size}
        return {"size": size, "seed": source.seed, "teacher": teacher, **asked, **batch}

    def chunks(self, size: int) -> list[slice]:
        """The rows of each shard."""
        firsts = range(0, size, self.batch_size)
        return [slice(first, min(first + self.batch_size, size)) for first in firsts]

    def drawn(self, source: Synthetic, chunk: slice) -> Tensor:
        """The samples of these rows: functions of the seed and of the first of them."""
        shape, teacher = source.images[chunk].shape, self.teacher

        def noise(step: int) -> Tensor:
            random = generator("cpu", source.seed, "synthetic", chunk.start, step)
            return torch.randn(shape, generator=random).to(teacher.device)

        cond = {key: value[chunk] for key, value in source.conditions.items()}
        samples = teacher.sample(noise, cond, self.num_steps, guidance_scale=self.guidance_scale)
        return samples.cpu()


@dataclass(eq=False)
class Synthetic(Images):
    """Finished samples of a teacher in place of real images: the paper's data-free training.

    shards: files that hold the set; a checkpoint then does without it. None: a checkpoint holds it.
    drawing: how a shard that is damaged or missing is drawn again; None ends the run.
    """

    shards: SampleShards | None = None
    drawing: Drawing | None = None
    evaluations: int = field(default=0, init=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The step and the size of the set, together; the set itself, unless it lies in shards."""
        whole = as_tensors(self.images, self.conditions) if self.shards is None else {}
        evaluations = processes.total(torch.tensor(self.evaluations))
        return {"evaluations": evaluations, **whole, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the set. Raises UsageError for one of another size, DkdmError if a shard lacks.

        Former checkpoints hold the set as `images`.
        """
        named = {"samples" if key == "images" else key: value for key, value in state.items()}
        size = len(named["samples"]) if "samples" in named else int(state["size"])
        if size != len(self.images):
            raise UsageError(
                f"the checkpoint's synthetic set is of {size} samples, this run's of "
                f"{len(self.images)}: resume with the options the run was started with; "
                f"--synthetic-samples {size} keeps its size"
            )
        self.images, self.conditions = of_tensors(named) if "samples" in named else self._on_disk()
        self.evaluations = int(state["evaluations"]) * processes.is_main()
        super().load_state_dict(state)

    def _on_disk(self) -> Samples:
        assert self.shards is not None
        how = self.drawing
        if how is not None and self.shards.hold(how.about(self)):
            chunks = how.chunks(len(self.images))
            parts = [self._read_or_draw(how, *each) for each in enumerate(chunks)]
        else:
            parts = [self.shards.read(number) for number in self.shards.numbers()]
        found = joined_samples(parts)
        if len(found[0]) != len(self.images):
            raise DkdmError(
                f"{self.shards.folder} holds {len(found[0])} of {len(self.images)} samples: start "
                "the run anew in another folder"
            )
        return found

    def _read_or_draw(self, how: Drawing, number: int, chunk: slice) -> Samples:
        assert self.shards is not None
        try:
            return self.shards.read(number)
        except DkdmError as error:
            warn(f"{error}: it is drawn again")
        self.images[chunk] = how.drawn(self, chunk)
        return _write_chunk(self, number, chunk)


def empty_set(teacher: Denoiser, student: Denoiser, size: int, **fields: Any) -> Synthetic:
    """A synthetic set for a student; its `size` samples are not drawn yet.

    fields: seed, condition_dropout, device and shards of `Synthetic`.
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
    """Draw the samples of a set, with `num_steps` teacher evaluations each (twice if guided).

    Every batch is written as it comes, if the set has shards, and not drawn again. Several
    processes draw batches in turns, and read those of the others. Raises UsageError if the shards
    were begun with other options.
    """
    size, shards = len(source.images), source.shards
    how = Drawing(teacher, num_steps, guidance_scale, batch_size)
    if shards is not None:
        processes.by_main(lambda: shards.claim(how.about(source)))
    done = set() if shards is None else set(shards.numbers())
    turns = source.drawn_by.world if shards is not None else 1
    with track(size, batch_size * len(done), "drawing samples") as progress:
        for number, chunk in enumerate(how.chunks(size)):
            if number % turns != source.drawn_by.rank % turns:
                continue
            if shards is not None and number in done and _is_read(source, shards, number, chunk):
                continue
            source.images[chunk] = how.drawn(source, chunk)
            if shards is not None:
                _write_chunk(source, number, chunk)
            progress(chunk.stop)
    if turns > 1:
        _read_others(source, how)
    levels = torch.tensor(teacher.process.timesteps(num_steps))
    each = int(teacher.evaluations_at(levels, guidance_scale != 1).sum())
    source.evaluations += each * size * processes.is_main()


def _write_chunk(source: Synthetic, number: int, chunk: slice) -> Samples:
    assert source.shards is not None
    cond = {key: value[chunk] for key, value in source.conditions.items()}
    samples = source.images[chunk].clone(), cond
    source.shards.write(number, samples)
    return samples


def _read_others(source: Synthetic, how: Drawing) -> None:
    """Take the shards that other processes have drawn, together."""
    shards, own = source.shards, source.drawn_by
    assert shards is not None
    processes.wait()
    for number, chunk in enumerate(how.chunks(len(source.images))):
        if number % own.world != own.rank:
            _read_chunk(source, shards, number, chunk)


def _is_read(source: Synthetic, shards: SampleShards, number: int, chunk: slice) -> bool:
    """Take a shard that was drawn before; False for one that is damaged, which stderr names."""
    try:
        _read_chunk(source, shards, number, chunk)
    except UsageError:
        raise
    except DkdmError as error:
        warn(f"{error}: it is drawn again")
        return False
    return True


def _read_chunk(source: Synthetic, shards: SampleShards, number: int, chunk: slice) -> None:
    """Take a shard that was drawn before. Raises UsageError if it is of other conditions."""
    samples, cond = shards.read(number)
    same = cond.keys() == source.conditions.keys() and all(
        torch.equal(value, source.conditions[key][chunk]) for key, value in cond.items()
    )
    if samples.shape != source.images[chunk].shape or not same:
        raise UsageError(
            f"{shards.path(number)} holds samples of another shape or other conditions: go on with "
            f"the options it was begun with, or remove {shards.folder}"
        )
    source.images[chunk] = samples
