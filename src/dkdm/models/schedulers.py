"""From a diffusers scheduler config to the one-step process it samples, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkdm.core.diffusion.prediction import PredictionType
from dkdm.core.diffusion.process import Process
from dkdm.core.diffusion.schedules import from_betas, karras, rectified_flow
from dkdm.errors import UsageError
from dkdm.models.effective import class_config
from dkdm.models.stand_ins import (
    EDM_SCHEDULERS,
    ENDS,
    FIRST_ORDER,
    FLOW,
    IN_PYTHON,
    ON_BETAS,
    SPACINGS,
    TINY,
    Config,
    betas_of,
    clipping_of,
    fields_of,
    stand_in,
)
from dkdm.reading.arguments import refuse
from dkdm.reading.fields import Fields, read_json
from dkdm.reading.places import expanded
from dkdm.reading.sizes import MAX_LEVELS


def from_scheduler_config(config: Config, image_tokens: int | None = None) -> Process:
    """The process of a diffusers scheduler config, recomputed in float64.

    config: as in `scheduler_config.json`; absent entries take the defaults of its class. Schedulers
    that solve the same equation in several evaluations or with a memory (PNDM, Euler, DPM-Solver,
    UniPC, ...) are rebuilt as one-step solvers on their betas, see `stand_in`, whose config is the
    process's `scheduler`: what a student is saved with. image_tokens: length of the network's image
    sequence, for a flow whose shift depends on it. Raises UsageError for a
    scheduler that defines no one-step transition or is not supported, naming what to do instead,
    and for an entry of the wrong type or out of range.
    """
    read = stand_in(_config_given(config))
    if read["_class_name"] == FLOW or read.get("use_flow_sigmas"):
        return _from_flow_config(read, image_tokens)
    return _OTHERS[read["_class_name"]](read)


def _config_given(value: Any) -> Config:
    if isinstance(value, Mapping):
        return value
    if isinstance(getattr(value, "config", None), Mapping):
        return {**value.config, "_class_name": type(value).__name__}
    accepted = "give a dict, as in scheduler_config.json, or a scheduler of diffusers"
    if isinstance(value, (str, Path)):
        accepted = f"give what it holds: json.load(open({str(value)!r}))"
    refuse("from_scheduler_config: config", value, accepted)


def prediction_type(config: Config) -> PredictionType:
    """What a scheduler's network predicts. Raises UsageError for a kind that is unknown."""
    read = stand_in(config)
    name = read["_class_name"]
    if name == FLOW or read.get("use_flow_sigmas"):
        return "flow_prediction"
    if name == "IPNDMScheduler":
        return "v_prediction"
    kinds: Mapping[str, PredictionType] = {kind: kind for kind in BETA_PREDICTIONS}
    if name in EDM_SCHEDULERS:
        kinds = {"epsilon": "edm", "v_prediction": "edm_v"}
    return kinds[fields_of(read).text("prediction_type", among=tuple(kinds))]


BETA_PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "sample", "v_prediction")


NAMED: dict[str, dict[str, Any]] = {  # what is not the default of the class
    "ddpm-linear": {"_class_name": "DDPMScheduler", "clip_sample": False},
    "ddpm-cosine": {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "clip_sample": False,
    },
    "flow": {"_class_name": FLOW},
    "edm": {"_class_name": "EDMEulerScheduler"},
}


def named_config(spec: str, clip_range: float | None = None) -> Config:
    """A scheduler's config by its name in NAMED, or by the path of its JSON or of a folder with it.

    clip_range: of a named one that can clip; None does not. Raises UsageError for a name that is
    neither, and for a file that is not one.
    """
    if spec in NAMED:
        config = class_config(NAMED[spec], NAMED[spec]["_class_name"], spec)
        clips = clip_range is not None and "clip_sample" in config
        return config | ({"clip_sample": True, "clip_sample_range": clip_range} if clips else {})
    path = expanded(spec)
    places = (path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json")
    file = next((place for place in places if place.is_file()), path)
    try:
        return stand_in(read_json(file, "a scheduler_config.json or a folder with one"))
    except UsageError as error:
        raise UsageError(
            f"noise process '{spec}': give {', '.join(NAMED)}, or the path of a "
            f"scheduler_config.json ({error})"
        ) from error


def within(config: Config, low: float, high: float) -> Config:
    """The same scheduler on those of its levels whose sigma / alpha lies in low..high.

    Raises UsageError if fewer than two are left, and for a scheduler that cannot be cut.
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
    if name not in ON_BETAS or config.get("use_flow_sigmas"):
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
    """DDPM, DDIM (which keeps eps if it clips x_0) or first-order DPM-Solver++."""
    fields = fields_of(config)
    process = from_betas(
        betas_of(fields),
        clipping=clipping_of(fields, config["_class_name"] != "DDIMScheduler"),
        spacing=fields.text("timestep_spacing", among=SPACINGS),
        steps_offset=fields.whole("steps_offset", low=0, high=MAX_LEVELS),
        scheduler=dict(config),
    )
    ends_clean = fields.text("final_sigmas_type", "zero", among=ENDS) == "zero"
    if fields.flag("set_alpha_to_one", True) and ends_clean:
        return process
    return replace(process, final=(float(process.alpha[0]), float(process.sigma[0])))


def beta_fields(process: Process) -> dict[str, Any]:
    """How a process clips and steps, as the config of its scheduler on betas says it.

    These schedulers clip around 0 only, and first-order DPM-Solver++ only by thresholding: a
    clipping of another kind is left out.
    """
    clipping, name = process.clipping, process.scheduler["_class_name"]
    clips = clipping.range is not None and clipping.center == 0
    quantile = clipping.quantile if clips else None
    fields: dict[str, Any] = {
        "thresholding": quantile is not None,
        "timestep_spacing": process.spacing,
        "steps_offset": process.steps_offset,
    }
    if quantile is not None:
        fields |= {"dynamic_thresholding_ratio": quantile, "sample_max_value": clipping.range}
    ends_clean = process.final == (1.0, 0.0)
    if name == FIRST_ORDER:
        return fields | {"final_sigmas_type": "zero" if ends_clean else "sigma_min"}
    fields["clip_sample"] = clips and quantile is None
    if fields["clip_sample"]:
        fields["clip_sample_range"] = clipping.range
    return fields | ({"set_alpha_to_one": ends_clean} if name == "DDIMScheduler" else {})


def clips_as(config: Config, process: Process) -> bool:
    """Whether a scheduler of this config does to x_0 what a process's chain does."""
    clipping = process.clipping
    if not config or clipping.range is None:
        return True
    if config.get("use_dynamic_shifting"):
        return False  # Euler on a flow, which does not clip
    return from_scheduler_config(config).clipping == clipping


def _from_flow_config(config: Config, image_tokens: int | None) -> Process:
    """Euler on a flow or, for its thresholding, first-order DPM-Solver++."""
    fields = fields_of(config)
    if fields.flag("invert_sigmas", False):
        raise UsageError(
            f"{fields.where}: invert_sigmas is not supported: the network is fed a time that runs "
            f"from 0 at noise to 1 at data; {IN_PYTHON}, with rectified_flow(levels, shift), "
            'time="data_fraction" and the negated output'
        )
    levels = fields.whole("num_train_timesteps", low=1, high=MAX_LEVELS)
    by_euler = config["_class_name"] == FLOW
    shift = fields.number("shift" if by_euler else "flow_shift", low=TINY)
    # Euler's set_timesteps, which every pipeline calls, shifts its lowest level twice.
    lowest = shift / (levels + shift - 1) if by_euler else 1 / levels
    if fields.flag("use_dynamic_shifting", False):
        shift, lowest = dynamic_shift(config, image_tokens), 1 / levels
        config = {**config, "shift": shift}  # what it amounts to; diffusers does not read it
    clipping = clipping_of(fields)
    process = rectified_flow(levels, shift, lowest, clipping=clipping, scheduler=dict(config))
    terminal = fields.number("shift_terminal", None, low=0, high=1 - 1e-6)
    if terminal:
        # The least noise is brought to `shift_terminal`, the rest stretched (LTX).
        alpha = process.alpha * (1 - terminal) / process.alpha[0]
        process = _flow_at(process, 1 - alpha, levels)
    if config.get(SIGMA_RANGE):
        limits = Fields(config, fields.where).numbers(SIGMA_RANGE, low=0, high=1, count=(2, 2))
        sigma = process.sigma
        process = _flow_at(process, sigma[(sigma >= limits[0]) & (sigma <= limits[1])], levels)
    return process


def _flow_at(process: Process, sigma: Tensor, levels: int) -> Process:
    return replace(process, alpha=1 - sigma, sigma=sigma, network_time=sigma * levels)


def dynamic_shift(config: Config, image_tokens: int | None) -> float:
    """The shift of a flow for images of `image_tokens` tokens (Flux, `calculate_shift`).

    mu is linear in the number of tokens; the shift is exp(mu), or mu for the linear kind. Raises
    UsageError if the number of tokens is not known.
    """
    if image_tokens is None:
        raise UsageError(
            "a flow with dynamic shifting needs the size of an image: give a network with a "
            "sample_size, or --teacher-size"
        )
    fields = fields_of(config)
    few = fields.whole("base_image_seq_len", low=1, high=MAX_LEVELS)
    many = fields.whole("max_image_seq_len", low=few + 1, high=MAX_LEVELS)
    low, high = (fields.number(name, low=0, high=20) for name in ("base_shift", "max_shift"))
    mu = low + (high - low) / (many - few) * (image_tokens - few)
    return mu if fields.text("time_shift_type", among=_SHIFTS) == "linear" else math.exp(mu)


_SHIFTS = ("exponential", "linear")


def _from_edm_config(config: Config) -> Process:
    """EDM levels (arXiv 2206.00364); "epsilon" in these configs means F of its preconditioning,
    "v_prediction" its negative."""
    fields = fields_of(config)
    levels = fields.whole("num_train_timesteps", low=2, high=MAX_LEVELS)
    low = fields.number("sigma_min", low=TINY)
    high = fields.number("sigma_max", low=low * (1 + 1e-6))
    fields.number("sigma_data", low=TINY)
    process = karras(levels, low, high, fields.number("rho", low=TINY), scheduler=dict(config))
    if fields.text("sigma_schedule", among=("karras", "exponential")) == "exponential":
        log_sigma = torch.linspace(math.log(low), math.log(high), levels, dtype=torch.float64)
        process = replace(process, sigma=log_sigma.exp(), network_time=log_sigma / 4)
    process = replace(process, clipping=clipping_of(fields))
    if fields.text("final_sigmas_type", among=ENDS) == "sigma_min":
        process = replace(process, final=(1.0, low))
    return process


def _from_trigonometric_config(config: Config) -> Process:
    """The process of DanceDiffusion: alpha = sqrt(1 - sigma^2), sigma = sin^2 of the time.

    Its networks are fed the angle atan2(sigma, alpha) as a share of a right angle.
    """
    fields = fields_of(config)
    if fields.values["trained_betas"] is not None:
        raise UsageError(f"{fields.where}: trained_betas is not supported; set it to null")
    levels = fields.whole("num_train_timesteps", low=2, high=MAX_LEVELS)
    u = torch.arange(1, levels + 1, dtype=torch.float64) / levels
    sigma = torch.sin(u * math.pi / 2) ** 2
    alpha = (1 - sigma**2).clamp(min=0).sqrt()
    angle = torch.atan2(sigma, alpha) / math.pi * 2
    return Process(alpha, sigma, angle, spacing="trailing", scheduler=dict(config))


_OTHERS: dict[str, Callable[[Config], Process]] = {
    "DDPMScheduler": _from_beta_config,
    "DDIMScheduler": _from_beta_config,
    FIRST_ORDER: _from_beta_config,
    "EDMEulerScheduler": _from_edm_config,
    "EDMDPMSolverMultistepScheduler": _from_edm_config,
    "IPNDMScheduler": _from_trigonometric_config,
}
