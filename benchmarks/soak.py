"""A long run, watched from outside: memory, open files, threads, time a step and the pool's mean t.

    python benchmarks/soak.py OUT --hours 2

starts `dkdm distill` with the embedded teacher in OUT/run, notes a line in OUT/soak.jsonl every
minute, stops the run by SIGTERM at the end, and writes OUT/soak.svg and a table of the first and
last quarters. Called again with a longer time, it goes on with the run. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from dkdm.core.saving.checkpoint import newest, read_tensors
from dkdm.core.saving.progress import read_metrics
from dkdm.core.saving.stopping import RESUMABLE
from dkdm.report.charts import Series, bin_means, line_chart

COLOURS = {"memory": "#1f5fa8", "files": "#c94f18", "step": "#2a8a57", "t": "#8e449e"}
SHOWN = {
    "memory": "memory",
    "files": "open files",
    "step": "CPU time a step",
    "t": "mean t of the pool",
}
WARM_UP = 5  # lines that are left out: the first steps load and allocate
OPTIONS = [
    *("--teacher", "builtin:fashion", "--student", "dit-tiny", "--pool-size", "2048"),
    *("--train-batch-size", "32", "--stride", "random:200", "--max-train-steps", "100000000"),
    *("--checkpointing-steps", "200", "--logging-steps", "20", "--validation-steps", "1000"),
    *("--validation-metric", "gap", "--validation-samples", "32", "--keep-finished", "512"),
    *("--validation-sampling-steps", "5", "--fill-steps", "4"),
    *("--resume-from-checkpoint", "latest"),
]


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The run, in a process of its own."""
    command = [sys.executable, "-m", "dkdm", "distill", *OPTIONS, "--output-dir", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seen(process: int, run: Path) -> dict[str, Any] | None:
    """What can be seen of a run now; None before its first step."""
    metrics = [entry for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]
    checkpoint = newest(run)
    if not metrics or checkpoint is None:
        return None
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    about = dict(line.split(":", 1) for line in status)
    spent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    shards = sorted(checkpoint.glob("source/shard-*.safetensors"))
    levels = [float(t) for shard in shards for t in read_tensors(shard)["t"]]
    return {
        "at_step": metrics[-1]["step"],
        "cpu": sum(map(int, spent[11:13])) / os.sysconf("SC_CLK_TCK"),
        "memory": int(about["VmRSS"].split()[0]) / 1024,
        "threads": int(about["Threads"]),
        "files": len(os.listdir(f"/proc/{process}/fd")),
        "t": fmean(levels),
        "loss": metrics[-1]["loss"],
        "checkpoints": len(list(run.glob("checkpoint-*"))),
    }


def watch(folder: Path, seconds: float, every: float) -> int:
    """Watch the run for a time, then stop it; returns its exit code."""
    process, began = start(folder / "run"), time.monotonic()
    while time.monotonic() - began < seconds and process.poll() is None:
        time.sleep(every)
        found = seen(process.pid, folder / "run") if process.poll() is None else None
        if found is not None:
            found = {"minutes": (time.monotonic() - began) / 60, "pid": process.pid, **found}
            with (folder / "soak.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
    process.send_signal(signal.SIGTERM)
    return process.wait()


def with_steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines at which a new step was seen, with CPU seconds a step since the one before."""
    found, before = [], lines[0]
    for line in lines[1:]:
        steps = line["at_step"] - before["at_step"]
        if line["pid"] != before["pid"]:
            before = line
        elif steps > 0:
            found.append({**line, "step": (line["cpu"] - before["cpu"]) / steps})
            before = line
    return found[WARM_UP:]


def show(folder: Path) -> None:
    """Print the first and the last quarter; write the chart."""
    lines = with_steps([json.loads(line) for line in (folder / "soak.jsonl").open()])
    quarter = max(1, len(lines) // 4)
    print(f"{len(lines)} minutes, {lines[-1]['at_step']:,} steps")
    print("| | first quarter | last quarter | spread |\n|---|---|---|---|")
    series = []
    for name, label in SHOWN.items():
        values = [line[name] for line in lines]
        first, last = fmean(values[:quarter]), fmean(values[-quarter:])
        print(f"| {label} | {first:.4g} | {last:.4g} | {pstdev(values):.2g} |")
        points = [(line["minutes"], line[name] / first) for line in lines]
        series.append(Series(label, bin_means(points, 60), name))
    title = "Each as a multiple of its mean over the first quarter"
    (folder / "soak.svg").write_text(str(line_chart(title, series, "minutes", "", COLOURS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two lines")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    code = watch(args.folder, args.hours * 3600, args.every)
    show(args.folder)
    print(f"stopped by SIGTERM: exit code {code}")
    if code != RESUMABLE:
        sys.exit(f"the run ended with {code}, not {RESUMABLE}")


if __name__ == "__main__":
    main()
