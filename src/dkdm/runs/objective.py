"""The objective of a run, from its options: enter a new term of the loss here."""

from __future__ import annotations

from dkdm.config import LossOptions
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.matching import level_weights
from dkdm.core.denoisers.teachers import common_levels, parts_of
from dkdm.core.objectives.feature_loss import Features, match_features
from dkdm.core.objectives.objective import Objective, check_variance
from dkdm.errors import UsageError
from dkdm.runs.arms import Teaching


def objective_of(
    student: Denoiser,
    on_teacher_levels: Denoiser,
    teacher: Denoiser,
    loss: LossOptions,
    features: Features | None,
    teaching: Teaching,
) -> Objective:
    """What the student is to be like; teaching: what the teacher says of the batches."""
    if student.parameterization.learns_variance and not teaching.variance:
        check_variance(student, None)
    if not teaching.targets:
        return Objective(student, None, loss)
    parts = parts_of(teacher)
    weights = [level_weights(student, one, loss.loss_weighting) for one in parts]
    if len(parts) > 1:  # whose targets are clipped by their source, each as its teacher's
        levels = common_levels([one.process for one in parts])
        return Objective(on_teacher_levels, None, loss, levels.spread(weights))
    further = () if features is None else (features,)
    return Objective(on_teacher_levels, teacher, loss, weights[0], further)


def features_of(
    teacher: Denoiser, student: Denoiser, loss: LossOptions, teaching: Teaching
) -> Features | None:
    """The hidden features to match, if any. Raises UsageError if there are none to match."""
    if loss.feature_weight == 0:
        return None
    if not teaching.features:
        raise UsageError(
            "--feature-weight: with this --source, or several teachers, the teacher does not see "
            "whole batches: remove --feature-weight, or choose another --source"
        )
    return match_features(teacher, student, loss.feature_layers, loss.feature_weight)
