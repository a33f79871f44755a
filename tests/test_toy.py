"""The exact teacher against numerical integration, its own law, and samplers of every process."""

import math
from typing import get_args

import pytest
import torch
from torch import distributions

from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization, Prediction, PredictionType
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import (
    beta_schedule,
    from_betas,
    karras,
    rectified_flow,
    zero_terminal_snr,
)
from dkdm.core.diffusion.steps import reverse_step
from dkdm.errors import UsageError
from factories import counting

KINDS = get_args(PredictionType)
LEVELS = 200
PROCESSES = {
    "ddpm": from_betas(beta_schedule("squaredcos_cap_v2", LEVELS)),
    "zero-snr": from_betas(zero_terminal_snr(beta_schedule("linear", LEVELS, 1e-3, 0.1))),
    "flow": rectified_flow(LEVELS, shift=2.0),
    "karras": karras(LEVELS, 0.01, 20.0),
}
TRIANGLE = GaussianMixture.of(
    means=[[-1.5, 0.5], [1.0, 1.5], [0.8, -1.2]], std=[0.2, 0.3, 0.5], weights=[5, 3, 2]
)
LINE = GaussianMixture.of(means=[[-1.0], [0.5], [2.0]], std=[0.3, 0.2, 0.5], weights=[1, 2, 3])
IMAGES = GaussianMixture.of(torch.randn(4, 1, 3, 2), std=0.4)
LABELLED = GaussianMixture.of(
    means=[[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], std=0.3, weights=[1, 2, 1], classes=[0, 1, 1]
)


def legal_kinds(process):
    return [kind for kind in KINDS if kind != "epsilon" or (process.alpha > 0).all()]


def law_of(mixture):
    """The same mixture as a torch distribution over flattened samples."""
    means = mixture.means.flatten(1)
    std = mixture.std.unsqueeze(1).expand_as(means)
    components = distributions.Independent(distributions.Normal(means, std), 1)
    which = distributions.Categorical(mixture.weights)
    return distributions.MixtureSameFamily(which, components)


def normal(seed):
    return torch.Generator().manual_seed(seed)


def kolmogorov_smirnov(values, cdf):
    """sqrt(N) times the largest distance of distribution functions; above 2.5 in 1 of 10^5."""
    count = len(values)
    expected = cdf(values.sort().values)
    steps = torch.arange(count + 1) / count
    distance = torch.maximum(steps[1:] - expected, expected - steps[:-1]).max()
    return float(distance) * count**0.5


def assert_follows(x, mixture):
    """Samples have the mixture's moments, component weights and marginals."""
    mean, covariance = mixture.moments()
    error = (covariance.diagonal() / len(x)).sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * error).all()
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0.06, atol=0.06)
    nearest = torch.cdist(x, mixture.means).argmin(1)
    share = nearest.bincount(minlength=len(mixture.weights)) / len(x)
    torch.testing.assert_close(share.double(), mixture.weights, rtol=0, atol=0.04)
    for i in range(x.shape[1]):
        assert kolmogorov_smirnov(x[:, i], lambda v, i=i: mixture.cdf(v, i)) < 2.5


@pytest.mark.parametrize("mixture", [TRIANGLE, IMAGES], ids=["points", "images"])
def test_mixture_is_the_torch_distribution(mixture):
    law = law_of(mixture)
    x = mixture.sample(50, normal(0))
    assert x.shape == (50, *mixture.sample_shape)
    torch.testing.assert_close(mixture.log_density(x), law.log_prob(x.flatten(1)))
    mean, covariance = mixture.moments()
    torch.testing.assert_close(mean, law.mean)
    torch.testing.assert_close(covariance.diagonal(), law.variance)


def test_samples_and_their_noised_versions_follow_the_stated_laws():
    x_0 = TRIANGLE.sample(4000, normal(1))
    assert_follows(x_0, TRIANGLE)
    process = PROCESSES["flow"]
    t = torch.full((4000,), 80)
    x = process.add_noise(x_0, torch.randn(4000, 2, generator=normal(2)).double(), t)
    noised = TRIANGLE.noised(float(process.alpha[80]), float(process.sigma[80]))
    for i in range(2):
        assert kolmogorov_smirnov(x[:, i], lambda v, i=i: noised.cdf(v, i)) < 2.5


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_posterior_mean_is_the_integral_over_x_0(process):
    x_0 = torch.linspace(-5, 6, 20_001).double()
    prior = law_of(LINE).log_prob(x_0.unsqueeze(1))
    for level in (20, 100, 150, LEVELS - 1):
        alpha, sigma = process.at(torch.tensor([level]))
        x = torch.linspace(-3, 3, 7).double() * (alpha**2 + sigma**2).sqrt()
        likelihood = distributions.Normal(alpha * x_0, sigma).log_prob(x.unsqueeze(1))
        expected = (prior + likelihood).softmax(1) @ x_0
        found = LINE.posterior_mean(x.unsqueeze(1), alpha.expand(7), sigma.expand(7))
        torch.testing.assert_close(found.squeeze(1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mixture", [TRIANGLE, IMAGES], ids=["points", "images"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_posterior_mean_is_tweedies(process, mixture):
    for level in (0, 50, 198):
        alpha, sigma = float(process.alpha[level]), float(process.sigma[level])
        noised = mixture.noised(alpha, sigma)
        x = noised.sample(9, normal(level)).requires_grad_()
        (score,) = torch.autograd.grad(noised.log_density(x).sum(), x)
        expected = (x + sigma**2 * score) / alpha
        at = torch.full((9,), level)
        found = mixture.posterior_mean(x, *process.at(at))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_parameterization_says_the_same(process, dtype):
    t = torch.arange(LEVELS)
    x_0 = IMAGES.sample(LEVELS, normal(3)).to(dtype)
    x = process.add_noise(x_0, torch.randn(x_0.shape, generator=normal(4)).to(dtype), t)
    exact = IMAGES.posterior_mean(x, *process.at(t))
    alpha, sigma = (per_sample(v, exact) for v in process.at(t))
    digits = 1e-3 if dtype == torch.float32 else 1e-9
    for kind in legal_kinds(process):
        denoiser = mixture_denoiser(IMAGES, process, Parameterization(kind, sigma_data=0.7))
        found = denoiser.predict(Batch(x, t, {}, t))
        assert found.x_0.dtype == dtype
        # Rounding of x is amplified by 1 / alpha in x_0, by 1 / sigma in eps.
        x_0_error = (found.x_0 - exact).abs() * alpha.clamp(max=1)
        eps_error = (found.eps - (x - alpha * exact) / sigma).abs() * sigma.clamp(max=1)
        assert x_0_error.max() < digits
        assert eps_error.max() < digits


@pytest.mark.parametrize(
    "process",
    [from_betas(beta_schedule("linear", 1000)), rectified_flow(1000, 5.0), karras(1000)],
    ids=["ddpm", "flow", "karras"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_knows_its_level_exactly(process, dtype):
    network = mixture_denoiser(LINE, process, Parameterization("sample")).network
    t = torch.randperm(1000)
    x = torch.full((1000, 1), 0.7).double()
    found = network(x, process.network_time[t].to(dtype))
    assert torch.equal(found, LINE.posterior_mean(x, *process.at(t)))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddpm", "epsilon"),
        ("zero-snr", "v_prediction"),
        ("flow", "flow_prediction"),
        ("karras", "edm"),
    ],
)
def test_sampling_gives_the_mixture_back(name, kind, eta):
    denoiser, counts = counting(mixture_denoiser(TRIANGLE, PROCESSES[name], Parameterization(kind)))
    random = normal(5)
    x = denoiser.sample(lambda _: torch.randn(4000, 2, generator=random).double(), {}, LEVELS, eta)
    assert_follows(x, TRIANGLE)
    assert sum(counts) == 4000 * LEVELS


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_a_chain_is_on_the_noised_law_on_its_way(process):
    parameterization = Parameterization("sample")
    denoiser = mixture_denoiser(LINE, process, parameterization)
    random = normal(6)
    level, top = LEVELS // 2, LEVELS - 1

    def predict(x, t) -> Prediction:
        return denoiser.predict(Batch(x, t, {}, t))

    def noise(_):
        return torch.randn(4000, 1, generator=random).double()

    x = process.start_std * noise(-1)
    for i in range(top, level, -1):
        t = torch.full((4000,), i)
        x = reverse_step(process, parameterization, x, predict(x, t), t, t - 1, noise(i))
    noised = LINE.noised(float(process.alpha[level]), float(process.sigma[level]))
    assert kolmogorov_smirnov(x.squeeze(1), noised.cdf) < 2.5


def test_classes_are_mixtures_of_their_own():
    process = PROCESSES["ddpm"]
    denoiser = mixture_denoiser(LABELLED, process, Parameterization())
    assert denoiser.conditioning == ClassLabels(2, null_class=2)
    t = torch.tensor([0, 30, 90, 150, 190, 199])
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    x = process.add_noise(LABELLED.sample(6, normal(7)), torch.randn(6, 2).double(), t)
    found = denoiser.predict(Batch(x, t, {"class_labels": labels}, t)).x_0
    for i, label in enumerate(labels.tolist()):
        alone = mixture_denoiser(LABELLED.of_class(label), process, Parameterization())
        assert alone.conditioning == Unconditional()
        expected = alone.predict(Batch(x[i : i + 1], t[i : i + 1], {}, t))
        torch.testing.assert_close(found[i : i + 1], expected.x_0)


def test_a_class_can_be_sampled():
    denoiser = mixture_denoiser(LABELLED, PROCESSES["flow"], Parameterization("flow_prediction"))
    random = normal(8)
    cond = denoiser.conditioning.of([1] * 4000)
    x = denoiser.sample(lambda _: torch.randn(4000, 2, generator=random).double(), cond, 50)
    part = LABELLED.of_class(1)
    torch.testing.assert_close(part.weights, torch.tensor([2 / 3, 1 / 3]).double())
    torch.testing.assert_close(x.mean(0), part.moments()[0], rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(x.T), part.moments()[1], rtol=0, atol=0.06)


def test_guidance_moves_away_from_the_null_class():
    denoiser = mixture_denoiser(LABELLED, PROCESSES["ddpm"], Parameterization())
    x, t = torch.randn(3, 2).double(), torch.tensor([50, 100, 150])
    one, null = (
        denoiser.predict(Batch(x, t, denoiser.conditioning.of([label] * 3), t)).eps
        for label in (0, 2)
    )
    guided = denoiser.predict(Batch(x, t, denoiser.conditioning.of([0] * 3), t), 3.0).eps
    torch.testing.assert_close(guided, null + 3 * (one - null))


def test_a_single_gaussian_has_the_linear_denoiser():
    single = GaussianMixture.of([[2.0]], std=0.5)
    alpha, sigma = torch.tensor([0.6]).double(), torch.tensor([0.8]).double()
    found = single.posterior_mean(torch.tensor([[1.0]]), alpha, sigma)
    gain = 0.6 * 0.25 / (0.36 * 0.25 + 0.64)
    assert float(found) == pytest.approx(2 + gain * (1 - 1.2))


def test_far_away_states_stay_finite():
    x = torch.tensor([[1e6, -1e6]])
    alpha, sigma = PROCESSES["ddpm"].at(torch.tensor([0]))
    assert TRIANGLE.posterior_mean(x, alpha, sigma).isfinite().all()
    assert math.isfinite(float(TRIANGLE.log_density(x)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"means": [0.0, 1.0]}, r"means have shape \(2,\): give \[K, ...\]"),
        ({"means": [[0.0], [1.0]], "std": [0.1]}, "1 values of std for 2 means"),
        ({"means": [[0.0], [1.0]], "std": -0.1}, "every std 0 or more"),
        ({"means": [[0.0], [1.0]], "weights": [1.0, 0.0]}, "every weight must be above 0"),
        (
            {"means": [[0.0], [1.0]], "classes": [0, 2]},
            r"use each of 0\.\.C-1",
        ),
    ],
)
def test_values_that_make_no_mixture_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        GaussianMixture.of(**values)
