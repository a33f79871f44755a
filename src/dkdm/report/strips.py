"""The sample images of the page: at the top pairs, or those of a model alone; the others as rows by
class or prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from dkdm.report.grids import comparison_strip, grid, png_data_uri
from dkdm.report.images import PageImage, Pair, page_images, pairs, reduced
from dkdm.report.plots import is_plotted, plots
from dkdm.report.run import Run

FIRST = 10  # samples at the top
PER_BLOCK = 5  # samples side by side
BLOCK, NARROW = 420, 272  # pixels: widths of a block of samples, and on a phone
LARGEST_IN_ROWS = 96  # pixels; larger samples are averaged down in rows


@dataclass(frozen=True)
class Strip:
    """An image of several rows, one column a sample.

    rows: what each row is; none for a single one. names: of the columns, or a title for all. width,
    height: of the image before the page enlarges it `scale` times (`narrow` on a phone).
    is_plotted: whether it shows vectors or signals, whose paper is dark on a dark page.
    """

    title: str
    names: list[str]
    image: str
    width: int
    height: int
    scale: float
    narrow: float
    alt: str
    rows: tuple[str, ...] = ("teacher", "student", "difference")
    is_plotted: bool = False


def top_pairs(run: Run) -> list[Pair]:
    """The first samples of teacher and student, each pair from the same noise; empty for a model
    alone."""
    if not can_be_drawn(run) or "teacher" not in run.samples:
        return []
    teacher, student = (run.samples[key][:FIRST] for key in ("teacher", "student"))
    return pairs(teacher, student, [name_of(run, row) for row in range(len(teacher))])


def top_images(run: Run) -> list[tuple[str, PageImage]]:
    """The first samples of a model alone by their names, which may be empty; none for a student
    beside its teacher."""
    if not can_be_drawn(run) or "teacher" in run.samples:
        return []
    samples = run.samples["student"][:FIRST]
    names = [name_of(run, row) for row in range(len(samples))]
    alts = [name or f"Sample {i + 1}" for i, name in enumerate(names)]
    return list(zip(names, page_images(samples, alts), strict=True))


def strips(run: Run) -> list[Strip]:
    """The other samples by class, or in the order they were drawn."""
    if not can_be_drawn(run):
        return []
    rows = range(FIRST, len(run.samples["student"]))
    return [_strip(run, title, block) for title, block in _by_class(run, rows)]


def can_be_drawn(run: Run) -> bool:
    """Whether there are samples of the student, and of its teacher if any, that can be shown."""
    if not run.samples:
        return False
    student = run.samples["student"]
    teacher = run.samples.get("teacher", student)
    return 2 <= student.ndim <= 5 and teacher.shape == student.shape


def _blocks(rows: Sequence[int]) -> list[list[int]]:
    return [list(rows[i : i + PER_BLOCK]) for i in range(0, len(rows), PER_BLOCK)]


def _by_class(run: Run, rows: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Blocks, each with the name of its class if the classes have several samples each."""
    labels = run.samples.get("labels")
    classes: dict[int, list[int]] = {}
    for row in rows:
        classes.setdefault(0 if labels is None else int(labels[row]), []).append(row)
    if len(classes) > len(rows) / 2:
        return [("", block) for block in _blocks(rows)]
    groups = [group for _, group in sorted(classes.items())]
    return [(name_of(run, group[0]), block) for group in groups for block in _blocks(group)]


def name_of(run: Run, row: int) -> str:
    """What a sample was drawn for; empty for a model without classes and prompts."""
    if "labels" not in run.samples:
        return ""
    return label_name(run, int(run.samples["labels"][row]))


def label_name(run: Run, label: int) -> str:
    """What a label stands for, by its name if it is known."""
    names = run.comparison.class_names if run.comparison else None
    return names[label] if names and 0 <= label < len(names) else f"{run.asked_for} {label}"


def _strip(run: Run, title: str, rows: list[int]) -> Strip:
    drawn = [run.samples[key][rows] for key in ("teacher", "student") if key in run.samples]
    shown = [reduced(samples, LARGEST_IN_ROWS) for samples in drawn]
    image = _alone(shown[0]) if len(shown) == 1 else comparison_strip(shown[0], shown[1])
    who = () if len(shown) == 1 else Strip.rows
    names = [] if title else [name_of(run, row) for row in rows]
    words = title or ", ".join(filter(None, names))
    alt = f"{len(rows)} samples{': ' if words else ''}{words}."
    alt += f" Rows: {', '.join(who)}." if who else ""
    return made(image, (len(rows), PER_BLOCK), title, names, alt, who)


def _alone(samples: Tensor) -> Image.Image:
    """A row of samples [N, ...] of one model."""
    return grid(plots(samples) if is_plotted(samples) else samples, len(samples))


def made(
    image: Image.Image,
    columns: tuple[int, int],
    title: str,
    names: list[str],
    alt: str,
    rows: tuple[str, ...] = Strip.rows,
) -> Strip:
    """A strip of an image with so many columns, of the columns that a whole one has."""
    full = columns[1] * (image.width + 1) / columns[0] - 1
    return Strip(
        title=title,
        names=names,
        image=png_data_uri(image),
        width=image.width,
        height=image.height,
        scale=_whole(BLOCK / full),
        narrow=_whole(NARROW / full),
        alt=alt,
        rows=rows,
    )


def _whole(scale: float) -> float:
    """Enlarge small pixels a whole number of times, so that all have one size."""
    return math.floor(scale) if scale >= 2 else round(scale, 3)
