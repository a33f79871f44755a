"""The parts of a run together: what was asked for, and what their training took."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dkdm.config import DistillConfig, RunConfig, TrainingOptions, read_config, to_json
from dkdm.core.saving.progress import read_metrics
from dkdm.errors import UsageError
from dkdm.reading.fields import is_number
from dkdm.reading.files import atomic
from dkdm.reading.places import check_place

WHOLE = "whole.json"  # in the folder of the last part


class Part(NamedTuple):
    """What one part was trained by, and the last line of its metrics."""

    config: RunConfig
    line: dict[str, Any]


class Spent(NamedTuple):
    """What the training of all parts of a run took: optimizer steps, teacher evaluations, seconds.

    The last two are 0 if they were not logged.
    """

    steps: int
    evaluations: float
    seconds: float


def write_whole(run_dir: Path, whole: RunConfig) -> None:
    """Write what a run was asked for, into the folder of its last part."""
    with atomic(run_dir / WHOLE) as partial:
        partial.write_text(to_json(whole), encoding="utf-8")


def read_whole(run_dir: Path, last: RunConfig) -> RunConfig:
    """What a run was asked for; `last`, the options of its last part, if it had but one.

    Raises UsageError for a damaged file.
    """
    file = check_place(run_dir / WHOLE, run_dir)
    return read_config(file) if file.is_file() else last


def earlier_part(run_dir: Path, config: RunConfig) -> Part | None:
    """The part that came first: it lies in the run's folder, whose weights the run started from."""
    if not isinstance(config, DistillConfig):
        return None
    start = Path(config.student_choice.student_init)
    if start.parent != config.run.output_dir:
        return None
    place = run_dir / start.name
    logged = logged_in(check_place(place / "metrics.jsonl", run_dir))
    try:
        before = read_config(check_place(place / "config.json", run_dir))
    except UsageError:  # gone, or damaged: the curves of the last part say enough
        return None
    return Part(before, logged[-1]) if logged else None


def logged_in(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics but for those of a validation."""
    return [entry for entry in read_metrics(metrics) if "validation" not in entry]


def spent_in(*lines: dict[str, Any] | None) -> Spent:
    """What parts took, by the last line of the metrics of each."""
    found = [_spent(line) for line in lines if line]
    return Spent(*map(sum, zip(*found, strict=True))) if found else Spent(0, 0.0, 0.0)


def _spent(line: dict[str, Any]) -> Spent:
    step, evaluations, rate = (
        value if is_number(value := line.get(key)) and value > 0 else 0
        for key in ("step", "teacher_evaluations", "steps_per_second")
    )
    return Spent(int(step), evaluations, step / rate if rate else 0.0)


def training_in_words(folder: Path, config: RunConfig, minutes: float | None = None) -> str:
    """Steps and batches of all parts of a run, teacher evaluations and time; empty if not known."""
    before = earlier_part(folder, config)
    logged = logged_in(folder / "metrics.jsonl")
    _, evaluations, seconds = spent_in(before.line if before else None, *logged[-1:])
    words = _steps(config.training)
    if before:
        words = f"{_steps(before.config.training)}, then {words}"
    if evaluations:
        words += f", {evaluations:,} teacher evaluations"
    if before and seconds:
        return f"{words}, {seconds / 60:.1f} minutes"
    return words if minutes is None else f"{words}, {minutes:.1f} minutes in its last process"


def _steps(training: TrainingOptions) -> str:
    return f"{training.max_train_steps:,} steps of {training.batch_size}"
