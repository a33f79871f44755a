"""Parameterizations: exact round trips, slopes by autograd, clipping against diffusers."""

from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from dkdm.core.diffusion.clipping import Clipping
from dkdm.core.diffusion.prediction import (
    Parameterization,
    Prediction,
    PredictionType,
    VarianceType,
    check_compatible,
    clip_x_0,
    dynamic_threshold,
    from_x_0_eps,
    scale_input,
    to_x_0_eps,
    x_0_slope,
)
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import (
    beta_schedule,
    from_betas,
    karras,
    rectified_flow,
    zero_terminal_snr,
)
from dkdm.core.diffusion.variances import posterior_var, step_log_var, transition_var
from dkdm.errors import UsageError

KINDS = get_args(PredictionType)
COSINE = from_betas(beta_schedule("squaredcos_cap_v2", 100))
ZERO_SNR = from_betas(zero_terminal_snr(beta_schedule("scaled_linear", 100)))
PROCESSES = {
    "linear": from_betas(beta_schedule("linear", 100, 1e-3, 0.2)),
    "cosine": COSINE,
    "zero-snr": ZERO_SNR,
    "flow": rectified_flow(100, 3.0),
    "karras": karras(100),
}
SHAPES = [(4, 3, 2), (4, 2, 3, 2), (4, 2, 1, 3, 2)]


def legal(kind, process):
    return kind != "epsilon" or bool((process.alpha > 0).all())


@st.composite
def states(draw):
    """(kind, x_0, eps, x, alpha, sigma) of a random batch of mixed t, of rank 3 to 5."""
    kind = draw(st.sampled_from(KINDS))
    process = draw(st.sampled_from([p for p in PROCESSES.values() if legal(kind, p)]))
    shape = draw(st.sampled_from([(2, 3, 4), (2, 3, 2, 2), (2, 3, 2, 1, 2)]))
    t = torch.tensor(draw(st.lists(st.integers(0, 99), min_size=2, max_size=2)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x_0, eps = torch.randn((2, *shape), generator=random, dtype=torch.float64)
    return kind, x_0, eps, process.add_noise(x_0, eps, t), *process.at(t)


@given(states(), st.floats(0.1, 2.0))
def test_every_parameterization_round_trips(state, sigma_data):
    kind, x_0, eps, x, alpha, sigma = state
    output = from_x_0_eps(kind, x_0, eps, alpha, sigma, sigma_data)
    found_x_0, found_eps = to_x_0_eps(kind, output, x, alpha, sigma, sigma_data)
    # Rounding of x (1e-16 of its size) is amplified by 1 / alpha, or 1 / sigma, at the ends.
    size = x.abs().max()
    x_0_rounding = 1e-14 * float(size / alpha.min()) if kind == "epsilon" else 1e-13 * float(size)
    eps_rounding = 1e-13 * float(size / sigma.min())
    torch.testing.assert_close(found_x_0, x_0, rtol=1e-9, atol=x_0_rounding)
    torch.testing.assert_close(found_eps, eps, rtol=1e-9, atol=eps_rounding)


@given(states())
def test_output_round_trips_and_explains_x(state):
    kind, output, _, x, alpha, sigma = state
    x_0, eps = to_x_0_eps(kind, output, x, alpha, sigma)
    explained = per_sample(alpha, x) * x_0 + per_sample(sigma, x) * eps
    torch.testing.assert_close(explained, x, rtol=1e-9, atol=1e-9)
    # An output of order 1 is a difference of terms as large as |x_0| and |eps|.
    rounding = 1e-13 * float(1 + x_0.abs().max() + eps.abs().max() + x.abs().max())
    found = from_x_0_eps(kind, x_0, eps, alpha, sigma)
    torch.testing.assert_close(found, output, rtol=1e-9, atol=rounding / float(sigma.min()))


@pytest.mark.parametrize("process", [ZERO_SNR, rectified_flow(10)], ids=["zero-snr", "flow"])
def test_epsilon_is_refused_where_alpha_is_zero(process):
    with pytest.raises(UsageError, match="epsilon prediction cannot be used"):
        check_compatible(Parameterization("epsilon"), process)
    for kind in KINDS:
        if kind != "epsilon":
            check_compatible(Parameterization(kind), process)


def test_unknown_kinds_are_refused():
    with pytest.raises(UsageError, match="'noise': did you mean 'epsilon'"):
        Parameterization("noise")
    with pytest.raises(UsageError, match="variance is 'big'"):
        Parameterization(variance="big")


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_x_0_slope_is_the_derivative_of_the_output(kind, process):
    t = torch.tensor([0, 1, 50, 98, 99] if legal(kind, process) else [0, 1, 50, 98])
    alpha, sigma = process.at(t)
    x = torch.randn(len(t), 1).double()
    x_0 = torch.randn(len(t), 1).double().requires_grad_()
    eps = (x - per_sample(alpha, x) * x_0) / per_sample(sigma, x)
    output = from_x_0_eps(kind, x_0, eps, alpha, sigma, 0.7)
    (slope,) = torch.autograd.grad(output.sum(), x_0)
    torch.testing.assert_close(
        slope.abs().flatten(), x_0_slope(kind, alpha, sigma, 0.7), rtol=1e-6, atol=0
    )


def test_edm_is_the_preconditioning_of_the_paper():
    sigma = torch.tensor([0.01, 0.5, 30.0]).double()
    x, output = torch.randn(2, 3, 4).double()
    x_0, _ = to_x_0_eps("edm", output, x, torch.ones(3).double(), sigma, sigma_data=0.5)
    s = sigma.unsqueeze(1)
    # arXiv 2206.00364, table 1, in the paper's own form.
    c_skip = 0.5**2 / (s**2 + 0.5**2)
    c_out = s * 0.5 / (0.5**2 + s**2) ** 0.5
    c_in = 1 / (s**2 + 0.5**2) ** 0.5
    torch.testing.assert_close(x_0, c_skip * x + c_out * output)
    torch.testing.assert_close(scale_input("edm", x, sigma, sigma_data=0.5), c_in * x)


@pytest.mark.parametrize("kind", ["edm", "edm_v"])
def test_eps_of_edm_keeps_its_digits_at_the_least_noise(kind):
    process = karras(100)
    t = torch.zeros(4, dtype=torch.int64)
    x, output = torch.randn(2, 4, 3, 5)
    alpha, sigma = process.at(t)
    _, eps = to_x_0_eps(kind, output, x, alpha, sigma)
    _, exact = to_x_0_eps(kind, output.double(), x.double(), alpha, sigma)
    # (x - x_0) / sigma in float32 would lose the digits that x and x_0 have in common, 1e-5.
    torch.testing.assert_close(eps.double(), exact, rtol=0, atol=1e-6)


def test_only_edm_scales_what_the_network_is_shown():
    x = torch.randn(2, 3)
    for kind in set(KINDS) - {"edm", "edm_v"}:
        assert scale_input(kind, x, torch.ones(2).double()) is x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_value", [1.0, 1.5, 5.0])
@pytest.mark.parametrize("quantile", [0.5, 0.995])
def test_dynamic_threshold_is_diffusers(shape, max_value, quantile):
    scale = torch.tensor([0.1, 1.0, 2.0, 10.0]).reshape(-1, *[1] * (len(shape) - 1))
    x_0 = torch.randn(shape).double() * scale
    peer = DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=max_value
    )
    ours = dynamic_threshold(x_0, quantile, max_value)
    torch.testing.assert_close(ours, peer._threshold_sample(x_0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clipping", [Clipping(0.5), Clipping(1.5, 0.9)])
def test_clipping_rederives_or_keeps_eps(shape, clipping):
    t = torch.tensor([0, 10, 50, 99])
    alpha, sigma = COSINE.at(t)
    x_0, eps = torch.randn(2, *shape).double()
    x = COSINE.add_noise(x_0, eps, t)
    raw = Prediction(eps, x_0, eps)
    clipped = clip_x_0(raw, x, alpha, sigma, clipping)
    expected = (
        x_0.clamp(-0.5, 0.5) if clipping.quantile is None else dynamic_threshold(x_0, 0.9, 1.5)
    )
    assert torch.equal(clipped.x_0, expected)
    assert not torch.equal(clipped.x_0, x_0)
    assert torch.equal(clipped.output, raw.output)
    explained = per_sample(alpha, x) * clipped.x_0 + per_sample(sigma, x) * clipped.eps
    torch.testing.assert_close(explained, x)
    kept = clip_x_0(raw, x, alpha, sigma, Clipping(clipping.range, clipping.quantile, False))
    assert torch.equal(kept.x_0, expected)
    assert kept.eps is eps


def test_no_clipping_changes_nothing():
    x = 10 * torch.randn(4, 3)
    raw = Prediction(x, x, x)
    assert clip_x_0(raw, x, *COSINE.at(torch.arange(4)), Clipping()) is raw


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_variances_are_those_of_bayes(process):
    t, s = torch.tensor([1, 50, 98, 99]), torch.tensor([0, 20, 97, 10])
    alpha_t, sigma_t = process.at(t)
    alpha_s, sigma_s = process.at(s)
    beta = transition_var(alpha_t, sigma_t, alpha_s, sigma_s)
    post = posterior_var(alpha_t, sigma_t, alpha_s, sigma_s)
    # Precisions add: of x_s given x_0, and of x_t given x_s.
    ratio = alpha_t / alpha_s
    torch.testing.assert_close(1 / post, 1 / sigma_s**2 + ratio**2 / beta)
    assert (post <= beta * (1 + 1e-9)).all()


@pytest.mark.parametrize("kind", get_args(VarianceType))
def test_step_log_var(kind):
    post, beta = torch.tensor([0.01, 0.02]).double(), torch.tensor([0.04, 0.08]).double()
    like = torch.zeros(2, 3).double()
    raw = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]]).double()
    output = {"learned": raw.exp(), "learned_range": raw}.get(kind)
    var = step_log_var(kind, post, beta, output, like).exp().expand(2, 3)
    low, high = post.unsqueeze(1).expand(2, 3), beta.unsqueeze(1).expand(2, 3)
    middle = (low * high).sqrt()
    expected = {
        "fixed_small": low,
        "fixed_small_log": low,
        "fixed_large": high,
        "fixed_large_log": high,
        "learned": raw.exp(),
        "learned_range": torch.stack([low[:, 0], middle[:, 1], high[:, 2]], dim=1),
    }[kind]
    torch.testing.assert_close(var, expected)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_learned_variance_needs_its_channels(kind):
    one = torch.ones(1).double()
    with pytest.raises(UsageError, match="variance channels"):
        step_log_var(kind, one, one, None, torch.zeros(1, 1))
