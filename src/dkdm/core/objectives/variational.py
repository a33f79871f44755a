"""L_vlb: how far the student's reverse step is from the teacher's, if both learn a variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.variances import posterior_var, step_log_var, transition_var


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
    pair_1, pair_0 = student.process.at(t.new_ones(1)), student.process.at(t.new_zeros(1))
    clipped = torch.where((t == 0).to(post.device), posterior_var(*pair_1, *pair_0), post)
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
