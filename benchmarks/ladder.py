"""The paper's Table 2 and Fig. 4 at the scale of the embedded teacher, on the CPU.

    make ladder                                   # or: python benchmarks/ladder.py runs/ladder

Every arm of `dkdm distill --source` teaches the same student: real images, shares of them, a
synthetic set, iterative, shuffled and dynamic iterative distillation. One table at equal optimizer
steps, one at equal teacher evaluations, all that prepares a run counted. A cell is one line of
`results.jsonl`; a run that was stopped goes on where it was, from its last checkpoint. Writes
`ladder.md` after each cell, seed by seed, so that an early end leaves whole rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import cells

from dkdm.config import DistillConfig
from dkdm.data.named import load_images
from dkdm.errors import DkdmError
from dkdm.models import load_teacher
from dkdm.runs.distill import distill

TEACHER, LEVELS = "builtin:fashion", 1000
SHARES = (0.2, 0.15, 0.1, 0.05)
# CIFAR-10, FID of 50,000 samples: Xiang et al. 2025, Table 2.
PAPER = {
    "teacher": 4.45,
    "data-based": 7.84,
    "data-limited 20 %": 9.76,
    "data-limited 15 %": 11.07,
    "data-limited 10 %": 11.06,
    "data-limited 5 %": 10.91,
    "data-free": 12.06,
    "dynamic": 9.56,
}


@dataclass(frozen=True)
class Scale:
    """How large the experiment is.

    steps, batch_size: optimizer steps of an arm, and the samples of each. set_size: samples of the
    synthetic set at equal steps. set_steps, fill_steps: teacher evaluations for each of its
    samples, and for each state that a pool begins with. rhos: sizes of the dynamic pool as
    multiples of T times a batch; `rho` is the one whose evaluations the others are given. samples,
    sampler_steps: of the measurement.
    """

    student: str = "dit-tiny"
    steps: int = 300
    batch_size: int = 64
    set_size: int = 2000
    set_steps: int = 20
    fill_steps: int = 8
    rhos: tuple[float, ...] = (0.005, 0.02, 0.06)
    rho: float = 0.02
    samples: int = 1000
    sampler_steps: int = 20
    checkpoints: int = 50

    def entries(self, rho: float) -> int:
        """States in the dynamic pool."""
        return round(rho * LEVELS * self.batch_size)

    @property
    def budget(self) -> int:
        """Teacher evaluations of the dynamic arm, its pool's among them."""
        return self.entries(self.rho) * self.fill_steps + self.steps * self.batch_size

    def steps_for(self, entries: int) -> int:
        """Steps that the budget leaves once so many states are prepared; 0 if it does not do."""
        return max(0, (self.budget - entries * self.fill_steps) // self.batch_size)


@dataclass(frozen=True)
class Arm:
    """What one row learns from, and for how long. paper: the row of PAPER that it repeats."""

    name: str
    steps: int
    settings: dict[str, Any] = field(compare=False)
    paper: str | None = None

    def cell(self, seed: int) -> cells.Cell:
        """The cell of one seed."""
        return {"arm": self.name, "steps": self.steps, "seed": seed}


def data_arms(scale: Scale, images: str) -> list[Arm]:
    """Training on real images, and on shares of them."""
    given = {"source": "images", "images": images}
    rows = [Arm("data-based", scale.steps, given, "data-based")]
    for share in SHARES:
        name = f"data-limited {share:.0%}".replace("%", " %")
        rows.append(Arm(name, scale.steps, given | {"images_share": share}, name))
    return rows


def data_free(scale: Scale, size: int) -> Arm:
    """Training on finished samples of the teacher."""
    settings = {"source": "synthetic", "synthetic_samples": size}
    settings["synthetic_steps"] = scale.set_steps
    return Arm(f"data-free, {size:,} samples", scale.steps, settings, "data-free")


def dynamic(scale: Scale, rho: float, steps: int) -> Arm:
    """Dynamic iterative distillation."""
    paper = "dynamic" if rho == scale.rho else None
    return Arm(f"dynamic, rho {rho:g}", steps, {"source": "dynamic", "rho": rho}, paper)


def at_equal_steps(scale: Scale, images: str) -> list[Arm]:
    """Every arm for as many optimizer steps, whatever the teacher's work."""
    return [
        *data_arms(scale, images),
        data_free(scale, scale.set_size),
        Arm("iterative", scale.steps, {"source": "iterative"}),
        Arm("shuffled", scale.steps, {"source": "shuffled"}),
        *(dynamic(scale, rho, scale.steps) for rho in scale.rhos),
    ]


def at_equal_evaluations(scale: Scale) -> list[Arm]:
    """Every arm that asks the teacher, as long as the budget lasts; a set takes all of it."""
    pools = {rho: scale.steps_for(scale.entries(rho)) for rho in scale.rhos}
    return [
        data_free(scale, scale.budget // scale.set_steps),
        Arm("iterative", scale.steps_for(0), {"source": "iterative"}),
        Arm("shuffled", scale.steps_for(scale.batch_size), {"source": "shuffled"}),
        *(dynamic(scale, rho, steps) for rho, steps in pools.items() if steps),
    ]


def config_of(scale: Scale, arm: Arm, seed: int, folder: Path) -> DistillConfig:
    """The options of one run: the same for every arm, but for what it learns from."""
    shared = {
        "teacher": TEACHER,
        "student": scale.student,
        "train_batch_size": scale.batch_size,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(30, scale.steps // 10),
        "ema_decay": 0.98,
        "fill_steps": scale.fill_steps,
        "fill_entries": 1,
        "stride": "random:50",
        "checkpointing_steps": scale.checkpoints,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "validation_steps": 0,
        "evaluation_samples": 0,
        "report_to": "none",
        "check": False,
    }
    steps = {"max_train_steps": arm.steps, "seed": seed, "output_dir": folder}
    return DistillConfig(**(shared | arm.settings | steps))


def run_cell(scale: Scale, arms: list[Arm], folder: Path, cell: cells.Cell) -> cells.Line:
    """Distil and measure one student, or measure the teacher; goes on from a checkpoint."""
    if cell["arm"] == "teacher":
        return cells.measured(load_teacher(TEACHER), scale.samples, scale.sampler_steps)
    arm = next(each for each in arms if each.cell(cell["seed"]) == cell)
    name = f"{arm.name}-{arm.steps}-{cell['seed']}".replace(" ", "").replace(",", "-")
    run = distill(None, None, config_of(scale, arm, cell["seed"], folder / "runs" / name))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found = cells.measured(load_teacher(str(run)), scale.samples, scale.sampler_steps)
    return found | {"evaluations": last.get("teacher_evaluations", 0)}


def queue(arms: list[Arm], seeds: list[int]) -> Iterator[cells.Cell]:
    """The teacher, then every arm once, seed by seed."""
    yield {"arm": "teacher"}
    for seed in seeds:
        yield from (arm.cell(seed) for arm in dict.fromkeys(arms))


def row(arm: Arm, lines: list[cells.Line]) -> str:
    """One row: the mean over the seeds, their spread, and the paper's figure."""
    found = [each for each in lines if (each["arm"], each.get("steps")) == (arm.name, arm.steps)]
    paper = f"{PAPER[arm.paper]:.2f}" if arm.paper else ""
    if not found:
        return f"| {arm.name} | {arm.steps} | | 0 | | | | {paper} |"
    asked = fmean(each["evaluations"] for each in found)
    distance = cells.spread([each["fd"] for each in found])
    accuracy, diversity = (
        fmean(each[key] for each in found) for key in ("class_accuracy", "variance_ratio_mean")
    )
    return (
        f"| {arm.name} | {arm.steps} | {asked:,.0f} | {len(found)} | {distance} | "
        f"{accuracy:.1%} | {diversity:.2f} | {paper} |"
    )


def table(arms: list[Arm], lines: list[cells.Line]) -> str:
    """A table of arms, below the teacher."""
    head = (
        "| trained on | steps | teacher evaluations | seeds | Frechet distance | class accuracy | "
        "diversity | the paper, CIFAR-10 FID |\n|---|---|---|---|---|---|---|---|"
    )
    teacher = next((line for line in lines if line["arm"] == "teacher"), None)
    shown = "" if teacher is None else f"{teacher['fd']:.2f}"
    first = f"| (teacher) | | | | {shown} | | | {PAPER['teacher']:.2f} |"
    return "\n".join([head, first, *(row(arm, lines) for arm in arms)])


def page(scale: Scale, images: str, lines: list[cells.Line]) -> str:
    """Both tables."""
    left_out = [rho for rho in scale.rhos if not scale.steps_for(scale.entries(rho))]
    costly = "".join(
        f" The pool of rho {rho:g} alone costs {scale.entries(rho) * scale.fill_steps:,}."
        for rho in left_out
    )
    return (
        f"## At equal optimizer steps: {scale.steps} of {scale.batch_size}\n\n"
        f"{table(at_equal_steps(scale, images), lines)}\n\n"
        f"## At equal teacher evaluations: {scale.budget:,}\n\n"
        f"{table(at_equal_evaluations(scale), lines)}\n\n"
        f"What a pool begins with, and the drawing of a set, are counted.{costly}\n"
    )


def images_found(images: str) -> bool:
    """Whether the images can be read; says what to do if not."""
    try:
        load_images(images, (1, 16, 16))
    except DkdmError as error:
        print(f"note: the rows of real images are left out. {error}", file=sys.stderr)
        return False
    return True


def main() -> int:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", default="fashion-mnist", help="fashion-mnist, or a folder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=cells.CORES, help="cells at once")
    args = parser.parse_args()
    scale = Scale()
    arms = [*at_equal_steps(scale, args.images), *at_equal_evaluations(scale)]
    if not images_found(args.images):
        arms = [arm for arm in arms if arm.settings["source"] != "images"]
    args.folder.mkdir(parents=True, exist_ok=True)

    def write(lines: list[cells.Line]) -> None:
        (args.folder / "ladder.md").write_text(page(scale, args.images, lines), encoding="utf-8")

    work = partial(run_cell, scale, arms, args.folder)
    wanted = list(queue(arms, args.seeds))
    succeeded = cells.run_cells(args.folder / "results.jsonl", wanted, work, args.jobs, write)
    print((args.folder / "ladder.md").read_text(encoding="utf-8"))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
