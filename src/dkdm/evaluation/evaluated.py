"""What `dkdm evaluate` found of a model, with all that its numbers depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dkdm.evaluation.beside_teacher import TeacherGap
from dkdm.evaluation.energy import TeacherDistance
from dkdm.reading.fields import read_json
from dkdm.reading.files import atomic
from dkdm.reading.values import made_of


@dataclass(frozen=True)
class Measured:
    """A number, and the best that can be asked for: the reference measured against its like.

    - `floor_samples`: how many samples the floor is of. Both None where no floor is known.
    """

    value: float
    floor: float | None = None
    floor_samples: int | None = None


@dataclass(frozen=True)
class SampledModel:
    """A model, and how samples were drawn from it.

    - `weights`: which ones were taken: the average over training, or those of the last step.
    """

    name: str
    weights: str
    guidance_scale: float


@dataclass(frozen=True)
class Against:
    """What samples were measured against, and by which network's features.

    - `images`: how many real or drawn images the reference summarizes; None if it does not
      say.
    - `network`, `features`: the version of the network, and in words what is compared.
    - `resize`: how images are brought to its size; None for one that does not say.
    """

    name: str
    images: int | None
    network: str
    features: str
    resize: str | None


@dataclass(frozen=True)
class Evaluation:
    """The numbers of a model, each with everything that it depends on.

    - `metrics`: by their names in `METRICS`; empty without a reference.
    - `teacher`, `teacher_distance`, `gap`: None without a teacher, or if nothing needs one.
    - `warnings`: what a reader of the numbers has to know.
    - `judges`: the networks of LPIPS and the CLIP score in words, by the names of the metrics.
    - `versions`: of dkdm, torch and diffusers.
    """

    model: SampledModel
    num_samples: int
    sampler: str
    num_steps: int
    seed: int
    batch_size: int
    guidance_interval: str | None
    sample_shape: tuple[int, ...]
    reference: Against | None
    metrics: Mapping[str, Measured]
    teacher: SampledModel | None
    teacher_distance: TeacherDistance | None
    gap: TeacherGap | None
    warnings: tuple[str, ...]
    device: str
    versions: Mapping[str, str]
    judges: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The value of a metric by its name, such as "fid"."""
        return self.metrics[name].value

    def as_dict(self) -> dict[str, Any]:
        """Every field as JSON-ready values."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read what `write` wrote. Raises `UsageError` if it is missing or damaged."""
        values = read_json(path, "what dkdm evaluate found")
        if "gaps" in values:  # its former name
            values["gap"] = values.pop("gaps")
        return made_of(cls, values, str(path))
