"""How far a student's outputs are from its teacher's, at each noise level."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.evaluation.comparison import GAP_SAMPLES, level_gaps
from dkdm.evaluation.cost import undisturbed
from dkdm.evaluation.results import LevelGap

NAMES = ("teacher_distance", "gap")


@dataclass(frozen=True)
class TeacherGap:
    """How far the outputs are apart on `num_samples` noised samples of the teacher, per level."""

    levels: tuple[LevelGap, ...]
    num_samples: int

    @property
    def mean(self) -> float:
        """The mean of the relative gaps over the levels."""
        return sum(gap.relative for gap in self.levels) / len(self.levels)


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
