"""From a diffusers scheduler config to the one-step process it samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkdm.core.clipping import Clipping
from dkdm.core.prediction import PredictionType
from dkdm.core.process import Process
from dkdm.core.schedules import (
    BETA_SCHEDULES,
    beta_schedule,
    from_betas,
    karras,
    rectified_flow,
    zero_terminal_snr,
)
from dkdm.errors import UsageError
from dkdm.models.effective import arguments, class_config
from dkdm.reading.arguments import refuse
from dkdm.reading.fields import Fields, read_json, shown

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
_IN_PYTHON = "wrap the model in Python, --teacher module:factory"
_REFUSED = {
    **dict.fromkeys(
        (
            "CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler", "LCMScheduler",
            "TCDScheduler", "SCMScheduler", "FlowMatchLCMScheduler", "PiflowScheduler",
            "FlowMapEulerDiscreteScheduler", "HeliosDMDScheduler",
        ),
        _ONE_JUMP,
    ),
    "HeliosScheduler": f"it goes through several resolutions; {_IN_PYTHON}, one resolution alone",
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
        f"its network is fed an angle; {_IN_PYTHON}, with process karras and that time"
    ),
    "DDPMWuerstchenScheduler": f"its time is continuous; {_IN_PYTHON}, with that time",
    "ScoreSdeVeScheduler": f"its network predicts a score; {_IN_PYTHON}, with process karras",
    "ScoreSdeVpScheduler": "its network predicts a score; save a DDPMScheduler with its betas and "
    "a network that predicts epsilon",
    "KarrasVeScheduler": "it evaluates twice a step; save an EDMEulerScheduler of the same sigmas",
    "FlowMatchHeunDiscreteScheduler": (
        "it evaluates twice a step; save a FlowMatchEulerDiscreteScheduler with the same shift"
    ),
    "LTXEulerAncestralRFScheduler": "save a FlowMatchEulerDiscreteScheduler with the same shift",
    "MiniMaxH3Scheduler": "save a FlowMatchEulerDiscreteScheduler with the same shift",
    "RFD4ProteinaScheduler": f"its steps are of a kind of their own; {_IN_PYTHON}",
}  # fmt: skip
MAX_LEVELS = 100_000
_TWINS = {  # the same process by another name
    "DDPMParallelScheduler": "DDPMScheduler",
    "DDIMParallelScheduler": "DDIMScheduler",
}
_FLAX = "Flax"  # prefix of class names in old repositories
FIRST_ORDER = "DPMSolverMultistepScheduler"  # of order 1 it is DDIM with eps of the clipped x_0


def from_scheduler_config(config: Config, image_tokens: int | None = None) -> Process:
    """The process of a diffusers scheduler config, recomputed in float64.

    config: as in `scheduler_config.json`; absent entries take the defaults of its class. Schedulers
    that solve the same equation in several evaluations or with a memory (PNDM, Euler, DPM-Solver,
    UniPC, ...) are rebuilt as one-step solvers on their betas, see `stand_in`. image_tokens: length
    of the network's image sequence, for a flow whose shift depends on it. Raises UsageError for a
    scheduler that defines no one-step transition or is not supported, naming what to do instead,
    and for an entry of the wrong type or out of range.
    """
    read = stand_in(_config_given(config))
    if read["_class_name"] == _FLOW or read.get("use_flow_sigmas"):
        return _from_flow_config(read, image_tokens)
    return _OTHERS[read["_class_name"]](read)


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
    if name == _FLOW:
        return {key: value for key, value in config.items() if key not in _ONLY_THE_GRID}
    if name in _OTHERS:
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


def _config_given(value: Any) -> Config:
    """A scheduler's config, from itself or a scheduler. Raises UsageError for anything else."""
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
    if name == _FLOW or read.get("use_flow_sigmas"):
        return "flow_prediction"
    if name == "IPNDMScheduler":
        return "v_prediction"
    kinds: Mapping[str, PredictionType] = {kind: kind for kind in BETA_PREDICTIONS}
    if name in EDM_SCHEDULERS:
        kinds = {"epsilon": "edm", "v_prediction": "edm_v"}
    return kinds[fields_of(read).text("prediction_type", among=tuple(kinds))]


BETA_PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "sample", "v_prediction")
_FLOW = "FlowMatchEulerDiscreteScheduler"
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
ON_BETAS = ("DDPMScheduler", "DDIMScheduler", FIRST_ORDER)  # what is saved for betas
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
_STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # of every scheduler


def _solver_stand_in(config: Config) -> dict[str, Any]:
    """What stands for a solver of several evaluations or with a memory."""
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
    clipping = _clipping(fields)
    return _as_ddim(fields) if clipping.range is None else _as_first_order(fields, clipping)


def _beta_entries(fields: Fields) -> dict[str, Any]:
    """The betas and prediction of a solver, as every scheduler on betas takes them."""
    entries = {key: fields.values[key] for key in _BETA_KEYS if key in fields.values}
    if fields.text("beta_schedule", among=BETA_SCHEDULES) not in _STOCK_BETA_SCHEDULES:
        entries |= {"trained_betas": _betas(fields).tolist(), "beta_schedule": "linear"}
    if entries["prediction_type"] == "original_sample":
        entries["prediction_type"] = "sample"
    return entries


def _as_ddim(fields: Fields) -> dict[str, Any]:
    """A DDIM config of the same betas, prediction and clean end as a solver's config.

    Steps with linspace spacing become trailing ones, which begin at T-1 as well: diffusers' DDIM
    moves off its own grid with the former.
    """
    spacing = fields.text("timestep_spacing", "linspace", among=SPACINGS)
    ends_clean = fields.text("final_sigmas_type", "zero", among=_ENDS) == "zero"
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
        "final_sigmas_type": fields.text("final_sigmas_type", "zero", among=_ENDS),
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


_TINY = 1e-9
_ENDS = ("zero", "sigma_min")
SPACINGS = ("leading", "trailing", "linspace")


def _flow_stand_in(config: Config, fields: Fields) -> dict[str, Any]:
    """What stands for a solver with `use_flow_sigmas`: Euler on the same flow, or, if x_0 is
    thresholded, first-order DPM-Solver++."""
    if fields.text("prediction_type") != "flow_prediction":
        raise UsageError(
            f"{fields.where}: use_flow_sigmas with prediction_type "
            f"{fields.values['prediction_type']} is not supported: set prediction_type to "
            "flow_prediction"
        )
    clipping, values = _clipping(fields), fields.values
    flow = {
        "_class_name": _FLOW,
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
    process = from_betas(_betas(fields))
    ratio = process.sigma / process.alpha
    low, high = (fields.number(key, None, low=_TINY) for key in ("sigma_min", "sigma_max"))
    return {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": fields.whole("num_train_timesteps", low=1, high=MAX_LEVELS),
        "prediction_type": "v_prediction",
        "sigma_data": 1.0,
        "sigma_min": low or float(ratio[0]),
        "sigma_max": high or float(ratio[-1].clamp(max=4096)),
    }


def saved_config(config: Config, image_tokens: int | None = None) -> dict[str, Any]:
    """The config a student is saved with: the teacher's own, or what stands for it.

    A dynamic shift is beside it the `shift` that it amounts to, which diffusers does not read.
    """
    read = stand_in(config)
    if read.get("use_dynamic_shifting"):
        return {**read, "shift": dynamic_shift(read, image_tokens)}
    return read


NAMED: dict[str, dict[str, Any]] = {  # what is not the default of the class
    "ddpm-linear": {"_class_name": "DDPMScheduler", "clip_sample": False},
    "ddpm-cosine": {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "clip_sample": False,
    },
    "flow": {"_class_name": _FLOW},
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
    path = Path(spec).expanduser()
    places = (path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json")
    file = next((place for place in places if place.is_file()), path)
    try:
        return saved_config(read_json(file, "a scheduler_config.json or a folder with one"))
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


def _betas(fields: Fields) -> Tensor:
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


def _from_beta_config(config: Config) -> Process:
    """DDPM, DDIM (which keeps eps if it clips x_0) or first-order DPM-Solver++."""
    fields = fields_of(config)
    process = from_betas(
        _betas(fields),
        clipping=_clipping(fields, config["_class_name"] != "DDIMScheduler"),
        spacing=fields.text("timestep_spacing", among=SPACINGS),
        steps_offset=fields.whole("steps_offset", low=0, high=MAX_LEVELS),
        scheduler=dict(config),
    )
    ends_clean = fields.text("final_sigmas_type", "zero", among=_ENDS) == "zero"
    if fields.flag("set_alpha_to_one", True) and ends_clean:
        return process
    return replace(process, final=(float(process.alpha[0]), float(process.sigma[0])))


def _clipping(fields: Fields, rederive_eps: bool = True) -> Clipping:
    """What a scheduler does to x_0; UniPC thresholds it only if it predicts that."""
    if fields.flag("thresholding", False) and fields.flag("predict_x0", True):
        return Clipping(
            fields.number("sample_max_value", low=_TINY),
            fields.number("dynamic_thresholding_ratio", low=0, high=1),
            rederive_eps,
        )
    clips = fields.flag("clip_sample", False)
    reach = fields.number("clip_sample_range", low=_TINY) if clips else None
    return Clipping(reach, rederive_eps=rederive_eps)


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
            f"from 0 at noise to 1 at data; {_IN_PYTHON}, with rectified_flow(levels, shift), "
            'time="data_fraction" and the negated output'
        )
    levels = fields.whole("num_train_timesteps", low=1, high=MAX_LEVELS)
    by_euler = config["_class_name"] == _FLOW
    shift = fields.number("shift" if by_euler else "flow_shift", low=_TINY)
    # Euler's set_timesteps, which every pipeline calls, shifts its lowest level twice.
    lowest = shift / (levels + shift - 1) if by_euler else 1 / levels
    if fields.flag("use_dynamic_shifting", False):
        shift, lowest = dynamic_shift(config, image_tokens), 1 / levels
    clipping = _clipping(fields)
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
_ONLY_THE_GRID = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling",
)  # fmt: skip


def _from_edm_config(config: Config) -> Process:
    """EDM levels (arXiv 2206.00364); "epsilon" in these configs means F of its preconditioning,
    "v_prediction" its negative."""
    fields = fields_of(config)
    levels = fields.whole("num_train_timesteps", low=2, high=MAX_LEVELS)
    low = fields.number("sigma_min", low=_TINY)
    high = fields.number("sigma_max", low=low * (1 + 1e-6))
    fields.number("sigma_data", low=_TINY)
    process = karras(levels, low, high, fields.number("rho", low=_TINY), scheduler=dict(config))
    if fields.text("sigma_schedule", among=("karras", "exponential")) == "exponential":
        log_sigma = torch.linspace(math.log(low), math.log(high), levels, dtype=torch.float64)
        process = replace(process, sigma=log_sigma.exp(), network_time=log_sigma / 4)
    process = replace(process, clipping=_clipping(fields))
    if fields.text("final_sigmas_type", among=_ENDS) == "sigma_min":
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
