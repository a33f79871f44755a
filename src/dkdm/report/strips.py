"""The sample images of the page: teacher, student and their difference, a column a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool2d

from dkdm.report.grids import as_images, comparison_strip, png_data_uri
from dkdm.report.plots import is_plotted
from dkdm.report.run import Run

FIRST = 10  # samples at the top
PER_BLOCK = 5  # samples side by side
HERO, BLOCK, NARROW = 504, 420, 252  # pixels: widths of five samples at the top, below, on a phone
LARGEST_IMAGE = 128  # pixels; larger samples are averaged down for the page


@dataclass(frozen=True)
class Strip:
    """An image of three rows (teacher, student, difference), one column a sample.

    width, height: of the image before the page enlarges it `scale` times (`narrow` on a phone).
    """

    title: str
    names: list[str]
    image: str
    width: int
    height: int
    scale: float
    narrow: float
    alt: str


def strips(run: Run) -> tuple[list[Strip], list[Strip]]:
    """The images: the first samples, then the others by class, in the order they were drawn."""
    if not run.samples:
        return [], []
    teacher, student = run.samples["teacher"], run.samples["student"]
    if not 2 <= teacher.ndim <= 5 or teacher.shape != student.shape:
        run.missing.append(f"Samples of shape {tuple(teacher.shape[1:])} cannot be drawn.")
        return [], []
    rows = range(len(teacher))
    hero = [_strip(run, "", half, HERO) for half in _blocks(rows[:FIRST])]
    more = [_strip(run, title, block, BLOCK) for title, block in _by_class(run, rows[FIRST:])]
    return hero, more


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
    return [(_name(run, group[0]), block) for group in groups for block in _blocks(group)]


def _name(run: Run, row: int) -> str:
    """What a sample was drawn for."""
    if "labels" not in run.samples:
        return ""
    label = int(run.samples["labels"][row])
    names = run.comparison.class_names if run.comparison else None
    return names[label] if names and label < len(names) else f"{run.asked_for} {label}"


def _strip(run: Run, title: str, rows: list[int], width: int) -> Strip:
    teacher, student = (_reduced(run.samples[key][rows]) for key in ("teacher", "student"))
    image = comparison_strip(teacher, student)
    full = PER_BLOCK * (image.width + 1) / len(rows) - 1
    names = [] if title else [_name(run, row) for row in rows]
    shown = title or ", ".join(filter(None, names))
    return Strip(
        title=title,
        names=names,
        image=png_data_uri(image),
        width=image.width,
        height=image.height,
        scale=_whole(width / full),
        narrow=_whole(NARROW / full),
        alt=f"{len(rows)} samples{': ' if shown else ''}{shown}. "
        "Rows: teacher, student, their difference.",
    )


def _whole(scale: float) -> float:
    """Enlarge small pixels a whole number of times, so that all have one size."""
    return math.floor(scale) if scale >= 2 else round(scale, 3)


def _reduced(samples: Tensor) -> Tensor:
    """Average large images and video frames down; leave vectors and signals alone."""
    images = None if is_plotted(samples) else as_images(samples)
    if images is None:
        return samples
    return avg_pool2d(images.float(), math.ceil(max(images.shape[2:]) / LARGEST_IMAGE))
