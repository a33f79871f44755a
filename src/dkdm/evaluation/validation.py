"""One number that says how good a student is while it learns: the same samples every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.randomness import derived_seed
from dkdm.data.reference import Reference
from dkdm.errors import UsageError
from dkdm.evaluation.comparison import GAP_SAMPLES, level_gaps
from dkdm.evaluation.cost import undisturbed
from dkdm.evaluation.energy import MOST, energy_distance
from dkdm.evaluation.metrics import METRICS, PER_SAMPLE, Sampled, check, measure
from dkdm.evaluation.numbers import number, percent
from dkdm.evaluation.same_noise import Sampling, decoded, draw

REHEARSED = 6  # images that every metric can be measured of


class Watched(NamedTuple):
    """How a number is called and shown, and which values are better."""

    label: str
    better: Literal["lower", "higher"] | None
    format: Callable[[float], str]


WITHOUT_IMAGES = {
    "gap": Watched("gap to the teacher's output, mean over noise levels", "lower", percent),
    "teacher_distance": Watched("energy distance to the teacher's samples", "lower", number),
}


def watched(name: str) -> Watched:
    """What `--validation-metric` names.

    Raises `UsageError` for an unknown metric, for one of which neither more nor less is better, and
    for those of `dkdm evaluate` alone, which look at single samples.
    """
    if name in WITHOUT_IMAGES:
        return WITHOUT_IMAGES[name]
    known = {key: each for key, each in METRICS.items() if each.better and key not in PER_SAMPLE}
    if name not in known:
        what = "is neither better high nor low" if name in METRICS else "is no metric"
        what = "is measured by dkdm evaluate only" if name in PER_SAMPLE else what
        words = ", ".join([*WITHOUT_IMAGES, *known])
        raise UsageError(f"--validation-metric {name} {what}: give one of {words}")
    metric = known[name]
    return Watched(metric.label, metric.better, metric.format)


@dataclass(eq=False)
class Validation:
    """Measures students of one run by one metric.

    - `name`: in `METRICS` or `WITHOUT_IMAGES`.
    - `sampling`: of the samples; its seed gives other noise than that of the final evaluation.
    - `guidance`: scales that samples of teacher and student are drawn with.
    - `teacher`: None for a run without one.
    - `reference`: what samples are measured against; None if nothing fits or no image is needed.
    """

    name: str
    sampling: Sampling
    guidance: tuple[float, float]
    teacher: Denoiser | None = None
    reference: Reference | None = None
    _of_teacher: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        watched(self.name)
        if self.name in WITHOUT_IMAGES:
            most = GAP_SAMPLES if self.name == "gap" else MOST
            few = min(self.sampling.num_samples, most)
            self.sampling = replace(self.sampling, num_samples=few)
            self.reference = None
            if self.teacher is None:
                raise UsageError(
                    f"--validation-metric {self.name}: this run has no teacher; give a metric of "
                    "its reference, such as fd"
                )
        elif self.reference is None:
            raise UsageError(
                f"--validation-metric {self.name}: there is no reference to measure it against; "
                f"give --evaluation-reference, or {' or '.join(WITHOUT_IMAGES)} as the metric"
            )
        else:
            check([self.name], self.reference)
            fewest = min(METRICS[self.name].least, REHEARSED)
            if self.sampling.num_samples < fewest:
                raise UsageError(
                    f"--validation-samples {self.sampling.num_samples} is too few for {self.name}: "
                    f"give {fewest} or more"
                )
            kept = self.reference.features
            self.reference = replace(self.reference, features=kept and cache(kept))

    def rehearse(self, student: Denoiser) -> None:
        """Measure a few black images, so that what cannot be measured is refused before work.

        Raises `UsageError` for a metric that the student's samples do not have.
        """
        if self.reference is None:
            return
        x = torch.zeros(1, *student.sample_shape)
        images = decoded(student, x).expand(REHEARSED, *[-1] * len(student.sample_shape))
        labels = student.conditioning.in_turns(self.sampling.num_samples).get("class_labels")
        some = None if labels is None else labels.sort().values[-REHEARSED:]
        self._value(images, some)

    def measure(self, student: Denoiser) -> float:
        """The metric of a student. Raises `DkdmError` for samples that are not finite."""
        with undisturbed(student):
            if self.name == "gap":
                return self._gap(student)
            cond = student.conditioning.in_turns(self.sampling.num_samples)
            samples = draw(student, cond, self.sampling, self.guidance[1])
            if self.name == "teacher_distance":
                return energy_distance(samples, self._teachers(cond)).distance
            return self._value(decoded(student, samples), cond.get("class_labels"))

    def _value(self, images: Tensor, labels: Tensor | None) -> float:
        assert self.reference is not None  # else it was refused
        sampled = Sampled(self.reference.network(images), labels)
        found = measure(sampled, self.reference, [self.name]).get(self.name)
        if found is None:
            raise UsageError(
                f"--validation-metric {self.name} needs a model that draws classes; give another"
            )
        return found

    def _gap(self, student: Denoiser) -> float:
        assert self.teacher is not None  # else it was refused
        cond = student.conditioning.in_turns(self.sampling.num_samples)
        x_0, seed = self._teachers(cond), self.sampling.seed
        with undisturbed(self.teacher):
            gaps = level_gaps(self.teacher, student, x_0, cond, seed, *self.guidance)
        return fmean(gap.relative for gap in gaps)

    def _teachers(self, cond: Condition) -> Tensor:
        """Samples of the teacher, drawn once; their noise is not the student's."""
        assert self.teacher is not None  # else it was refused
        if not self._of_teacher:
            seed = derived_seed(self.sampling.seed, "teacher")
            sampling = replace(self.sampling, seed=seed)
            with undisturbed(self.teacher):
                self._of_teacher.append(draw(self.teacher, cond, sampling, self.guidance[0]))
        return self._of_teacher[0]

    @property
    def how(self) -> dict[str, Any]:
        """What is measured and how, as JSON; equal for values that can be compared."""
        return {
            "metric": self.name,
            "num_samples": self.sampling.num_samples,
            "sampler": self.sampling.sampler,
            "num_steps": self.sampling.num_steps,
            "seed": self.sampling.seed,
            "guidance_scale": self.guidance[1],
            "reference": self.reference.name if self.reference else None,
            "network": self.reference.network.name if self.reference else None,
        }


def how_in_words(how: Mapping[str, Any]) -> str:
    """How a validation measured, by `Validation.how`; what that does not say is left out."""
    known = {key: value for key, value in how.items() if value is not None}
    if "sampler" in known:
        known["sampler"] = str(known["sampler"]).upper()
    if known.get("guidance_scale") == 1:
        known["guidance_scale"] = "none"
    words = {
        "num_samples": "{} samples",
        "sampler": "{}",
        "num_steps": "{} steps",
        "guidance_scale": "guidance {}",
        "seed": "seed {}",
        "reference": "against {}",
        "network": "by {}",
    }
    return ", ".join(text.format(known[key]) for key, text in words.items() if key in known)


def validation_seed(seed: int) -> int:
    """The seed of a run's validation: the best weights are chosen by other noise than they are
    measured with at the end."""
    return derived_seed(seed, "validation") % 2**32
