"""Samplers of second order: against diffusers' own schedulers, and by their order on a Gaussian.

The path of a Gaussian is known: (x - alpha mean) / sqrt(alpha^2 var + sigma^2) never changes.
"""

from collections.abc import Callable

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import Tensor

from dkdm.core.diffusion.prediction import Parameterization, Prediction
from dkdm.core.diffusion.process import Process, Spacing, per_sample
from dkdm.core.diffusion.solvers import SPACING, Solver, dpm, heun, spacing_of
from dkdm.core.diffusion.steps import sample
from dkdm.models.schedulers import from_scheduler_config

MEAN, VAR = 0.4, 0.3
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}
CONFIGS = {
    "ddpm": {"_class_name": "DDPMScheduler", "clip_sample": False} | BETAS,
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "edm": {"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000},
    "cosine": {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False,
    },
}


def predictor(process: Process) -> Callable[[Tensor, Tensor], Prediction]:
    """The exact prediction for data N(MEAN, VAR)."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (per_sample(table, x) for table in process.at(t))
        away = (x - alpha * MEAN) / (alpha**2 * VAR + sigma**2)
        return Prediction(x, MEAN + alpha * VAR * away, sigma * away)

    return predict


def first_order(
    predict: Callable[[Tensor, Tensor], Prediction], process: Process, x: Tensor, steps: list[int]
) -> Tensor:
    return sample(predict, process, Parameterization(), x, steps, lambda _: torch.zeros(()))


def start(process: Process) -> Tensor:
    noise = torch.randn(
        64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return process.start_std * noise


def error(process: Process, solver: Solver, num_steps: int, spacing: Spacing = "linspace") -> float:
    """The largest distance from the end of the exact path."""
    x, levels = start(process), process.timesteps(num_steps, spacing)
    alpha, sigma = process.at(torch.tensor([levels[0]]))
    place = (x - alpha * MEAN) / (alpha**2 * VAR + sigma**2).sqrt()
    low, high = process.final
    end = low * MEAN + (low**2 * VAR + high**2) ** 0.5 * place
    return float((solver(predictor(process), process, x, levels) - end).abs().max())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("solver", "factor"), [(heun, 3.0), (dpm, 2.5), (first_order, 1.7)])
def test_error_falls_by_the_order(kind: str, solver: Solver, factor: float) -> None:
    process = from_scheduler_config(CONFIGS[kind])
    coarse, fine = (error(process, solver, steps) for steps in (16, 32))
    assert fine < coarse / factor
    if solver is heun:
        assert fine < error(process, first_order, 32) / 4


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_step_is_that_of_ddim(kind: str) -> None:
    process = from_scheduler_config(CONFIGS[kind])
    x, levels = start(process), process.timesteps(1, "trailing")
    expected = first_order(predictor(process), process, x, levels)
    for solver in (heun, dpm):
        torch.testing.assert_close(solver(predictor(process), process, x, levels), expected)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["heun", "dpm"])
def test_path_is_that_of_diffusers(name: str) -> None:
    process = from_scheduler_config(CONFIGS["ddpm"])
    predict, x, levels = predictor(process), start(process), process.timesteps(12, "trailing")
    if name == "heun":
        scale = process.at(torch.tensor([levels[0]]))[0]  # it keeps x / alpha
        exploding = Process(
            torch.ones_like(process.alpha), process.sigma / process.alpha, process.network_time
        )
        found = heun(predictor(exploding), exploding, x / scale, levels)
        scheduler = HeunDiscreteScheduler(**BETAS)
    else:
        found = dpm(predict, process, x, levels)
        scheduler = DPMSolverMultistepScheduler(final_sigmas_type="zero", **BETAS)
    scheduler.set_timesteps(timesteps=levels)
    alpha, sigma = process.at(torch.tensor([levels[0]]))
    x = x / alpha if name == "heun" else x  # it keeps x / alpha
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        x = scheduler.step(predict(given, t.long().repeat(len(x))).eps, t, x).prev_sample
    torch.testing.assert_close(found, x.to(found.dtype), rtol=0, atol=2e-4)


def test_first_steps_of_a_cosine_schedule_are_no_worse_than_those_of_first_order() -> None:
    process = from_scheduler_config(CONFIGS["cosine"])
    assert process.sigma[-1] / process.alpha[-1] > 10_000
    for steps in (5, 10, 20):
        assert error(process, heun, steps) < error(process, first_order, steps) / 2


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("steps", [10, 20])
def test_from_their_own_levels_both_are_better_than_first_order(kind: str, steps: int) -> None:
    process = from_scheduler_config(CONFIGS[kind])
    for solver in (heun, dpm):
        assert error(process, solver, steps, SPACING) < error(process, first_order, steps, SPACING)
    if kind != "edm":  # whose levels lie closely at low noise
        assert error(process, dpm, steps, SPACING) < error(process, dpm, steps, "leading")


def test_levels_start_at_the_most_noise_unless_it_hides_x_0() -> None:
    cosine, linear = (from_scheduler_config(CONFIGS[kind]) for kind in ("cosine", "ddpm"))
    assert spacing_of("heun", cosine, "v_prediction") == SPACING
    assert spacing_of("dpm", linear, "epsilon") == SPACING
    assert spacing_of("dpm", cosine, "epsilon") is spacing_of("ddim", linear, "epsilon") is None
