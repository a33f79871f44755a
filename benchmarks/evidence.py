"""What makes a short run good: variants of one distillation, over seeds, at equal evaluations.

    python benchmarks/evidence.py runs/evidence --variants eps v flow --seeds 0 1 2 --jobs 2
    python benchmarks/evidence.py runs/laws --variants laws --evaluations 28352
    python benchmarks/evidence.py runs/start --variants start

The teacher is the embedded one read as an eps teacher (its v is turned into eps at every level), or
any folder. With --evaluations a variant takes as many steps as these leave once its pool is filled.
Each run is one line of `results.jsonl`, and is left out if its line is there: a
benchmark that was interrupted goes on. Writes `evidence.md`: distance to 10,000 test images (1,000
samples, 20 DDIM steps, no guidance), mean and spread over the seeds, and the excess over the
teacher beside that of the first variant.
"""

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import cells
from torch import Tensor, nn

from dkdm.config import DistillConfig
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.process import Process
from dkdm.core.sources.budget import fill_cost
from dkdm.models import load_teacher
from dkdm.runs.distill import distill

LEVELS = 1000
VARIANTS: dict[str, dict[str, Any]] = {
    "eps, AdamW (the paper's)": {"student_prediction": "epsilon", "learning_rate": 2e-3},
    "eps": {"student_prediction": "epsilon"},
    "default": {},
    "default, AdamW": {"learning_rate": 2e-3},
    "real images": {"source": "images", "images": "fashion-mnist"},
    "real images, eps, AdamW": {
        "source": "images",
        "images": "fashion-mnist",
        "student_prediction": "epsilon",
        "learning_rate": 2e-3,
    },
    "v": {"student_prediction": "v_prediction"},
    "x_0": {"student_prediction": "sample"},
    "flow": {"student_process": "flow"},
    "edm": {"student_process": "edm"},
    "eps, min-SNR": {"student_prediction": "epsilon", "loss_weighting": "min-snr"},
    "v, min-SNR": {"student_prediction": "v_prediction", "loss_weighting": "min-snr"},
}
MUON = {"optimizer": "muon"}
LAWS: dict[str, dict[str, Any]] = {
    "default": {},
    "stride 1, eta 1": {"stride": "1", "eta": 1.0},
    "stride 1, eta 0": {"stride": "1"},
    "random:50, eta 1": {"eta": 1.0},
    "random:200, eta 0": {"stride": "random:200"},
    "random:200, eta 1": {"stride": "random:200", "eta": 1.0},
    "random:500, eta 0": {"stride": "random:500"},
    "fill of 2 steps": {"fill_steps": 2},
    "fill of 4 steps": {"fill_steps": 4},
    "fill of 20 steps": {"fill_steps": 20},
    "8 entries of a sample": {"fill_entries": 8},
    "8 entries of a sample, replay 2": {"fill_entries": 8, "replay": 2},
    "no fill": {"fill": "none"},
    "no fill, random:200": {"fill": "none", "stride": "random:200"},
    "replay 2": {"replay": 2},
    "replay 3": {"replay": 3},
    "replay 4": {"replay": 4},
    "batch 32": {"train_batch_size": 32},
    "batch 32, replay 2": {"train_batch_size": 32, "replay": 2},
    "batch 128": {"train_batch_size": 128},
    "rate 0.01": MUON | {"learning_rate": 0.01},
    "rate 0.04": MUON | {"learning_rate": 0.04},
    "no average": {"use_ema": False},
    "average 0.9": {"ema_decay": 0.9},
    "average 0.95": {"ema_decay": 0.95},
}
START: dict[str, dict[str, Any]] = {
    "a run's defaults": {},
    "a rate that does not fall": {"lr_scheduler": "constant"},
    "rate 0.04, cosine": MUON | {"learning_rate": 0.04, "lr_scheduler": "cosine"},
    "rho 0.4, an entry of a sample": {"rho": 0.4, "fill_entries": 1, "lr_scheduler": "constant"},
}
VARIANTS |= LAWS | START
SHARED: dict[str, Any] = {
    "train_batch_size": 64,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 30,
    "ema_decay": 0.98,
    "pool_size": 1024,
    "fill_steps": 8,
    "fill_entries": 1,
    "stride": "random:50",
    "eta": 0.0,
    "condition_dropout": 0.1,
    "checkpointing_steps": 10**6,
    "validation_steps": 0,
    "evaluation_samples": 0,
    "check": False,
}


class AsEps(nn.Module):
    """A network that predicts v, read as one that predicts eps = sigma x + alpha v."""

    def __init__(self, network: nn.Module, process: Process) -> None:
        super().__init__()
        self.network, self.process = network, process

    def forward(self, x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        """Return eps [B, ...] at x [B, ...]; time: levels [B]."""
        v = self.network(x, time, **cond).sample
        alpha, sigma = (table.to(x)[:, None, None, None] for table in self.process.at(time.long()))
        return sigma * x + alpha * v


def teacher_of(name: str) -> Denoiser:
    """The embedded teacher as one of eps, or any other model as it is."""
    teacher = load_teacher("builtin:fashion" if name == "cnn-eps" else name)
    if name != "cnn-eps":
        return teacher
    assert isinstance(teacher.network, nn.Module)
    return replace(
        teacher,
        network=AsEps(teacher.network, teacher.process),
        call=lambda network, x, time, cond: network(x, time, **cond),
        parameterization=replace(teacher.parameterization, prediction="epsilon"),
        name="builtin:fashion as eps",
    )


def settings_of(variant: str) -> dict[str, Any]:
    """Options of a variant; those of START leave the pool and the optimizer as dkdm has them."""
    if variant not in START:
        return SHARED | VARIANTS[variant]
    own = ("lr_scheduler", "lr_warmup_steps", "ema_decay", "pool_size", "fill_steps", "stride")
    left = {*own, "eta", "fill_entries"}
    return {key: value for key, value in SHARED.items() if key not in left} | START[variant]


def run(teacher: str, folder: Path, cell: cells.Cell) -> cells.Line:
    """Distil and measure one student, or measure the teacher."""
    if cell["variant"] == "teacher":
        return cells.measured(teacher_of(teacher))
    own = {key: cell[key] for key in ("student", "seed")} | {"max_train_steps": cell["steps"]}
    run_folder = folder / "runs" / "-".join(str(value) for value in cell.values())
    shutil.rmtree(run_folder, ignore_errors=True)
    settings = settings_of(cell["variant"]) | own
    distill(teacher_of(teacher), None, DistillConfig(**settings, output_dir=run_folder))
    return cells.measured(load_teacher(str(run_folder)))


def steps_within(settings: dict[str, Any], evaluations: int) -> int:
    """Optimizer steps that so many teacher evaluations leave after the fill; restarts count."""
    pool = DistillConfig(**settings).pool
    assert pool.pool_size is not None, "--evaluations takes variants whose pool has a size"
    restarts = sum(pool.strides) / 2 / LEVELS
    each = settings["train_batch_size"] * (1 + restarts) / pool.replay
    return max(1, round((evaluations - fill_cost(pool, pool.pool_size, LEVELS)) / each))


def queue(args: argparse.Namespace) -> Iterator[cells.Cell]:
    """Seed by seed, so that an early end leaves a whole row."""
    yield {"variant": "teacher"}
    for seed in args.seeds:
        for student in args.students:
            for variant in args.variants:
                settings = settings_of(variant)
                steps = args.steps
                if args.evaluations is not None:
                    steps = steps_within(settings, args.evaluations)
                yield {"variant": variant, "student": student, "seed": seed, "steps": steps}


def table(lines: list[dict[str, Any]], variants: list[str]) -> str:
    """Rows of a variant and a student: mean and spread, and the excess over the teacher."""
    teacher = next((line["fd"] for line in lines if line["variant"] == "teacher"), float("nan"))
    found = defaultdict(list)
    for line in lines:
        found[line.get("student"), line["variant"]].append(line)
    rows = [
        "| student | variant | runs | Frechet distance | excess over the teacher, "
        f"by that of {variants[0]} | class accuracy | diversity |",
        "|---|---|---|---|---|---|---|",
        f"| (teacher) | | 1 | {teacher:.2f} | | | |",
    ]
    for (student, variant), cell in found.items():
        if variant == "teacher":
            continue
        distances, first = [each["fd"] for each in cell], found.get((student, variants[0]))
        share = ""
        if first:
            excess = fmean(distances) - teacher
            share = f"{excess / (fmean(each['fd'] for each in first) - teacher):.2f}"
        accuracy, diversity = (
            fmean(each[key] for each in cell) for key in ("class_accuracy", "variance_ratio_mean")
        )
        rows.append(
            f"| {student} | {variant} | {len(cell)} | {cells.spread(distances)} | {share} | "
            f"{accuracy:.1%} | {diversity:.2f} |"
        )
    return "\n".join(rows) + "\n"


def main() -> int:
    """Run what is missing, one line a run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", default="cnn-eps", help="cnn-eps, or any model")
    parser.add_argument("--students", nargs="+", default=["dit-tiny"])
    names = [*VARIANTS, "laws", "start"]
    parser.add_argument("--variants", nargs="+", default=["eps", "default"], choices=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=600)
    length.add_argument("--evaluations", type=int, help="of the teacher, instead of --steps")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    args = parser.parse_args()
    groups = {"laws": [*LAWS], "start": [*START]}
    args.variants = [each for name in args.variants for each in groups.get(name, [name])]
    args.folder.mkdir(parents=True, exist_ok=True)
    page = args.folder / "evidence.md"

    def write(lines: list[cells.Line]) -> None:
        page.write_text(table(lines, args.variants), encoding="utf-8")

    work = partial(run, args.teacher, args.folder)
    file, wanted = args.folder / "results.jsonl", list(queue(args))
    succeeded = cells.run_cells(file, wanted, work, args.jobs, write)
    print(page.read_text(encoding="utf-8"))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
