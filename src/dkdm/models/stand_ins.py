"""The one-step scheduler that stands for a scheduler of diffusers, and what its config says.

Solvers of several evaluations a step, or with a memory, solve the equation of a process that has
one-step solvers as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dkdm.core.diffusion.clipping import Clipping
from dkdm.core.diffusion.schedules import (
    BETA_SCHEDULES,
    beta_schedule,
    from_betas,
    zero_terminal_snr,
)
from dkdm.errors import UsageError
from dkdm.models.effective import arguments
from dkdm.reading.fields import Fields, shown
from dkdm.reading.sizes import MAX_LEVELS

Config = Mapping[str, Any]
_ONE_JUMP = (
    "it maps noise to data in a few jumps and has no reverse transition p(x_prev | x_t) to learn "
    "from; distil the diffusion model it came from"
)
_COGVIDEO = (
    "it shifts the signal-to-noise ratio; save a DDIMScheduler with trained_betas and "
    "clip_sample false"
)
_BACKWARDS = "it runs from data to noise; save"
IN_PYTHON = "wrap the model in Python, --teacher module:factory"
_REFUSED = {
    **dict.fromkeys(
        (
            "CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler", "LCMScheduler",
            "TCDScheduler", "SCMScheduler", "FlowMatchLCMScheduler", "PiflowScheduler",
            "FlowMapEulerDiscreteScheduler", "HeliosDMDScheduler",
        ),
        _ONE_JUMP,
    ),
    "HeliosScheduler": f"it goes through several resolutions; {IN_PYTHON}, one resolution alone",
    **dict.fromkeys(
        (
            "AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler",
            "EntropyBoundScheduler", "VQDiffusionScheduler",
        ),
        "its states are tokens, not Gaussian; distil a model whose noise is Gaussian",
    ),
    "DDIMInverseScheduler": f"{_BACKWARDS} a DDIMScheduler with the same betas",
    "DPMSolverMultistepInverseScheduler": (
        f"{_BACKWARDS} a DPMSolverMultistepScheduler with the same betas"
    ),
    "RePaintScheduler": "it paints into images; save a DDPMScheduler with the same betas",
    "UnCLIPScheduler": (
        "save a DDPMScheduler with beta_schedule squaredcos_cap_v2 and the same variance_type"
    ),
    "CogVideoXDDIMScheduler": _COGVIDEO,
    "CogVideoXDPMScheduler": _COGVIDEO,
    "CosineDPMSolverMultistepScheduler": (
        f"its network is fed an angle; {IN_PYTHON}, with process karras and that time"
    ),
    "DDPMWuerstchenScheduler": f"its time is continuous; {IN_PYTHON}, with that time",
    "ScoreSdeVeScheduler": f"its network predicts a score; {IN_PYTHON}, with process karras",
    "ScoreSdeVpScheduler": "its network predicts a score; save a DDPMScheduler with its betas and "
    "a network that predicts epsilon",
    "KarrasVeScheduler": "it evaluates twice a step; save an EDMEulerScheduler of the same sigmas",
    "FlowMatchHeunDiscreteScheduler": (
        "it evaluates twice a step; save a FlowMatchEulerDiscreteScheduler with the same shift"
    ),
    "LTXEulerAncestralRFScheduler": "save a FlowMatchEulerDiscreteScheduler with the same shift",
    "MiniMaxH3Scheduler": "save a FlowMatchEulerDiscreteScheduler with the same shift",
    "RFD4ProteinaScheduler": f"its steps are like no other scheduler's; {IN_PYTHON}",
}  # fmt: skip
TINY = 1e-9
_TWINS = {  # the same process by another name
    "DDPMParallelScheduler": "DDPMScheduler",
    "DDIMParallelScheduler": "DDIMScheduler",
}
_FLAX = "Flax"  # prefix of class names in old repositories
FLOW = "FlowMatchEulerDiscreteScheduler"
FIRST_ORDER = "DPMSolverMultistepScheduler"  # of order 1 it is DDIM with eps of the clipped x_0
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
ON_BETAS = ("DDPMScheduler", "DDIMScheduler", FIRST_ORDER)  # what is saved for betas
_ONE_STEP = ("DDPMScheduler", "DDIMScheduler", *EDM_SCHEDULERS, "IPNDMScheduler")
MULTISTEP = (
    "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler", "SASolverScheduler",
)  # fmt: skip
_BETA_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "steps_offset", "rescale_betas_zero_snr",
)  # fmt: skip
_FLOW_KEYS = (
    "num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal",
)  # fmt: skip
_DYNAMIC_KEYS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
_ONLY_THE_GRID = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling",
)  # fmt: skip
_STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # of every scheduler
ENDS = ("zero", "sigma_min")
SPACINGS = ("leading", "trailing", "linspace")


def stand_in(config: Config) -> dict[str, Any]:
    """The config of the one-step scheduler that stands for a scheduler.

    Twins take the name of the class they repeat, solvers become DDIM, first-order DPM-Solver++ (if
    eps follows from a thresholded or clipped x_0), Euler on a flow, or Euler of EDM. What only
    places a sampler's steps (Karras, exponential, beta and Lu's sigmas, `stochastic_sampling`, ...)
    is left out. Raises UsageError as `from_scheduler_config` does.
    """
    name = _class_name(config)
    config = {**{key: _plain(value) for key, value in config.items()}, "_class_name": name}
    if name in MULTISTEP:
        return _solver_stand_in(config)
    if name == FLOW:
        return {key: value for key, value in config.items() if key not in _ONLY_THE_GRID}
    if name in _ONE_STEP:
        return config
    raise UsageError(
        f"scheduler {shown(name or 'without _class_name')} is not supported: use "
        "DDPMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler or one "
        f"of {', '.join(MULTISTEP)}. If the model was trained with a beta schedule, save a "
        "DDPMScheduler with the same betas and prediction type beside it"
    )


def _class_name(config: Config) -> str:
    """The scheduler's class, or its twin's. Raises UsageError for one that cannot teach."""
    found = config.get("_class_name", "")
    name = found if isinstance(found, str) else shown(found)
    name = name.removeprefix(_FLAX)
    if name in _REFUSED:
        raise UsageError(f"scheduler {name} cannot teach: {_REFUSED[name]}")
    return _TWINS.get(name, name)


def _plain(value: Any) -> Any:
    """Numbers and lists in place of numpy's, which a scheduler in memory may hold."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def fields_of(config: Config) -> Fields:
    """The arguments that a scheduler's class has, as the config has them or by their defaults.

    Configs are handed from one class to another and keep what the new one does not read.
    """
    defaults = arguments(str(config["_class_name"]))
    values = {key: config.get(key, default) for key, default in defaults.items()}
    return Fields(values, f"scheduler_config.json ({_class_name(config) or 'no class'})")


def _solver_stand_in(config: Config) -> dict[str, Any]:
    fields = fields_of(config)
    if fields.flag("use_flow_sigmas", False):
        return _flow_stand_in(config, fields)
    if fields.text("prediction_type") == "flow_prediction":
        raise UsageError(
            f"{fields.where}: prediction_type flow_prediction without flow sigmas; "
            "set use_flow_sigmas to true"
        )
    kind = fields.values.get("prediction_type")
    if fields.values.get("timestep_type") == "continuous" and kind == "v_prediction":
        return _edm_stand_in(fields)
    clipping = clipping_of(fields)
    return _as_ddim(fields) if clipping.range is None else _as_first_order(fields, clipping)


def _beta_entries(fields: Fields) -> dict[str, Any]:
    """The betas and prediction of a solver, as every scheduler on betas takes them."""
    entries = {key: fields.values[key] for key in _BETA_KEYS if key in fields.values}
    if fields.text("beta_schedule", among=BETA_SCHEDULES) not in _STOCK_BETA_SCHEDULES:
        entries |= {"trained_betas": betas_of(fields).tolist(), "beta_schedule": "linear"}
    if entries["prediction_type"] == "original_sample":
        entries["prediction_type"] = "sample"
    return entries


def _as_ddim(fields: Fields) -> dict[str, Any]:
    """A DDIM config of the same betas, prediction and clean end as a solver's config.

    Steps with linspace spacing become trailing ones, which begin at T-1 as well: diffusers' DDIM
    moves off its own grid with the former.
    """
    spacing = fields.text("timestep_spacing", "linspace", among=SPACINGS)
    ends_clean = fields.text("final_sigmas_type", "zero", among=ENDS) == "zero"
    return {
        "_class_name": "DDIMScheduler",
        **_beta_entries(fields),
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": fields.flag("set_alpha_to_one", ends_clean),
        "timestep_spacing": "trailing" if spacing == "linspace" else spacing,
    }


def _as_first_order(fields: Fields, clipping: Clipping) -> dict[str, Any]:
    """DDIM whose eps follows from the clipped x_0: DPM-Solver++ of order 1.

    It clips as thresholding to a largest value of 1 does, which is a clipping to -1..1. Its
    trailing steps are those of `Process.timesteps`. Raises UsageError for another range.
    """
    if clipping.quantile is None and clipping.range != 1:
        raise UsageError(
            f"{fields.where}: clip_sample_range {clipping.range:g} is not supported with this "
            "scheduler; save a DDPMScheduler with the same betas, which clips to any range"
        )
    return {
        "_class_name": FIRST_ORDER,
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
        **_beta_entries(fields),
        **_thresholded(clipping),
        "final_sigmas_type": fields.text("final_sigmas_type", "zero", among=ENDS),
        "timestep_spacing": "trailing",
    }


def _thresholded(clipping: Clipping) -> dict[str, Any]:
    """First-order DPM-Solver++ that clips x_0, by thresholding to a quantile or to all values."""
    return {
        "solver_order": 1,
        "algorithm_type": "dpmsolver++",
        "thresholding": True,
        "dynamic_thresholding_ratio": 1.0 if clipping.quantile is None else clipping.quantile,
        "sample_max_value": clipping.range,
    }


def _flow_stand_in(config: Config, fields: Fields) -> dict[str, Any]:
    """What stands for a solver with `use_flow_sigmas`: Euler on the same flow, or, if x_0 is
    thresholded, first-order DPM-Solver++."""
    if fields.text("prediction_type") != "flow_prediction":
        raise UsageError(
            f"{fields.where}: use_flow_sigmas with prediction_type "
            f"{fields.values['prediction_type']} is not supported: set prediction_type to "
            "flow_prediction"
        )
    clipping, values = clipping_of(fields), fields.values
    flow = {
        "_class_name": FLOW,
        **{key: values[key] for key in _FLOW_KEYS if key in values},
        **{key: config[key] for key in _DYNAMIC_KEYS if key in config},  # pipelines read these
        "shift": values["flow_shift"],
    }
    if clipping.range is None:
        return flow
    if flow.get("use_dynamic_shifting") or flow.get("shift_terminal"):
        raise UsageError(
            f"{fields.where}: thresholding with use_dynamic_shifting or shift_terminal is not "
            "supported; set thresholding to false"
        )
    return {
        "_class_name": FIRST_ORDER,
        "num_train_timesteps": flow["num_train_timesteps"],
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": flow["shift"],
        **_thresholded(clipping),
        "final_sigmas_type": "zero",
    }


def _edm_stand_in(fields: Fields) -> dict[str, Any]:
    """Euler of EDM for the continuous times of EulerDiscreteScheduler: v on sigma_data = 1, fed
    ln(sigma) / 4, on its betas' range of sigma, or the one that is given."""
    process = from_betas(betas_of(fields))
    ratio = process.sigma / process.alpha
    low, high = (fields.number(key, None, low=TINY) for key in ("sigma_min", "sigma_max"))
    return {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": fields.whole("num_train_timesteps", low=1, high=MAX_LEVELS),
        "prediction_type": "v_prediction",
        "sigma_data": 1.0,
        "sigma_min": low or float(ratio[0]),
        "sigma_max": high or float(ratio[-1].clamp(max=4096)),
    }


def betas_of(fields: Fields) -> Tensor:
    """Per-step variances, float64 [T]."""
    trained = fields.numbers("trained_betas", None, low=0, high=1, count=(1, MAX_LEVELS))
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float64)
    else:
        betas = beta_schedule(
            fields.text("beta_schedule", among=BETA_SCHEDULES),
            fields.whole("num_train_timesteps", low=1, high=MAX_LEVELS),
            fields.number("beta_start", low=0, high=1),
            fields.number("beta_end", low=0, high=1),
        )
    return zero_terminal_snr(betas) if fields.flag("rescale_betas_zero_snr", False) else betas


def clipping_of(fields: Fields, rederive_eps: bool = True) -> Clipping:
    """What a scheduler does to x_0; UniPC thresholds it only if it predicts that."""
    if fields.flag("thresholding", False) and fields.flag("predict_x0", True):
        return Clipping(
            fields.number("sample_max_value", low=TINY),
            fields.number("dynamic_thresholding_ratio", low=0, high=1),
            rederive_eps,
        )
    clips = fields.flag("clip_sample", False)
    reach = fields.number("clip_sample_range", low=TINY) if clips else None
    return Clipping(reach, rederive_eps=rederive_eps)
