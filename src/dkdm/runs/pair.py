"""A student and its teacher draw from the same noise, each timed: behind the page of `dkdm ui`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from dkdm.config import ClassId, DistillConfig, Sampler, Scale, Seed, TrainConfig
from dkdm.core.denoisers.conditioning import ClassLabels, Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import kind_of, null_or_none
from dkdm.core.few_steps.model import fewest_steps
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.comparison import check_shapes
from dkdm.evaluation.cost import undisturbed
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.models.prompts import Prompts, with_prompts
from dkdm.reading.options import Options
from dkdm.reading.values import Range
from dkdm.runs.judges import own_scales


@dataclass(frozen=True, eq=False)
class Pair:
    """A teacher and its student, and the guidance scales that they are drawn with by default.

    is_baked: whether guidance was baked into the student, which is then drawn without.
    """

    teacher: Denoiser
    student: Denoiser
    guidance_scale: float = 1.0
    is_baked: bool = False

    @property
    def classes(self) -> list[tuple[str, int]]:
        """Name and id of each class that can be asked for; empty without classes."""
        own = self.student.conditioning
        if not isinstance(own, ClassLabels):
            return []
        return [(own.names[i] if own.names else f"class {i}", i) for i in own.drawn]

    @property
    def takes_prompts(self) -> bool:
        """Whether it is asked for prompts."""
        return isinstance(self.student.conditioning, Prompts)

    @property
    def can_be_guided(self) -> bool:
        """Whether a guidance scale changes anything."""
        model = self.teacher if self.is_baked else self.student
        return model.embeds_guidance or null_or_none(model.conditioning, 1) is not None


class Wish(Options):
    """What is to be drawn. class_id: None takes the classes in turns; prompt: of a text model."""

    num_samples: Annotated[int, Range(1, 64)] = 8
    num_steps: Annotated[int, Range(1, 10_000)] = 25
    seed: Seed = 0
    sampler: Sampler = "ddim"
    guidance_scale: Scale = 1.0
    class_id: ClassId | None = None
    prompt: str = ""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Samples [N, ...] in about [-1, 1], and the seconds that drawing and decoding them took."""

    samples: Tensor
    seconds: float
    decoding: float

    def in_words(self, num_steps: int) -> str:
        """The latency, as the page shows it."""
        count = len(self.samples)
        each = 1000 * self.seconds / count
        found = f"{self.seconds:.2f} s for {count} in {num_steps} steps, {each:,.0f} ms each"
        return found + (f"; decoded in {self.decoding:.2f} s" if self.decoding >= 0.01 else "")


def pair_of(teacher: Denoiser, student: Denoiser, run: DistillConfig | TrainConfig | None) -> Pair:
    """A pair that is ready to draw, guided as the run measured itself.

    Raises UsageError for models of different shapes or conditions.
    """
    check_shapes(teacher, student)
    asks = [kind_of(each.conditioning).asks for each in (teacher, student)]
    if asks[0] != asks[1]:
        words = " and ".join(each or "nothing" for each in asks)
        raise UsageError(f"teacher and student cannot be compared: they ask for {words}")
    teachers, own = own_scales(run, student)
    is_baked = teachers is not None and own == 1
    return Pair(teacher, student, own if teachers is None else teachers, is_baked)


def draw_both(pair: Pair, wish: Wish) -> tuple[Drawn, Drawn]:
    """Teacher's and student's samples from the same noise, one after the other.

    Each model draws in its fewest steps before its time is taken. Raises UsageError for a wish that
    the models cannot fulfil, DkdmError for samples that are not finite.
    """
    teacher, student = (_asked(model, wish) for model in (pair.teacher, pair.student))
    cond = _condition(student, wish)
    scale = wish.guidance_scale if pair.can_be_guided else 1.0
    scales = scale, 1.0 if pair.is_baked else scale
    return (
        _timed(teacher, cond, wish, scales[0]),
        _timed(student, cond, wish, scales[1]),
    )


def _asked(model: Denoiser, wish: Wish) -> Denoiser:
    """The model with the prompt; any other as it is."""
    if not isinstance(model.conditioning, Prompts):
        return model
    if not wish.prompt.strip():
        raise UsageError("this model draws what a prompt says: write one")
    return replace(model, conditioning=with_prompts(model.conditioning, (wish.prompt,), ""))


def _condition(student: Denoiser, wish: Wish) -> Condition:
    conditioning = student.conditioning
    if wish.class_id is not None and isinstance(conditioning, ClassLabels):
        return conditioning.of([wish.class_id] * wish.num_samples)
    return conditioning.in_turns(wish.num_samples)


def _timed(model: Denoiser, cond: Condition, wish: Wish, scale: float) -> Drawn:
    sampling = Sampling(wish.num_samples, wish.num_steps, wish.seed, wish.sampler)
    with undisturbed(model):
        draw(model, cond, replace(sampling, num_steps=fewest_steps(model)), scale)
        started = time.perf_counter()
        samples = draw(model, cond, sampling, scale)
        drawn = time.perf_counter()
        images = decoded(model, samples)
    if not images.isfinite().all():
        raise DkdmError(f"{model.name} drew samples that are not finite: try other settings")
    return Drawn(images, drawn - started, time.perf_counter() - drawn)
