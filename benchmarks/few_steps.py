"""Few-step students beside plain ones: every number of sampling steps, over seeds, at equal cost.

    python benchmarks/few_steps.py runs/few --students dit-tiny unet-mini --seeds 0 1 2 --jobs 2

The teacher is the embedded one, or any folder. All runs of a student have as many teacher
evaluations. Each run is one line of `results.jsonl`, and is left out if its line is
there: a benchmark that was interrupted goes on. Writes `few_steps.md`: Frechet distance, class
accuracy and variance within a class (1 = real images) of 1,000 samples without guidance, from the
same noise, at each number of steps; mean and spread over the seeds. Teacher and plain students draw
by DDIM with trailing levels, which begin at pure noise.
"""

import argparse
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import cells
import torch

from dkdm.config import DistillConfig
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.models import load_teacher
from dkdm.models.place import place
from dkdm.runs import consistency, few_steps, programs
from dkdm.runs.distill import distill

FEW: dict[str, Any] = {"objective": "few-step"}
PAIRS: dict[str, Any] = {"objective": "consistency"}
ADAMW: dict[str, Any] = {"learning_rate": 2e-3}
# each: options, and those of the last part alone
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "few-step": (FEW, {}),
    "few-step, whole batches": (FEW | {"few_step_batch_size": 64, "few_step_anchor": 0.0}, {}),
    "half batches alone": (FEW | {"few_step_anchor": 0.0}, {}),
    "anchor alone": (FEW | {"few_step_batch_size": 64}, {}),
    "quarter batches": (FEW | {"few_step_batch_size": 16}, {}),
    "plain, AdamW": (ADAMW, {}),
    "few-step, AdamW": (FEW | ADAMW, {}),
    "few steps by AdamW, rate 1e-3": (FEW | {"few_step_learning_rate": 1e-3}, {}),
    "few steps by AdamW, rate 3e-3": (FEW | {"few_step_learning_rate": 3e-3}, {}),
    "few steps by Muon, rate 0.01": (FEW, {"learning_rate": 0.01}),
    "few steps by Muon, rate 0.04": (FEW, {"learning_rate": 0.04}),
    "half of the run": (FEW | {"few_step_share": 0.5}, {}),
    "a fifth of the run": (FEW | {"few_step_share": 0.2}, {}),
    "from scratch": (FEW | {"few_step_share": 1.0}, {}),
    "8 heads": (FEW | {"few_step_heads": 8}, {}),
    "32 heads": (FEW | {"few_step_heads": 32}, {}),
    "shift 2": (FEW | {"few_step_shift": 2.0}, {}),
    "pool 1,024": (FEW | {"few_step_pool": 1024}, {}),
    "half moved by the teacher": (FEW | {"few_step_on_policy": 0.5}, {}),
    "consistency": (PAIRS, {}),
    # 51 states of the pool and 13 at T-1 beside them are 64 evaluations a step
    "consistency, equal evaluations": (PAIRS, {"train_batch_size": 51}),
    "consistency, AdamW": (PAIRS | ADAMW, {}),
    "consistency, no more pure noise": (PAIRS | {"start_share": 0.0}, {}),
    "consistency from scratch": (PAIRS | {"few_step_share": 1.0}, {}),
    # as many teacher evaluations: half as many states, each with two targets
    "2 targets": (FEW | {"few_step_targets": 2}, {"train_batch_size": 16}),
}
SHARED: dict[str, Any] = {
    "train_batch_size": 64,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 30,
    "ema_decay": 0.99,
    "pool_size": 1024,
    "fill_steps": 8,
    "fill_entries": 1,
    "stride": "random:50",
    "eta": 0.0,
    "checkpointing_steps": 10**6,
    "checkpoints_total_limit": 1,
    "validation_steps": 0,
    "evaluation_samples": 0,
    "report_to": "none",
    "check": False,
}
STEPS = {"unet-mini": 390}  # by default 1,200
MANY = (1, 2, 4, 8, 20)
# what ships beside a student, by its key in a line
BESIDE = {"plain at": few_steps.PLAIN, "many at": consistency.MANY_STEPS}
Result = dict[str, dict[str, float]]


def at_each(model: Denoiser, numbers: tuple[int, ...], samples: int, device: str) -> Result:
    """What a model's samples are at each number of steps."""
    place(model, torch.device(device))
    trailing = replace(model, process=replace(model.process, spacing="trailing"))
    return {str(steps): cells.measured(trailing, samples, steps) for steps in numbers}


def run(teacher: str, folder: Path, samples: int, device: str, cell: cells.Cell) -> cells.Line:
    """Distil and measure one student, or measure the teacher."""
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if cell["variant"] == "teacher":
        return {"at": at_each(load_teacher(teacher), MANY, samples, device)}
    options, last = VARIANTS[cell["variant"]]
    own = {key: cell[key] for key in ("student", "seed")} | {"max_train_steps": cell["steps"]}
    run_folder = folder / "runs" / "-".join(str(value).replace(" ", "-") for value in cell.values())
    shutil.rmtree(run_folder, ignore_errors=True)
    config = DistillConfig(**SHARED | options | own, teacher=teacher, output_dir=run_folder)
    with_last(last)
    distill(config=config)
    model = load_teacher(str(run_folder))
    few = config.few_steps.objective != "dkdm"
    found = {"at": at_each(model, config.few_steps.steps if few else MANY, samples, device)}
    for name, beside in BESIDE.items():
        if (run_folder / beside).is_dir():
            found[name] = at_each(load_teacher(str(run_folder / beside)), MANY, samples, device)
    return found


def with_last(options: Mapping[str, Any]) -> None:
    """Let the last part of few-step runs in this process have these options too."""
    for name, kind in (("few-step", few_steps.FewSteps), ("consistency", consistency.Consistency)):
        programs.OBJECTIVES[name] = _changed(kind, options)


def _changed(kind: type[few_steps.FewSteps], options: Mapping[str, Any]) -> few_steps.FewSteps:
    class Changed(kind):  # type: ignore[misc, valid-type]
        def last(self, config: DistillConfig) -> DistillConfig:
            return replace(super().last(config), **options)

    return Changed()


def queue(args: argparse.Namespace) -> Iterator[cells.Cell]:
    """Seed by seed, so that an early end leaves a whole row."""
    yield {"variant": "teacher"}
    for seed in args.seeds:
        for student in args.students:
            for variant in args.variants:
                steps = args.steps or STEPS.get(student, 1200)
                yield {"variant": variant, "student": student, "seed": seed, "steps": steps}


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each student and variant: distance / accuracy / variance at each number."""
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for line in lines:
        student = line.get("student", "")
        found[student, line["variant"]].append(line["at"])
        for name, beside in BESIDE.items():
            if name in line:
                found[student, f"{line['variant']}: its {beside}/"].append(line[name])
    head = ["student", "run", "seeds", *(f"{steps} steps" for steps in MANY)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (student, variant), results in found.items():
        each = [_cell([one[str(steps)] for one in results if str(steps) in one]) for steps in MANY]
        rows.append(f"| {student} | {variant} | {len(results)} | {' | '.join(each)} |")
    return "\n".join(rows) + "\n"


def _cell(found: list[dict[str, float]]) -> str:
    if not found:
        return ""
    accuracy, variance = (
        fmean(one[key] for one in found) for key in ("class_accuracy", "variance_ratio_mean")
    )
    return f"{cells.spread([one['fd'] for one in found])} / {accuracy:.0%} / {variance:.2f}"


def main() -> int:
    """Run what is missing, one line a run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", default="builtin:fashion", help="any model")
    parser.add_argument("--students", nargs="+", default=["dit-tiny", "unet-mini"])
    parser.add_argument("--variants", nargs="+", default=["plain", "few-step"], choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="of every run")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=usual, help="cpu or cuda")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    page = args.folder / "few_steps.md"

    def write(lines: list[cells.Line]) -> None:
        page.write_text(table(lines), encoding="utf-8")

    work = partial(run, args.teacher, args.folder, args.samples, args.device)
    file, wanted = args.folder / "results.jsonl", list(queue(args))
    succeeded = cells.run_cells(file, wanted, work, args.jobs, write)
    print(page.read_text(encoding="utf-8"))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
