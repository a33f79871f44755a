"""What `dkdm compare` puts side by side: runs, evaluations and models, each a column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dkdm.core.training.bad_steps import faults_in_words
from dkdm.errors import UsageError
from dkdm.evaluation.evaluated import Evaluation
from dkdm.evaluation.figures import Figure, figures_of_comparison, figures_of_evaluation
from dkdm.evaluation.numbers import count, duration
from dkdm.evaluation.results import EVALUATION
from dkdm.report.run import Run, read_run, spent

SHOWN = 10  # samples of each
UNINTERESTING = ("output_dir", "resume_from_checkpoint")


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of one model, [N, ...], and the noise that they come from.

    noise: seed and shape, equal for samples from the same noise. teacher: the teacher's from that
    noise; None for a model without one. names: what each was drawn for, empty for nothing.
    """

    own: Tensor
    teacher: Tensor | None
    noise: tuple[Any, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Entry:
    """One column: where it comes from, what was measured of it, and what can be shown of it.

    facts: what is no measurement, by name, as text. options: of a run, by their names. missing: a
    sentence for each part that is not there.
    """

    name: str
    kind: str
    facts: Mapping[str, str]
    figures: Sequence[Figure]
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Run | None = None
    samples: Samples | None = None
    missing: Sequence[str] = ()


def entry_of_run(folder: Path) -> Entry:
    """A run's folder. Raises UsageError if its `config.json` cannot be read."""
    run = read_run(folder)
    found = run.comparison
    interval = getattr(run.config, "guidance_interval", None)
    figures = figures_of_comparison(found, interval) if found else []
    missing = [text for text in run.missing if "step-*" not in text]
    if found is None and not run.is_distillation:
        missing.append("It kept no numbers: measure it by dkdm evaluate --json.")
    facts = {"network": found.student.network, "weights": found.weights} if found else {}
    if found:
        how = found.num_steps, found.student.guidance_scale, found.sampler
        facts["samples shown"] = how_drawn(*how)
    options = {k: v for k, v in run.asked.flat().items() if k not in UNINTERESTING}
    return Entry(
        name=str(folder),
        kind="run",
        facts=facts | training_facts(run),
        figures=figures,
        options=options,
        run=run,
        samples=_samples_of(run),
        missing=missing,
    )


def how_drawn(num_steps: int, guidance_scale: float, sampler: str = "DDIM") -> str:
    """How the samples that are shown were drawn."""
    guidance = "no guidance" if guidance_scale == 1 else f"guidance {guidance_scale:g}"
    return f"{sampler}, {num_steps} steps, {guidance}"


def training_facts(run: Run) -> dict[str, str]:
    """What the training took, as far as it is logged; of both parts, if there were two."""
    steps, evaluations, seconds = spent(run)
    facts = {"optimizer steps": f"{steps:,}"}
    if evaluations:
        facts["teacher evaluations"] = count(evaluations)
    if seconds:
        facts["training time"] = duration(seconds)
    if said := faults_in_words(run.metrics):
        facts["faults"] = said
    return facts


def _samples_of(run: Run) -> Samples | None:
    if not run.samples or run.comparison is None:
        return None
    own, teacher, labels = (run.samples.get(key) for key in ("student", "teacher", "labels"))
    if own is None or not 2 <= own.ndim <= 5:
        return None
    if (teacher is None) != (run.comparison.teacher is None):
        return None
    if teacher is not None and own.shape != teacher.shape:
        return None
    known, asked = run.comparison.class_names or (), run.comparison.asked_for
    numbers = [] if labels is None else labels.tolist()
    names = [known[i] if 0 <= i < len(known) else f"{asked} {i}" for i in numbers]
    noise = run.comparison.seed, tuple(run.comparison.sample_shape)
    return Samples(own, teacher, noise, tuple(names) or ("",) * len(own))


def entry_of_evaluation(file: Path) -> Entry:
    """A JSON file of `dkdm evaluate --json`.

    Raises UsageError if it is damaged, is that of a run, or holds no number.
    """
    if file.name == EVALUATION and (file.parent / "config.json").is_file():
        raise UsageError(f"{file} belongs to a run: give {file.parent}, the run's folder")
    found = Evaluation.read(file)
    figures = figures_of_evaluation(found)
    if not figures:
        raise UsageError(
            f"{file} holds no metric: give dkdm evaluate a --reference or a --teacher, and try "
            "again"
        )
    model = found.model
    facts = {"model": model.name, "weights": model.weights}
    return Entry(str(file), "evaluation", facts, figures, missing=found.warnings)


def named_shortly(entries: Sequence[Entry]) -> list[str]:
    """The names of the entries, paths by as few of their last parts as tell them apart."""
    parts = [entry.name.rstrip("/").removesuffix(".json").split("/") for entry in entries]
    length, most = 1, max(map(len, parts))
    while length < most and _clash(parts, length):
        length += 1
    names = ["/".join(each[-length:]) for each in parts]
    counts = Counter(names)
    return [f"{name} ({i + 1})" if counts[name] > 1 else name for i, name in enumerate(names)]


def _clash(parts: Sequence[Sequence[str]], length: int) -> bool:
    return len({tuple(each[-length:]) for each in parts}) < len(parts)
