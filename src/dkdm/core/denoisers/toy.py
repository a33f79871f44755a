"""The exact teacher: a Gaussian mixture, whose denoiser is known in closed form.

For tests and first steps, without training or files, in any shape, process and parameterization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dkdm.core.denoisers.conditioning import ClassLabels, Conditioning, Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization, from_x_0_eps, scale_input
from dkdm.core.diffusion.process import Process, per_sample
from dkdm.errors import UsageError


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A mixture of K isotropic Gaussians in any shape; build it with `of`.

    means: float64 [K, ...]; std, weights: float64 [K], the weights summing to 1; classes: int64
    [K], the class each component belongs to, or None.
    """

    means: Tensor
    std: Tensor
    weights: Tensor
    classes: Tensor | None = None

    @classmethod
    def of(
        cls,
        means: Tensor | Sequence[Sequence[float]],
        std: Tensor | Sequence[float] | float = 0.1,
        weights: Tensor | Sequence[float] | None = None,
        classes: Tensor | Sequence[int] | None = None,
    ) -> GaussianMixture:
        """Build a mixture from means [K, ...].

        std: one for all or [K]; weights: [K] in any scale, None makes them equal; classes: [K] ids
        0..C-1, each used. Raises UsageError for values that make no mixture.
        """
        mu = torch.as_tensor(means, dtype=torch.float64)
        if mu.ndim < 2:
            raise UsageError(f"mixture: means have shape {tuple(mu.shape)}: give [K, ...]")
        width = _per_component("std", std, len(mu))
        share = _per_component("weight", 1.0 if weights is None else weights, len(mu))
        if not (share > 0).all() or not (width >= 0).all():
            raise UsageError("mixture: every weight must be above 0 and every std 0 or more")
        ids = None if classes is None else _per_component("class", classes, len(mu)).long()
        if ids is not None and ids.unique().tolist() != list(range(int(ids.max()) + 1)):
            raise UsageError(f"mixture: classes are {ids.tolist()}: use each of 0..C-1")
        return cls(mu, width, share / share.sum(), ids)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.means.shape[1:])

    @property
    def members(self) -> Tensor:
        """The components of each class, bool [C + 1, K]; the last row, the null class, has all."""
        if self.classes is None:
            return torch.ones(1, len(self.std), dtype=torch.bool)
        each = functional.one_hot(self.classes).T.bool()
        return torch.cat([each, torch.ones_like(each[:1])])

    def of_class(self, label: int) -> GaussianMixture:
        """The mixture of one class's components."""
        keep = self.members[label]
        return self.of(self.means[keep], self.std[keep], self.weights[keep])

    def noised(self, alpha: float, sigma: float) -> GaussianMixture:
        """The law of alpha x_0 + sigma eps, again a mixture."""
        std = ((alpha * self.std) ** 2 + sigma**2).sqrt()
        return GaussianMixture(alpha * self.means, std, self.weights, self.classes)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent samples, float64 [count, ...]."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn((count, *self.sample_shape), generator=generator, dtype=torch.float64)
        return self.means[which] + per_sample(self.std[which], z) * z

    def log_density(self, x: Tensor) -> Tensor:
        """ln p(x) for x [B, ...], float64 [B]."""
        offset = x.double().flatten(1).unsqueeze(1) - self.means.flatten(1)
        return _log_joint(offset, self.std**2, self.weights).logsumexp(1)

    def cdf(self, values: Tensor, coordinate: int = 0) -> Tensor:
        """P(x[coordinate] <= value) for values [N]; coordinate counts the flattened sample."""
        centre = self.means.flatten(1)[:, coordinate]
        return torch.special.ndtr((values.double().unsqueeze(1) - centre) / self.std) @ self.weights

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the flattened sample."""
        means = self.means.flatten(1)
        mean = self.weights @ means
        spread = (self.weights * (means - mean).T) @ (means - mean)
        return mean, spread + self.weights @ self.std**2 * torch.eye(len(mean), dtype=torch.float64)

    def posterior_mean(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """E[x_0 | x_t = x], float64 [B, ...], for x [B, ...] and alpha, sigma float64 [B].

        labels: int64 [B], classes or C for any; None is any. Component k has x_t ~ N(alpha mu_k,
        v_k), v_k = alpha^2 s_k^2 + sigma^2, hence E[x_0 | x_t, k] = mu_k + alpha s_k^2 / v_k (x_t -
        alpha mu_k) = (sigma^2 mu_k + alpha s_k^2 x_t) / v_k, averaged with p(k | x_t). Source:
        Bishop, Pattern Recognition and Machine Learning, Eq. 2.116; the same as Tweedie's (x_t +
        sigma^2 grad ln p_t(x_t)) / alpha.
        """
        means, std = self.means.flatten(1).to(x.device), self.std.to(x.device)
        a, s = alpha.to(x.device).unsqueeze(1), sigma.to(x.device).unsqueeze(1)
        var = (a * std) ** 2 + s**2
        state = x.double().flatten(1)
        offset = state.unsqueeze(1) - a.unsqueeze(2) * means
        log_joint = _log_joint(offset, var, self.weights.to(x.device))
        if labels is not None:
            log_joint = log_joint.where(self.members.to(x.device)[labels], -math.inf)
        share = log_joint.softmax(1) / var
        x_0 = (s**2 * share) @ means + (a * std**2 * share).sum(1, keepdim=True) * state
        return x_0.reshape(x.shape)


def _per_component(what: str, values: Tensor | Sequence[float] | float, count: int) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float64)
    if tensor.ndim == 0:
        return tensor.expand(count)
    if tensor.shape != (count,):
        raise UsageError(
            f"mixture: {len(tensor)} values of {what} for {count} means: give one for each"
        )
    return tensor


def _log_joint(offset: Tensor, var: Tensor, weights: Tensor) -> Tensor:
    """ln of weight times density of each component, [B, K], from x - mean [B, K, D]."""
    distance, dimension = offset.square().sum(2), offset.shape[2]
    return weights.log() - 0.5 * (distance / var + dimension * (2 * math.pi * var).log())


class ExactNetwork(nn.Module):
    """What a perfectly trained network would compute: the posterior mean, as the output asked for.

    Takes (x, time, class_labels) like any network, and finds t as the level whose network time is
    nearest; that is exact in float32 and float64.
    """

    def __init__(
        self, mixture: GaussianMixture, process: Process, parameterization: Parameterization
    ) -> None:
        super().__init__()
        self.mixture, self.process, self.parameterization = mixture, process, parameterization
        times, self.order = process.network_time.sort()
        self.midpoints = (times[1:] + times[:-1]) / 2

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network's output [B, ...] in the dtype of x [B, ...], computed in float64."""
        meaning = self.parameterization
        t = self.order[torch.bucketize(time.cpu().double(), self.midpoints)]
        alpha, sigma = self.process.at(t)
        shown = x.double()
        ones = torch.ones_like(shown)
        state = shown / scale_input(meaning.prediction, ones, sigma, meaning.sigma_data)
        x_0 = self.mixture.posterior_mean(state, alpha, sigma, class_labels)
        eps = (state - per_sample(alpha, state) * x_0) / per_sample(sigma, state)
        output = from_x_0_eps(meaning.prediction, x_0, eps, alpha, sigma, meaning.sigma_data)
        return output.to(x.dtype)


def mixture_denoiser(
    mixture: GaussianMixture, process: Process, parameterization: Parameterization
) -> Denoiser:
    """The exact denoiser of a mixture, with the parameterization's fixed variance.

    Class-conditional if the mixture has classes; its null class C stands for all of them.
    """
    conditioning: Conditioning = Unconditional()
    if mixture.classes is not None:
        count = len(mixture.members) - 1
        conditioning = ClassLabels(count, null_class=count)
    network = ExactNetwork(mixture, process, parameterization).eval()
    return Denoiser(
        network, process, parameterization, mixture.sample_shape, conditioning, name="toy"
    )
