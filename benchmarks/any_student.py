"""One budget, many students: architectures, processes and sizes against the data-free baseline.

    dkdm train --recipe fashion-dit-teacher
    python benchmarks/any_student.py train --vit-teacher runs/fashion-dit-teacher
    python benchmarks/any_student.py table --vit-teacher runs/fashion-dit-teacher

Every run takes as many steps of 64 from its teacher. `dkdm` rows distil dynamically; `data-free`
rows train as long on finished samples of the teacher that cost as many of its evaluations (the
paper's baseline). `--only` names some of the runs; finished runs are skipped, others resumed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from dkdm import distill
from dkdm.config import DistillConfig
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import PredictionType
from dkdm.core.saving.checkpoint import read_tensors, write_tensors
from dkdm.data.named import load_reference
from dkdm.evaluation.cost import count_macs
from dkdm.evaluation.metrics import evaluate_images
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.models import load_teacher
from dkdm.models.student_process import with_process
from dkdm.report.charts import Series, line_chart
from dkdm.report.grids import grid
from dkdm.students import Interface, as_denoiser
from dkdm.students.transformers import dit
from dkdm.students.unets import unet

BATCH, SHOWN, DATA_FREE_STEPS = 64, 10, 25
WIDTHS = (8, 12, 16, 24, 32)


@dataclass(frozen=True)
class Run:
    """One student. teacher: cnn or vit; process, prediction: the student's, None the teacher's;
    size: of a UNet, its first width; None is a transformer."""

    teacher: str
    size: int | None
    source: str = "dynamic"
    process: str = "teacher"
    prediction: PredictionType | None = None

    @property
    def name(self) -> str:
        student = "vit" if self.size is None else f"cnn{self.size}"
        kind = "" if self.process == "teacher" else f"-{self.process}"
        kind += f"-{self.prediction}" if self.prediction else ""
        return f"{self.teacher}-to-{student}{kind}-{self.source}"


CORNERS = [
    Run(teacher, size, source)
    for source in ("dynamic", "synthetic")
    for teacher in ("cnn", "vit")
    for size in (16, None)
]
FLOWS = [Run(teacher, None, process="flow") for teacher in ("vit", "cnn")]
VELOCITIES = [replace(run, prediction="v_prediction") for run in CORNERS if run.teacher == "vit"]
SIZES = [Run("cnn", width) for width in WIDTHS if width != 16]
RUNS = {run.name: run for run in [*CORNERS, *FLOWS, *VELOCITIES, *SIZES]}


def network(run: Run, like: Denoiser) -> nn.Module:
    """The student: about 0.4 M parameters, but for the sizes."""
    interface = Interface(like.sample_shape, like.sample_shape[0], like.conditioning)
    torch.manual_seed(0)
    if run.size is None:
        return dit(interface, width=64, depth=4, heads=2)
    channels = (run.size, 2 * run.size, 3 * run.size)
    return unet(interface, channels, blocks=1, attention=(4,))


def config_of(run: Run, folder: Path, steps: int) -> DistillConfig:
    """The demo's settings at this length; no guidance anywhere."""
    return DistillConfig(
        output_dir=folder / run.name,
        source=run.source,  # type: ignore[arg-type]
        max_train_steps=steps,
        train_batch_size=BATCH,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=50,
        ema_decay=0.98,
        pool_size=1024,
        fill_steps=8,
        fill_entries=1,
        stride="random:50",
        eta=0.0,
        synthetic_steps=DATA_FREE_STEPS,
        checkpointing_steps=200,
        validation_steps=0,
        evaluation_samples=0,
        report_to="none",
        resume_from_checkpoint="latest",
    )


def train(run: Run, teacher: Denoiser, folder: Path, steps: int) -> None:
    if (folder / run.name / "model_index.json").is_file():
        return
    like = with_process(teacher, run.prediction, run.process)
    student = as_denoiser(run.name, network(run, like), like)
    distill(teacher, student, config_of(run, folder, steps))


def measured(model: Denoiser, samples: int, steps: int) -> tuple[dict[str, float], torch.Tensor]:
    """Distance and agreement of samples from the noise that all models share."""
    cond = model.conditioning.in_turns(samples)
    images = decoded(model, draw(model, cond, Sampling(samples, steps, seed=0))).clamp(-1, 1)
    metrics = evaluate_images(images, cond["class_labels"], load_reference("fashion-test"))
    found = {
        "parameters": model.num_parameters,
        "macs": count_macs(model),
        "fd": metrics["fd"],
        "class_accuracy": metrics["class_accuracy"],
    }
    return found, images[:SHOWN]


def measured_once(
    name: str, load: Callable[[], Denoiser], args: argparse.Namespace
) -> tuple[dict[str, float], torch.Tensor]:
    """What was measured of a model before, or now; kept beside the runs."""
    file = args.output_dir / "measured" / f"{name}-{args.num_samples}-{args.sampler_steps}"
    numbers, shown = file.with_suffix(".json"), file.with_suffix(".safetensors")
    if not shown.is_file():
        found, images = measured(load(), args.num_samples, args.sampler_steps)
        numbers.parent.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(found))
        write_tensors(shown, {"images": images})
    return json.loads(numbers.read_text()), read_tensors(shown)["images"]


def rows(
    chosen: list[Run], teachers: dict[str, Callable[[], Denoiser]], args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, float], torch.Tensor]]:
    for name in sorted({run.teacher for run in chosen}):
        found, images = measured_once(f"teacher-{name}", teachers[name], args)
        yield f"teacher {name}", found, images
    for run in chosen:
        folder = args.output_dir / run.name
        found, images = measured_once(run.name, partial(load_teacher, str(folder)), args)
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        yield run.name, found | {"evaluations": last["teacher_evaluations"]}, images


def size_curve(results: dict[str, dict[str, float]]) -> str:
    """Distance over parameters of the UNets of one teacher, and the teacher's own."""
    names = [f"cnn-to-cnn{width}-dynamic" for width in WIDTHS]
    found = [results[name] for name in names if name in results]
    points = [(model["parameters"], model["fd"]) for model in found]
    last = max(x for x, _ in points)
    level = [(x, results["teacher cnn"]["fd"]) for x in (points[0][0], last)]
    series = [Series("student", points, "student", markers=True), Series("teacher", level, "base")]
    colours = {"student": "#06c", "base": "#888"}
    return str(line_chart("Size", series, "parameters", "Frechet distance", colours))


def table(
    chosen: list[Run], teachers: dict[str, Callable[[], Denoiser]], args: argparse.Namespace
) -> None:
    """Print the table; write results.json and one picture, a row a model, all from one noise."""
    print(
        "| model | parameters | MACs | teacher evaluations | Frechet distance | x teacher | class |"
    )
    print("|---|---|---|---|---|---|---|")
    results, images = {}, []
    for name, found, shown in rows(chosen, teachers, args):
        results[name] = found
        images.append(shown)
        base = results.get(f"teacher {name.partition('-')[0]}", found)["fd"]
        print(
            f"| {name} | {found['parameters'] / 1e6:.2f} M | {found['macs'] / 1e6:.1f} M | "
            f"{found.get('evaluations', 0):,} | {found['fd']:.2f} | {found['fd'] / base:.1f} | "
            f"{found['class_accuracy']:.1%} |",
            flush=True,
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if "teacher cnn" in results:
        (args.output_dir / "sizes.svg").write_text(size_curve(results))
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    picture: Image.Image = grid(torch.cat(images), SHOWN, scale=3)
    picture.save(args.output_dir / "samples.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "table"))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/any-student"))
    parser.add_argument("--vit-teacher", default="runs/fashion-dit-teacher")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--sampler-steps", type=int, default=20)
    args = parser.parse_args()
    chosen = [RUNS[name] for name in args.only]
    teachers: dict[str, Callable[[], Denoiser]] = {
        "cnn": lambda: load_teacher("builtin:fashion"),
        "vit": lambda: load_teacher(args.vit_teacher),
    }
    if args.what == "table":
        table(chosen, teachers, args)
        return
    for run in chosen:
        print(run.name, flush=True)
        train(run, teachers[run.teacher](), args.output_dir, args.steps)


if __name__ == "__main__":
    main()
