"""An inspection as tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dkdm.checks.findings import print_findings
from dkdm.checks.inspection.check import DenoisingCheck
from dkdm.checks.inspection.denoising import LevelError
from dkdm.checks.inspection.facts import Inspection, ProcessFacts
from dkdm.evaluation.numbers import count


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print the facts, the errors at each noise level, and the verdict with its warnings."""
    console.print(_facts(inspection))
    if inspection.check.levels:
        console.print(_levels(inspection.check.levels))
    _print_verdict(inspection.check, console)


def _facts(inspection: Inspection) -> Table:
    table = Table(title=escape(inspection.name), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, value in _rows(inspection):
        table.add_row(label, escape(value))
    return table


def _rows(inspection: Inspection) -> list[tuple[str, str]]:
    process, spread = inspection.process, inspection.check.samples
    shape = " x ".join(map(str, inspection.sample_shape))
    coder = inspection.autoencoder
    kind = "values" if coder is None else f"latents of {coder}"
    return [
        ("network", f"{inspection.network}, {count(inspection.parameters)} parameters"),
        ("weights", f"{inspection.weights_mib:.1f} MiB, {_place(inspection)}"),
        ("sample", f"{shape} {kind}"),
        ("process", f"{process.kind}, T = {process.num_levels}"),
        ("signal-to-noise", f"{process.snr[0]:.3g} at t = 0 to {process.snr[1]:.3g} at t = T-1"),
        ("time fed to it", f"{process.network_times[0]:.4g} to {process.network_times[1]:.4g}"),
        ("scheduler", _scheduler(process)),
        ("prediction", f"{inspection.prediction}, variance {inspection.variance}"),
        ("clipping of x_0", _clipping(process)),
        ("condition", _condition(inspection)),
        ("one evaluation", f"{count(inspection.macs)} multiply-accumulates a sample"),
        ("speed", _speed(inspection)),
        (
            "its samples",
            f"{spread.low:.2f} to {spread.high:.2f}, mean {spread.mean:.2f}, "
            f"standard deviation {spread.std:.2f}",
        ),
    ]


def _place(inspection: Inspection) -> str:
    return f"{inspection.dtype or 'no parameters'} on {inspection.device}"


def _scheduler(process: ProcessFacts) -> str:
    name = process.scheduler or "none"
    return f"{name}, {process.beta_schedule} betas" if process.beta_schedule else name


def _clipping(process: ProcessFacts) -> str:
    if process.clip_range is None:
        return "off"
    if process.clip_quantile is None:
        return f"to -{process.clip_range:g}..{process.clip_range:g}"
    return f"to its quantile {process.clip_quantile:g}, at most {process.clip_range:g}"


def _condition(inspection: Inspection) -> str:
    conditioning = inspection.conditioning
    fed = ", and fed the guidance scale" if inspection.embeds_guidance else ""
    if conditioning.num_classes is None:
        return conditioning.kind + fed
    null = conditioning.null_class
    return f"{conditioning.num_classes} {conditioning.kind}, " + (
        "no null class (no guidance)" if null is None else f"null class {null}"
    )


def _speed(inspection: Inspection) -> str:
    return (
        f"{inspection.evaluations_per_second:.3g} evaluations/s in batches of "
        f"{inspection.batch_size}, which take {inspection.evaluation_mib:.1f} MiB"
    )


def _levels(levels: tuple[LevelError, ...]) -> Table:
    table = Table(
        title="Denoising check: known samples, noised and predicted",
        caption="1 in the error columns is predicting the mean. The blind guess knows the mean and "
        "the variance of the samples; levels in grey do not count.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("t", "SNR", "x_0 error", "eps error", "eps std", "eps corr.", "error / blind"):
        table.add_column(heading, justify="right")
    for level in levels:
        table.add_row(
            str(level.t),
            f"{level.snr:.3g}",
            f"{level.x_0_error:.3g}",
            f"{level.eps_error:.3g}",
            f"{level.eps_std:.2f}",
            f"{level.eps_correlation:.3f}",
            f"{level.blind_ratio:.2f}" if level.decisive else "-",
            style=None if level.decisive else "dim",
        )
    return table


def _print_verdict(check: DenoisingCheck, console: Console) -> None:
    if check.denoises:
        console.print("[green]It denoises.[/green]")
    elif check.denoises is None:
        console.print("[yellow]It cannot be judged by these samples.[/yellow]")
    else:
        console.print("[red]It does not denoise as it is read.[/red]")
    if check.warnings:
        print_findings(check.warnings, console)
