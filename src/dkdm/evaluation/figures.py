"""Measured numbers with what each was measured under, whatever file they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from dkdm.core.few_steps.model import OWN_SAMPLER
from dkdm.evaluation.energy import TeacherDistance
from dkdm.evaluation.evaluated import Evaluation, SampledModel
from dkdm.evaluation.metrics import METRICS, Metrics
from dkdm.evaluation.numbers import count, memory, number, percent
from dkdm.evaluation.results import Comparison, ModelResult
from dkdm.evaluation.rows import floors_in, guidance_in_words

DISTANCE = "distance to the teacher's samples"
SHARE = "the same, as a share of the largest"
COPY = "distance to the teacher's sample from the same noise, by that from other noise"
GAP = "gap to the teacher's outputs, mean over levels"
OF_TEACHER = ", its teacher"
EVALUATIONS = "network evaluations a second, in batches of 64"


@dataclass(frozen=True)
class Figure:
    """One number of one model.

    - `label`: what it is; figures of one label can stand in one row.
    - `under`: what it was measured under, by name. Figures that differ here mean different things,
      and never stand in one row.
    - `beside`: what a reader has to know too, such as seed and weights. Figures that differ here
      stand in one row, which says so.
    - `better`: which values are better; None for what is neither.
    - `floor`: the best that can be asked for; None if unknown.
    """

    label: str
    value: float
    format: Callable[[float], str] = number
    under: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    better: Literal["lower", "higher"] | None = None
    floor: float | None = None

    @property
    def text(self) -> str:
        """The value as text."""
        return self.format(self.value)

    @property
    def floor_text(self) -> str:
        """The floor as text; empty if it is unknown."""
        return "" if self.floor is None else self.format(self.floor)


def figures_of_comparison(found: Comparison, interval: str | None = None) -> list[Figure]:
    """What a run measured of its student at its end, and of its teacher if it has one.

    interval: where guidance acted; None is everywhere.
    """
    ddim = "DDIM" if found.eta == 0 else f"DDIM, eta {found.eta:g}"
    own, of_teacher = (
        ddim if name == "DDIM" else name for name in (found.sampler, found.teacher_sampler)
    )
    drawn = _drawn(found.num_samples, own, found.num_steps)
    beside = {"seed": str(found.seed), "weights": found.weights}
    how = found.measurement
    against = (
        _against(how.reference, how.reference_images, how.features, how.network) if how else {}
    )
    figures = []
    for model, of in ((found.student, ""), (found.teacher, OF_TEACHER)):
        if model is None:
            continue
        under = drawn | {"guidance": guidance_in_words(model.guidance_scale, interval)} | against
        under |= {"sampler": of_teacher if of else own}
        figures += _metrics(model.metrics, floors_in(how), of, under, beside)
    return [*figures, *_near_teacher(found, interval, drawn, beside), *_cost(found)]


def _metrics(
    metrics: Metrics | None,
    floors: Mapping[str, float],
    of: str,
    under: Mapping[str, str],
    beside: Mapping[str, str],
) -> list[Figure]:
    values = metrics.values if metrics else {}
    known = {name: each for name, each in METRICS.items() if name in values}
    return [
        Figure(
            each.label + of,
            values[name],
            each.format,
            under,
            beside,
            None if of else each.better,
            floors.get(name),
        )
        for name, each in known.items()
    ]


def _near_teacher(
    found: Comparison, interval: str | None, drawn: Mapping[str, str], beside: Mapping[str, str]
) -> list[Figure]:
    """How near the student is to its teacher, without any image."""
    if found.teacher is None:
        return []
    pair = _beside_its_teacher(found.student, found.teacher, interval)
    figures = []
    if found.other_noise_difference:
        share = found.same_noise_difference / found.other_noise_difference
        figures.append(Figure(COPY, share, percent, {**drawn, **pair}, beside, "lower"))
    if apart := found.teacher_distance:
        figures += _apart(apart, drawn, pair, beside)
    if found.gaps:
        mean = fmean(gap.relative for gap in found.gaps)
        under = _noised(found.gap_samples, len(found.gaps)) | pair
        figures.append(Figure(GAP, mean, percent, under, beside, "lower"))
    return figures


def figures_of_evaluation(found: Evaluation) -> list[Figure]:
    """What `dkdm evaluate` measured of one model."""
    sampler = found.sampler if found.sampler == OWN_SAMPLER else found.sampler.upper()
    drawn = _drawn(found.num_samples, sampler, found.num_steps)
    beside = {"seed": str(found.seed), "weights": found.model.weights}
    figures = []
    for name, one in found.metrics.items():
        if name in METRICS:
            each, under = METRICS[name], drawn | _measured_by(found, name)
            about = each.format, under, beside, each.better, one.floor
            figures.append(Figure(each.label, one.value, *about))
    return figures + _to_teacher(found, drawn, beside)


def _measured_by(found: Evaluation, name: str) -> dict[str, str]:
    """Guidance and what a metric compares with: the reference, or a network of its own."""
    model, to = found.model, found.reference
    if name not in found.judges:
        against = _against(to.name, to.images, to.features, to.network) if to else {}
        return {
            "guidance": guidance_in_words(model.guidance_scale, found.guidance_interval)
        } | against
    judge = {"network": found.judges[name]}
    if name == "lpips" and found.teacher is not None:
        return _beside_its_teacher(model, found.teacher, found.guidance_interval) | judge
    return {"guidance": guidance_in_words(model.guidance_scale, found.guidance_interval)} | judge


def _to_teacher(
    found: Evaluation, drawn: Mapping[str, str], beside: Mapping[str, str]
) -> list[Figure]:
    if found.teacher is None:
        return []
    pair = _beside_its_teacher(found.model, found.teacher, found.guidance_interval)
    figures = []
    if apart := found.teacher_distance:
        figures += _apart(apart, drawn, pair, beside)
    if gap := found.gap:
        under = _noised(gap.num_samples, len(gap.levels)) | pair
        figures.append(Figure(GAP, gap.mean, percent, under, beside, "lower"))
    return figures


def _apart(
    found: TeacherDistance,
    drawn: Mapping[str, str],
    pair: Mapping[str, str],
    beside: Mapping[str, str],
) -> list[Figure]:
    under = {**drawn, "samples": f"{found.num_samples:,}", **pair}
    return [
        Figure(DISTANCE, found.distance, number, under, beside, "lower", found.floor),
        Figure(SHARE, found.share, percent, under, beside, "lower", found.floor_share),
    ]


def _cost(found: Comparison) -> list[Figure]:
    model, steps = found.student, found.num_steps
    place, beside = {"device": found.device}, {"measured": "when the run ended"}
    each = {"steps": str(steps), "guidance": guidance_in_words(model.guidance_scale)}
    speed = model.images_per_second(steps)
    return [
        *sizes(model.parameters, model.macs),
        *memories(model.weights_mib, model.evaluation_mib),
        Figure(EVALUATIONS, model.evaluations_per_second, number, place, beside, "higher"),
        Figure(f"{found.noun}s a second", speed, number, place | each, beside, "higher"),
    ]


def sizes(parameters: int, macs: int) -> list[Figure]:
    """What needs nothing but the network."""
    return [
        Figure("parameters", parameters, count, better="lower"),
        Figure("multiply-accumulates of an evaluation", macs, count, better="lower"),
    ]


def memories(weights_mib: float | None, evaluation_mib: float | None) -> list[Figure]:
    """Memory of weights and of one evaluation of one sample, in MiB; None: not measured."""
    found = {
        "memory of the weights": weights_mib,
        "memory of an evaluation beside them": evaluation_mib,
    }
    return [
        Figure(label, mib, memory, better="lower")
        for label, mib in found.items()
        if mib is not None
    ]


def speed(evaluations_per_second: float, device: str) -> Figure:
    """The speed of a network that was measured just now."""
    return Figure(
        EVALUATIONS,
        evaluations_per_second,
        number,
        {"device": device},
        {"measured": "for this comparison"},
        "higher",
    )


def _drawn(num_samples: int, sampler: str, num_steps: int) -> dict[str, str]:
    return {"samples": f"{num_samples:,}", "sampler": sampler, "steps": str(num_steps)}


def _noised(num_samples: int, levels: int) -> dict[str, str]:
    return {"samples": f"{num_samples:,} of the teacher's, noised to {levels} levels"}


def _beside_its_teacher(
    student: ModelResult | SampledModel, teacher: ModelResult | SampledModel, interval: str | None
) -> dict[str, str]:
    own, other = (guidance_in_words(each.guidance_scale, interval) for each in (student, teacher))
    guidance = own if own == other else f"{own}; teacher {other}"
    return {"guidance": guidance, "reference": f"the teacher, {teacher.name}"}


def _against(reference: str, images: int | None, features: str, network: str) -> dict[str, str]:
    known = f"{reference}, {images:,} images" if images else reference
    found = {"reference": known, "features": features, "network": network}
    return {name: words for name, words in found.items() if words}
