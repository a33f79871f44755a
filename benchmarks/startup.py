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
import importlib, json, sys, time
start = time.perf_counter()
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
print(json.dumps([time.perf_counter() - start, len(sys.modules)]))
"""


def measured(modules: str, source: Path) -> list[float]:
    """(seconds, modules) of importing them from `source` in a new process."""
    found = subprocess.run(
        [sys.executable, "-c", CODE, *modules.split()],
        env={**os.environ, "PYTHONPATH": str(source)},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(found.stdout)  # type: ignore[no-any-return]


def main() -> None:
    """Print a table in Markdown: the seconds of all rounds, and the modules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| | seconds before | after | modules before | after |")
    print("|---|---|---|---|---|")
    for command, modules in IMPORTED.items():
        rounds = [
            (measured(modules, options.against), measured(modules, HERE))
            for _ in range(options.rounds)
        ]
        seconds = [[f"{each[side][0]:.2f}" for each in rounds] for side in (0, 1)]
        modules_each = [f"{rounds[0][side][1]:.0f}" for side in (0, 1)]
        cells = [", ".join(sorted(values)) for values in seconds] + modules_each
        print(f"| `{command}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
