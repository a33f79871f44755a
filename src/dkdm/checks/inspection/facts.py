"""What a model is, in numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dkdm.checks.inspection.check import (
    TRIAL_SECONDS,
    DenoisingCheck,
    affordable_trials,
    check_denoising,
)
from dkdm.checks.inspection.readings import process_kind
from dkdm.core.conditioning import Conditioning
from dkdm.core.denoiser import Denoiser
from dkdm.core.kinds import kind_of
from dkdm.core.process import Process
from dkdm.evaluation.cost import count_macs, evaluations_per_second
from dkdm.evaluation.memory import evaluation_mib, weights_mib


@dataclass(frozen=True)
class Inspection:
    """A model's facts and costs, by the names of `dkdm inspect --json`, and its denoising check.

    process: SNR and network times at t = 0 and T-1; clip_range, clip_quantile as in `Clipping`.
    embeds_guidance: whether the network is fed the guidance scale. pipeline, autoencoder: class
    names; None without a pipeline, or in pixel space. macs: multiply-accumulates of one evaluation
    of one sample. weights_mib, evaluation_mib: memory of the weights, and beside them of one
    evaluation of `batch_size` samples without gradients. evaluations_per_second: samples a second,
    on `device`.
    """

    facts: Mapping[str, Any]
    check: DenoisingCheck

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values, with None for numbers that are not finite."""
        plain: dict[str, Any] = _plain({**self.facts, "check": dataclasses.asdict(self.check)})
        plain["check"]["concerns"] = [
            {"seen": each["what"], "expected": each["usual"], "remedy": each["remedy"]}
            for each in plain["check"].pop("warnings")
        ]
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def inspect_denoiser(
    denoiser: Denoiser,
    *,
    num_samples: int = 8,
    num_steps: int = 50,
    seed: int = 0,
    images: Tensor | None = None,
    max_trials: int | None = None,
) -> Inspection:
    """Measure a model and check that it denoises; takes num_steps evaluations and a few seconds.

    The options are those of `check_denoising`; num_samples is also the batch size at which costs
    are measured. max_trials: None is as many as take about half a minute. Raises UsageError as
    `check_denoising`.
    """
    speed = evaluations_per_second(denoiser, num_samples, seconds=0.5)
    if max_trials is None:
        max_trials = affordable_trials(denoiser, speed, TRIAL_SECONDS)
    check = check_denoising(
        denoiser,
        num_samples=num_samples,
        num_steps=num_steps,
        seed=seed,
        images=images,
        max_trials=max_trials,
    )
    network, coder = denoiser.network, denoiser.bundle.autoencoder
    kind = type(network) if isinstance(network, nn.Module) else network
    facts = {
        "name": denoiser.name,
        "network": getattr(kind, "__name__", type(network).__name__),
        "parameters": denoiser.num_parameters,
        "dtype": None if denoiser.dtype is None else str(denoiser.dtype).removeprefix("torch."),
        "device": str(denoiser.device),
        "sample_shape": tuple(denoiser.sample_shape),
        "process": _process(denoiser.process, denoiser.network_time),
        "prediction": denoiser.parameterization.prediction,
        "variance": denoiser.parameterization.variance,
        "conditioning": _conditioning(denoiser.conditioning),
        "embeds_guidance": denoiser.embeds_guidance,
        "pipeline": denoiser.bundle.pipeline,
        "autoencoder": None if coder is None else coder.component.class_name,
        "weights_mib": weights_mib(denoiser),
        "evaluation_mib": evaluation_mib(denoiser, num_samples),
        "batch_size": num_samples,
        "macs": count_macs(denoiser),
        "evaluations_per_second": speed,
    }
    return Inspection(facts, check)


def _process(process: Process, times: Tensor) -> dict[str, Any]:
    return {
        "kind": process_kind(process),
        "num_levels": process.num_levels,
        "snr": tuple(process.snr()[[0, -1]].tolist()),
        "network_times": tuple(times[[0, -1]].tolist()),
        "scheduler": process.scheduler.get("_class_name"),
        "beta_schedule": process.scheduler.get("beta_schedule"),
        "clip_range": process.clipping.range,
        "clip_quantile": process.clipping.quantile,
    }


def _conditioning(conditioning: Conditioning) -> dict[str, Any]:
    kind = kind_of(conditioning)
    known = kind.facts()
    names = ("num_classes", "null_class", "class_names")
    return {"kind": kind.label, **{name: known.get(name) for name in names}}
