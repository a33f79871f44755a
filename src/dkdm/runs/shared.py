"""What of a run several processes can share, and what they cannot."""

from __future__ import annotations

from dkdm.config import DistillConfig
from dkdm.errors import UsageError


def check_shared(config: DistillConfig) -> None:
    """Raise UsageError for options of a run that only one process can carry out."""
    pool, training, objective = config.pool, config.training, config.few_steps.objective
    unshared = {
        f"--objective {objective}": (
            objective != "dkdm",
            "distil with --objective dkdm first, then start one process with --student-init RUN",
        ),
        "--replay": (pool.replay > 1, "remove it, or start one process"),
        "--keep-finished": (
            pool.keep_finished > 0,
            "remove it and draw with dkdm harvest, or start one process",
        ),
        "--mixed-precision fp16": (
            training.mixed_precision == "fp16" and training.fsdp != "none",
            "give bf16, or --fsdp none",
        ),
    }
    for option, (is_asked, remedy) in unshared.items():
        if is_asked:
            raise UsageError(f"{option} cannot be shared by several processes: {remedy}")
