"""The objective: a perfect student has zero loss, weights mean what they say, the KL is the KL."""

import itertools
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import distributions, nn

from dkdm.config import LossOptions
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import (
    Parameterization,
    Prediction,
    PredictionType,
    from_x_0_eps,
)
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas, karras, rectified_flow
from dkdm.core.objectives.objective import Objective, simple_loss
from dkdm.core.objectives.variational import gaussian_kl, variational_loss
from dkdm.errors import UsageError

KINDS = get_args(PredictionType)
COSINE = from_betas(beta_schedule("squaredcos_cap_v2", 100))
PROCESSES = {"cosine": COSINE, "flow": rectified_flow(100, 3.0), "karras": karras(100)}
MIXTURE = GaussianMixture.of([[-1.0, 0.5], [1.0, -0.5]], std=[0.2, 0.4])
T = torch.tensor([0, 1, 30, 60, 98, 99])


class WithVariance(nn.Module):
    """A network whose second half of channels, the raw variance, is the same everywhere."""

    def __init__(self, network, raw):
        super().__init__()
        self.network, self.raw = network, raw

    def forward(self, x, time):
        return torch.cat([self.network(x, time), torch.full_like(x, self.raw)], dim=1)


def exact(process=COSINE, kind="epsilon"):
    return mixture_denoiser(MIXTURE, process, Parameterization(kind))


def with_variance(denoiser, raw):
    own = replace(denoiser.parameterization, variance="learned_range")
    return replace(denoiser, network=WithVariance(denoiser.network, raw), parameterization=own)


def batch_of(process=COSINE, t=T):
    x = process.add_noise(MIXTURE.sample(len(t), torch.Generator().manual_seed(0)), noise(t), t)
    return Batch(x, t, {}, t)


def noise(t):
    return torch.randn(len(t), 2, generator=torch.Generator().manual_seed(1)).double()


def prediction_of(denoiser, x, x_0, t):
    """What a denoiser that finds x_0 at x would have returned."""
    alpha, sigma = denoiser.process.at(t)
    own = denoiser.parameterization
    eps = (x - per_sample(alpha, x) * x_0) / per_sample(sigma, x)
    output = from_x_0_eps(own.prediction, x_0, eps, alpha, sigma, own.sigma_data)
    return Prediction(output, x_0, eps)


def answering(student, prediction):
    """The same student, which gives this prediction whatever it is shown."""
    student = replace(student)
    student.predict = lambda batch: prediction
    return student


def test_gaussian_kl_is_torchs_in_bits():
    mean_p, log_var_p, mean_q, log_var_q = torch.randn(4, 10).double()
    p, q = (
        distributions.Normal(mean, (0.5 * log_var).exp())
        for mean, log_var in ((mean_p, log_var_p), (mean_q, log_var_q))
    )
    expected = distributions.kl_divergence(p, q) / math.log(2)
    torch.testing.assert_close(gaussian_kl(mean_p, log_var_p, mean_q, log_var_q), expected)


def legal_kinds(process):
    return [kind for kind in KINDS if kind != "epsilon" or process.alpha[-1] > 0]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_a_perfect_student_has_zero_loss_in_every_pair_of_parameterizations(process):
    batch = batch_of(process)
    for teacher_kind, student_kind in itertools.product(legal_kinds(process), repeat=2):
        teacher, student = exact(process, teacher_kind), exact(process, student_kind)
        loss = Objective(student, teacher)(student, batch, teacher.predict(batch))
        assert loss.shape == (len(T),)
        assert loss.max() < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_simple_loss_is_the_error_of_the_output(kind):
    student, batch = exact(kind=kind), batch_of()
    target = student.predict(batch)
    error = torch.linspace(0.1, 0.6, 6).double().unsqueeze(1)
    wrong = target._replace(output=target.output + error)
    loss = simple_loss(student, wrong, target, batch.t)
    torch.testing.assert_close(loss, error.squeeze(1) ** 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize(("weighting", "largest"), [("snr", math.inf), ("min-snr", 5.0)])
def test_snr_weights_are_on_x_0_whatever_the_student_predicts(process, weighting, largest):
    batch, target = batch_of(process), exact(process, "sample").predict(batch_of(process))
    error = 0.1 * noise(batch.t)
    expected = process.snr()[T].clamp(max=largest) * error.square().mean(1)
    for kind in legal_kinds(process):
        student = exact(process, kind)
        prediction = prediction_of(student, batch.x, target.x_0 + error, batch.t)
        objective = Objective(
            student, exact(process, "sample"), LossOptions(loss_weighting=weighting)
        )
        loss = objective(answering(student, prediction), batch, target)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)


def test_uniform_weight_is_one():
    assert Objective(exact(), exact()).weights.tolist() == [1] * 100


def test_variational_loss_is_zero_for_identical_models_and_finite_everywhere():
    teacher, student = with_variance(exact(), 0.3), with_variance(exact(), 0.3)
    batch = batch_of()
    loss = variational_loss(
        student, teacher, student.predict(batch), teacher.predict(batch), batch.x, batch.t
    )
    torch.testing.assert_close(loss, torch.zeros(len(T)).double(), rtol=0, atol=1e-12)
    other = with_variance(exact(), -0.9)
    loss = variational_loss(
        other, teacher, other.predict(batch), teacher.predict(batch), batch.x, batch.t
    )
    assert loss.isfinite().all()
    assert (loss > 0).all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_variational_loss_is_the_kl_of_the_ddpm_posteriors(kind):
    teacher, student = with_variance(exact(kind=kind), 0.5), with_variance(exact(kind=kind), -0.5)
    batch = batch_of()
    right = teacher.predict(batch)
    wrong = prediction_of(student, batch.x, right.x_0 + 0.05 * noise(T), T)
    wrong = wrong._replace(variance_output=torch.full_like(batch.x, -0.5))
    # DDPM, arXiv 2006.11239, Eq. 7, and the learned range of arXiv 2102.09672, Eq. 15.
    alpha_bar = torch.cat([torch.ones(1).double(), COSINE.alpha**2])
    now, before = alpha_bar[T + 1].unsqueeze(1), alpha_bar[T].unsqueeze(1)
    beta = 1 - now / before
    post = (1 - before) / (1 - now) * beta
    post[T == 0] = post[T == 1]

    def law(x_0, raw):
        mean = (before.sqrt() * beta * x_0 + (now / before).sqrt() * (1 - before) * batch.x) / (
            1 - now
        )
        share = (raw + 1) / 2
        log_var = share * beta.log() + (1 - share) * post.log()
        return distributions.Normal(mean, (0.5 * log_var).exp())

    kl = distributions.kl_divergence(law(right.x_0, 0.5), law(wrong.x_0, -0.5))
    found = variational_loss(student, teacher, wrong, right, batch.x, batch.t)
    torch.testing.assert_close(found, kl.mean(1) / math.log(2), rtol=1e-6, atol=1e-12)


def test_variational_loss_trains_the_variance_only():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 4)

        def forward(self, x, time):
            return self.layer(x) + 0 * time.unsqueeze(1)

    teacher = with_variance(exact(), 0.3)
    network = Linear()
    student = replace(teacher, network=network)
    x, t, *_ = batch_of()
    batch = Batch(x.float(), t, {}, t)
    prediction, target = student.predict(batch), teacher.predict(batch)
    variational_loss(student, teacher, prediction, target, batch.x, t).sum().backward()
    assert torch.equal(network.layer.weight.grad[:2], torch.zeros(2, 2))
    assert (network.layer.weight.grad[2:] != 0).all()
    assert network.layer.weight.grad.isfinite().all()


def test_the_objective_is_simple_plus_lambda_variational():
    teacher, student = with_variance(exact(), 0.5), with_variance(exact(), -0.5)
    batch = batch_of()
    target = teacher.predict(batch)
    wrong = student.predict(batch)._replace(output=target.output + 0.1)
    simple = simple_loss(student, wrong, target, batch.t)
    vlb = variational_loss(student, teacher, wrong, target, batch.x, batch.t)
    for weight in (0.0, 0.5):
        objective = Objective(student, teacher, LossOptions(vlb_weight=weight))
        loss = objective(answering(student, wrong), batch, target)
        torch.testing.assert_close(loss, simple + weight * vlb)


def test_a_student_without_variance_ignores_the_teachers():
    teacher, student, batch = with_variance(exact(), 0.5), exact(), batch_of()
    loss = Objective(student, teacher)(student, batch, teacher.predict(batch))
    assert loss.max() < 1e-15


@pytest.mark.parametrize("teacher", [None, exact()], ids=["images", "fixed variance"])
def test_a_learned_variance_that_nothing_teaches_is_refused(teacher):
    with pytest.raises(UsageError, match="nothing teaches it"):
        Objective(with_variance(exact(), 0.0), teacher)
