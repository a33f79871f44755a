"""Starting a run: devices, trackers, the output folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from dkdm.config import RunConfig, read_config, to_json
from dkdm.core import checkpoint
from dkdm.errors import UsageError
from dkdm.reading.made_here import remember
from dkdm.reading.places import check_folder
from dkdm.reading.plugins import named_code, split

TRACKERS = ("tensorboard", "trackio", "wandb")


def start_accelerator(config: RunConfig) -> Accelerator:
    set_seed(config.seed)
    AcceleratorState._reset_state()  # an earlier run in this process may have set another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=_trackers(config.report_to) or None,
        project_dir=config.output_dir / "logs",
    )
    if accelerator.num_processes > 1:
        raise UsageError(
            f"started with {accelerator.num_processes} processes: expected one; several are not "
            "supported yet"
        )
    return accelerator


def _trackers(wanted: str) -> list[str]:
    """The trackers of `--report-to`. Raises UsageError for one that is not installed."""
    if wanted == "auto":
        return ["tensorboard"] if find_spec("tensorboard") else []
    names = [] if wanted == "none" else wanted.split(",")
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"--report-to {name}: expected {', '.join(TRACKERS)}, auto or none")
        if not find_spec(name):
            raise UsageError(f"--report-to {name}: not installed; pip install 'dkdm[{name}]'")
    return names


def claim_output(config: RunConfig, accelerator: Accelerator) -> Path | None:
    """Take the output folder and start the trackers; returns the checkpoint to resume from.

    Raises UsageError where the folder holds another run and this is no resumption of it.
    """
    existing = config.output_dir / "config.json"
    if existing.is_file() and not config.resume_from_checkpoint:
        raise UsageError(
            f"--output-dir {config.output_dir} already holds a run: expected an empty folder, or "
            "--resume-from-checkpoint latest to go on with it"
        )
    found = None
    if config.resume_from_checkpoint:
        if config.output_dir.is_dir():
            check_folder(config.output_dir)
        found = checkpoint.resolve(config.output_dir, config.resume_from_checkpoint)
    if existing.is_file() and type(read_config(existing)) is not type(config):
        raise UsageError(f"--output-dir {config.output_dir} holds a run of another command")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    existing.write_text(to_json(config))
    for name in ("teacher", "student", "network", "student_factory"):
        for spec in named_code(getattr(config, name, None)):
            remember({"spec": spec}, split(spec)[0])
    accelerator.init_trackers("dkdm", {key: str(value) for key, value in config.flat().items()})
    return found
