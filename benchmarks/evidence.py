"""What makes a short run good: variants of one distillation, over seeds, at equal evaluations.

    python benchmarks/evidence.py runs/evidence --variants eps v flow --seeds 0 1 2

The teacher is the embedded one read as an eps teacher (its v is turned into eps at every level), or
any folder. Each run is one line of `results.jsonl`, and is left out if its line is there: a
benchmark that was interrupted goes on. Writes `evidence.md`: distance to 10,000 test images (1,000
samples, 20 DDIM steps, no guidance), mean and spread over the seeds, and the excess over the
teacher beside that of the first variant.
"""

import argparse
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.config import DistillConfig
from dkdm.core.denoiser import Denoiser
from dkdm.core.process import Process
from dkdm.data.named import load_reference
from dkdm.evaluation.metrics import evaluate_images
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.models import load_teacher
from dkdm.runs.distill import distill

VARIANTS: dict[str, dict[str, Any]] = {
    "eps, AdamW (the paper's)": {"student_prediction": "epsilon", "learning_rate": 2e-3},
    "eps": {"student_prediction": "epsilon"},
    "default": {},
    "default, AdamW": {"learning_rate": 2e-3},
    "real images": {"source": "images", "images": "fashion-mnist"},
    "v": {"student_prediction": "v_prediction"},
    "x_0": {"student_prediction": "sample"},
    "flow": {"student_process": "flow"},
    "edm": {"student_process": "edm"},
    "eps, min-SNR": {"student_prediction": "epsilon", "loss_weighting": "min-snr"},
    "v, min-SNR": {"student_prediction": "v_prediction", "loss_weighting": "min-snr"},
}
SHARED: dict[str, Any] = {
    "train_batch_size": 64,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 30,
    "ema_decay": 0.98,
    "pool_size": 1024,
    "fill_steps": 8,
    "stride": "random:50",
    "eta": 0.0,
    "condition_dropout": 0.1,
    "checkpointing_steps": 10**6,
    "validation_steps": 0,
    "evaluation_samples": 0,
    "check": False,
}
SAMPLES, SAMPLER_STEPS = 1000, 20


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


def measured(model: Denoiser) -> dict[str, float]:
    """The distance of a model's samples, their class accuracy and diversity."""
    cond = model.conditioning.in_turns(SAMPLES)
    images = decoded(model, draw(model, cond, Sampling(SAMPLES, SAMPLER_STEPS, seed=0)))
    found = evaluate_images(images, cond.get("class_labels"), load_reference("fashion-test"))
    return dict(found.values)


def run(args: argparse.Namespace, variant: str, student: str, seed: int) -> dict[str, Any]:
    """Distil and measure one student."""
    folder = args.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    settings = SHARED | VARIANTS[variant] | {"student": student, "seed": seed}
    config = DistillConfig(**settings, max_train_steps=args.steps, output_dir=folder)
    started = time.monotonic()
    distill(teacher_of(args.teacher), None, config)
    seconds = time.monotonic() - started
    return measured(load_teacher(str(folder))) | {"seconds": round(seconds, 1)}


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Seed by seed, so that an early end leaves a whole row."""
    for seed in args.seeds:
        for student in args.students:
            for variant in args.variants:
                yield variant, student, seed


def table(lines: list[dict[str, Any]], variants: list[str]) -> str:
    """Rows of a variant and a student: mean and spread, and the excess over the teacher."""
    teacher = next(line["fd"] for line in lines if line["variant"] == "teacher")
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
        distances, first = [each["fd"] for each in cell], found[student, variants[0]]
        spread = f" ± {pstdev(distances):.2f}" if len(cell) > 1 else ""
        share = ""
        if first:
            excess = fmean(distances) - teacher
            share = f"{excess / (fmean(each['fd'] for each in first) - teacher):.2f}"
        accuracy, diversity = (
            fmean(each[key] for each in cell) for key in ("class_accuracy", "variance_ratio_mean")
        )
        rows.append(
            f"| {student} | {variant} | {len(cell)} | {fmean(distances):.2f}{spread} | {share} | "
            f"{accuracy:.1%} | {diversity:.2f} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run what is missing, one line a run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", default="cnn-eps", help="cnn-eps, or any model")
    parser.add_argument("--students", nargs="+", default=["dit-tiny"])
    parser.add_argument("--variants", nargs="+", default=["eps", "default"], choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {tuple(line.get(key) for key in ("variant", "student", "seed")) for line in lines}

    def add(values: dict[str, Any]) -> None:
        lines.append(values)
        with file.open("a") as results:
            results.write(json.dumps(values) + "\n")

    if ("teacher", None, None) not in known:
        add({"variant": "teacher"} | measured(teacher_of(args.teacher)))
    for variant, student, seed in cells(args):
        if (variant, student, seed) not in known:
            cell = {"variant": variant, "student": student, "seed": seed, "steps": args.steps}
            add(cell | run(args, variant, student, seed))
        (args.folder / "evidence.md").write_text(table(lines, args.variants), encoding="utf-8")
    print(table(lines, args.variants))


if __name__ == "__main__":
    main()
