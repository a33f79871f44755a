"""Noise processes against diffusers' own tables and grids, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_ddpm

from dkdm.core.diffusion.process import Process
from dkdm.core.diffusion.schedules import (
    BETA_SCHEDULES,
    beta_schedule,
    from_betas,
    karras,
    rectified_flow,
    zero_terminal_snr,
)
from dkdm.errors import UsageError
from dkdm.models.schedulers import from_scheduler_config

DDPM = {"_class_name": "DDPMScheduler"}
DDIM = {"_class_name": "DDIMScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
PEERS = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}
# DDPMScheduler knows every schedule but "exp", which diffusers has as a function only.
DDPM_SCHEDULES = [name for name in BETA_SCHEDULES if name != "exp"]


def assert_close(ours, theirs, rel):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rel, atol=0)


@pytest.mark.parametrize("num_levels", [10, 1000])
@pytest.mark.parametrize("name", DDPM_SCHEDULES)
def test_beta_schedules_are_diffusers(name, num_levels):
    theirs = DDPMScheduler(num_levels, beta_schedule=name, beta_start=1e-3, beta_end=0.03).betas
    ours = beta_schedule(name, num_levels, 1e-3, 0.03)
    assert ours.dtype == torch.float64
    assert_close(ours, theirs, rel=1e-5)


def test_exp_schedule_is_diffusers():
    theirs = scheduling_ddpm.betas_for_alpha_bar(1000, alpha_transform_type="exp")
    assert_close(beta_schedule("exp", 1000), theirs, rel=1e-5)


@pytest.mark.parametrize("name", DDPM_SCHEDULES)
@pytest.mark.parametrize("config", [DDPM, DDIM], ids=lambda c: c["_class_name"])
def test_process_of_a_beta_config(name, config):
    process = from_scheduler_config({**config, "beta_schedule": name, "num_train_timesteps": 200})
    alpha_bar = DDPMScheduler(200, beta_schedule=name).alphas_cumprod.double()
    # diffusers' own table is float32: 200 products each round by 6e-8.
    assert_close(process.alpha**2, alpha_bar, rel=1e-4)
    torch.testing.assert_close(process.alpha**2 + process.sigma**2, torch.ones(200).double())
    assert process.network_time.tolist() == list(range(200))
    assert process.start_std == 1


def test_trained_betas():
    betas = [0.1, 0.2, 0.3]
    process = from_scheduler_config({**DDPM, "trained_betas": betas, "num_train_timesteps": 1000})
    assert process.num_levels == 3
    assert_close(process.alpha**2, DDPMScheduler(trained_betas=betas).alphas_cumprod, rel=1e-6)


@pytest.mark.parametrize("name", DDPM_SCHEDULES)
def test_zero_terminal_snr_is_diffusers(name):
    betas = beta_schedule(name, 1000)
    ours = zero_terminal_snr(betas)
    assert_close(ours, scheduling_ddpm.rescale_zero_terminal_snr(betas), rel=1e-10)
    process = from_scheduler_config(
        {**DDPM, "beta_schedule": name, "rescale_betas_zero_snr": True, "prediction_type": "sample"}
    )
    assert_close(process.alpha, from_betas(ours).alpha, rel=1e-12)
    assert process.alpha[-1] == 0
    assert process.sigma[-1] == 1


@pytest.mark.parametrize("num_levels", [10, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.5])
def test_flow_is_diffusers(shift, num_levels):
    process = from_scheduler_config({**FLOW, "shift": shift, "num_train_timesteps": num_levels})
    peer = FlowMatchEulerDiscreteScheduler(num_levels, shift=shift)
    peer.set_timesteps(num_levels)
    assert_close(process.sigma.flip(0), peer.sigmas[:-1], rel=2e-6)
    assert_close(process.network_time.flip(0), peer.timesteps, rel=2e-6)
    assert torch.equal(process.alpha, 1 - process.sigma)
    assert process.alpha[-1] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_trailing_flow_levels_are_the_sigmas_pipelines_pass(shift, num_steps):
    process = rectified_flow(1000, shift)
    peer = FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    assert_close(process.sigma[process.timesteps(num_steps)], peer.sigmas[:-1], rel=2e-6)


def test_karras_levels():
    process = karras(18)
    # The sampling grid of EDM, arXiv 2206.00364, Eq. 5, from its own formula.
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert_close(process.sigma.flip(0), expected, rel=1e-12)
    assert_close(process.network_time, process.sigma.log() / 4, rel=1e-12)
    assert process.start_std == pytest.approx(80)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("config", [DDPM, DDIM], ids=lambda c: c["_class_name"])
def test_timesteps_are_diffusers_for_every_number_of_steps(config, spacing, steps_offset):
    total = 200
    options = {
        "num_train_timesteps": total,
        "timestep_spacing": spacing,
        "steps_offset": steps_offset,
    }
    process = from_scheduler_config({**config, **options})
    peer = PEERS[config["_class_name"]](**options)
    for num_steps in range(1, total + 1):
        peer.set_timesteps(num_steps)
        # Out of 0..T-1 in diffusers: t = -1, from an accumulated rounding error (trailing), and
        # t = T (leading with an offset and T steps).
        legal = [t for t in peer.timesteps.tolist() if 0 <= t < total]
        assert process.timesteps(num_steps) == legal


@pytest.mark.parametrize("process", [rectified_flow(100), karras(100)], ids=["flow", "karras"])
@pytest.mark.parametrize("num_steps", [1, 7, 100])
def test_chains_begin_where_their_noise_belongs(process, num_steps):
    assert process.timesteps(num_steps)[0] == 99


@pytest.mark.parametrize("num_steps", [0, 101])
def test_number_of_steps_is_checked(num_steps):
    with pytest.raises(UsageError, match=f"{num_steps} sampling steps: use 1 to 100"):
        rectified_flow(100).timesteps(num_steps)


def test_clean_end():
    process = from_scheduler_config({**DDIM, "num_train_timesteps": 100})
    alpha, sigma = process.at(torch.tensor([-1, 0, 99]))
    assert alpha.tolist() == [1, float(process.alpha[0]), float(process.alpha[99])]
    assert sigma.tolist() == [0, float(process.sigma[0]), float(process.sigma[99])]


def test_set_alpha_to_one_false_ends_at_the_first_level():
    process = from_scheduler_config({**DDIM, "set_alpha_to_one": False})
    alpha, sigma = process.at(torch.tensor([-1]))
    peer = DDIMScheduler(set_alpha_to_one=False)
    assert_close(alpha**2, peer.final_alpha_cumprod.reshape(1), rel=1e-6)
    assert sigma == process.sigma[0]


@pytest.mark.parametrize("t", [[-2], [0, 100]])
def test_t_out_of_range_is_refused(t):
    with pytest.raises(UsageError, match=r"-1\.\.99"):
        rectified_flow(100).at(torch.tensor(t))


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 2, 2), (3, 1, 2, 2, 2)])
def test_add_noise_is_diffusers(shape):
    process = from_scheduler_config(DDPM)
    x_0, eps, t = torch.randn(2, *shape).double().unbind() + (torch.tensor([0, 500, 999]),)
    peer = DDPMScheduler()
    peer.alphas_cumprod = process.alpha**2
    assert_close(process.add_noise(x_0, eps, t), peer.add_noise(x_0, eps, t), rel=1e-9)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**DDPM, "beta_schedule": "square"}, "beta_schedule is 'square': give one of"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "no reverse transition"),
        ({"_class_name": "LCMScheduler"}, "no reverse transition"),
        ({"_class_name": "VQDiffusionScheduler"}, "tokens, not Gaussian"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "predicts a score; wrap the model"),
        ({"_class_name": "StrangeScheduler"}, "'StrangeScheduler' is not supported: use DDPM"),
        ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "linear"}, "karras, exponential"),
        ({"_class_name": "IPNDMScheduler", "trained_betas": [0.1]}, "trained_betas is not"),
        ({}, "without _class_name"),
        ({**FLOW, "use_dynamic_shifting": True}, "needs the size of an image"),
        ({**FLOW, "invert_sigmas": True}, "invert_sigmas is not supported"),
    ],
)
def test_schedulers_that_cannot_teach_are_refused(config, message):
    with pytest.raises(UsageError, match=message):
        from_scheduler_config(config)


@pytest.mark.parametrize(
    ("alpha", "sigma", "message"),
    [
        ([0.9, 0.5], [0.1, 0.5, 0.9], "same length"),
        ([1.0, 0.5], [0.0, 0.5], "sigma must be above 0"),
        ([0.5, 0.9], [0.5, 0.1], "fall strictly"),
    ],
)
def test_tables_are_checked(alpha, sigma, message):
    with pytest.raises(UsageError, match=message):
        Process(torch.tensor(alpha), torch.tensor(sigma), torch.arange(2.0))


def test_names_that_moved_out_of_a_module_are_found_under_its_former_name():
    import dkdm.process

    assert dkdm.process.Process is Process
    assert dkdm.process.from_betas is from_betas
    with pytest.raises(
        AttributeError, match="'dkdm.core.diffusion.process' has no attribute 'nothing'"
    ):
        _ = dkdm.process.nothing
