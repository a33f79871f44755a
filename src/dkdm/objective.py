"""The DKDM objective: L_simple (Eq. 20) + lambda * L_vlb (Eq. 21), per sample, weighted over t."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dkdm.config import LossWeighting
from dkdm.denoiser import Denoiser
from dkdm.errors import UsageError
from dkdm.prediction import (
    Prediction,
    from_x_0_eps,
    posterior_var,
    step_log_var,
    transition_var,
    x_0_slope,
)
from dkdm.process import per_sample


@dataclass(frozen=True)
class Objective:
    """How far a student's prediction is from its target.

    student: gives process and parameterization. teacher: None where the target is the noise that
    was added to real images. vlb_weight: lambda; acts only where both models learn their variance.
    """

    student: Denoiser
    teacher: Denoiser | None = None
    weighting: LossWeighting = "uniform"
    snr_gamma: float = 5.0
    vlb_weight: float = 1.0

    def __post_init__(self) -> None:
        learns = self.student.parameterization.learns_variance
        teaches = self.teacher is not None and self.teacher.parameterization.learns_variance
        if learns and not teaches:
            raise UsageError(
                "the student learns its variance, but nothing teaches it: expected a teacher with "
                "a learned variance, or a student with a fixed one"
            )

    def __call__(self, prediction: Prediction, target: Prediction, x: Tensor, t: Tensor) -> Tensor:
        """The loss of every sample, [B]. x: [B, ...] the states; t: int64 [B]."""
        loss = self.weights(t).to(x.device, x.dtype) * simple_loss(
            self.student, prediction, target, t
        )
        if self.teacher is None or not self.student.parameterization.learns_variance:
            return loss
        if self.vlb_weight == 0:
            return loss
        vlb = variational_loss(self.student, self.teacher, prediction, target, x, t)
        return loss + self.vlb_weight * vlb

    def weights(self, t: Tensor) -> Tensor:
        """Weight of each sample's level, float64 [B].

        "snr" and "min-snr" weigh the x_0 error by SNR or min(SNR, gamma) whatever the student
        predicts (arXiv 2303.09556, sec. 3.3); "uniform" leaves the output error as it is.
        """
        alpha, sigma = self.student.process.at(t)
        if self.weighting == "uniform":
            return torch.ones_like(alpha)
        own = self.student.parameterization
        snr = (alpha / sigma) ** 2
        wanted = snr if self.weighting == "snr" else snr.clamp(max=self.snr_gamma)
        return wanted / x_0_slope(own.prediction, alpha, sigma, own.sigma_data) ** 2


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
