"""How much each noise level counts: one table, made once."""

from __future__ import annotations

import torch
from torch import Tensor

from dkdm.config import WeightingOptions
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import x_0_slope


def weights_of_levels(
    student: Denoiser, options: WeightingOptions, level_weights: Tensor | None = None
) -> Tensor:
    """The weight of a sample's loss by its level, float64 [T].

    "snr" and "min-snr" weigh the x_0 error by SNR or min(SNR, gamma) whatever the student predicts
    (arXiv 2303.09556, sec. 3.3), "capped" by min(SNR, gamma) + 1; "uniform" leaves the output
    error as it is. level_weights: one more weight of each level; None is 1.
    """
    alpha, sigma, own = student.process.alpha, student.process.sigma, student.parameterization
    further = torch.ones_like(alpha) if level_weights is None else level_weights
    if options.loss_weighting in ("auto", "uniform", "student"):
        return further
    snr = (alpha / sigma) ** 2
    least = snr.clamp(max=options.snr_gamma)
    wanted = {"snr": snr, "min-snr": least, "capped": least + 1}[options.loss_weighting]
    return wanted / x_0_slope(own.prediction, alpha, sigma, own.sigma_data) ** 2 * further
