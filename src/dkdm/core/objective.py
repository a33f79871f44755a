"""The DKDM objective: L_simple (Eq. 20) + lambda * L_vlb (Eq. 21), per sample, weighted over t."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dkdm.config import LossWeighting
from dkdm.core.denoiser import Denoiser
from dkdm.core.matching import amplifies
from dkdm.core.prediction import (
    Prediction,
    clip_x_0,
    from_x_0_eps,
    posterior_var,
    step_log_var,
    transition_var,
    x_0_slope,
)
from dkdm.core.process import per_sample
from dkdm.errors import UsageError


@dataclass(frozen=True)
class Objective:
    """How far a student's prediction is from its target.

    student: gives process and parameterization. teacher: None where the target is the noise that
    was added to clean samples. vlb_weight: lambda; acts where both models learn their variance.
    level_weights: one more weight of each of the teacher's levels, float64 [T]; None is 1.
    """

    student: Denoiser
    teacher: Denoiser | None = None
    weighting: LossWeighting = "uniform"
    snr_gamma: float = 5.0
    vlb_weight: float = 1.0
    level_weights: Tensor | None = None

    def __post_init__(self) -> None:
        learns = self.student.parameterization.learns_variance
        teaches = self.teacher is not None and self.teacher.parameterization.learns_variance
        if learns and not teaches:
            raise UsageError(
                "the student learns its variance, but nothing teaches it: expected a teacher with "
                "a learned variance, or a student with a fixed one"
            )
        if learns and self.student.rescale is not None:
            raise UsageError(
                "the student learns its variance, and its noise process is another than the "
                "teacher's: L_vlb is not defined between them; expected a fixed variance"
            )

    def __call__(self, prediction: Prediction, target: Prediction, x: Tensor, t: Tensor) -> Tensor:
        """The loss of every sample, [B]. x: [B, ...] the states; t: int64 [B]."""
        weights = self.weights(t).to(x.device, x.dtype)
        loss = weights * simple_loss(self.student, prediction, self._bounded(target, x, t), t)
        if self.teacher is None or not self.student.parameterization.learns_variance:
            return loss
        if self.vlb_weight == 0:
            return loss
        vlb = variational_loss(self.student, self.teacher, prediction, target, x, t)
        return loss + self.vlb_weight * vlb

    def _bounded(self, target: Prediction, x: Tensor, t: Tensor) -> Prediction:
        """Where an error of eps is amplified on its way to the student's output, x_0 is clipped as
        in the teacher's chain."""
        if self.teacher is None or not amplifies(self.student, self.teacher):
            return target
        process = self.teacher.process
        return clip_x_0(target, x, *process.at(t), replace(process.clipping, rederive_eps=True))

    def weights(self, t: Tensor) -> Tensor:
        """Weight of each sample's level, float64 [B].

        "snr" and "min-snr" weigh the x_0 error by SNR or min(SNR, gamma) whatever the student
        predicts (arXiv 2303.09556, sec. 3.3); "uniform" leaves the output error as it is.
        """
        alpha, sigma = self.student.process.at(t)
        further = 1 if self.level_weights is None else self.level_weights[t.cpu()]
        if self.weighting in ("uniform", "student"):
            return torch.ones_like(alpha) * further
        own = self.student.parameterization
        snr = (alpha / sigma) ** 2
        wanted = snr if self.weighting == "snr" else snr.clamp(max=self.snr_gamma)
        return wanted / x_0_slope(own.prediction, alpha, sigma, own.sigma_data) ** 2 * further


def simple_loss(student: Denoiser, prediction: Prediction, target: Prediction, t: Tensor) -> Tensor:
    """Mean squared error of the student's output against the target's, [B] (DKDM, Eq. 20).

    The target is expressed in the student's own parameterization.
    """
    alpha, sigma = student.process.at(t)
    own = student.parameterization
    wanted = from_x_0_eps(own.prediction, target.x_0, target.eps, alpha, sigma, own.sigma_data)
    return (prediction.output - wanted).square().flatten(1).mean(1)


def variational_loss(
    student: Denoiser,
    teacher: Denoiser,
    prediction: Prediction,
    target: Prediction,
    x: Tensor,
    t: Tensor,
) -> Tensor:
    """KL(p_T(x_{t-1} | x_t) || p_S(x_{t-1} | x_t)) in bits per dimension, [B] (DKDM, Eq. 21).

    Means come from each model's unclipped x_0 and are detached: only the variance learns. At t = 0
    the variance bounds are those of t = 1 (clipped table of Improved DDPM, arXiv 2102.09672).
    """
    alpha_t, sigma_t = student.process.at(t)
    alpha_s, sigma_s = student.process.at(t - 1)
    post = posterior_var(alpha_t, sigma_t, alpha_s, sigma_s)
    beta = transition_var(alpha_t, sigma_t, alpha_s, sigma_s)
    pair_1, pair_0 = student.process.at(torch.tensor([1])), student.process.at(torch.tensor([0]))
    clipped = torch.where(t.cpu() == 0, posterior_var(*pair_1, *pair_0), post)
    direction = (sigma_s**2 - post).clamp(min=0).sqrt()

    def mean(p: Prediction) -> Tensor:
        at_s = per_sample(alpha_s, x) * p.x_0 + per_sample(direction, x) * p.eps
        return at_s.detach()

    log_vars = [
        step_log_var(model.parameterization.variance, clipped, beta, p.variance_output, x)
        for model, p in ((teacher, target), (student, prediction))
    ]
    return gaussian_kl(mean(target), log_vars[0], mean(prediction), log_vars[1]).flatten(1).mean(1)


def gaussian_kl(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL(p || q) of diagonal Gaussians in bits, elementwise."""
    ratio = (log_var_p - log_var_q).exp()
    distance = (mean_p - mean_q).square() * (-log_var_q).exp()
    return 0.5 * (log_var_q - log_var_p + ratio + distance - 1) / math.log(2)
