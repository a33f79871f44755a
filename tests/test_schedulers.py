"""Scheduler configs of any class against the diffusers object of that class: one step, the levels,
the preconditioning; what is saved steps as what was read; everything else is refused with a remedy.
"""

import inspect
import itertools
import math

import diffusers
import pytest
import torch
from diffusers import schedulers as stock

from dkdm.core.diffusion.prediction import Parameterization, Prediction, scale_input, to_x_0_eps
from dkdm.core.diffusion.steps import reverse_step
from dkdm.errors import UsageError
from dkdm.models.schedulers import (
    BETA_PREDICTIONS,
    from_scheduler_config,
    named_config,
    prediction_type,
)
from dkdm.models.stand_ins import stand_in

pytestmark = [  # numpy's, of diffusers' `np.array(tensor)`; and diffusers' own
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`algorithm_types dpmsolver:FutureWarning"),
]

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 100}
THRESHOLDING = {
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.9,
    "sample_max_value": 1.5,
}
# The order-1 form of every solver whose step is x_0 and eps at one evaluation.
FIRST_ORDERS = {
    "dpm++": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "dpm": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 1, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "single": ("DPMSolverSinglestepScheduler", {"solver_order": 1}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 1}),
    "unipc-bh1": ("UniPCMultistepScheduler", {"solver_order": 1, "solver_type": "bh1"}),
    "unipc-eps": ("UniPCMultistepScheduler", {"solver_order": 1, "predict_x0": False}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 1}),
    "sa": (
        "SASolverScheduler",
        {"predictor_order": 1, "corrector_order": 1, "tau_func": lambda _: 0.0},
    ),
    "ddpm-parallel": ("DDPMParallelScheduler", {"clip_sample": False}),
    "ddim-parallel": ("DDIMParallelScheduler", {"clip_sample": False}),
}
LEVELS = (80, 60, 40)


def config_of(name, options):
    return {"_class_name": name, **options}


def saved_config(config, image_tokens=None):
    """What a student of this process is saved with."""
    return from_scheduler_config(config, image_tokens).scheduler


def step_of(peer, level, following, output, x):
    """One deterministic step of a scheduler in float64, from one level to another."""
    parallel = type(peer).__name__.endswith("ParallelScheduler")
    if parallel or isinstance(peer, diffusers.DDIMScheduler):
        peer.num_inference_steps = peer.config.num_train_timesteps // (level - following)
        return peer.step(output, level, x).prev_sample
    ratio = ((1 - peer.alphas_cumprod.double()) / peer.alphas_cumprod.double()).sqrt()
    peer.set_timesteps(2)
    peer.timesteps = torch.tensor([level, following])
    peer.sigmas = torch.cat([ratio[[level, following]], torch.zeros(1)])
    return peer.step(output, level, x).prev_sample


def our_step(config, kind, level, following, output, x):
    process = from_scheduler_config(config)
    assert prediction_type(config) == kind
    t, s = torch.full((len(x),), level), torch.full((len(x),), following)
    prediction = Prediction(output, *to_x_0_eps(kind, output, x, *process.at(t)))
    return reverse_step(
        process, Parameterization(kind), x, prediction, t, s, torch.zeros_like(x), 0
    )


def exact_tables(peer, config):
    """Ours in place of its float32 ones: the comparison is of the step."""
    process = from_scheduler_config(config)
    peer.alphas_cumprod = process.alpha**2
    return peer


@pytest.mark.parametrize("kind", BETA_PREDICTIONS)
@pytest.mark.parametrize("thresholding", [False, True], ids=["plain", "thresholding"])
@pytest.mark.parametrize("solver", [name for name in FIRST_ORDERS if name != "ddpm-parallel"])
def test_the_first_order_step_of_every_solver_is_ours(solver, thresholding, kind):
    name, own = FIRST_ORDERS[solver]
    options = {**BETAS, **own, "prediction_type": kind, **(THRESHOLDING if thresholding else {})}
    x, output = 2 * torch.randn(2, 3, 2, 4, 4).double()
    config = config_of(name, options)
    for level, following in itertools.pairwise(LEVELS):
        peer = exact_tables(getattr(diffusers, name)(**options), config)
        theirs = step_of(peer, level, following, output, x)
        ours = our_step(config, kind, level, following, output, x)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        # What the student is saved with takes the same step.
        saved = saved_config(config)
        ours = our_step(saved, kind, level, following, output, x)
        assert saved_config(saved) == saved
        cls = getattr(diffusers, saved["_class_name"])
        peer = exact_tables(cls.from_config(saved), config)
        again = step_of(peer, level, following, output, x)
        torch.testing.assert_close(again, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BETA_PREDICTIONS)
def test_heun_clips_and_derives_eps_from_what_is_left(kind):
    options = {**BETAS, "prediction_type": kind, "clip_sample": True}
    x, output = 2 * torch.randn(2, 3, 2, 4, 4).double()
    config = config_of("HeunDiscreteScheduler", options)
    process = from_scheduler_config(config)
    peer = diffusers.HeunDiscreteScheduler(**options)
    peer.set_timesteps(4)
    level, following = 60, 40
    (alpha, sigma), (alpha_s, sigma_s) = (process.at(torch.tensor([i])) for i in (level, following))
    peer.sigmas = torch.cat([sigma / alpha, sigma_s / alpha_s, torch.zeros(1)])
    peer._step_index = 0
    theirs = peer.step(output, level, x / alpha).prev_sample * alpha_s  # its states are x / alpha
    torch.testing.assert_close(our_step(config, kind, level, following, output, x), theirs)
    saved = saved_config(config)
    peer = exact_tables(diffusers.DPMSolverMultistepScheduler.from_config(saved), config)
    torch.testing.assert_close(step_of(peer, level, following, output, x), theirs)
    with pytest.raises(UsageError, match=r"clip_sample_range 2 .*save a DDPMScheduler"):
        from_scheduler_config({**config, "clip_sample_range": 2.0})


def test_a_thresholding_solver_that_predicts_eps_ignores_it_as_unipc_does():
    own = {"thresholding": True, "predict_x0": False}
    assert from_scheduler_config(config_of("UniPCMultistepScheduler", own)).clipping.range is None


def test_thresholding_on_a_flow_is_kept():
    options = {
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
        "solver_order": 1,
        "num_train_timesteps": 100,
        **THRESHOLDING,
    }
    config = config_of("UniPCMultistepScheduler", options)
    process = from_scheduler_config(config)
    x, output = 2 * torch.randn(2, 3, 2, 4, 4).double()
    t, s = torch.tensor([70] * 3), torch.tensor([50] * 3)
    prediction = Prediction(output, *to_x_0_eps("flow_prediction", output, x, *process.at(t)))
    parameterization = Parameterization("flow_prediction")
    ours = reverse_step(process, parameterization, x, prediction, t, s, torch.zeros_like(x), 0)
    saved = saved_config(config)
    kept = diffusers.DPMSolverMultistepScheduler.from_config(saved)
    for peer in (diffusers.UniPCMultistepScheduler(**options), kept):
        peer.set_timesteps(2)
        peer.timesteps = torch.tensor([70, 50])
        peer.sigmas = torch.cat([process.sigma[[70, 50]], torch.zeros(1)])
        torch.testing.assert_close(ours, peer.step(output, 70, x).prev_sample)
    assert from_scheduler_config(saved).clipping == process.clipping


@pytest.mark.parametrize(
    ("solver", "schedule"),
    [("HeunDiscreteScheduler", "exp"), ("PNDMScheduler", "linear")],
)
def test_what_is_saved_has_betas_that_its_class_takes(solver, schedule):
    config = config_of(solver, {"beta_schedule": schedule, "num_train_timesteps": 50})
    saved = saved_config(config)
    peer = getattr(diffusers, saved["_class_name"]).from_config(saved)
    ours = from_scheduler_config(config).alpha ** 2
    torch.testing.assert_close(peer.alphas_cumprod.double(), ours, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_is_diffusers(name, final, schedule, prediction):
    """CosXL is EDM with v, sigma_data 1 and sigma up to 120."""
    options = {
        "num_train_timesteps": 30,
        "sigma_max": 120.0,
        "sigma_data": 1.0,
        "sigma_schedule": schedule,
        "prediction_type": prediction,
        "final_sigmas_type": final,
    }
    if name.startswith("EDMDPM"):
        options |= {"solver_order": 1, **THRESHOLDING}
    config = config_of(name, options)
    process = from_scheduler_config(config)
    peer = getattr(diffusers, name)(**options)
    peer.set_timesteps(30)
    levels = torch.cat([process.sigma.flip(0), torch.tensor([process.final[1]])])
    torch.testing.assert_close(levels, peer.sigmas.double(), rtol=1e-5, atol=0)
    times = process.network_time.flip(0)
    torch.testing.assert_close(times, peer.timesteps.double(), rtol=1e-5, atol=1e-6)
    peer.sigmas = levels
    kind = prediction_type(config)
    x, output = 2 * torch.randn(2, 3, 2, 4, 4).double()
    for t, s in ((29, 28), (10, 9), (0, -1)):
        peer._step_index = 29 - t
        shown = peer.scale_model_input(x, peer.timesteps[29 - t])
        ids = torch.full((3,), t)
        alpha, sigma = process.at(ids)
        torch.testing.assert_close(scale_input(kind, x, sigma, 1.0), shown)
        prediction_ = Prediction(output, *to_x_0_eps(kind, output, x, alpha, sigma, 1.0))
        parameterization = Parameterization(kind, sigma_data=1.0)
        there = torch.full((3,), s)
        noise = torch.zeros_like(x)
        ours = reverse_step(process, parameterization, x, prediction_, ids, there, noise, 0)
        theirs = peer.step(output, peer.timesteps[29 - t], x).prev_sample
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)


def test_the_continuous_times_of_euler_are_edm_with_v():
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_max": 80.0}
    peer = diffusers.EulerDiscreteScheduler(**options, sigma_min=0.1, use_karras_sigmas=True)
    config = {**peer.config, "_class_name": "EulerDiscreteScheduler"}
    process, kind = from_scheduler_config(config), prediction_type(config)
    peer.set_timesteps(1000)
    torch.testing.assert_close(process.sigma.flip(0), peer.sigmas[:-1].double(), rtol=1e-4, atol=0)
    peer._step_index = 500
    x, output = 2 * torch.randn(2, 3, 2, 4, 4).double()
    t, s = torch.tensor([499] * 3), torch.tensor([498] * 3)
    alpha, sigma = process.at(t)
    prediction = Prediction(output, *to_x_0_eps(kind, output, x, alpha, sigma, 1.0))
    ours = reverse_step(
        process, Parameterization(kind), x, prediction, t, s, torch.zeros_like(x), 0
    )
    theirs = peer.step(output, peer.timesteps[500], x).prev_sample
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(process.network_time[499], peer.timesteps[500].double())


@pytest.mark.parametrize(
    "flag",
    ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling"],
)
def test_flags_of_a_flows_grid_are_left_out(flag):
    config = config_of("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    flagged = {**config, flag: True}
    assert torch.equal(from_scheduler_config(flagged).sigma, from_scheduler_config(config).sigma)
    assert saved_config(flagged) == config


@pytest.mark.parametrize(
    "options",
    [
        {"use_karras_sigmas": True},
        {"use_lu_lambdas": True},
        {"use_beta_sigmas": True},
        {"use_exponential_sigmas": True},
        {"lambda_min_clipped": -5.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_flags_of_a_solvers_grid_are_left_out(options):
    config = config_of("DPMSolverMultistepScheduler", {})
    assert saved_config({**config, **options}) == saved_config(config)


def test_a_solver_on_a_flow_keeps_what_pipelines_read():
    told = {"base_shift": 0.25, "max_shift": 2.0, "max_image_seq_len": 1024}
    own = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    config = config_of("UniPCMultistepScheduler", {**own, **told, "use_dynamic_shifting": True})
    saved = saved_config(config, 256)
    assert {key: saved[key] for key in told} == told
    assert saved["shift"] == pytest.approx(math.exp(0.25))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": 10**8}, "1 to 100,000"),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": "1000"}, "a whole number"),
        ({"_class_name": "DDPMScheduler", "beta_start": -1}, "beta_start is -1"),
        ({"_class_name": "DDIMScheduler", "beta_end": float("nan")}, "beta_end is nan"),
        ({"_class_name": "DDIMScheduler", "trained_betas": {}}, "trained_betas is {}"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [2.0]}, "trained_betas"),
        ({"_class_name": "DDIMScheduler", "clip_sample": "yes"}, "true or false"),
        ({"_class_name": "DDIMScheduler", "clip_sample_range": None}, "clip_sample_range"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": 3}, "leading, trailing"),
        ({"_class_name": "DDIMScheduler", "steps_offset": -1}, "steps_offset"),
        ({"_class_name": "DDIMScheduler", "prediction_type": []}, "epsilon, sample"),
        ({"_class_name": "PNDMScheduler", "prediction_type": {}}, "prediction_type"),
        ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": 1}, "thresholding is 1"),
        (
            {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
            "set use_flow_sigmas to true",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            "prediction_type epsilon is not supported",
        ),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 90.0}, "sigma_max is 80"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0}, "sigma_data"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "epsilon, v_pred"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift is 0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 2}, "shift_terminal"),
        ({"_class_name": ["DDPMScheduler"]}, "is not supported"),
        ({"_class_name": None}, "is not supported"),
        ({"_class_name": "IPNDMScheduler", "num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_a_wrong_value_is_named(config, message):
    with pytest.raises(UsageError, match=message) as caught:
        from_scheduler_config(config)
        prediction_type(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"_class_name": 3}', "{"])
def test_a_named_file_that_is_no_schedulers_is_refused(tmp_path, text):
    file = tmp_path / "scheduler.json"
    file.write_text(text)
    with pytest.raises(UsageError, match="noise process"):
        named_config(str(file))


CLASSES = sorted(
    name
    for name in dir(stock)
    if name.endswith("Scheduler") and inspect.isclass(getattr(stock, name))
)
SUPPORTED = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("prefix", ["", "Flax"])
def test_every_scheduler_of_diffusers_is_read_or_refused_with_a_remedy(prefix, name):
    config = {"_class_name": prefix + name}
    if name in SUPPORTED:
        process = from_scheduler_config(config)
        assert process.num_levels == 1000
        assert process.scheduler == stand_in(config)
        assert not process.scheduler["_class_name"].startswith("Flax")
        return
    with pytest.raises(UsageError, match=r"save a|wrap the model|distil "):
        from_scheduler_config(config)


def test_absent_entries_take_the_defaults_of_their_class():
    for name in SUPPORTED - {"LMSDiscreteScheduler", "DPMSolverSDEScheduler"}:
        peer = getattr(diffusers, name)()
        told = from_scheduler_config({**peer.config, "_class_name": name})
        ours = from_scheduler_config({"_class_name": name})
        assert torch.equal(ours.sigma, told.sigma)
        assert (ours.clipping, ours.final, ours.spacing) == (
            told.clipping,
            told.final,
            told.spacing,
        )
