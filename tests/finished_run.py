"""The files of a finished run, without the run."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from dkdm.config import DistillConfig
from dkdm.evaluation.metrics import Metrics
from dkdm.evaluation.results import Comparison, LevelGap, ModelResult
from dkdm.evaluation.results import Measurement as How
from dkdm.report.grids import grid

CONFIG = DistillConfig(max_train_steps=200, learning_rate=1e-3, classes=(1, 2), use_ema=False)


def model(name: str, network: str, parameters: int, fd: float) -> ModelResult:
    metrics = Metrics(
        {
            "fd": fd,
            "class_accuracy": 0.9,
            "variance_ratio_mean": 0.8,
            "variance_ratio_min": 0.7,
        },
        1000,
        "fashion-test",
    )
    return ModelResult(name, network, parameters, 50 * parameters, 1e8 / parameters, 1.0, metrics)


def comparison(samples: int = 25, shape: tuple[int, ...] = (1, 16, 16)) -> Comparison:
    grey = torch.linspace(-1, 1, samples).reshape(-1, *[1] * len(shape))
    pictures = grey.expand(-1, *shape).clone()
    return Comparison(
        teacher=model("builtin:fashion", "UNet2DModel", 1_800_000, 2.0),
        student=model("dit-xs", "DiTTransformer2DModel", 400_000, 3.0),
        sample_shape=shape,
        num_levels=1000,
        num_samples=1000,
        num_steps=25,
        seed=0,
        device="CPU, 2 threads",
        gap_samples=64,
        gaps=tuple(LevelGap(t, 0.01, 0.02) for t in (0, 500, 999)),
        same_noise_difference=0.05,
        other_noise_difference=0.25,
        measurement=How("64 features", "fashion-test", 10_000, 60_000, 0.0123),
        class_names=("T-shirt/top", "Trouser", "Pullover"),
        samples={
            "teacher": pictures,
            "student": -pictures,
            "labels": torch.arange(samples) % 3,
        },
    )


def alone(samples: int = 25, shape: tuple[int, ...] = (1, 16, 16)) -> Comparison:
    """A model that was trained on images."""
    both = comparison(samples, shape)
    kept = {name: both.samples[name] for name in ("student", "labels")}
    without = {"gaps": (), "same_noise_difference": 0.0, "other_noise_difference": None}
    return replace(both, teacher=None, samples=kept, **without)


def write_metrics(run: Path, last: int) -> None:
    entries = [
        {
            "step": step,
            "loss": 1 / step,
            "steps_per_second": 2.0,
            "loss_per_level": [0.5, None, *[0.1] * 8],
            "teacher_evaluations": 64 * step,
        }
        for step in range(10, last + 1, 10)
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (run / "metrics.jsonl").write_text(lines + '{"step": 99')


def write_validation(run: Path, metric: str, values: dict[int, float]) -> None:
    lines = [json.dumps({"step": k, "validation": {metric: v}}) for k, v in values.items()]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "\n".join(lines) + "\n")


def write_stages(run: Path, *steps: int) -> None:
    (run / "samples").mkdir(exist_ok=True)
    for step in steps:
        grid(torch.rand(4, 1, 4, 4), columns=2).save(run / "samples" / f"step-{step:06d}.png")
