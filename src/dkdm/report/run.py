"""What lies in a run folder, and what is missing in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dkdm.config import DistillConfig, RunConfig, TrainConfig, read_config
from dkdm.core.objectives.positions import evenly
from dkdm.core.saving.progress import read_metrics
from dkdm.core.training.selection import FOLDER as BEST
from dkdm.core.training.selection import RECORD, read_best
from dkdm.data.images import open_image
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.few_steps import FEW_STEPS, StepsTable, read_steps_table
from dkdm.evaluation.parts import Spent, earlier_part, logged_in, read_whole, spent_in
from dkdm.evaluation.pool_state import POOL, PoolState, read_pool_state
from dkdm.evaluation.results import (
    EVALUATION,
    SAMPLES,
    Comparison,
    read_evaluation,
    read_samples,
)
from dkdm.evaluation.trajectories import TRAJECTORIES, Trajectories, read_trajectories
from dkdm.reading.fields import is_number
from dkdm.reading.places import check_place
from dkdm.report.grids import png_data_uri

STAGES = 6  # sample grids shown of the training


@dataclass
class Run:
    """What a run folder holds, and one sentence for each part that is missing.

    validated: steps at which `--validation-metric` was measured, and its values. trajectories,
    pool: None for earlier runs, which are not incomplete without. steps: of few-step students.
    earlier: the last line of the metrics of the part that came first, if the run had two; config is
    of the last one, and whole what was asked for. chosen: how the best weights were; None without.
    """

    config: DistillConfig | TrainConfig
    metrics: list[dict[str, Any]]
    validated: list[tuple[int, float]] = field(default_factory=list)
    comparison: Comparison | None = None
    samples: dict[str, Tensor] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    trajectories: Trajectories | None = None
    pool: PoolState | None = None
    steps: StepsTable | None = None
    earlier: dict[str, Any] | None = None
    whole: RunConfig | None = None
    chosen: dict[str, Any] | None = None

    @property
    def asked(self) -> RunConfig:
        """The options that repeat the run."""
        return self.whole or self.config

    @property
    def step(self) -> int:
        """Optimizer steps that metrics.jsonl knows of."""
        return int(self.metrics[-1].get("step", 0)) if self.metrics else 0

    @property
    def is_finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step >= self.config.training.max_train_steps

    @property
    def noun(self) -> str:
        """What a sample is called; an image if its shape is not known."""
        return self.comparison.noun if self.comparison else "image"

    @property
    def asked_for(self) -> str:
        """What a sample was drawn for, if it was drawn for anything: class or prompt."""
        return self.comparison.asked_for if self.comparison else "class"

    @property
    def is_distillation(self) -> bool:
        """Whether the run has a teacher."""
        return isinstance(self.config, DistillConfig)

    @property
    def is_data_free(self) -> bool:
        """Whether no real image was read to learn from."""
        return isinstance(self.config, DistillConfig) and not self.config.reads_images


def spent(run: Run) -> Spent:
    """What a run took, by the last lines of its metrics."""
    return spent_in(run.earlier, *run.metrics[-1:])


class Stage(NamedTuple):
    """A grid of samples that the student drew during training."""

    step: int
    image: str


def read_run(run_dir: Path) -> Run:
    """Read what a run folder holds. Raises UsageError without a `config.json` of a run."""
    if not run_dir.is_dir():
        raise UsageError(f"there is no folder {run_dir}: give the output folder of a run")
    for name in (
        "config.json",
        "metrics.jsonl",
        EVALUATION,
        SAMPLES,
        TRAJECTORIES,
        POOL,
        FEW_STEPS,
        f"{BEST}/{RECORD}",
    ):
        check_place(run_dir / name, run_dir)
    config = read_config(run_dir / "config.json")
    lines = read_metrics(run_dir / "metrics.jsonl")
    logged = logged_in(run_dir / "metrics.jsonl")
    run = Run(config, logged, validated_in(lines, config.evaluation.validation_metric))
    if not run.metrics:
        run.missing.append("metrics.jsonl is empty: no training step was logged.")
    elif not run.is_finished:
        last = run.config.training.max_train_steps
        run.missing.append(f"The run is not finished: {run.step:,} of {last:,} steps.")
    with _named_if_missing(run):
        run.comparison = _comparison_in(run_dir, run)
    with _named_if_missing(run):
        run.samples = _samples_in(run_dir, run)
    if run.is_distillation:
        with _named_if_missing(run):
            run.trajectories = read_trajectories(run_dir)
        with _named_if_missing(run):
            run.pool = read_pool_state(run_dir)
        with _named_if_missing(run):
            run.steps = read_steps_table(run_dir)
        before = earlier_part(run_dir, run.config)
        run.earlier = before and before.line
        with _named_if_missing(run):
            run.whole = read_whole(run_dir, run.config)
    if (run_dir / BEST).is_dir():
        with _named_if_missing(run):
            run.chosen = read_best(run_dir / BEST)
    if run.config.evaluation.validation_steps:
        run.stages = read_stages(run_dir / "samples", run.missing)
    return run


def _comparison_in(run_dir: Path, run: Run) -> Comparison | None:
    """What was measured at the end; None if nothing was to be. Raises DkdmError if it is missing,
    damaged, or of a run of the other kind."""
    if _is_unmeasured(run_dir, run):
        return None
    found = read_evaluation(run_dir)
    if (found.teacher is not None) != run.is_distillation:
        raise DkdmError(f"{EVALUATION} is that of another run")
    return found


def _samples_in(run_dir: Path, run: Run) -> dict[str, Tensor]:
    """The samples drawn at the end, as `_comparison_in`."""
    if _is_unmeasured(run_dir, run):
        return {}
    found = read_samples(run_dir)
    if ("teacher" in found) != run.is_distillation:
        raise DkdmError(f"{SAMPLES} is that of another run")
    return found


def _is_unmeasured(run_dir: Path, run: Run) -> bool:
    """Whether nothing was to be measured: as asked, or by a version that kept nothing of a run on
    images."""
    kept = (run_dir / EVALUATION).exists()
    return not kept and (run.config.evaluation.evaluation_samples == 0 or not run.is_distillation)


def validated_in(lines: list[dict[str, Any]], metric: str | None) -> list[tuple[int, float]]:
    """The steps at which a metric was measured, and its values."""
    found = [(entry["step"], entry.get("validation")) for entry in lines]
    pairs = [(step, values.get(metric)) for step, values in found if isinstance(values, dict)]
    return [(step, value) for step, value in pairs if is_number(value)]


@contextmanager
def _named_if_missing(run: Run) -> Iterator[None]:
    try:
        yield
    except DkdmError as error:
        run.missing.append(f"{error}.")


def read_stages(folder: Path, missing: list[str]) -> list[Stage]:
    """Read the sample grids `step-N.png`, a few evenly spaced ones if there are many."""
    found = sorted((int(m[1]), p) for p in folder.glob("*.png") if (m := _STEP.fullmatch(p.name)))
    if not found:
        missing.append("samples/step-*.png are missing: no sample grid was drawn during training.")
    stages = []
    for step, path in (found[i] for i in evenly(min(STAGES, len(found)), len(found))):
        try:
            image = open_image(check_place(path, folder.parent))
            image.thumbnail((640, 640))
            stages.append(Stage(step, png_data_uri(image)))
        except DkdmError:
            missing.append(f"samples/{path.name} cannot be read as an image.")
    return stages


_STEP = re.compile(r"step-(\d+)\.png")
