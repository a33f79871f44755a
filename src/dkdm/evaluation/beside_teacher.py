"""What says without any image how near a student's samples and outputs are to its teacher's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.evaluation.comparison import GAP_SAMPLES, level_gaps
from dkdm.evaluation.cost import undisturbed
from dkdm.evaluation.energy import energy_distance
from dkdm.evaluation.results import LevelGap

MOST = 2000  # samples of an energy distance: the time grows with their square
NAMES = ("teacher_distance", "gap")


@dataclass(frozen=True)
class TeacherDistance:
    """The energy distance between `num_samples` samples of a model and as many of its teacher.

    - `share`: of the largest that it could be, from 0 (equal) to 1 (nothing in common).
    - `floor`, `floor_share`: of one half of the teacher's samples to the other, which has other
      noise; None with fewer than 4 samples. They lie about 0, at times a little below.
    """

    distance: float
    share: float
    floor: float | None
    floor_share: float | None
    num_samples: int


@dataclass(frozen=True)
class TeacherGap:
    """How far the outputs are apart on `num_samples` noised samples of the teacher, per level."""

    levels: tuple[LevelGap, ...]
    num_samples: int

    @property
    def mean(self) -> float:
        """The mean of the relative gaps over the levels."""
        return sum(gap.relative for gap in self.levels) / len(self.levels)


def teacher_distance(samples: Tensor, teacher: Tensor) -> TeacherDistance:
    """Compare samples [N, ...] of a model with the teacher's [M, ...], of other noise."""
    found, count = energy_distance(samples, teacher), min(len(samples), len(teacher))
    if len(teacher) < 4:
        return TeacherDistance(found.distance, found.share, None, None, count)
    floor = energy_distance(*teacher.tensor_split(2))
    return TeacherDistance(found.distance, found.share, floor.distance, floor.share, count)


def teacher_gap(
    teacher: Denoiser,
    student: Denoiser,
    samples: Tensor,
    cond: Condition,
    seed: int,
    guidance_teacher: float,
    guidance_student: float,
) -> TeacherGap:
    """Compare the outputs on the first samples [N, ...] of the teacher; cond: a row for each."""
    few = samples[:GAP_SAMPLES]
    with undisturbed(teacher), undisturbed(student):
        scales = guidance_teacher, guidance_student
        return TeacherGap(level_gaps(teacher, student, few, cond, seed, *scales), len(few))
