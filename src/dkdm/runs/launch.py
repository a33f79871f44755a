"""What every run does: it starts, trains, measures and publishes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, set_seed

from dkdm.config import (
    CheckpointOptions,
    DistillConfig,
    RunConfig,
    RunOptions,
    TrainConfig,
    TrainingOptions,
    read_config,
    to_json,
)
from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.saving import checkpoint
from dkdm.core.saving.checkpoint import RUN
from dkdm.core.saving.folders import add_sums, remove_leftovers
from dkdm.core.saving.tolerance import named_faults, tolerated, tracked, warn
from dkdm.core.training.precision import allow_tf32
from dkdm.core.training.selection import FOLDER as BEST
from dkdm.core.training.trainer import Trainer
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.few_steps import FEW_STEPS
from dkdm.evaluation.pool_state import POOL
from dkdm.evaluation.results import EVALUATION, SAMPLES
from dkdm.evaluation.trajectories import TRAJECTORIES
from dkdm.reading import files
from dkdm.reading.fields import read_json
from dkdm.reading.lock import holder, locked
from dkdm.reading.made_here import remember
from dkdm.reading.places import check_folder
from dkdm.reading.plugins import split
from dkdm.report import write_report
from dkdm.report.page import REPORT
from dkdm.runs.config_file import code_named_in
from dkdm.runs.memory import explained
from dkdm.runs.resume import Change, note_start, start_of
from dkdm.runs.source import FILL
from dkdm.runs.validation import best_weights, shipped_weights
from dkdm.shipping.card import NO_LICENCE, Measured, write_card
from dkdm.shipping.hub import publish, reserve
from dkdm.shipping.licence import CARD
from dkdm.shipping.pipeline_folder import shipping_notes, write_pipeline

Config = TypeVar("Config", bound=RunConfig)
MEASURED = (EVALUATION, FEW_STEPS, POOL, SAMPLES, TRAJECTORIES)
AT_THE_END = ("grid", "comparison", "few-steps")  # pictures
TRACKERS = ("tensorboard", "trackio", "wandb")


def start_accelerator(
    run: RunOptions, training: TrainingOptions, checkpoints: CheckpointOptions
) -> Accelerator:
    """Seed torch; make the accelerator of a run. Raises UsageError for accelerate's sharding."""
    set_seed(run.seed)
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first call
        torch.use_deterministic_algorithms(True)
    AcceleratorState._reset_state()  # an earlier run in this process may have set another precision
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        log_with=_trackers(checkpoints.report_to) or None,
        project_dir=run.output_dir / "logs",
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError(
            f"accelerate's config asks for {accelerator.distributed_type.value}: dkdm shards by "
            "itself; choose multi-GPU or multi-CPU there"
        )
    if training.allow_tf32:
        allow_tf32(accelerator.device)
    return accelerator


def _trackers(wanted: str) -> list[str]:
    if wanted == "auto":
        return ["tensorboard"] if find_spec("tensorboard") else []
    names = [] if wanted == "none" else wanted.split(",")
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"--report-to {name}: give {', '.join(TRACKERS)}, auto or none")
        if not find_spec(name):
            raise UsageError(f"--report-to {name}: not installed; pip install 'dkdm[{name}]'")
    return names


def check_run_folder(
    run: RunOptions, checkpoints: CheckpointOptions, command: type[RunConfig]
) -> None:
    """Raise UsageError if a run of this command cannot have its output folder."""
    folder, existing = run.output_dir, run.output_dir / "config.json"
    files.check_output("--output-dir", folder, folder=True, overwrite=True)
    if (who := holder(folder)) is not None:
        raise UsageError(f"--output-dir {folder} is being written by {who}: wait for its end")
    if not existing.is_file():
        return
    if not checkpoints.resume_from_checkpoint:
        raise UsageError(
            f"--output-dir {folder} already holds a run: give another folder, or "
            "--resume-from-checkpoint latest to go on with it"
        )
    if type(read_config(existing)) is not command:
        raise UsageError(f"--output-dir {folder} holds a run of another command")


def is_finished(folder: Path) -> bool:
    """Whether a run in this folder has come to its end: its card, then its page."""
    return all((folder / name).is_file() for name in (CARD, REPORT))


def checkpoint_of(run: RunOptions, checkpoints: CheckpointOptions) -> Path | None:
    """The checkpoint that the run goes on from; None if it starts anew."""
    folder, wanted = run.output_dir, checkpoints.resume_from_checkpoint
    if wanted and folder.is_dir():
        check_folder(folder)
    return checkpoint.resolve(folder, wanted) if wanted else None


def begun_by(run: RunOptions, checkpoints: CheckpointOptions) -> Path | None:
    """What says how the run was started: its checkpoint, or a fill that is not done yet."""
    filling = run.output_dir / FILL
    given = checkpoints.resume_from_checkpoint
    unfinished = filling if given == "latest" and _is_told(filling) else None
    return checkpoint_of(run, checkpoints) or unfinished


def _is_told(filling: Path) -> bool:
    """Whether a fill says for which teacher it is; otherwise it is begun anew."""
    with suppress(UsageError):
        read_json(filling / RUN, "what a pool is filled for")
        return True
    return False


def anew(run: RunOptions, checkpoints: CheckpointOptions) -> str:
    """What is said if there is nothing to resume; empty if there is, or nothing was asked for."""
    if not checkpoints.resume_from_checkpoint or begun_by(run, checkpoints):
        return ""
    return f"{run.output_dir} has no checkpoint yet: the run starts anew"


@contextmanager
def filled_in(folder: Path, about: Mapping[str, Any]) -> Iterator[None]:
    """Keep what is filled, and how, in the folder of a run until its first checkpoint.

    All processes have written that at the end.
    """
    processes.by_main(lambda: _begin_fill(folder / FILL, about))
    yield
    if processes.is_main():
        forget_fill(folder)


def _begin_fill(filling: Path, about: Mapping[str, Any]) -> None:
    if filling.is_dir() and not _is_told(filling):
        warn(f"{filling / RUN} is missing or damaged: the pool is filled anew")
        shutil.rmtree(filling, ignore_errors=True)
    filling.mkdir(exist_ok=True)
    files.write_text(filling / RUN, json.dumps(about, indent=2) + "\n")


def forget_fill(folder: Path) -> None:
    """Delete what was filled, once a checkpoint has it."""
    if checkpoint.checkpoints(folder):
        shutil.rmtree(folder / FILL, ignore_errors=True)


def carry_out(
    config: DistillConfig | TrainConfig,
    trainer: Trainer,
    measure: Callable[[Denoiser, str], Measured],
    before: Callable[[], None] = lambda: None,
    teacher: Denoiser | None = None,
    changes: Sequence[Change] = (),
) -> Path:
    """Train, measure the student, describe and publish it; returns the output folder.

    before: what is done first in the folder of the run. teacher: of a distillation. changes: of the
    options since the run was started.
    """
    folder = config.run.output_dir
    taken = claimed(folder, type(config).command) if processes.is_main() else nullcontext()
    with named_faults(folder), taken:
        return _carried_out(config, trainer, measure, before, teacher, changes)


@contextmanager
def claimed(folder: Path, command: str) -> Iterator[None]:
    """The folder of a run, as long as it is written. Raises UsageError if somebody else writes."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"dkdm {command}"):
        yield


def _carried_out(
    config: DistillConfig | TrainConfig,
    trainer: Trainer,
    measure: Callable[[Denoiser, str], Measured],
    before: Callable[[], None],
    teacher: Denoiser | None,
    changes: Sequence[Change],
) -> Path:
    step = trainer.step_number
    config = processes.by_main(lambda: claim_output(config, trainer.accelerator, step)) or config
    start = start_of(step, changes)
    noted = partial(_note, config.run.output_dir, start)
    processes.by_main(noted)
    with explained(trainer, teacher):
        before()
        started = time.monotonic()
        trainer.run()
        processes.by_main(noted)  # if the disk was full before
        minutes = (time.monotonic() - started) / 60
        for tracker in trainer.accelerator.trackers:
            tracked(tracker.finish)
        student = trainer.averaged()
        processes.by_main(lambda: publish_run(config, trainer, student, measure, minutes, teacher))
    return config.run.output_dir


def _note(folder: Path, start: Mapping[str, Any]) -> None:
    with tolerated("history.jsonl lacks this start", folder):
        note_start(folder, start)


def publish_run(
    config: DistillConfig | TrainConfig,
    trainer: Trainer,
    student: Denoiser,
    measure: Callable[[Denoiser, str], Measured],
    minutes: float,
    teacher: Denoiser | None,
) -> None:
    """Write, measure and describe the student, and publish it."""
    if config.evaluation.ship_best and trainer.selection is not None:
        student = trainer.selection.restored(student, trainer.name)
    write_pipeline(trainer.output_dir, student)
    weights = shipped_weights(trainer, config.evaluation)
    folder, measured = config.run.output_dir, measure(student, weights)
    licensed = write_card(
        folder,
        student,
        config,
        teacher=teacher,
        minutes=minutes,
        weights=weights,
        measured=measured,
    )
    if best := best_weights(trainer, config.evaluation):
        write_card(folder / BEST, student, config, teacher=teacher, minutes=minutes, weights=best)
    notes = [] if licensed else [f"{NO_LICENCE} {folder}/README.md"]
    for note in [*notes, *shipping_notes(student, folder)]:
        print(f"note: {note}", file=sys.stderr)
    add_sums(folder, [*MEASURED, *(f"samples/{name}.png" for name in AT_THE_END)])
    write_report(folder)
    publish(config.hub, folder)


def claim_output(config: Config, accelerator: Accelerator, step: int = 0) -> Config:
    """Take the output folder and start the trackers, once nothing can be refused any more.

    step: that the run goes on from. Returns the config with the name of its repository on the hub.
    A hub that cannot be reached ends a new run, before its work; one that is resumed goes on.
    """
    folder = config.run.output_dir
    try:
        config = replace(config, hub=reserve(config.hub, folder))
    except DkdmError as error:
        if not step or isinstance(error, UsageError):
            raise
        warn(f"{error}; the run goes on, and is uploaded at its end")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    checkpoint.set_aside_later(folder, step)
    forget_fill(folder)
    files.write_text(folder / "config.json", to_json(config))
    for _, spec in code_named_in(config):
        remember({"spec": spec}, split(spec)[0])
    options = {key: str(value) for key, value in config.flat().items()}
    tracked(accelerator.init_trackers, "dkdm", options)
    return config
