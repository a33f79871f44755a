"""What a start is worth in the first steps: one student of the embedded teacher, four starts.

    python benchmarks/start.py runs/starts --checkpoint runs/some-earlier-run

Trains `thin-50` from random weights, from a slice of the teacher, from the checkpoint (any run,
folder or file that fits; left out without one) and with LoRA on the slice; other settings are those
of the recipe `fashion-small`. A run that was interrupted goes on where it was. Writes `starts.md`
and `starts.svg` into the folder.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from dkdm.config import DistillConfig
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.saving.progress import read_metrics
from dkdm.data.named import load_reference
from dkdm.evaluation.metrics import evaluate_images
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.models import load_teacher
from dkdm.report.charts import Series, bin_means, line_chart
from dkdm.runs.distill import distill
from dkdm.runs.recipes import recipe
from dkdm.students import student_of
from dkdm.students.start import read_checkpoint

STUDENT = "thin-50"
LOSS_AT, DISTANCE_AT = (10, 100, 300, 1000), (100, 300, 1000)
COLOURS = {"random": "#888", "teacher": "#06c", "checkpoint": "#c60", "lora": "#292"}


def starts(args: argparse.Namespace) -> dict[str, DistillConfig]:
    """The config of each run, by its name."""
    shared = replace(
        recipe("fashion-small", DistillConfig),
        student=STUDENT,
        max_train_steps=args.steps,
        pool_size=args.pool_size,
        logging_steps=1,
        checkpointing_steps=min(100, args.steps),
        checkpoints_total_limit=None,
        validation_steps=0,
        evaluation_samples=0,
        resume_from_checkpoint="latest",
    )
    given = {"random": {}, "teacher": {"student_init": "teacher"}}
    if args.checkpoint:
        given["checkpoint"] = {"student_init": args.checkpoint}
    given["lora"] = {"student_init": "teacher", "lora_rank": args.lora_rank}
    return {
        name: replace(shared, output_dir=args.folder / name, **options)
        for name, options in given.items()
    }


def train(config: DistillConfig) -> None:
    """Run, or go on, unless it has ended."""
    last = config.output_dir / f"checkpoint-{config.max_train_steps}"
    if not (last.is_dir() and (config.output_dir / "model_index.json").is_file()):
        distill(config=config)


def distances(config: DistillConfig, teacher: Denoiser, samples: int) -> dict[str, float]:
    """Frechet distance of the averaged weights by step; kept in the run's folder."""
    file = config.output_dir / f"distances-{samples}.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    for step in marks(DISTANCE_AT, config.max_train_steps):
        if str(step) not in known:
            known[str(step)] = distance(config, teacher, step, samples)
            file.write_text(json.dumps(known) + "\n")
    return known


def distance(config: DistillConfig, teacher: Denoiser, step: int, samples: int) -> float:
    student = student_of(STUDENT, teacher)
    weights = read_checkpoint(str(config.output_dir / f"checkpoint-{step}"))
    student.network.load_state_dict(weights)
    student.network.eval()
    cond = student.conditioning.in_turns(samples)
    sampling = Sampling(samples, config.validation_sampling_steps, config.seed)
    images = decoded(student, draw(student, cond, sampling, config.sampling_guidance_scale))
    reference = load_reference("fashion-test")
    return evaluate_images(images.clamp(-1, 1), cond["class_labels"], reference)["fd"]


def marks(steps: tuple[int, ...], last: int) -> list[int]:
    """Those that the run reaches, and its end."""
    return sorted({step for step in steps if step < last} | {last})


def loss_near(config: DistillConfig, step: int) -> float:
    """Mean loss within 5 steps, or 5 %, of a step."""
    reach = max(5, step // 20)
    metrics = read_metrics(config.output_dir / "metrics.jsonl")
    return fmean(entry["loss"] for entry in metrics if abs(entry["step"] - step) <= reach)


def table(configs: dict[str, DistillConfig], found: dict[str, dict[str, float]]) -> str:
    last = next(iter(configs.values())).max_train_steps
    losses, measured = marks(LOSS_AT, last), marks(DISTANCE_AT, last)
    head = ["start", *(f"loss at {s:,}" for s in losses), *(f"distance at {s:,}" for s in measured)]
    rows = [head, ["---"] * len(head)]
    for name, config in configs.items():
        values = [f"{loss_near(config, step):.4f}" for step in losses]
        rows.append([name, *values, *(f"{found[name][str(step)]:.2f}" for step in measured)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def chart(configs: dict[str, DistillConfig]) -> str:
    """The losses."""
    series = []
    for name, config in configs.items():
        metrics = read_metrics(config.output_dir / "metrics.jsonl")
        points = [(entry["step"], entry["loss"]) for entry in metrics]
        series.append(Series(name, bin_means(points, 50), name))
    return str(line_chart("Loss by start", series, "optimizer step", "loss", COLOURS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--checkpoint", help="a run, folder or file that the student may start from"
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--pool-size", type=int, default=recipe("fashion-small", DistillConfig).pool_size
    )
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=2000, help="of each distance")
    args = parser.parse_args()
    configs = starts(args)
    for config in configs.values():
        train(config)
    teacher = load_teacher("builtin:fashion")
    found = {name: distances(c, teacher, args.num_samples) for name, c in configs.items()}
    (args.folder / "starts.md").write_text(table(configs, found))
    (args.folder / "starts.svg").write_text(chart(configs))
    print(table(configs, found))


if __name__ == "__main__":
    main()
