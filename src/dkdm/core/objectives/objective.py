"""The DKDM objective per sample: L_simple (Eq. 20), weighted over t, + lambda * L_vlb (Eq. 21)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from dkdm.config import LossOptions, WeightingOptions
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.matching import amplifies
from dkdm.core.devices import looked_up, to_device
from dkdm.core.diffusion.clipping import Clipping
from dkdm.core.diffusion.prediction import Prediction, clip_x_0, from_x_0_eps
from dkdm.core.objectives.variational import variational_loss
from dkdm.core.objectives.weighting import weights_of_levels
from dkdm.errors import UsageError

DEFAULTS = LossOptions()
# (student, its prediction, batch, target) -> loss of every sample, [B]
Term = Callable[[Denoiser, Prediction, Batch, Prediction], Tensor]


class Objective:
    """How far a student is from its target: a sum of terms, each a loss of every sample.

    student: whose levels are weighted, as it looks from the levels of the source. teacher: whose
    predictions the targets are; None if they are the noise that was added to clean samples.
    options: `vlb_weight` is lambda, which acts if both models learn their variance. level_weights:
    one more weight of each level, float64 [T]; None is 1. further: terms beside the paper's.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None = None,
        options: WeightingOptions = DEFAULTS,
        level_weights: Tensor | None = None,
        further: Sequence[Term] = (),
    ) -> None:
        self.teacher = teacher
        self.vlb_weight = options.vlb_weight if isinstance(options, LossOptions) else 0.0
        self.weights = weights_of_levels(student, options, level_weights)
        self.further = tuple(further)
        self.learns_variance = False
        self.clipping = Clipping()
        if teacher is not None and amplifies(student, teacher):
            self.clipping = replace(teacher.process.clipping, rederive_eps=True)
        if student.parameterization.learns_variance:
            check_variance(student, teacher)
            self.learns_variance = bool(self.vlb_weight)

    def __call__(self, student: Denoiser, batch: Batch, target: Prediction) -> Tensor:
        """The loss of every sample, [B]; the student is evaluated once."""
        prediction = student.predict(batch)
        first, *rest = (term(student, prediction, batch, target) for term in self.terms)
        return sum(rest, first)

    @property
    def terms(self) -> list[Term]:
        """The losses of every sample that are added up."""
        variational = [self._variational] if self.learns_variance else []
        return [self._simple, *variational, *self.further]

    def _simple(
        self, student: Denoiser, prediction: Prediction, batch: Batch, target: Prediction
    ) -> Tensor:
        """L_simple, weighted. If the teacher's error of eps would be amplified on the way to the
        student's output, x_0 is clipped as in the teacher's chain."""
        if self.teacher is not None:
            alpha, sigma = self.teacher.process.at(batch.t)
            target = clip_x_0(target, batch.x, alpha, sigma, self.clipping)
        weights = to_device(looked_up(self.weights, batch.t), batch.x.device, batch.x.dtype)
        return weights * simple_loss(student, prediction, target, batch.t)

    def _variational(
        self, student: Denoiser, prediction: Prediction, batch: Batch, target: Prediction
    ) -> Tensor:
        assert self.teacher is not None
        loss = variational_loss(student, self.teacher, prediction, target, batch.x, batch.t)
        return self.vlb_weight * loss


def check_variance(student: Denoiser, teacher: Denoiser | None) -> None:
    """Raise UsageError for a student whose variance nothing teaches."""
    if teacher is None or not teacher.parameterization.learns_variance:
        raise UsageError(
            "the student learns its variance, but nothing teaches it: give a teacher with a "
            "learned variance, or a student with a fixed one"
        )
    if student.rescale is not None:
        raise UsageError(
            "the student learns its variance, and its noise process is not the teacher's: L_vlb "
            "is not defined between them; give a student with a fixed variance"
        )


def simple_loss(student: Denoiser, prediction: Prediction, target: Prediction, t: Tensor) -> Tensor:
    """Mean squared error of the student's output against the target's, [B] (DKDM, Eq. 20).

    The target is expressed in the student's parameterization.
    """
    alpha, sigma = student.process.at(t)
    own = student.parameterization
    wanted = from_x_0_eps(own.prediction, target.x_0, target.eps, alpha, sigma, own.sigma_data)
    return (prediction.output - wanted).square().flatten(1).mean(1)
