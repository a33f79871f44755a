"""`reverse_step` on a vector of t against the scalar `step` of diffusers' schedulers.

Every case is one batch in which each sample has its own t; diffusers steps them one by one. Its
tables are float32, which alone is an error of 5e-5 in a variance, so they are replaced by the
process's own before the comparison. Where diffusers is known to be wrong, or does another thing on
purpose, the case is left out or adapted, and the reason stands beside it.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_ddpm

from dkdm.core.diffusion.prediction import Parameterization, Prediction, to_x_0_eps
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas, karras, rectified_flow
from dkdm.core.diffusion.steps import reverse_step, sample
from dkdm.errors import UsageError
from dkdm.models.schedulers import from_scheduler_config
from factories import SCHEDULER

TOLERANCE = 1e-6
TOTAL = 40
# fixed_large_log is left out: DDPMScheduler.step takes the square root of a logarithm, NaN.
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
KINDS = ["epsilon", "sample", "v_prediction"]
CLIPPINGS = [
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
]
SCHEDULES = [
    {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.2},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_end": 0.3, "rescale_betas_zero_snr": True},
]


def in_float64(peer, process):
    """The scheduler with the process's tables in place of its float32 ones."""
    peer.alphas_cumprod = process.alpha**2
    peer.betas = 1 - peer.alphas_cumprod / torch.cat([torch.ones(1), peer.alphas_cumprod[:-1]])
    peer.alphas = 1 - peer.betas
    peer.one = torch.ones((), dtype=torch.float64)
    if isinstance(peer, DDIMScheduler):
        peer.final_alpha_cumprod = torch.tensor(process.final[0] ** 2, dtype=torch.float64)
    return peer


def some_moves(grid):
    """First, last and a few random moves of a sampler's grid."""
    moves = list(zip(grid, [*grid[1:], -1], strict=True))
    chosen = {0, len(grid) - 1, *torch.randint(len(grid), (6,)).tolist()}
    return torch.tensor([moves[i] for i in chosen]).unbind(1)


def batch_at(t, shape=(2, 3, 3)):
    """States, raw outputs and noise for a list of t, in float32 values: no peer rounds them."""
    x, output, z = 1.5 * torch.randn(3, len(t), *shape)
    return x.double(), output.double(), z.double()


def predicted(process, kind, x, output, t, variance_output=None):
    x_0, eps = to_x_0_eps(kind, output, x, *process.at(t))
    return Prediction(output, x_0, eps, variance_output)


def assert_same(ours, theirs):
    """Every sample agrees, relative to its own largest value."""
    error = (ours - theirs).abs().flatten(1).amax(1) / theirs.abs().flatten(1).amax(1)
    assert error.isfinite().all()
    assert error.max() <= TOLERANCE


def variance_channels(variance, x):
    """Raw variance channels in the range each type expects, or None."""
    fraction = torch.rand_like(x)
    return {"learned": 0.1 + fraction, "learned_range": 2 * fraction - 1}.get(variance)


def ddpm_scalar_steps(peer, raw, t, x, z, monkeypatch):
    """DDPMScheduler.step for each sample alone, fed our noise."""
    stepped = []
    for i, level in enumerate(t.tolist()):
        noise = z[i : i + 1]
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, n=noise, **__: n)
        stepped.append(peer.step(raw[i : i + 1], level, x[i : i + 1]).prev_sample)
    return torch.cat(stepped)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm(kind, variance, spacing, monkeypatch):
    parameterization = Parameterization(kind, variance)
    for schedule, clipping, num_steps in itertools.product(SCHEDULES, CLIPPINGS, [1, 7, TOTAL]):
        if kind == "epsilon" and "rescale_betas_zero_snr" in schedule:
            continue  # x_0 is not determined at alpha = 0; refused by Denoiser
        config = {
            "num_train_timesteps": TOTAL,
            "prediction_type": kind,
            "variance_type": variance,
            "timestep_spacing": spacing,
            **schedule,
            **clipping,
        }
        process = from_scheduler_config({"_class_name": "DDPMScheduler", **config})
        peer = in_float64(DDPMScheduler(**config), process)
        peer.set_timesteps(num_steps)
        t, s = some_moves(process.timesteps(num_steps))
        x, output, z = batch_at(t)
        extra = variance_channels(variance, x)
        raw = output if extra is None else torch.cat([output, extra], dim=1)
        # Where a grid ends above t = 0, diffusers adds noise to its last state, the clean one:
        # none for us. Same noise everywhere else.
        fed = z * per_sample(s >= 0, z)
        theirs = ddpm_scalar_steps(peer, raw, t, x, fed, monkeypatch)
        prediction = predicted(process, kind, x, output, t, extra)
        assert_same(reverse_step(process, parameterization, x, prediction, t, s, z), theirs)


@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 2, 3)])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_ddpm_on_1000_levels_in_any_rank(shape, variance, monkeypatch):
    config = {"variance_type": variance, "beta_schedule": "squaredcos_cap_v2"}
    process = from_scheduler_config({"_class_name": "DDPMScheduler", **config})
    peer = in_float64(DDPMScheduler(**config), process)
    t = torch.tensor([0, 1, 2, 10, 500, 997, 998, 999])
    x, output, z = batch_at(t, shape)
    extra = variance_channels(variance, x)
    raw = output if extra is None else torch.cat([output, extra], dim=1)
    theirs = ddpm_scalar_steps(peer, raw, t, x, z, monkeypatch)
    prediction = predicted(process, "epsilon", x, output, t, extra)
    parameterization = Parameterization("epsilon", variance)
    assert_same(reverse_step(process, parameterization, x, prediction, t, t - 1, z), theirs)


def test_fixed_large_log_is_fixed_large():
    process = from_scheduler_config({"_class_name": "DDPMScheduler"})
    t = torch.tensor([0, 1, 500, 999])
    x, output, z = batch_at(t)
    prediction = predicted(process, "epsilon", x, output, t)
    plain, log = (
        reverse_step(process, Parameterization("epsilon", variance), x, prediction, t, t - 1, z)
        for variance in ("fixed_large", "fixed_large_log")
    )
    assert_same(log, plain)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_clipped_model_output", [False, True])
def test_ddim(kind, eta, use_clipped_model_output):
    """The move t -> t - T // n of DDIMScheduler, for every t.

    With leading spacing these are the scheduler's own moves. With linspace and trailing it makes
    the same moves, which lead off its own grid: a mistake, so its chains are no reference there.
    """
    options = itertools.product(SCHEDULES[:2], CLIPPINGS, [True, False], [1, 7, TOTAL])
    for schedule, clipping, set_alpha_to_one, num_steps in options:
        config = {
            "num_train_timesteps": TOTAL,
            "prediction_type": kind,
            "set_alpha_to_one": set_alpha_to_one,
            **schedule,
            **clipping,
        }
        process = from_scheduler_config({"_class_name": "DDIMScheduler", **config})
        assert not process.clipping.rederive_eps
        clip = replace(process.clipping, rederive_eps=use_clipped_model_output)
        process = replace(process, clipping=clip)
        peer = in_float64(DDIMScheduler(**config), process)
        peer.set_timesteps(num_steps)
        t = torch.randperm(TOTAL)[:8]
        t[:2] = torch.tensor([0, TOTAL - 1])
        s = (t - TOTAL // num_steps).clamp(min=-1)
        x, output, z = batch_at(t)
        theirs = [
            peer.step(
                output[i : i + 1],
                int(level),
                x[i : i + 1],
                eta,
                use_clipped_model_output,
                variance_noise=z[i : i + 1],
            ).prev_sample
            for i, level in enumerate(t)
        ]
        prediction = predicted(process, kind, x, output, t)
        ours = reverse_step(process, Parameterization(kind), x, prediction, t, s, z, eta)
        assert_same(ours, torch.cat(theirs))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 7, TOTAL])
def test_flow_euler(shift, num_steps):
    process = rectified_flow(TOTAL, shift)
    t = torch.tensor(process.timesteps(num_steps))
    s = torch.cat([t[1:], torch.tensor([-1])])
    peer = FlowMatchEulerDiscreteScheduler(TOTAL, shift=shift)
    peer.set_timesteps(num_steps)
    peer.sigmas = torch.cat([process.sigma[t], torch.zeros(1)])
    peer.timesteps = process.network_time[t]
    x, output, z = batch_at(t)
    theirs = [
        peer.step(output[i : i + 1], time, x[i : i + 1]).prev_sample
        for i, time in enumerate(peer.timesteps)
    ]
    prediction = predicted(process, "flow_prediction", x, output, t)
    parameterization = Parameterization("flow_prediction")
    ours = reverse_step(process, parameterization, x, prediction, t, s, z, eta=0.0)
    assert_same(ours, torch.cat(theirs))


def test_karras_step_is_the_euler_step_of_edm():
    process = karras(40)
    t = torch.tensor([39, 20, 5, 1, 0])
    s = torch.tensor([38, 3, -1, 0, -1])
    x, x_0, z = batch_at(t)
    prediction = predicted(process, "sample", x, x_0, t)
    ours = reverse_step(process, Parameterization("sample"), x, prediction, t, s, z, eta=0.0)
    sigma_t, sigma_s = (per_sample(process.at(level)[1], x) for level in (t, s))
    # arXiv 2206.00364, algorithm 1, lines 4 and 5.
    assert_same(ours, x + (sigma_s - sigma_t) * (x - x_0) / sigma_t)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "process",
    [from_betas(beta_schedule("squaredcos_cap_v2", TOTAL)), rectified_flow(TOTAL), karras(TOTAL)],
    ids=["ddpm", "flow", "karras"],
)
def test_a_step_keeps_the_forward_law(process, eta):
    """With the true (x_0, eps), x_s has mean alpha_s x_0 and variance sigma_s^2, whatever eta."""
    t = torch.full((20_000,), TOTAL - 1)
    s = torch.tensor([0, TOTAL // 3]).repeat(10_000)
    x_0 = torch.full((20_000, 1), 2.0).double()
    eps, z = torch.randn(2, 20_000, 1).double()
    prediction = Prediction(eps, x_0, eps)
    x = process.add_noise(x_0, eps, t)
    x_s = reverse_step(process, Parameterization("sample"), x, prediction, t, s, z, eta)
    alpha, sigma = process.at(s)
    standard = ((x_s - per_sample(alpha, x) * x_0) / per_sample(sigma, x)).reshape(-1, 2)
    assert standard.mean(0).abs().max() < 0.05
    assert (standard.var(0) - 1).abs().max() < 0.07


def test_the_clean_end_has_no_noise():
    process = karras(10)
    t, s = torch.arange(10), torch.full((10,), -1)
    x, x_0, z = batch_at(t)
    for variance in ("fixed_small", "fixed_large"):
        parameterization = Parameterization("sample", variance)
        prediction = predicted(process, "sample", x, x_0, t)
        assert_same(reverse_step(process, parameterization, x, prediction, t, s, z), x_0)


def test_impossible_moves_are_refused():
    process = karras(10)
    x = torch.zeros(1, 2)
    prediction = Prediction(x, x, x)
    t = torch.tensor([3])
    with pytest.raises(UsageError, match="every s must be smaller"):
        reverse_step(process, Parameterization(), x, prediction, t, t, x)
    with pytest.raises(UsageError, match=r"eta = 0\.5"):
        large = Parameterization("sample", "fixed_large")
        reverse_step(process, large, x, prediction, t, t - 1, x, eta=0.5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sample_is_its_steps_in_a_row(eta):
    process = from_betas(beta_schedule("squaredcos_cap_v2", 10))
    parameterization = Parameterization("sample")
    noise = torch.randn(4, 5, 2).double()
    seen = []

    def predict(x, t):
        seen.append(t.tolist())
        return predicted(process, "sample", x, x.tanh(), t)

    start = torch.randn(5, 2).double()
    ended = sample(predict, process, parameterization, start, [9, 6, 3], lambda i: noise[i], eta)
    x = start
    for i, (level, following) in enumerate([(9, 6), (6, 3), (3, -1)]):
        t = torch.full((5,), level)
        s = torch.full((5,), following)
        prediction = predicted(process, "sample", x, x.tanh(), t)
        x = reverse_step(process, parameterization, x, prediction, t, s, noise[i], eta)
    assert torch.equal(ended, x)
    assert seen == [[9] * 5, [6] * 5, [3] * 5]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_a_chain_is_its_steps_bit_by_bit(variance, eta):
    kind = Parameterization("v_prediction", variance)
    process = from_scheduler_config({**SCHEDULER, "variance_type": variance})
    random = torch.Generator().manual_seed(0)
    start, *noises = torch.randn(5, 3, 1, 8, 8, generator=random)

    def predict(x, t):
        x_0, eps = to_x_0_eps("v_prediction", x.sin(), x, *process.at(t))
        return Prediction(x, x_0, eps, x.cos() if kind.learns_variance else None)

    x, levels = start, [49, 30, 11, 0]
    for level, following, z in zip(levels, [*levels[1:], -1], noises, strict=True):
        t, s = torch.full((3,), level), torch.full((3,), following)
        x = reverse_step(process, kind, x, predict(x, t), t, s, z, eta)
    found = sample(predict, process, kind, start, levels, lambda i: noises[i], eta)
    assert torch.equal(found, x)
