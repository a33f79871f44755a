"""What a comparison of teacher and student found, and how it lies in a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dkdm.core.saving.checkpoint import read_tensors, write_tensors
from dkdm.core.saving.checksums import sums_of
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.energy import TeacherDistance
from dkdm.evaluation.metrics import Metrics
from dkdm.reading.fields import read_json
from dkdm.reading.files import atomic
from dkdm.reading.values import made_of

EVALUATION = "evaluation.json"
SAMPLES = "samples/comparison.safetensors"
PUBLISHED = {"class_accuracy": "class_agreement"}  # fields whose name in the file is another
FIELDS = {name: field for field, name in PUBLISHED.items()}


@dataclass(frozen=True)
class ModelResult:
    """What was measured of a model.

    - `network`: class name of the network.
    - `macs`: multiply-accumulates of one network evaluation of one sample.
    - `evaluations_per_second`: samples through the network, unguided.
    - `guidance_scale`: of its samples.
    - `metrics`: None if no reference was given or its samples do not fit it.
    - `evaluations_per_step`: network evaluations of one sample in a sampling step, on average; None
      in files of earlier versions, which guided every step with a second evaluation.
    - `weights_mib`: parameters and buffers in memory; `evaluation_mib`: what one evaluation of one
      sample needs beside them. Earlier versions wrote neither.
    """

    name: str
    network: str
    parameters: int
    macs: int
    evaluations_per_second: float
    guidance_scale: float
    metrics: Metrics | None
    evaluations_per_step: float | None = None
    weights_mib: float | None = None
    evaluation_mib: float | None = None

    def images_per_second(self, num_steps: int) -> float:
        """Finished samples a second with a sampler of `num_steps` steps."""
        each = self.evaluations_per_step or (1 if self.guidance_scale == 1 else 2)
        return self.evaluations_per_second / (num_steps * each)


@dataclass(frozen=True)
class LevelGap:
    """How far the student's output is from the teacher's at level t.

    - `gap`: mean squared difference, in the student's parameterization.
    - `relative`: the same as a share of the teacher's mean squared output.
    """

    t: int
    gap: float
    relative: float


@dataclass(frozen=True)
class Measurement:
    """How the distances were measured, so that a reader can judge them.

    - `reference_images`: how many real images the reference summarizes; None if it does not say.
    - `real_distance`: the Frechet distance of `real_images` real images, the floor; None if there
      are too few.
    - `network`: name of the network whose features are compared.
    - `dataset`: type, name and split of the real images, as the hub's model index wants them.
    - `floors`: what the real images are given by each metric that they have, by its name.
    - `warnings`: what a reader of the distances has to know.

    Files of earlier versions say none of the last four.
    """

    features: str
    reference: str
    reference_images: int | None
    real_images: int | None
    real_distance: float | None
    network: str = ""
    dataset: Mapping[str, str] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Comparison:
    """A teacher and its student, drawn from the same noise and measured the same way; or a model
    alone, which was trained on images.

    - `teacher`: None for a model alone, called student all the same. It has no gaps, differences
      and distance to a teacher.
    - `gap_samples`: teacher samples noised again for each of `gaps`.
    - `same_noise_difference`: mean |teacher - student| over all samples and pixels.
    - `other_noise_difference`: the same with the teacher's next sample of the same class or prompt,
      which has other noise; None with too few samples. The first over this is 0 for a perfect copy,
      1 for a student that shares nothing but what was asked for.
    - `teacher_distance`: of the student's samples to the teacher's from other noise; None for one
      sample, for samples that are not finite, and in files of earlier versions.
    - `class_names`: what the numbers in `labels` stand for, prompts of a text model.
    - `samples`: `teacher` (if there is one) and `student` [M, ...] for the first M samples, and
      `labels` int64 [M] if the models have classes or prompts.
    - `sampler`, `teacher_sampler`: in words. `eta`: of both; 0 is DDIM.
    - `asked_for`: what `labels` number, "class" or "prompt"; earlier versions wrote none.
    - `weights`: which of the student's were sampled, in words; earlier versions wrote none.
    - `versions`: of dkdm and its libraries, by their names; earlier versions wrote none.
    """

    teacher: ModelResult | None
    student: ModelResult
    sample_shape: tuple[int, ...]
    num_levels: int
    num_samples: int
    num_steps: int
    seed: int
    device: str
    gap_samples: int
    gaps: tuple[LevelGap, ...]
    same_noise_difference: float
    other_noise_difference: float | None
    measurement: Measurement | None
    class_names: tuple[str, ...] | None
    samples: Mapping[str, Tensor]
    eta: float = 0.0
    asked_for: str = "class"
    weights: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    sampler: str = "DDIM"
    teacher_distance: TeacherDistance | None = None
    teacher_sampler: str = "DDIM"

    @property
    def noun(self) -> str:
        """What a sample is called."""
        return {3: "image", 4: "video"}.get(len(self.sample_shape), "sample")

    def as_dict(self) -> dict[str, Any]:
        """Return every field but the samples as JSON-ready values, by their published names."""
        values = asdict(replace(self, samples={})) | {"samples": SAMPLES}
        for name, model in (("teacher", self.teacher), ("student", self.student)):
            if model is not None:
                values[name]["metrics"] = as_published(model.metrics)
        return values

    def save(self, run_dir: Path) -> None:
        """Write `evaluation.json` and `samples/comparison.safetensors` into a run folder."""
        write_tensors(run_dir / SAMPLES, self.samples, sums_of(self.samples))
        with atomic(run_dir / EVALUATION) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")


def read_evaluation(run_dir: Path) -> Comparison:
    """Read the `evaluation.json` that `Comparison.save` wrote; `samples` is empty.

    Raises `DkdmError` if it is missing or damaged.
    """
    file = _written(run_dir / EVALUATION, EVALUATION)
    try:
        values = read_json(file, "a comparison, written when a run ends")
        for model in ("teacher", "student"):
            fields = values.get(model)
            if isinstance(fields, dict):
                fields["metrics"] = _from_published(fields.get("metrics"))
        return made_of(Comparison, values, EVALUATION, samples={})
    except UsageError as error:
        raise DkdmError(f"{EVALUATION} cannot be read ({error})") from error


def read_samples(run_dir: Path) -> dict[str, Tensor]:
    """Read the samples that `Comparison.save` wrote: `student`, and `teacher` and `labels` if there
    are any.

    Raises `DkdmError` if they are missing or damaged.
    """
    samples = read_tensors_of(run_dir, SAMPLES)
    if samples.keys() - {"labels"} not in ({"teacher", "student"}, {"student"}):
        raise DkdmError(f"{SAMPLES} holds {', '.join(samples)}, not teacher and student")
    labels = samples.get("labels")
    fits = labels is None or (not labels.is_floating_point() and labels.ndim == 1)
    if not fits or len({len(each) if each.ndim else 0 for each in samples.values()}) > 1:
        raise DkdmError(f"{SAMPLES} holds tensors that do not fit together")
    return samples


def read_tensors_of(run_dir: Path, name: str) -> dict[str, Tensor]:
    """Read a file of tensors in a run folder. Raises `DkdmError` if it is missing or damaged."""
    file = _written(run_dir / name, name)
    try:
        return read_tensors(file)
    except DkdmError as error:
        raise DkdmError(f"{name} cannot be read ({error})") from error


def _written(file: Path, name: str) -> Path:
    if not file.exists():
        raise DkdmError(f"{name} is missing: it is written when a run ends")
    return file


def as_published(metrics: Metrics | None) -> dict[str, Any] | None:
    """Measurements as they lie in files: one flat object, by their published names."""
    if metrics is None:
        return None
    values = {PUBLISHED.get(name, name): value for name, value in metrics.values.items()}
    return values | {"num_samples": metrics.num_samples, "reference": metrics.reference}


def _from_published(entries: Any) -> Any:
    if not isinstance(entries, dict):
        return entries
    values = {FIELDS.get(name, name): value for name, value in entries.items()}
    about = {name: values.pop(name) for name in ("num_samples", "reference") if name in values}
    return about | {"values": {name: x for name, x in values.items() if x is not None}}
