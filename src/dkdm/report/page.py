"""The page itself: its words, and the template they go into."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dkdm.config import DistillConfig, RunConfig, TrainConfig, to_json
from dkdm.core.training.bad_steps import faults_in_words
from dkdm.evaluation.circumstances import circumstances_of
from dkdm.evaluation.rows import comparison_rows
from dkdm.evaluation.validation import how_in_words
from dkdm.reading.files import atomic
from dkdm.report.curves import best_in_words, charts, levels_table
from dkdm.report.html import render_page
from dkdm.report.pool import ages_in_words, pool_charts
from dkdm.report.run import Run, read_run
from dkdm.report.strips import can_be_drawn, strips, top_images, top_pairs
from dkdm.report.tiles import tiles
from dkdm.report.ways import other_levels, ways

REPORT = "report.html"
MORE = {"teacher": "more_teachers", "prompts": "more_prompts"}  # the same option, given again
NAMED = ("teacher", "student")  # options that a command shows even if they are the default
LEFT_OUT = ("output_dir", "resume_from_checkpoint", *MORE.values())


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises UsageError if the folder holds no `config.json` of a run.
    """
    page = render(read_run(run_dir))
    with atomic(run_dir / REPORT) as partial:
        partial.write_text(page, encoding="utf-8")
    return run_dir / REPORT


def render(run: Run) -> str:
    """The page as HTML; every text in it is escaped."""
    if run.samples and not can_be_drawn(run):
        shape = tuple(run.samples["student"].shape[1:])
        run.missing.append(f"Samples of shape {shape} cannot be drawn.")
    return render_page(
        "report.html.j2",
        run=run,
        headline=headline(run),
        claim=claim(run),
        teachers=teachers_of(run),
        comparison=run.comparison,
        how=circumstances_of(run.comparison).in_words() if run.comparison else [],
        rows=comparison_rows(run.comparison) if run.comparison else [],
        pairs=top_pairs(run),
        images=top_images(run),
        lesson=lesson(run),
        more=strips(run),
        ways=ways(run),
        other_levels=other_levels(run),
        tiles=tiles(run),
        charts=charts(run),
        levels=levels_table(run),
        pool=run.pool,
        pool_charts=pool_charts(run.pool),
        ages=ages_in_words(run.pool) if run.pool else "",
        best=best_in_words(run),
        validated_by=how_in_words(run.chosen) if run.chosen else "",
        faults=faults_in_words(run.metrics),
        undrawn=any(value <= 0 for _, value in run.validated),
        command=command_line(run.asked),
        config_json=to_json(run.asked),
    )


def headline(run: Run) -> str:
    """One sentence: what learned from what."""
    config = run.config
    if isinstance(config, TrainConfig) or not config.is_taught:
        verb = "was" if run.is_finished else "is being"
        return f"{_trained(config)} {verb} trained on {_images(config)}."
    verb = "learned" if run.is_finished else "is learning"
    found = teachers_of(run)
    short = [Path(name).name for name in found]
    names = " and ".join(short if len({*short}) == len(short) else found)
    if run.comparison is None or run.comparison.teacher is None:
        return f"{config.student_choice.student} {verb} from {names}."
    teacher, student = run.comparison.teacher, run.comparison.student
    if len(found) > 1:
        return f"A {kind(student.network)} {verb} from {len(found)} teachers: {names}."
    taught, teaching = kind(student.network), kind(teacher.network)
    larger = teacher.parameters - student.parameters
    size = "one of its size" if larger == 0 else "a larger one" if larger > 0 else "a smaller one"
    return f"A {taught} {verb} from {size if taught == teaching else f'a {teaching}'}."


def _trained(config: DistillConfig | TrainConfig) -> str:
    """The model that is trained, as it was asked for."""
    if isinstance(config, TrainConfig):
        return config.model.network
    return config.student_choice.student


def _images(config: DistillConfig | TrainConfig) -> str:
    """The real images that are read, as they were named."""
    if isinstance(config, TrainConfig):
        return config.data.images
    return config.images_choice.images or "images"


def teachers_of(run: Run) -> list[str]:
    """The teachers of a distillation, as they were named; none for training on images."""
    if not isinstance(run.config, DistillConfig):
        return []
    return [run.config.teacher_choice.model, *(run.config.teachers.more_teachers or ())]


def claim(run: Run) -> str:
    """What a data-free distillation read: no images. Empty for any other run."""
    if not run.is_data_free:
        return ""
    what = "data" if run.noun == "sample" else run.noun
    return f"No {what} {'was' if run.is_finished else 'is'} read."


def lesson(run: Run) -> str:
    """What a student learned, after "from its teacher"; empty for a run without a teacher."""
    config = run.config
    if not isinstance(config, DistillConfig):
        return ""
    several = len(teachers_of(run)) > 1
    they, their = ("they denoise", "their") if several else ("it denoises", "its")
    noisy = f"from how {they} noisy {run.noun}s"
    if not config.reads_images:
        if config.pool.source == "synthetic":
            return f"from {their} finished {run.noun}s, noised afresh"
        return f"{noisy} of {their} own making"
    images = Path(_images(config)).name
    if config.pool.source == "mixed":
        return f"{noisy} of {their} own making and from {images}"
    if config.images_choice.images_target == "teacher":
        return f"{noisy} made of {images}"
    return f"from {images}, noised: the baseline of a distillation"


def kind(network: str) -> str:
    """What a network class is, in words."""
    if "Transformer" in network or "DiT" in network or "ViT" in network:
        return "transformer"
    if "MLP" in network:
        return "residual MLP"
    return "convolutional UNet" if "UNet" in network else f"network ({network})"


def command_line(config: RunConfig) -> str:
    """The command that repeats the run: every option that differs from its default, one a line.

    Teachers and student are always named.
    """
    given, default = config.flat(), type(config)().flat()
    options = []
    for name, value in given.items():
        if name in NAMED or (name not in LEFT_OUT and value != default[name]):
            options.append(_option(name.replace("_", "-"), value))
            options += [[f"--{name}", more] for more in given.get(MORE.get(name, "")) or ()]
    options.append(["--output-dir", "runs/again"])
    return " \\\n  ".join([f"dkdm {config.command}", *map(shlex.join, options)])


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *map(str, values)]
