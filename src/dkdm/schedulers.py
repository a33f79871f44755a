"""From a diffusers scheduler config to the one-step process it samples."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkdm.errors import UsageError
from dkdm.prediction import PredictionType
from dkdm.process import (
    Clipping,
    Process,
    beta_schedule,
    from_betas,
    karras,
    rectified_flow,
    zero_terminal_snr,
)

Config = Mapping[str, Any]

_NO_TRANSITION = (
    "maps noise to data in one jump and has no reverse transition p(x_prev | x_t) to learn from; "
    "distil the diffusion model it came from"
)
_REFUSED = {
    "CMStochasticIterativeScheduler": f"a consistency model {_NO_TRANSITION}",
    "LCMScheduler": f"a latent consistency model {_NO_TRANSITION}",
    "TCDScheduler": f"a trajectory consistency model {_NO_TRANSITION}",
    "VQDiffusionScheduler": "its states are tokens, not Gaussian; no supported scheduler is near",
    "ScoreSdeVeScheduler": "it predicts a score; the nearest supported is EDMEulerScheduler",
    "KarrasVeScheduler": "it evaluates twice a step; the nearest supported is EDMEulerScheduler",
    "UnCLIPScheduler": "the nearest supported is DDPMScheduler with the same betas",
    "FlowMatchHeunDiscreteScheduler": "the nearest supported is FlowMatchEulerDiscreteScheduler",
}


def from_scheduler_config(config: Config, image_tokens: int | None = None) -> Process:
    """The process of a diffusers scheduler config, recomputed in float64.

    config: as in `scheduler_config.json`. Schedulers that solve the same equation in several
    evaluations or with a memory (PNDM, Euler, DPM-Solver, UniPC, ...) are rebuilt as DDIM on their
    betas. image_tokens: length of the network's image sequence, for a flow whose shift depends on
    it. Raises UsageError for a scheduler that defines no one-step transition or is not supported,
    naming the nearest that is, and for an unknown beta schedule.
    """
    name = config.get("_class_name", "")
    if name in _REFUSED:
        raise UsageError(f"scheduler {name} cannot teach: {_REFUSED[name]}")
    if name == "FlowMatchEulerDiscreteScheduler":
        return _from_flow_config(config, image_tokens)
    if config.get("use_flow_sigmas"):
        return _from_flow_config(as_flow_euler(config), image_tokens)
    if name in _OTHERS:
        return _OTHERS[name](config)
    if name in MULTISTEP:
        return _from_beta_config(as_ddim(config))
    raise UsageError(
        f"scheduler '{name or 'without _class_name'}' is not supported: expected DDPMScheduler, "
        "DDIMScheduler, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler or one of "
        f"{', '.join(MULTISTEP)}. If the model was trained with a beta schedule, save a "
        "DDPMScheduler with the same betas and prediction type beside it"
    )


def prediction_type(config: Config) -> PredictionType:
    """What a scheduler's network predicts."""
    name = config.get("_class_name", "")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return "flow_prediction"
    if name == "IPNDMScheduler":
        return "v_prediction"
    if name.startswith("EDM"):
        return "edm"
    kind: PredictionType = config.get("prediction_type", "epsilon")
    return kind


MULTISTEP = (
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
)
_BETA_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "steps_offset",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "rescale_betas_zero_snr",
)


def as_ddim(config: Config) -> dict[str, Any]:
    """A DDIM config of the same betas, prediction and clean end as a solver's config.

    Steps with linspace spacing become trailing ones, which begin at T-1 as well: diffusers' DDIM
    moves off its own grid with the former.
    """
    own = _own_arguments(config)
    if own.get("timestep_type", "discrete") != "discrete":
        raise UsageError(
            f"{config['_class_name']} with timestep_type {own['timestep_type']} is not supported: "
            "expected discrete; the nearest supported is EDMEulerScheduler"
        )
    spacing = own.get("timestep_spacing", "linspace")
    ends_clean = own.get("final_sigmas_type", "zero") == "zero"
    return {
        "_class_name": "DDIMScheduler",
        **{key: own[key] for key in _BETA_KEYS if key in own},
        "clip_sample": own.get("clip_sample", False),
        "set_alpha_to_one": own.get("set_alpha_to_one", ends_clean),
        "timestep_spacing": "trailing" if spacing == "linspace" else spacing,
    }


def _own_arguments(config: Config) -> dict[str, Any]:
    """The arguments that a scheduler's class has, as the config has them or by their defaults.

    Configs are handed from one class to another and keep what the new one does not read.
    """
    import diffusers

    name: str = config["_class_name"]
    cls = getattr(diffusers, _SAME_ARGUMENTS.get(name, name))
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: config.get(p.name, p.default) for p in parameters if p.name != "self"}


_SAME_ARGUMENTS = {  # stand-ins for classes that need scipy and torchsde to be there
    "LMSDiscreteScheduler": "EulerDiscreteScheduler",
    "DPMSolverSDEScheduler": "KDPM2DiscreteScheduler",
}


def as_flow_euler(config: Config) -> dict[str, Any]:
    """A flow Euler config of the same shift as a solver's config with `use_flow_sigmas`."""
    kept = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        **{key: config[key] for key in kept if key in config},
        "shift": config.get("flow_shift", 1.0),
    }


def saved_config(config: Config, image_tokens: int | None = None) -> dict[str, Any]:
    """The config a student is saved with: the teacher's own, or what it was rebuilt as.

    A dynamic shift is beside it the `shift` that it amounts to, which diffusers does not read.
    """
    if config.get("use_flow_sigmas"):
        config = as_flow_euler(config)
    if config.get("use_dynamic_shifting"):
        return {**config, "shift": dynamic_shift(config, image_tokens)}
    return as_ddim(config) if config.get("_class_name") in MULTISTEP else dict(config)


NAMED: dict[str, dict[str, Any]] = {
    "ddpm-linear": {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "clip_sample": False,
    },
    "ddpm-cosine": {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "variance_type": "fixed_small",
        "clip_sample": False,
    },
    "flow": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
    },
    "edm": {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": 1000,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "rho": 7.0,
        "sigma_data": 0.5,
        "prediction_type": "epsilon",
    },
}


def named_config(spec: str, clip_range: float | None = None) -> Config:
    """A scheduler's config by its name in NAMED or the path of its JSON.

    clip_range: of a named one that can clip; None does not. Raises UsageError for a name that is
    neither, and for a file that is none.
    """
    if spec in NAMED:
        clips = {"clip_sample": True, "clip_sample_range": clip_range}
        can = clip_range is not None and "clip_sample" in NAMED[spec]
        return NAMED[spec] | (clips if can else {})
    try:
        config = json.loads(Path(spec).read_text())
        return saved_config({**config, "_class_name": config["_class_name"]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"noise process '{spec}': expected {', '.join(NAMED)}, or the path of a "
            f"scheduler_config.json ({type(error).__name__}: {error})"
        ) from error


def within(config: Config, low: float, high: float) -> Config:
    """The same scheduler on those of its levels whose sigma / alpha lies in low..high.

    Raises UsageError where fewer than two are left, and for a scheduler that cannot be cut.
    """
    process, name = from_scheduler_config(config), str(config["_class_name"])
    ratio = process.sigma / process.alpha
    kept = (ratio >= low * (1 - 1e-9)) & (ratio <= high * (1 + 1e-9))
    if kept.sum() < 2:
        raise UsageError(
            f"{name} has no signal-to-noise ratio in common with the teacher: sigma / alpha from "
            f"{ratio[0]:.3g} to {ratio[-1]:.3g} here, from {low:.3g} to {high:.3g} there"
        )
    if kept.all():
        return config
    if name.startswith("EDM"):
        low, high = max(low, float(ratio[0])), min(high, float(ratio[-1]))
        return {**config, "sigma_min": low, "sigma_max": high}
    sigma, alpha = process.sigma[kept], process.alpha[kept]
    if name.startswith("FlowMatch"):
        return {**config, SIGMA_RANGE: [float(sigma[0]), float(sigma[-1])]}
    if name not in ("DDPMScheduler", "DDIMScheduler"):
        raise UsageError(f"{name} cannot be cut to the teacher's signal-to-noise ratios")
    before = torch.cat([alpha.new_ones(1), alpha[:-1]])
    betas = (1 - (alpha / before) ** 2).tolist()
    left_out = ("rescale_betas_zero_snr", "beta_start", "beta_end", "beta_schedule")
    rest = {key: value for key, value in config.items() if key not in left_out}
    # Leading steps would leave out the noisiest of a number of levels that is not round.
    spacing = {"timestep_spacing": "trailing"}
    return {**rest, **spacing, "num_train_timesteps": len(betas), "trained_betas": betas}


SIGMA_RANGE = "_sigma_range"  # of the levels a flow was trained on; diffusers skips such names


def flow_grid(config: Config) -> tuple[float, float]:
    """First and lowest sigma to give a flow's `set_timesteps`, which shifts them itself."""
    shift = config.get("shift", 1.0)
    low, high = config.get(SIGMA_RANGE, (0.0, 1.0))
    return high / (shift - (shift - 1) * high), low / (shift - (shift - 1) * low)


def _from_beta_config(config: Config) -> Process:
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    else:
        betas = beta_schedule(
            config.get("beta_schedule", "linear"),
            config.get("num_train_timesteps", 1000),
            config.get("beta_start", 1e-4),
            config.get("beta_end", 0.02),
        )
    if config.get("rescale_betas_zero_snr"):
        betas = zero_terminal_snr(betas)
    is_ddim = config["_class_name"] == "DDIMScheduler"
    process = from_betas(
        betas,
        clipping=_clipping(config, rederive_eps=not is_ddim),
        spacing=config.get("timestep_spacing", "leading"),
        steps_offset=config.get("steps_offset", 0),
        scheduler=dict(config),
    )
    if is_ddim and not config.get("set_alpha_to_one", True):
        final = (float(process.alpha[0]), float(process.sigma[0]))
        process = replace(process, final=final)
    return process


def _clipping(config: Config, rederive_eps: bool) -> Clipping:
    if config.get("thresholding"):
        return Clipping(
            range=config.get("sample_max_value", 1.0),
            quantile=config.get("dynamic_thresholding_ratio", 0.995),
            rederive_eps=rederive_eps,
        )
    if config.get("clip_sample", True):
        return Clipping(range=config.get("clip_sample_range", 1.0), rederive_eps=rederive_eps)
    return Clipping(rederive_eps=rederive_eps)


def beta_fields(process: Process) -> dict[str, Any]:
    """How a process clips and steps, as a DDPM or DDIM scheduler's config says it.

    These schedulers clip around 0 only: a clipping around another value is left out.
    """
    clipping = process.clipping
    clips = clipping.range is not None and clipping.center == 0
    quantile = clipping.quantile if clips else None
    fields: dict[str, Any] = {
        "clip_sample": clips and quantile is None,
        "thresholding": quantile is not None,
        "timestep_spacing": process.spacing,
        "steps_offset": process.steps_offset,
    }
    if quantile is not None:
        fields |= {"dynamic_thresholding_ratio": quantile, "sample_max_value": clipping.range}
    elif clips:
        fields["clip_sample_range"] = clipping.range
    if process.scheduler["_class_name"] == "DDIMScheduler":
        fields["set_alpha_to_one"] = process.final == (1.0, 0.0)
    return fields


def _from_flow_config(config: Config, image_tokens: int | None) -> Process:
    odd = [key for key in _UNSUPPORTED_FLOW if config.get(key)]
    if odd:
        raise UsageError(f"FlowMatchEulerDiscreteScheduler with {', '.join(odd)} is not supported")
    levels, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
    # The scheduler's set_timesteps, which every pipeline calls, shifts its lowest level twice.
    lowest = shift / (levels + shift - 1)
    if config.get("use_dynamic_shifting"):
        shift, lowest = dynamic_shift(config, image_tokens), 1 / levels
    process = rectified_flow(levels, shift, lowest, scheduler=dict(config))
    if config.get("shift_terminal"):
        # The least noise is brought to `shift_terminal`, the rest stretched (LTX).
        alpha = process.alpha * (1 - config["shift_terminal"]) / process.alpha[0]
        process = _flow_at(process, 1 - alpha, levels)
    if config.get(SIGMA_RANGE):
        low, high = config[SIGMA_RANGE]
        sigma = process.sigma
        process = _flow_at(process, sigma[(sigma >= low) & (sigma <= high)], levels)
    return process


def _flow_at(process: Process, sigma: Tensor, levels: int) -> Process:
    return replace(process, alpha=1 - sigma, sigma=sigma, network_time=sigma * levels)


def dynamic_shift(config: Config, image_tokens: int | None) -> float:
    """The shift of a flow for pictures of `image_tokens` tokens (Flux, `calculate_shift`).

    mu is linear in the number of tokens; the shift is exp(mu), or mu for the linear kind. Raises
    UsageError where the number of tokens is not known.
    """
    if image_tokens is None:
        raise UsageError(
            "a flow with dynamic shifting needs the picture's size: expected a network with a "
            "sample_size, or --teacher-size"
        )
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) / (many - few) * (image_tokens - few)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


_UNSUPPORTED_FLOW = (
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


def _from_edm_config(config: Config) -> Process:
    """EDM levels (arXiv 2206.00364); "epsilon" in these configs means F of its preconditioning."""
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise UsageError(
            f"{config['_class_name']} with prediction type {config['prediction_type']} is not "
            "supported: expected epsilon"
        )
    if config.get("sigma_schedule", "karras") != "karras":
        raise UsageError(f"{config['_class_name']}: expected sigma_schedule karras")
    return karras(
        config.get("num_train_timesteps", 1000),
        config.get("sigma_min", 0.002),
        config.get("sigma_max", 80.0),
        config.get("rho", 7.0),
        scheduler=dict(config),
    )


def _from_trigonometric_config(config: Config) -> Process:
    """The process of DanceDiffusion: alpha = sqrt(1 - sigma^2), sigma = sin^2 of the time.

    Its networks are fed the angle atan2(sigma, alpha) as a share of a right angle.
    """
    if config.get("trained_betas") is not None:
        raise UsageError(f"{config['_class_name']} with trained_betas is not supported")
    levels = config.get("num_train_timesteps", 1000)
    u = torch.arange(1, levels + 1, dtype=torch.float64) / levels
    sigma = torch.sin(u * math.pi / 2) ** 2
    alpha = (1 - sigma**2).clamp(min=0).sqrt()
    angle = torch.atan2(sigma, alpha) / math.pi * 2
    return Process(alpha, sigma, angle, spacing="trailing", scheduler=dict(config))


_OTHERS: dict[str, Callable[[Config], Process]] = {
    "DDPMScheduler": _from_beta_config,
    "DDIMScheduler": _from_beta_config,
    "EDMEulerScheduler": _from_edm_config,
    "EDMDPMSolverMultistepScheduler": _from_edm_config,
    "IPNDMScheduler": _from_trigonometric_config,
}
