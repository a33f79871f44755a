"""What a run writes: its folder, checkpoints, and what goes to the hub."""

from __future__ import annotations

import re
from pathlib import Path

from dkdm.config.values import Count, Seed
from dkdm.errors import UsageError
from dkdm.reading.fields import shown
from dkdm.reading.options import Options


class RunOptions(Options, title="Run"):
    """What comes out."""

    output_dir: Path = Path("runs/run")
    """Folder of the run: checkpoints, metrics, samples and, at the end, the model."""
    seed: Seed = 0
    """Seed of every random choice in the run."""


class CheckpointOptions(Options, title="Checkpoint"):
    """Checkpoints and logs."""

    checkpointing_steps: Count = 1000
    """Optimizer steps between checkpoints; one more is written at the end."""
    checkpoint_every: str | None = None
    """Time after which a checkpoint is written too, such as 90s, 10m or 2h. Default: by steps
    alone."""
    checkpoints_total_limit: Count | None = 2
    """Checkpoints to keep, the last ones; None keeps all."""
    resume_from_checkpoint: str | None = None
    """'latest', or the path of a checkpoint of this run. Default: start anew."""
    accept_changes: bool = False
    """Resume even if options that say what the run means, or the teacher, have changed."""
    logging_steps: Count = 10
    """Optimizer steps between lines in metrics.jsonl."""
    report_to: str = "auto"
    """Trackers in addition to metrics.jsonl, separated by commas (tensorboard, trackio, wandb);
    none; or auto: TensorBoard if it is installed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_every is not None and not self.seconds:
            raise UsageError(
                f"--checkpoint-every {shown(self.checkpoint_every)}: give a time such as 90s, 10m "
                "or 2h"
            )

    @property
    def seconds(self) -> float | None:
        """`checkpoint_every` in seconds; None if it is left open or is no time."""
        found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smh])", self.checkpoint_every or "")
        return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else None


class HubOptions(Options, title="Hub"):
    """The model card's licence, and upload to the Hugging Face hub."""

    license: str | None = None
    """Licence of the model, by the hub's name for it (apache-2.0, mit, openrail, other, ...).
    Default: the teacher's, if the teacher's card names one."""
    push_to_hub: bool = False
    """Upload the finished run. Log in with `hf auth login` or HF_TOKEN first."""
    hub_model_id: str | None = None
    """Repository to upload to, USER/NAME. Default: the output folder's name under your account."""
    hub_private: bool = False
    """Make a new repository private."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise UsageError(
                f"--license {shown(self.license)}: give the hub's name of a licence, in lower "
                "case, such as apache-2.0, mit, cc-by-nc-4.0, openrail, or other"
            )
