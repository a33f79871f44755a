"""The page of a run: teacher and student from the same noise, and how it came about.

`report.html` is built from the files of the run folder alone, needs no other file or address to be
shown, and says which parts are missing.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dkdm.charts import Series, bin_means, line_chart
from dkdm.config import DistillConfig, RunConfig, read_config, to_json
from dkdm.errors import DkdmError
from dkdm.evaluation.results import Comparison, ModelResult, read_evaluation, read_samples
from dkdm.pictures import comparison_strip, png_data_uri
from dkdm.progress import read_metrics

REPORT = "report.html"
FIRST = 10  # samples in the picture at the top
PER_BLOCK = 5  # samples side by side in the pictures below it
LARGEST_PICTURE = 128  # pixels; larger samples are averaged down for the page
STAGES = 6  # sample grids shown of the training
UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
Read = TypeVar("Read")


@dataclass
class Run:
    """What was found in a run folder, and one sentence for each part that was not."""

    config: RunConfig
    metrics: list[dict[str, Any]]
    comparison: Comparison | None = None
    samples: dict[str, Tensor] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Optimizer steps that metrics.jsonl knows of."""
        return int(self.metrics[-1].get("step", 0)) if self.metrics else 0

    @property
    def is_distillation(self) -> bool:
        """Whether the student learned from a teacher and saw no image."""
        return isinstance(self.config, DistillConfig)


@dataclass(frozen=True)
class Stage:
    """A grid of samples that the student drew during training."""

    step: int
    picture: str


@dataclass(frozen=True)
class Strip:
    """A picture of three rows (teacher, student, difference), one column a sample.

    width, height: of the picture before the page enlarges it `scale` times (`narrow` on a phone).
    """

    title: str
    names: list[str]
    picture: str
    width: int
    height: int
    scale: float
    narrow: float
    alt: str


@dataclass(frozen=True)
class Tile:
    """A key number; teacher and student, where given, are drawn as two bars."""

    label: str
    value: str
    unit: str
    detail: str
    teacher: float | None = None
    student: float | None = None

    @property
    def bars(self) -> list[tuple[str, float]]:
        """Who, and its length in percent of the longer one."""
        if self.teacher is None or self.student is None:
            return []
        longest = max(self.teacher, self.student) or 1.0
        lengths = {"teacher": self.teacher, "student": self.student}
        return [(who, round(100 * value / longest, 1)) for who, value in lengths.items()]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises UsageError where the folder holds no `config.json` of a run.
    """
    page = render(read_run(run_dir))
    partial_path = run_dir / f".{REPORT}.partial"
    partial_path.write_text(page, encoding="utf-8")
    return partial_path.replace(run_dir / REPORT)


def read_run(run_dir: Path) -> Run:
    """Read what a run folder holds. Raises UsageError without a `config.json` of a run."""
    run = Run(read_config(run_dir / "config.json"), read_metrics(run_dir / "metrics.jsonl"))
    if not run.metrics:
        run.missing.append("metrics.jsonl has no line: no training step was logged.")
    elif run.step < run.config.max_train_steps:
        run.missing.append(
            f"The run is not finished: {run.step:,} of {run.config.max_train_steps:,} steps."
        )
    if run.is_distillation:
        run.comparison = _or_missing(partial(read_evaluation, run_dir), run.missing)
        run.samples = _or_missing(partial(read_samples, run_dir), run.missing) or {}
    if run.config.validation_steps:
        run.stages = read_stages(run_dir / "samples", run.missing)
    return run


def _or_missing(read: Callable[[], Read], missing: list[str]) -> Read | None:
    try:
        return read()
    except DkdmError as error:
        missing.append(f"{error}.")
        return None


def read_stages(folder: Path, missing: list[str]) -> list[Stage]:
    """Read the sample grids `step-N.png`, evenly spaced where there are many."""
    found = sorted((int(m[1]), p) for p in folder.glob("*.png") if (m := _STEP.fullmatch(p.name)))
    if not found:
        missing.append("There is no samples/step-*.png: no sample grid was drawn during training.")
    count = min(STAGES, len(found))
    places = {round(i * (len(found) - 1) / max(count - 1, 1)) for i in range(count)}
    stages = []
    for step, path in (found[i] for i in sorted(places)):
        try:
            with Image.open(path) as image:
                image.thumbnail((640, 640))
                stages.append(Stage(step, png_data_uri(image)))
        except (OSError, UnidentifiedImageError):
            missing.append(f"samples/{path.name} cannot be read as a picture.")
    return stages


_STEP = re.compile(r"step-(\d+)\.png")


def render(run: Run) -> str:
    """The page as HTML; every text in it is escaped."""
    environment = Environment(
        loader=PackageLoader("dkdm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "number": number, "percent": percent}
    hero, more = strips(run)
    return environment.get_template("report.html.j2").render(
        run=run,
        headline=headline(run),
        claim=claim(run),
        comparison=run.comparison,
        hero=hero,
        more=more,
        num_first=min(FIRST, len(run.samples.get("teacher", ()))),
        tiles=tiles(run),
        charts=charts(run),
        command=command_line(run.config),
        config_json=to_json(run.config),
    )


def headline(run: Run) -> str:
    """One sentence: what learned from what."""
    config, finished = run.config, run.step >= run.config.max_train_steps
    if not isinstance(config, DistillConfig):
        network, images = getattr(config, "network", "A model"), getattr(config, "images", "images")
        return f"{network} {'was' if finished else 'is being'} trained on {images}."
    verb = "learned" if finished else "is learning"
    if run.comparison is None:
        return f"{config.student} {verb} from {config.teacher}."
    teacher, student = run.comparison.teacher, run.comparison.student
    taught, teaching = kind(student.network), kind(teacher.network)
    if taught == teaching:
        return f"A {taught} {verb} from {_relative_size(teacher, student)}."
    return f"A {taught} {verb} from a {teaching}."


def claim(run: Run) -> str:
    """What was read to get there; nothing where a teacher taught."""
    if not run.is_distillation:
        return ""
    return "No image was read." if run.step >= run.config.max_train_steps else "No image is read."


def kind(network: str) -> str:
    """What a network class is, in words."""
    if "Transformer" in network or "DiT" in network or "ViT" in network:
        return "transformer"
    return "convolutional UNet" if "UNet" in network else f"network ({network})"


def _relative_size(teacher: ModelResult, student: ModelResult) -> str:
    if teacher.parameters == student.parameters:
        return "one of its size"
    return "a larger one" if teacher.parameters > student.parameters else "a smaller one"


def strips(run: Run) -> tuple[list[Strip], list[Strip]]:
    """The pictures: the first samples, then the others by class, in the order they were drawn."""
    if not run.samples:
        return [], []
    teacher, student = run.samples["teacher"], run.samples["student"]
    if teacher.ndim != 4 or teacher.shape != student.shape or 1 in teacher.shape[2:]:
        run.missing.append(f"Samples of shape {tuple(teacher.shape[1:])} are no pictures.")
        return [], []
    first = list(range(min(FIRST, len(teacher))))
    halves = [half for half in (first[:5], first[5:]) if half]
    groups = by_class(run, range(len(first), len(teacher)))
    hero = [_strip(run, "", half, size=96) for half in halves]
    more = [_strip(run, title, rows, size=80) for title, rows in groups]
    return hero, more


def by_class(run: Run, rows: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Cut samples into blocks of at most `PER_BLOCK`, each of one class where there are enough."""
    labels = run.samples.get("labels")
    names = [_class_name(run, row) for row in rows]
    if labels is None or len(set(names)) > len(rows) / 2:
        return [("", list(rows[i : i + PER_BLOCK])) for i in range(0, len(rows), PER_BLOCK)]
    classes: dict[int, list[int]] = {}
    for row in rows:
        classes.setdefault(int(labels[row]), []).append(row)
    return [
        (_class_name(run, group[0]), group[i : i + PER_BLOCK])
        for _, group in sorted(classes.items())
        for i in range(0, len(group), PER_BLOCK)
    ]


def _class_name(run: Run, row: int) -> str:
    labels = run.samples.get("labels")
    if labels is None:
        return ""
    label = int(labels[row])
    names = run.comparison.class_names if run.comparison else None
    return names[label] if names and label < len(names) else f"class {label}"


def _strip(run: Run, title: str, rows: list[int], size: int) -> Strip:
    teacher, student = (_reduced(run.samples[key][rows]) for key in ("teacher", "student"))
    picture = comparison_strip(teacher, student)
    height = teacher.shape[2]
    shown = title or ", ".join(filter(None, (_class_name(run, row) for row in rows)))
    return Strip(
        title=title,
        names=[] if title else [_class_name(run, row) for row in rows],
        picture=png_data_uri(picture),
        width=picture.width,
        height=picture.height,
        scale=_whole(size / height),
        narrow=_whole(min(size, 48) / height),
        alt=f"{len(rows)} samples{': ' if shown else ''}{shown}. "
        "Rows: teacher, student, their difference.",
    )


def _whole(scale: float) -> float:
    """Small pixels are enlarged a whole number of times, so that all are of one size."""
    return math.floor(scale) if scale >= 2 else round(scale, 3)


def _reduced(images: Tensor) -> Tensor:
    factor = math.ceil(max(images.shape[2:]) / LARGEST_PICTURE)
    return avg_pool2d(images.float(), factor)


def tiles(run: Run) -> list[Tile]:
    """The key numbers, as far as they are known."""
    found = _comparison_tiles(run.comparison) if run.comparison else []
    if run.is_distillation:
        found.append(Tile("Images read", "0", "", "the teacher's answers are all the student saw"))
    last = run.metrics[-1] if run.metrics else {}
    if evaluations := last.get("teacher_evaluations"):
        detail = f"samples through the teacher in {run.step:,} steps"
        found.append(Tile("Teacher evaluations", *in_units(evaluations), detail))
    if rate := last.get("steps_per_second"):
        detail = f"{run.step:,} steps, {number(rate)} a second"
        found.append(Tile("Training time", *duration(run.step / rate), detail))
    return found


def _comparison_tiles(comparison: Comparison) -> list[Tile]:
    teacher, student = comparison.teacher, comparison.student
    speeds = [model.images_per_second(comparison.num_steps) for model in (teacher, student)]
    return [
        *_metric_tiles(comparison),
        *_copy_tile(comparison),
        Tile(
            "Parameters",
            *compared(student.parameters, teacher.parameters, "fewer"),
            f"{count(student.parameters)} · teacher {count(teacher.parameters)}",
            teacher.parameters,
            student.parameters,
        ),
        Tile(
            "Multiply-accumulates",
            *compared(student.macs, teacher.macs, "fewer"),
            f"{count(student.macs)} an evaluation · teacher {count(teacher.macs)}",
            teacher.macs,
            student.macs,
        ),
        Tile(
            "Images a second",
            *compared(speeds[1], speeds[0], "fewer"),
            f"{number(speeds[1])} · teacher {number(speeds[0])}, {comparison.num_steps} steps each",
            *speeds,
        ),
    ]


def _metric_tiles(comparison: Comparison) -> list[Tile]:
    teacher, student = comparison.teacher.metrics, comparison.student.metrics
    if teacher is None or student is None:
        return []
    found = [
        Tile(
            "Fréchet distance",
            f"{number(student.fd / teacher.fd)} ×" if teacher.fd else number(student.fd),
            "",
            f"to real images: {number(student.fd)} · teacher {number(teacher.fd)}; lower is better",
            teacher.fd,
            student.fd,
        )
    ]
    if teacher.class_agreement is not None and student.class_agreement is not None:
        found.append(
            Tile(
                "Right class",
                f"{100 * student.class_agreement:.1f}",
                "%",
                f"show the class asked for · teacher {percent(teacher.class_agreement)}",
                teacher.class_agreement,
                student.class_agreement,
            )
        )
    return found


def _copy_tile(comparison: Comparison) -> list[Tile]:
    same, other = comparison.same_noise_difference, comparison.other_noise_difference
    if not other:
        return []
    detail = "between two pictures from the same noise; from different noise it is 100 %"
    return [Tile("Distance to the teacher", f"{100 * same / other:.1f}", "%", detail)]


def compared(value: float, base: float, less: str) -> tuple[str, str]:
    """How many times more or less than the teacher's: ('4.6 ×', 'fewer')."""
    if value == base or not value or not base:
        return ("as many", "") if value == base else (count(value), "")
    if value < base:
        return f"{number(base / value, digits=2)} ×", less
    return f"{number(value / base, digits=2)} ×", "more"


def charts(run: Run) -> dict[str, Markup | None]:
    """The curves, None where there is nothing to draw."""
    loss = [(e["step"], e["loss"]) for e in run.metrics if _is_number(e.get("loss"))]
    tenth = max(1, len(run.metrics) // 10)
    gaps = run.comparison.gaps if run.comparison else ()
    levels = run.comparison.num_levels - 1 if run.comparison else 1
    return {
        "loss": line_chart(
            "Loss over the training",
            [
                Series("single lines", bin_means(loss, 300), "faint"),
                Series("mean", bin_means(loss, 40), "student"),
            ],
            "optimizer step",
            "loss",
        ),
        "levels": line_chart(
            "Loss at each noise level",
            [
                Series("first tenth", level_means(run.metrics[:tenth]), "faint", markers=True),
                Series("last tenth", level_means(run.metrics[-tenth:]), "student", markers=True),
            ],
            "noise level t / T",
            "loss",
        ),
        "gaps": line_chart(
            "Gap between teacher and student at each noise level",
            [Series("gap", [(g.t / levels, g.relative) for g in gaps], "student", markers=True)],
            "noise level t / T",
            "share of the output",
        ),
    }


def level_means(entries: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Mean loss of each range of levels over some lines of metrics, at the middle of the range."""
    columns = zip(*(entry.get("loss_per_level") or [] for entry in entries), strict=False)
    points = []
    for index, column in enumerate(columns):
        known = [value for value in column if _is_number(value)]
        if known:
            points.append((index, sum(known) / len(known)))
    size = max((len(entry.get("loss_per_level") or []) for entry in entries), default=0)
    return [((index + 0.5) / size, mean) for index, mean in points]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def command_line(config: RunConfig) -> str:
    """The command that repeats the run: every option that differs from its default, one a line."""
    verb = "distill" if isinstance(config, DistillConfig) else "train"
    options = [["--output-dir", "runs/again"]]
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name not in ("output_dir", "resume_from_checkpoint") and value != item.default:
            options.append(_option(item.name.replace("_", "-"), value))
    return " \\\n  ".join([f"dkdm {verb}", *map(shlex.join, options)])


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *map(str, values)]


def count(value: float) -> str:
    """A count in three digits: 9,412, 393 k, 1.81 M, 75.8 M, 2.10 G."""
    return " ".join(filter(None, in_units(value)))


def in_units(value: float) -> tuple[str, str]:
    """A count in three digits, and the unit it is in: ('1.81', 'M'); whole below 10,000."""
    if value < 10_000:
        return f"{value:,.0f}", ""
    unit, size = next((unit, size) for unit, size in UNITS if value >= size)
    return number(value / size), unit


def number(value: float, digits: int = 3) -> str:
    """A few significant digits, never with an exponent: 1,234, 12.3, 0.0123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share: float) -> str:
    """A share of 1 as percent."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> tuple[str, str]:
    """Seconds, minutes or hours, whichever reads best, and the unit."""
    if seconds < 90:
        return f"{seconds:.0f}", "s"
    return (f"{seconds / 60:.0f}", "min") if seconds < 7200 else (f"{seconds / 3600:.1f}", "h")
