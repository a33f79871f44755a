"""What a process may use of this machine: cores and memory, within a container's limits."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP) -> float:
    """Cores this process may use: its CPU set, and the quota of its container (cgroup v2 or v1)."""
    if hasattr(os, "sched_getaffinity"):
        cores: float = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    limit = _words(cgroup / "cpu.max") or [
        *_words(cgroup / "cpu" / "cpu.cfs_quota_us"),
        *_words(cgroup / "cpu" / "cpu.cfs_period_us"),
    ]
    if len(limit) == 2 and limit[0] not in ("max", "-1"):
        cores = min(cores, int(limit[0]) / int(limit[1]))
    return cores


def usable_memory(cgroup: Path = CGROUP) -> int:
    """Bytes free for this process: the system's, and its container's (cgroup v2 or v1)."""
    available: int = psutil.virtual_memory().available
    limit = _words(cgroup / "memory.max") or _words(cgroup / "memory" / "memory.limit_in_bytes")
    used = _words(cgroup / "memory.current") or _words(cgroup / "memory" / "memory.usage_in_bytes")
    if limit and used and limit[0] != "max":
        available = min(available, max(0, int(limit[0]) - int(used[0])))
    return available


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
