"""What models draw in each number of sampling steps: teacher, plain student, few-step student."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.data.reference import Reference
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.cost import undisturbed
from dkdm.evaluation.energy import energy_distance
from dkdm.evaluation.metrics import METRICS, evaluate_images, known_labels
from dkdm.evaluation.numbers import percent
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.reading.fields import read_json
from dkdm.reading.files import atomic
from dkdm.reading.values import made_of

FEW_STEPS = "few_steps.json"
SHOWN = ("fd", "fid", "class_accuracy", "variance_ratio_mean")
OTHER_NOISE = 1  # added to the seed for the samples that others are measured against
TRAILING = "DDIM with trailing levels"  # the sampler of all but few-step students, in words
PLAIN_STUDENT = "plain student"  # its name in a table
MOST = 256  # samples of an energy distance here


class Drawn(NamedTuple):
    """A model that is measured, the numbers of steps, and the guidance scale."""

    name: str
    model: Denoiser
    steps: Sequence[int]
    guidance_scale: float = 1.0


@dataclass(frozen=True)
class StepsRow:
    """One model in one number of steps.

    - `teacher_distance`: the energy distance to samples that the teacher draws in its most steps
      from other noise, as a share of the largest; 0 for equal distributions.
    - `metrics`: by their names in `METRICS`; empty without a reference.
    """

    model: str
    num_steps: int
    guidance_scale: float
    teacher_distance: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class StepsTable:
    """Rows of all models; each number is of `num_samples` samples from the noise of `seed`."""

    rows: tuple[StepsRow, ...]
    num_samples: int
    seed: int
    reference: str = ""

    @property
    def heads(self) -> list[str]:
        """Names of the columns."""
        return [
            "model",
            "steps",
            *(METRICS[name].label for name in self._measured),
            "distance to the teacher",
        ]

    @property
    def texts(self) -> list[list[str]]:
        """The cells of each row."""
        return [
            [
                row.model,
                str(row.num_steps),
                *(METRICS[name].format(row.metrics[name]) for name in self._measured),
                percent(row.teacher_distance),
            ]
            for row in self.rows
        ]

    @property
    def follows_plain(self) -> bool:
        """Whether the student went on from a plain one, which is measured too."""
        return any(row.model == PLAIN_STUDENT for row in self.rows)

    @property
    def _measured(self) -> list[str]:
        return [name for name in SHOWN if all(name in row.metrics for row in self.rows)]

    def save(self, run_dir: Path) -> None:
        """Write `few_steps.json` into a run folder."""
        with atomic(run_dir / FEW_STEPS) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_steps_table(run_dir: Path) -> StepsTable | None:
    """Read `few_steps.json`; None if there is none. Raises DkdmError if it is damaged."""
    if not (run_dir / FEW_STEPS).exists():
        return None
    try:
        values = read_json(run_dir / FEW_STEPS, "what was measured at each number of steps")
        return made_of(StepsTable, values, FEW_STEPS)
    except UsageError as error:
        raise DkdmError(f"{FEW_STEPS} cannot be read ({error})") from error


def measure_steps(
    teacher: Drawn,
    others: Sequence[Drawn],
    num_samples: int,
    seed: int,
    reference: Reference | None,
    shown: int,
) -> tuple[StepsTable, dict[tuple[str, int], Tensor]]:
    """Draw from all models in all their numbers of steps, from the same noise, and measure.

    DDIM has trailing levels here, which begin at pure noise. Returns the first `shown` samples too,
    in pixels, by the model's name and the number of steps.
    """
    cond = teacher.model.conditioning.in_turns(num_samples)
    few, most = min(num_samples, MOST), max(teacher.steps)
    standard = _images(teacher, cond, Sampling(few, most, seed + OTHER_NOISE))
    rows, images = [], {}
    for each in [teacher, *others]:
        for steps in sorted(set(each.steps)):
            found = _images(each, cond, Sampling(num_samples, steps, seed))
            labels = cond.get("class_labels")
            measured: Any = {}
            if reference is not None:
                known = known_labels(labels, reference)
                measured = evaluate_images(found, known, reference).values
            apart = energy_distance(found[:few], standard).share if few > 1 else 0.0
            rows.append(StepsRow(each.name, steps, each.guidance_scale, apart, dict(measured)))
            images[each.name, steps] = found[:shown]
    name = reference.name if reference else ""
    return StepsTable(tuple(rows), num_samples, seed, name), images


def trailing(model: Denoiser) -> Denoiser:
    """The model with trailing levels, which begin at pure noise: few steps are better by them."""
    return replace(model, process=replace(model.process, spacing="trailing"))


def _images(drawn: Drawn, cond: Mapping[str, Tensor], sampling: Sampling) -> Tensor:
    model = trailing(drawn.model)
    with undisturbed(drawn.model):
        rows = {key: value[: sampling.num_samples] for key, value in cond.items()}
        return decoded(drawn.model, draw(model, rows, sampling, drawn.guidance_scale))
