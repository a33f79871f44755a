"""How much faster several processes are than one, with one thread each and the same batch.

    python benchmarks/processes.py [--processes 1 2] [--steps 30] [--turns 3] [--json FILE] OPTIONS

OPTIONS are those of `dkdm distill`, such as --train-batch-size 256.

Each turn runs the same distillation with every number of processes, one after the other, for
`steps` and twice as many; medians over the turns are compared. The rate is that of the longer run's
last half: nothing else should run meanwhile, and the load of the machine before each run is
printed. CPU seconds a step, of all processes, are the difference of the two runs: they depend less
on other work, and say what sharing adds to it, but not how long processes wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIONS = [
    *("--teacher", "builtin:fashion", "--student", "dit-tiny", "--train-batch-size", "64"),
    *("--pool-size", "512", "--fill", "none", "--validation-steps", "0", "--no-check"),
    *("--evaluation-samples", "0", "--checkpointing-steps", "1000000", "--report-to", "none"),
]


def run(processes: int, steps: int, options: list[str]) -> tuple[float, float]:
    """Steps a second of the last half of a run in so many processes, and its CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(processes), "-m"]
        command += ["dkdm", "distill", "--output-dir", str(output)]
        command += ["--max-train-steps", str(steps), "--logging-steps", str(steps // 2), *options]
        environment, before = {**os.environ, "OMP_NUM_THREADS": "1"}, cpu_seconds()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        lines = (output / "metrics.jsonl").read_text().splitlines()
    half, whole = (1 / json.loads(line)["steps_per_second"] for line in lines[-2:])
    return 1 / (2 * whole - half), cpu_seconds() - before


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print a row for each number of processes, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args, more = parser.parse_known_args()
    options = [*OPTIONS, *more]
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in args.processes}
    loads = []
    for _ in range(args.turns):
        for number, rows in found.items():
            loads.append(os.getloadavg()[0])
            (_, shorter), (rate, longer) = (run(number, n * args.steps, options) for n in (1, 2))
            rows.append((rate, (longer - shorter) / args.steps))
            print(f"{number}: {rate:.3f} steps/s, {rows[-1][1]:.3f} CPU s, load {loads[-1]:.1f}")
    rates, works = (
        {n: statistics.median(row[i] for row in rows) for n, rows in found.items()} for i in (0, 1)
    )
    first = min(rates)
    print(f"\n{'processes':>9} {'steps/s':>9} {'of linear':>9} {'CPU s/step':>10} {'of one':>7}")
    for number, rate in rates.items():
        share = rate / rates[first] * first / number
        work = works[number]
        print(f"{number:>9} {rate:>9.3f} {share:>9.2f} {work:>10.3f} {work / works[first]:>7.2f}")
    print(f"load before each run: {min(loads):.1f} to {max(loads):.1f}")
    if args.json:
        args.json.write_text(json.dumps({"runs": found, "loads": loads}, indent=2) + "\n")


if __name__ == "__main__":
    main()
