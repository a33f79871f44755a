"""Trajectories: what teacher and student expected of a sample on the way to it."""

from __future__ import annotations

import torch
from torch import Tensor

from dkdm.evaluation.trajectories import Trajectories
from dkdm.report.grids import grid
from dkdm.report.images import reduced
from dkdm.report.plots import is_plotted, plots, value_range
from dkdm.report.run import Run
from dkdm.report.strips import Strip, label_name, made

RESULT = "result"
MOST = 8  # trajectories shown


def ways(run: Run) -> list[Strip]:
    """A strip for each sample: a column for each moment, the teacher's row over the student's."""
    found = run.trajectories
    if found is None:
        return []
    return [_way(run, found, row) for row in range(min(len(found.teacher), MOST))]


def other_levels(run: Run) -> str:
    """The student's levels, if they are not the teacher's; empty if they are."""
    found = run.trajectories
    if found is None or torch.equal(found.teacher_t, found.student_t):
        return ""
    return ", ".join(map(str, found.student_t.tolist()))


def _way(run: Run, found: Trajectories, row: int) -> Strip:
    levels = found.teacher_t.tolist()
    title = "" if found.labels is None else label_name(run, int(found.labels[row]))
    alt = (
        f"{title or f'Sample {row + 1}'} on its way, teacher over student, at t = "
        f"{', '.join(map(str, levels))}, and the result."
    )
    both = torch.cat([found.teacher[row], found.student[row]])
    count = len(levels) + 1
    image = grid(_shown(both), count)
    names = [f"t {t}" for t in levels] + [RESULT]
    return made(image, (count, count), title, names, alt, ("teacher", "student"))


def _shown(samples: Tensor) -> Tensor:
    """Images of samples [N, ...]; vectors and signals over the range of the results."""
    if not is_plotted(samples):
        return reduced(samples)
    half = len(samples) // 2
    return plots(samples, value_range(samples[[half - 1, -1]]))
