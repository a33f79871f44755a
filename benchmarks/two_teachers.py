"""Two teachers of five garments each, of other architecture and process, into one of ten.

    python benchmarks/two_teachers.py                  # all of it: an hour on two cores
    python benchmarks/two_teachers.py --device cuda    # minutes
    python benchmarks/two_teachers.py measure          # only the tables, of runs that are there

The first teacher is a UNet that predicts v on DDPM's cosine schedule, the second a transformer that
predicts the velocity of a flow. Neither sees the other's garments, and the student sees no image.
Finished runs are skipped, others resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dkdm import DistillConfig, TrainConfig, distill, load_teacher, train
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.data.fashion import CLASS_NAMES, load_fashion_mnist
from dkdm.data.fashion.reference import feature_extractor
from dkdm.data.named import load_reference
from dkdm.evaluation.metrics import evaluate_images
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.models.place import device_of_run, place
from dkdm.report.grids import grid

HALVES = (range(5), range(5, 10))
NAMES = ("first", "second")


@dataclass(frozen=True)
class Measured:
    """confusion: [10, 10], of the class asked for (rows) as which class it is recognized, shares.
    distance: to the test images of the same classes; None for a model of some."""

    confusion: Tensor
    distance: float | None

    def accuracy(self, half: int) -> float:
        """Share of one teacher's classes recognized as what was asked for."""
        return float(self.confusion.diagonal()[list(HALVES[half])].mean())

    def across(self, half: int) -> float:
        """Share of one teacher's classes recognized as a class of the other's."""
        rows = self.confusion[list(HALVES[half])]
        return float(rows[:, list(HALVES[1 - half])].sum(1).mean())


def teacher_config(number: int, args: argparse.Namespace) -> TrainConfig:
    """A UNet on DDPM or a transformer on a flow, of one half of the classes."""
    network, scheduler, steps = (
        ("unet-tiny", None, args.unet_steps),
        ("dit-xs", "flow", args.dit_steps),
    )[number]
    return TrainConfig(
        output_dir=args.output_dir / NAMES[number],
        network=network,
        scheduler=scheduler,
        classes=tuple(HALVES[number]),
        max_train_steps=steps,
        train_batch_size=64,
        condition_dropout=0.1,
        lr_scheduler="cosine",
        lr_warmup_steps=50,
        ema_decay=0.995,
        checkpointing_steps=100,
        validation_steps=0,
        evaluation_samples=0,
        evaluation_reference="none",
        license="apache-2.0",
        report_to="none",
        resume_from_checkpoint="latest",
    )


def student_config(args: argparse.Namespace) -> DistillConfig:
    """The demo's settings at this length, with both teachers in every batch."""
    return DistillConfig(
        output_dir=args.output_dir / "student",
        max_train_steps=args.student_steps,
        train_batch_size=128,
        condition_dropout=0.1,
        lr_scheduler="cosine",
        lr_warmup_steps=30,
        ema_decay=0.99,
        pool_size=2048,
        fill_steps=10,
        fill_entries=1,
        stride="random:50",
        eta=0.0,
        replay=2,
        checkpointing_steps=100,
        validation_steps=0,
        validation_sampling_steps=20,
        evaluation_samples=1000,
        sampling_guidance_scale=1.5,
        report_to="none",
        resume_from_checkpoint="latest",
    )


def once(folder: Path, run: Callable[[], object]) -> None:
    """Make a run, unless it is finished."""
    if not (folder / "model_index.json").is_file():
        started = time.monotonic()
        run()
        print(f"{folder}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def train_all(args: argparse.Namespace) -> None:
    """Both teachers, then the student."""
    folders = [args.output_dir / name for name in NAMES]
    for number, folder in enumerate(folders):
        once(folder, lambda number=number: train(teacher_config(number, args)))
    once(
        args.output_dir / "student",
        lambda: distill([*map(str, folders)], args.student, student_config(args)),
    )


def device_of(args: argparse.Namespace) -> torch.device:
    """Where samples are drawn."""
    return device_of_run() if args.device == "auto" else torch.device(args.device)


def recognized(images: Tensor, labels: Tensor) -> Tensor:
    """As which class each image is recognized, as shares of the rows of each class [10, 10]."""
    logits = feature_extractor().compute(images).logits
    assert logits is not None
    counts = torch.zeros(10, 10)
    counts.index_put_((labels, logits.argmax(1)), torch.ones(len(labels)), accumulate=True)
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def measured(model: Denoiser, first_class: int, scale: float, args: argparse.Namespace) -> Measured:
    """Samples of every class the model has; first_class: what its class 0 is among the ten."""
    place(model, device_of(args))
    count = args.per_class * len(model.conditioning.drawn)  # type: ignore[attr-defined]
    cond = model.conditioning.in_turns(count)
    sampling = Sampling(count, args.sampler_steps, seed=0)
    images = decoded(model, draw(model, cond, sampling, scale)).clamp(-1, 1)
    labels = cond["class_labels"] + first_class
    metrics = None
    if len(set(labels.tolist())) == len(CLASS_NAMES):
        metrics = evaluate_images(images, labels, load_reference("fashion-test"))
    return Measured(recognized(images, labels), None if metrics is None else metrics["fd"])


def measure_all(args: argparse.Namespace) -> None:
    """Print the tables; write results.json and samples.png."""
    rows: list[tuple[str, Measured]] = [
        ("test images", Measured(recognized(*load_fashion_mnist("test")), None))
    ]
    models = {name: load_teacher(str(args.output_dir / name)) for name in (*NAMES, "student")}
    starts = {"first": 0, "second": 5, "student": 0}
    for scale in (1.0, args.guidance_scale):
        for name, model in models.items():
            label = f"{name}, guidance {scale:g}"
            rows.append((label, measured(model, starts[name], scale, args)))
    print("| | classes of the first | of the second | first taken for second | second for first |")
    print("|---|---|---|---|---|")
    for label, found in rows:
        known = [int(found.confusion[list(half)].sum() > 0) for half in HALVES]
        cells = [found.accuracy(0), found.accuracy(1), found.across(0), found.across(1)]
        shown = [f"{cell:.1%}" if known[i % 2] else "" for i, cell in enumerate(cells)]
        end = "" if found.distance is None else f" (distance {found.distance:.2f})"
        print(f"| {label}{end} | {' | '.join(shown)} |")
    print_confusion(rows[-1])
    results = {
        label: {
            "accuracy": [found.accuracy(0), found.accuracy(1)],
            "across": [found.across(0), found.across(1)],
            "frechet_distance": found.distance,
            "confusion": found.confusion.tolist(),
        }
        for label, found in rows
    }
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write_picture(models, args)


def print_confusion(row: tuple[str, Measured]) -> None:
    """Per cent of each class asked for, by the class it is recognized as."""
    label, found = row
    print(f"\n{label}: of each class asked for, per cent recognized as\n")
    print(f"| | {' | '.join(CLASS_NAMES)} |")
    print(f"|---|{'---|' * len(CLASS_NAMES)}")
    for name, shares in zip(CLASS_NAMES, found.confusion.tolist(), strict=True):
        print(f"| {name} | {' | '.join(f'{100 * share:.0f}' for share in shares)} |")


def write_picture(models: dict[str, Denoiser], args: argparse.Namespace) -> None:
    """Two rows of the teachers' samples, each by the one that knows it, two of the student."""
    halves = [_samples(models[name], 10, args) for name in NAMES]
    both = torch.stack([half.view(2, 5, *half.shape[1:]) for half in halves], dim=1)
    images = torch.cat([both.flatten(0, 2), _samples(models["student"], 20, args)])
    grid(images, 10, scale=3).save(args.output_dir / "samples.png")


def _samples(model: Denoiser, count: int, args: argparse.Namespace) -> Tensor:
    sampling = Sampling(count, args.sampler_steps, seed=0)
    cond = model.conditioning.in_turns(count)
    return decoded(model, draw(model, cond, sampling, args.guidance_scale)).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("all", "train", "measure"), default="all")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/two-teachers"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--student", default="dit-tiny")
    parser.add_argument("--unet-steps", type=int, default=1500)
    parser.add_argument("--dit-steps", type=int, default=3000)
    parser.add_argument("--student-steps", type=int, default=2000)
    parser.add_argument("--per-class", type=int, default=200)
    parser.add_argument("--sampler-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees none")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.what != "measure":
        train_all(args)
    if args.what != "train":
        measure_all(args)


if __name__ == "__main__":
    main()
