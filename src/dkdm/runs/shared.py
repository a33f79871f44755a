"""What of a run several processes can share, and what they cannot."""

from __future__ import annotations

from dkdm.config import DistillConfig
from dkdm.errors import UsageError
from dkdm.runs.teachers import POOLS


def check_shared(config: DistillConfig) -> None:
    """Raise UsageError for options of a run that only one process can carry out."""
    pool, objective = config.pool, config.few_steps.objective
    unshared = {
        f"--objective {objective}": (
            objective != "dkdm",
            "distil with --objective dkdm first, then start one process with --student-init RUN",
        ),
        f"--source {pool.source}": (
            pool.source not in POOLS,
            f"give {', '.join(POOLS)}, or start one process",
        ),
        "--replay": (pool.replay > 1, "remove it, or start one process"),
        "--keep-finished": (
            pool.keep_finished > 0,
            "remove it and draw with dkdm harvest, or start one process",
        ),
    }
    for option, (is_asked, remedy) in unshared.items():
        if is_asked:
            raise UsageError(f"{option} is not shared by several processes: {remedy}")
