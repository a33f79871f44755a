"""Draw the pictures of the README from finished runs of students with classes.

    python scripts/make_pictures.py runs/demo --output-dir docs
    python scripts/make_pictures.py runs/fashion-few-steps --output-dir docs

Writes `demo-light.png` and `demo-dark.png`, or of a few-step student `few-steps-light.png` and
`few-steps-dark.png`: one for each theme of the reader. Every number in them is read from the files
of the run. Pixels are enlarged a whole number of times, and the font is the one that Pillow
carries, so that the same run gives the same files.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import dkdm
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.diffusion.steps import sample
from dkdm.core.objectives.positions import evenly
from dkdm.evaluation.few_steps import Drawn, measure_steps
from dkdm.evaluation.numbers import count, duration, number
from dkdm.evaluation.results import Comparison, ModelResult
from dkdm.evaluation.same_noise import shared_noise
from dkdm.report.grids import to_uint8
from dkdm.report.page import kind
from dkdm.report.run import Run, read_run, spent

COLUMNS = 10
TILE, GAP = 128, 12  # pixels; the README shows the picture at half its size
LEFT, EDGE, ROUND = 316, 44, 24
WIDTH = LEFT + COLUMNS * (TILE + GAP) - GAP + EDGE
LARGE, MIDDLE, SMALL = 48, 36, 26  # heights of the letters in pixels
THEMES = {
    "light": {
        "card": "#f6f8fa",
        "rule": "#d1d9e0",
        "ink": "#1f2328",
        "soft": "#59636e",
        "teacher": "#2563a8",
        "student": "#bf4a14",
    },
    "dark": {
        "card": "#151b23",
        "rule": "#3d444d",
        "ink": "#f0f6fc",
        "soft": "#9198a1",
        "teacher": "#7db4f2",
        "student": "#f5975f",
    },
}


def main() -> None:
    """Read the run, draw its first samples step by step, write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--output-dir", type=Path, default=Path("docs"))
    parser.add_argument("--sample", type=int, default=9, help="number of the sample on its way")
    options = parser.parse_args()
    run = read_run(options.run)
    if not run.is_distillation or run.comparison is None or not run.samples:
        parser.error(f"{options.run} is no finished distillation: {' '.join(run.missing)}")
    name, draw = (
        few_steps(options.run, run) if run.steps else demo(options.run, run, options.sample)
    )
    for theme, colours in THEMES.items():
        card = Card(colours)
        draw(card)
        path = options.output_dir / f"{name}-{theme}.png"
        card.finished().save(path, optimize=True)
        print(path)


def demo(folder: Path, run: Run, row: int) -> tuple[str, Callable[["Card"], None]]:
    """Both models from the same noise, and a sample of the student on its way. row: which one."""
    found = run.comparison
    teacher, student = (run.samples[who][:COLUMNS] for who in ("teacher", "student"))
    states = states_of(folder, found, student)
    kept = evenly(COLUMNS, len(states))

    def draw(card: Card) -> None:
        card.row("Noise", ("the same for both",), states[0], "ink")
        card.row("Teacher", words_of(found.teacher), teacher, "teacher")
        card.row("Student", words_of(found.student), student, "student")
        card.captions(names_of(found))
        card.rule()
        way = "from noise to image", f"in {found.num_steps} steps"
        card.row("The student", way, states[kept, row], "student")
        card.captions([f"step {step}" if step else "noise" for step in kept])
        card.rule()
        card.facts(facts_of(run, found))
        card.line(how_measured(found, f"{found.num_steps} steps of {found.sampler}"))

    return "demo", draw


def few_steps(folder: Path, run: Run) -> tuple[str, Callable[["Card"], None]]:
    """The teacher in many steps and in one, the student in each number of steps."""
    found, table = run.comparison, run.steps
    rows = {(row.model, row.num_steps): row for row in table.rows}
    many = max(steps for model, steps in rows if model == "teacher")
    shown = [("teacher", many), ("teacher", 1)]
    shown += [("student", steps) for model, steps in rows if model == "student"][:3]
    images = drawn_in_steps(folder, run, shown)

    def draw(card: Card) -> None:
        for who in shown:
            model, number_of_steps = who
            steps = f"in {number_of_steps} step{'s' if number_of_steps > 1 else ''}"
            distance = f"distance {number(rows[who].metrics['fd'])}"
            card.row(model.capitalize(), (steps, distance), images[who], model)
        card.captions(names_of(found))
        card.rule()
        card.facts(facts_of_few_steps(run, found, many))
        card.line("Distance: Frechet, to real images. " + how_measured(found, "teacher by DDIM"))

    return "few-steps", draw


def drawn_in_steps(
    folder: Path, run: Run, shown: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], Tensor]:
    """The first samples [N, C, H, W] of teacher and student by (model, number of steps)."""
    found = run.comparison
    scale = found.student.guidance_scale
    models = {"teacher": run.config.teacher_choice.model, "student": str(folder)}
    teacher, student = (
        Drawn(who, dkdm.load_teacher(name), tuple(n for each, n in shown if each == who), scale)
        for who, name in models.items()
    )
    return measure_steps(teacher, [student], COLUMNS, found.seed, None, COLUMNS)[1]


def names_of(found: Comparison) -> list[str]:
    """The classes of the columns."""
    return [name.partition("/")[0] for name in found.class_names or ()][:COLUMNS]


def states_of(folder: Path, found: Comparison, kept: Tensor) -> Tensor:
    """The student's samples from noise to result, [steps + 1, N, C, H, W].

    kept: the results [N, C, H, W] that the run wrote; the same are drawn here.
    """
    student, states = dkdm.load_teacher(str(folder)), []
    cond, scale = student.conditioning.in_turns(len(kept)), found.student.guidance_scale

    def predict(x: Tensor, t: Tensor) -> Prediction:
        states.append(x)
        return student.predict(Batch(x, t, cond), scale)

    noise, process = shared_noise(student, found.seed, range(len(kept))), student.process
    student.network.eval()
    with torch.no_grad():
        steps = process.timesteps(found.num_steps)
        start = process.start_std * noise(-1)
        states.append(sample(predict, process, student.parameterization, start, steps, noise))
    torch.testing.assert_close(states[-1], kept, atol=0.02, rtol=0)
    return torch.stack(states)


def words_of(model: ModelResult) -> tuple[str, str]:
    """What a model is, in two lines."""
    return kind(model.network), f"{count(model.parameters)} parameters"


def facts_of(run: Run, found: Comparison) -> list[tuple[str, str]]:
    """What a stranger wants to know: large numbers, each with its meaning."""
    teacher, student, (steps, _, seconds) = found.teacher, found.student, spent(run)
    less = f"{number(teacher.macs / student.macs, 2)} times"
    facts = [
        ("0 images", "were read: the student learned\nfrom its teacher's outputs alone"),
        (duration(seconds), f"of training on a {found.device},\n{steps:,} steps"),
        (less, "less arithmetic in each\nsampling step"),
    ]
    if teacher.metrics and student.metrics:
        distances = [each.metrics["fd"] for each in (student, teacher)]
        words = f"Frechet distance to real images;\nits teacher's is {number(distances[1])}"
        facts.append((number(distances[0]), words))
    return facts


def facts_of_few_steps(run: Run, found: Comparison, many: int) -> list[tuple[str, str]]:
    """The same of a student that draws in few steps. many: steps that the teacher takes."""
    _, evaluations, seconds = spent(run)
    smaller = number(found.teacher.parameters / found.student.parameters, 2)
    return [
        ("1 step", f"where the teacher takes {many},\nby a network {smaller} times smaller"),
        ("0 images", "were read: the student learned\nfrom its teacher's outputs alone"),
        (count(evaluations), "teacher evaluations\nin the whole run"),
        (duration(seconds), f"of training on a {found.device}"),
    ]


def how_measured(found: Comparison, steps: str) -> str:
    """How the samples were drawn and their distance was measured. steps: and by which sampler."""
    guidance = found.student.guidance_scale
    words = [f"{found.num_samples:,} samples of each model", steps, f"seed {found.seed}"]
    words.append("no guidance" if guidance == 1 else f"guidance {guidance:g}")
    if found.measurement and found.measurement.reference_images:
        measured = found.measurement
        words.append(f"real images: the {measured.reference_images:,} of {measured.reference}")
    return f"{', '.join(words)}. Shown are the first samples, not selected."


class Card:
    """A picture that grows downwards, in the colours of one theme."""

    def __init__(self, colours: dict[str, str]) -> None:
        self.colours, self.bottom = colours, EDGE
        self.image = Image.new("RGB", (WIDTH, WIDTH), colours["card"])
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, place: tuple[float, float], words: str, size: int, colour: str, anchor: str = "la"
    ) -> None:
        """Write words. place: in pixels; anchor: as Pillow has it."""
        font = ImageFont.load_default(size)
        self.draw.text(place, words, self.colours[colour], font, anchor)

    def row(self, title: str, words: Sequence[str], images: Tensor, colour: str) -> None:
        """Images [N, C, H, W] in [-1, 1] beside their title and what they are."""
        top = self.bottom + (TILE - MIDDLE - len(words) * (SMALL + 8)) // 2 - 4
        self.text((EDGE, top), title, MIDDLE, colour)
        for number_of_line, line in enumerate(words):
            down = MIDDLE + 12 + number_of_line * (SMALL + 8)
            self.text((EDGE, top + down), line, SMALL, "soft")
        for column, pixels in enumerate(to_uint8(images)):
            image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
            scale = TILE // max(image.size)
            size = image.width * scale, image.height * scale
            large = image.resize(size, Image.Resampling.NEAREST)
            self.image.paste(large, (left_of(column), self.bottom))
        self.bottom += TILE + GAP

    def captions(self, words: Sequence[str]) -> None:
        """A line under the last row, with words under each column."""
        for column, each in enumerate(words):
            self.text((left_of(column) + TILE / 2, self.bottom), each, SMALL, "soft", "ma")
        self.bottom += SMALL + 2 * GAP

    def rule(self) -> None:
        """A line across."""
        self.draw.line((EDGE, self.bottom, WIDTH - EDGE, self.bottom), self.colours["rule"], 2)
        self.bottom += 2 * GAP

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Large numbers side by side, each over its meaning."""
        for column, (value, words) in enumerate(facts):
            left = EDGE + column * (WIDTH - 2 * EDGE) / len(facts)
            self.text((left, self.bottom), value, LARGE, "student")
            for i, line in enumerate(words.splitlines()):
                down = LARGE + GAP + i * (SMALL + 8)
                self.text((left, self.bottom + down), line, SMALL, "soft")
        self.bottom += LARGE + 2 * (SMALL + 8) + 3 * GAP

    def line(self, words: str) -> None:
        """Small letters, in as many lines as they take."""
        font = ImageFont.load_default(SMALL - 2)
        lines = [""]
        for word in words.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) > WIDTH - 2 * EDGE:
                lines.append(word)
            else:
                lines[-1] = longer
        for line in lines:
            self.text((EDGE, self.bottom), line, SMALL - 2, "soft")
            self.bottom += SMALL + 6

    def finished(self) -> Image.Image:
        """The picture, cut below its last line, with a border and round corners."""
        size = WIDTH, self.bottom + EDGE - GAP
        border = (0, 0, size[0] - 1, size[1] - 1)
        self.draw.rounded_rectangle(border, ROUND, outline=self.colours["rule"], width=2)
        corners = Image.new("L", size, 0)
        ImageDraw.Draw(corners).rounded_rectangle(border, ROUND, fill=255)
        picture = self.image.crop((0, 0, *size))
        picture.putalpha(corners)
        return picture


def left_of(column: int) -> int:
    """Where a column begins, in pixels."""
    return LEFT + column * (TILE + GAP)


if __name__ == "__main__":
    main()
