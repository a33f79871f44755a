"""What commands import before their first message: seconds and modules, in turns with another copy.

    python benchmarks/startup.py --against /path/to/another/src [--rounds 3]

Each import is a process of its own. A run's first message comes after its imports, whose largest
part is torch and diffusers with what these import themselves (the last row).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[1] / "src"
IMPORTED = {
    "dkdm --help": "dkdm.cli",
    "dkdm report": "dkdm.cli dkdm.report",
    "dkdm compare": "dkdm.cli dkdm.runs.compare",
    "dkdm push": "dkdm.cli dkdm.shipping.hub",
    "dkdm doctor": "dkdm.cli dkdm.checks.doctor",
    "dkdm sample": "dkdm.cli dkdm.models.loading dkdm.runs.outputs",
    "dkdm evaluate": "dkdm.cli dkdm.runs.evaluate",
    "dkdm distill": "dkdm.cli dkdm.runs.distill",
    "what diffusers' UNet needs": "accelerate diffusers.models.unets.unet_2d",
}
CODE = """
import importlib, json, resource, sys, time
start = time.perf_counter()
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
wall, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([wall, used.ru_utime + used.ru_stime, len(sys.modules)]))
"""


def measured(modules: str, source: Path) -> list[float]:
    """(seconds, CPU seconds, modules) of importing them from `source` in a new process."""
    found = subprocess.run(
        [sys.executable, "-c", CODE, *modules.split()],
        env={**os.environ, "PYTHONPATH": str(source)},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(found.stdout)  # type: ignore[no-any-return]


def main() -> None:
    """Print a table in Markdown: the median of the rounds, and all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| | CPU seconds before | after | wall before | after | modules before | after |")
    print("|---|---|---|---|---|---|---|")
    for command, modules in IMPORTED.items():
        rounds = [
            (measured(modules, options.against), measured(modules, HERE))
            for _ in range(options.rounds)
        ]
        cells = []
        for i in range(3):
            for side in range(2):
                values = [each[side][i] for each in rounds]
                cells.append(f"{median(values):.2f}" if i < 2 else f"{values[0]:.0f}")
        print(f"| `{command}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
