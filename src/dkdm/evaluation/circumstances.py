"""What a reader has to know of measured numbers: how samples were drawn, and against what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dkdm.data.reference import FeatureExtractor, Features, FeatureStatistics, Reference
from dkdm.evaluation.frechet import frechet_distance
from dkdm.evaluation.metrics import METRICS, PER_SAMPLE, Sampled, measure, missing, usual
from dkdm.evaluation.numbers import number
from dkdm.evaluation.results import Comparison, Measurement

FRECHET = ("fd", "fid")
OF_CLASSES = frozenset({"classes", "variance"})


@dataclass(frozen=True)
class Circumstances:
    """How samples were drawn, and what they were measured against.

    - `guidance`: scales by who was guided; one model has one, under an empty name.
    - `weights`: which were sampled, in words; empty if unknown.
    - `other_noise`: how many samples were compared with as many of the teacher's, from other noise.
    - `metrics`: the names of what was measured against a reference.
    """

    num_samples: int
    num_steps: int
    seed: int
    guidance: Mapping[str, float]
    weights: str = ""
    measurement: Measurement | None = None
    sampler: str = "DDIM"
    other_noise: int = 0
    metrics: Sequence[str] = ()

    def in_words(self) -> list[tuple[str, str]]:
        """Each circumstance by its name."""
        each = " of each model, in pairs from the same noise" if len(self.guidance) > 1 else ""
        scales = ", ".join(f"{scale:g} {who}".strip() for who, scale in self.guidance.items())
        off = all(scale == 1 for scale in self.guidance.values())
        found = [
            ("samples", f"{self.num_samples:,}{each}"),
            ("sampler", f"{self.sampler}, {self.num_steps} steps"),
            ("guidance", "none" if off else scales),
            ("weights", self.weights),
            ("seed", str(self.seed)),
            *_against(self.measurement),
            ("energy distance", _of_energy(self.other_noise)),
            ("warning", "; ".join(self._warnings())),
        ]
        return [(name, words) for name, words in found if words]

    def _warnings(self) -> Sequence[str]:
        known = self.measurement.warnings if self.measurement else ()
        return known or warnings_of(self.metrics, self.num_samples, None, "")  # an earlier version


def _of_energy(count: int) -> str:
    if not count:
        return ""
    return (
        f"as a share of the largest possible; of {count:,} samples of each model, not comparing "
        "those of the same noise"
    )


def _against(measurement: Measurement | None) -> list[tuple[str, str]]:
    if measurement is None:
        return []
    images, floor = measurement.reference_images, ""
    if measurement.real_images:
        floor = f"what {measurement.real_images:,} real images are given"
        if measurement.real_distance is not None:
            floor += f"; Frechet distance {number(measurement.real_distance)}"
    return [
        ("reference", f"{measurement.reference}{f', {images:,} images' if images else ''}"),
        ("features", measurement.features),
        ("floor", floor),
    ]


def circumstances_of(comparison: Comparison) -> Circumstances:
    """How the samples of a comparison were drawn and measured."""
    teacher, student = comparison.teacher, comparison.student
    return Circumstances(
        comparison.num_samples,
        comparison.num_steps,
        comparison.seed,
        {"": student.guidance_scale}
        if teacher is None
        else {"(teacher)": teacher.guidance_scale, "(student)": student.guidance_scale},
        comparison.weights,
        comparison.measurement if student.metrics else None,
        _samplers(comparison.teacher_sampler, comparison.sampler),
        apart.num_samples if (apart := comparison.teacher_distance) else 0,
        tuple(student.metrics.values) if student.metrics else (),
    )


def _samplers(of_teacher: str, of_student: str) -> str:
    if of_teacher == of_student:
        return of_student
    return f"{of_teacher} (teacher), {of_student} (student)"


def measurement_of(reference: Reference, num_samples: int) -> Measurement:
    """Describe how samples are measured against a reference, with the floors of its usual metrics.

    Floors are of as many real images as there are samples, unless the reference knows another.
    """
    real = reference.statistics
    floors = floors_of(reference, usual(reference), num_samples)
    return Measurement(
        features=reference.network.in_words,
        reference=reference.name,
        reference_images=real.count or None,
        real_images=next((floor.num_samples for floor in floors.values()), None),
        real_distance=next((floors[name].value for name in FRECHET if name in floors), None),
        network=reference.network.name,
        dataset=dict(reference.dataset),
        floors={name: floor.value for name, floor in floors.items()},
        warnings=(
            *warnings_of(usual(reference), num_samples, reference.network, ""),
            *reference.warnings,
        ),
    )


class Floor(NamedTuple):
    """What a metric gives real images (or a reference's own samples), and how many of them."""

    value: float
    num_samples: int | None


def floors_of(reference: Reference, names: Sequence[str], num_samples: int) -> dict[str, Floor]:
    """What real images are given by these metrics, as far as it is known.

    The Frechet distance of other statistics that the reference knows; otherwise as many of its
    images as there are samples, if it has more than that. What looks at single images compares
    these with other ones, see `Reference.floor_apart`.
    """
    known = {} if reference.floor is None else _known_floors(reference, reference.floor, names)
    asked = [name for name in names if name not in known and _has_floor(name, reference)]
    single = [name for name in asked if "real" in METRICS[name].needs]
    whole = [name for name in asked if name not in single]
    features = reference.floor_features(num_samples) if whole else None
    apart = reference.floor_apart(num_samples) if single else None
    if features is not None:
        known |= _floors(features, reference, whole)
    if apart is not None:
        fewest = min(len(apart.features.features), len(apart.others))
        others = replace(reference, features=lambda: apart.others)
        known |= _floors(apart.features, others, [n for n in single if fewest >= METRICS[n].least])
    return known


def _floors(features: Features, reference: Reference, names: Sequence[str]) -> dict[str, Floor]:
    found = measure(Sampled(features), reference, names)
    return {name: Floor(x, found.num_samples) for name, x in found.values.items()}


def _known_floors(
    reference: Reference, real: FeatureStatistics, names: Sequence[str]
) -> dict[str, Floor]:
    distance = frechet_distance(real, reference.statistics)
    return {name: Floor(distance, real.count) for name in names if name in FRECHET}


def _has_floor(name: str, reference: Reference) -> bool:
    metric = METRICS[name]
    if name in PER_SAMPLE:
        return False
    return not metric.needs & OF_CLASSES and not missing(metric, reference)


def warnings_of(
    names: Sequence[str],
    count: int,
    network: FeatureExtractor | None,
    option: str = "--num-samples",
) -> list[str]:
    """What a reader of these metrics of so many samples has to know.

    network: of the reference; None if it is not at hand. option: which sets the number of samples,
    the remedy; empty where nothing can be done any more.
    """
    fewest = {name: _fewest(name, network) for name in names}
    return [
        f"{METRICS[name].label} of {count:,} samples cannot be compared with other numbers: fewer "
        f"than {least:,} samples leave the covariance of its features singular and the distance "
        "too large" + (f"; give {option} {least} or more" if option else "")
        for name, least in fewest.items()
        if count < least
    ]


def _fewest(name: str, network: FeatureExtractor | None) -> int:
    """Fewer samples than this give a number that cannot be compared with others."""
    if name == "fd" and network is not None:
        return network.num_features + 1
    return METRICS[name].least


def weights_in_words(step: int, ema_decay: float | None, chosen: str = "") -> str:
    """Which weights of a run are meant.

    ema_decay: None for a run without average. chosen: why these and not the last.
    """
    kind = "without averaging" if ema_decay is None else f"EMA, decay {ema_decay:g}"
    return f"of step {step:,}, {kind}{f'; {chosen}' if chosen else ''}"
