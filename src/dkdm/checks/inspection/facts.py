"""What a model is, in numbers, and as tables for a terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor, nn

from dkdm.checks.findings import print_findings
from dkdm.checks.inspection.check import (
    TRIAL_SECONDS,
    DenoisingCheck,
    Spread,
    affordable_trials,
    check_denoising,
)
from dkdm.checks.inspection.denoising import LevelError
from dkdm.checks.inspection.readings import process_kind
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import Conditioning, kind_of
from dkdm.core.diffusion.process import Process
from dkdm.evaluation.cost import count_macs, evaluations_per_second
from dkdm.evaluation.memory import evaluation_mib, weights_mib
from dkdm.evaluation.numbers import count

VERDICTS = {
    True: "[green]It denoises.[/green]",
    None: "[yellow]It cannot be judged by these samples.[/yellow]",
    False: "[red]It does not denoise as it is read.[/red]",
}


@dataclass(frozen=True)
class Inspection:
    """A model's facts and costs, by the names of `dkdm inspect --json`, and its denoising check.

    process: SNR and network times at t = 0 and T-1; clip_range, clip_quantile as in `Clipping`.
    embeds_guidance: whether the network is fed the guidance scale. pipeline, autoencoder: class
    names; None without a pipeline, or in pixel space. macs: multiply-accumulates of one evaluation
    of one sample. weights_mib, evaluation_mib: memory of the weights, and beside them of one
    evaluation of `batch_size` samples without gradients. evaluations_per_second: on `device`.
    """

    facts: Mapping[str, Any]
    check: DenoisingCheck

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values, with None for numbers that are not finite."""
        text = json.dumps({**self.facts, "check": dataclasses.asdict(self.check)}, default=str)
        plain: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
        plain["check"]["concerns"] = [
            {"seen": each["what"], "expected": each["usual"], "remedy": each["remedy"]}
            for each in plain["check"].pop("warnings")
        ]
        return plain


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
    are measured. max_trials: None is as many as take about half a minute. Raises as that does.
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


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print the facts, the errors at each noise level, and the verdict with its warnings."""
    check, title = inspection.check, escape(inspection.facts["name"])
    name = Column(style="bold", no_wrap=True)
    table = Table(name, Column(), title=title, show_header=False, title_justify="left")
    for label, value in _rows(inspection.facts, check.samples):
        table.add_row(label, escape(value))
    console.print(table)
    if check.levels:
        console.print(_levels(check.levels))
    console.print(VERDICTS[check.denoises])
    if check.warnings:
        print_findings(check.warnings, console)


def _rows(facts: Mapping[str, Any], samples: Spread) -> list[tuple[str, str]]:
    process, coder = facts["process"], facts["autoencoder"]
    shape = " x ".join(map(str, facts["sample_shape"]))
    (clean, noisy), (first, last) = process["snr"], process["network_times"]
    betas = f", {process['beta_schedule']} betas" if process["beta_schedule"] else ""
    return [
        ("network", f"{facts['network']}, {count(facts['parameters'])} parameters"),
        (
            "weights",
            f"{facts['weights_mib']:.1f} MiB, {facts['dtype'] or 'no parameters'} on "
            f"{facts['device']}",
        ),
        ("sample", f"{shape} {f'latents of {coder}' if coder else 'values'}"),
        ("process", f"{process['kind']}, T = {process['num_levels']}"),
        ("signal-to-noise", f"{clean:.3g} at t = 0 to {noisy:.3g} at t = T-1"),
        ("time it is fed", f"{first:.4g} to {last:.4g}"),
        ("scheduler", f"{process['scheduler'] or 'none'}{betas}"),
        ("prediction", f"{facts['prediction']}, variance {facts['variance']}"),
        ("clipping of x_0", _clipping(process["clip_range"], process["clip_quantile"])),
        ("condition", _condition(facts["conditioning"], facts["embeds_guidance"])),
        ("one evaluation", f"{count(facts['macs'])} multiply-accumulates a sample"),
        (
            "speed",
            f"{facts['evaluations_per_second']:.3g} evaluations/s in batches of "
            f"{facts['batch_size']}, which take {facts['evaluation_mib']:.1f} MiB",
        ),
        (
            "its samples",
            f"{samples.low:.2f} to {samples.high:.2f}, mean {samples.mean:.2f}, "
            f"standard deviation {samples.std:.2f}",
        ),
    ]


def _clipping(limit: float | None, quantile: float | None) -> str:
    if limit is None:
        return "off"
    if quantile is None:
        return f"to -{limit:g}..{limit:g}"
    return f"to its quantile {quantile:g}, at most {limit:g}"


def _condition(conditioning: Mapping[str, Any], embeds_guidance: bool) -> str:
    kind, null = conditioning["kind"], conditioning["null_class"]
    if conditioning["num_classes"] is None:
        return f"{kind}, and the guidance scale" if embeds_guidance else str(kind)
    with_null = "no null class (no guidance)" if null is None else f"null class {null}"
    return f"{conditioning['num_classes']} {kind}, {with_null}"


def _levels(levels: tuple[LevelError, ...]) -> Table:
    headings = ("t", "SNR", "x_0 error", "eps error", "eps std", "eps corr.", "error / blind")
    table = Table(
        *(Column(heading, justify="right") for heading in headings),
        title="Denoising check: known samples, noised and predicted",
        caption="An error of 1 is that of predicting the mean. The blind guess knows the mean and "
        "the variance of the samples; levels in grey do not count.",
        title_justify="left",
        caption_justify="left",
    )
    for level in levels:
        table.add_row(
            str(level.t),
            *(f"{value:.3g}" for value in (level.snr, level.x_0_error, level.eps_error)),
            f"{level.eps_std:.2f}",
            f"{level.eps_correlation:.3f}",
            f"{level.blind_ratio:.2f}" if level.decisive else "-",
            style=None if level.decisive else "dim",
        )
    return table
