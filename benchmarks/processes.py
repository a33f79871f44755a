"""How much faster several processes are than one, with one thread each and the same batch.

    python benchmarks/processes.py [--processes 1 2] [--steps 60] [--turns 3] [--json FILE]

Each turn runs the same distillation with every number of processes, one after the other, and reads
the rate of its last half; medians over the turns are compared. Nothing else should run meanwhile:
the load of the machine before each run is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIONS = [
    *("--teacher", "builtin:fashion", "--student", "dit-tiny", "--train-batch-size", "64"),
    *("--pool-size", "512", "--fill", "none", "--validation-steps", "0", "--no-check"),
    *("--evaluation-samples", "0", "--checkpointing-steps", "0", "--report-to", "none"),
]


def rate(processes: int, steps: int) -> float:
    """Steps a second of the last half of a run in so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--nproc-per-node", str(processes)]
            command += ["--master-port", "0", "-m"]
        command += ["dkdm", "distill", "--output-dir", str(run), "--max-train-steps", str(steps)]
        command += ["--logging-steps", str(steps // 2), *OPTIONS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        lines = (run / "metrics.jsonl").read_text().splitlines()
    half, whole = (1 / json.loads(line)["steps_per_second"] for line in lines[-2:])
    return 1 / (2 * whole - half)


def main() -> None:
    """Print a row for each number of processes, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates: dict[int, list[float]] = {number: [] for number in args.processes}
    loads = []
    for _ in range(args.turns):
        for number, found in rates.items():
            loads.append(os.getloadavg()[0])
            found.append(rate(number, args.steps))
            print(f"{number}: {found[-1]:.3f} steps/s, load {loads[-1]:.1f}", flush=True)
    medians = {number: statistics.median(found) for number, found in rates.items()}
    first = min(medians)
    print(f"\n{'processes':>9} {'steps/s':>9} {'of linear':>9}")
    for number, median in medians.items():
        share = median / medians[first] * first / number
        print(f"{number:>9} {median:>9.3f} {share:>9.2f}")
    print(f"load before each run: {min(loads):.1f} to {max(loads):.1f}")
    if args.json:
        args.json.write_text(json.dumps({"rates": rates, "loads": loads}, indent=2) + "\n")


if __name__ == "__main__":
    main()
