"""An inspection as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dkdm.checks.findings import print_findings
from dkdm.checks.inspection.check import Spread
from dkdm.checks.inspection.denoising import LevelError
from dkdm.checks.inspection.facts import Inspection
from dkdm.evaluation.numbers import count

VERDICTS = {
    True: "[green]It denoises.[/green]",
    None: "[yellow]It cannot be judged by these samples.[/yellow]",
    False: "[red]It does not denoise as it is read.[/red]",
}


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
