"""What an evaluation measures, and its numbers once all samples are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkdm.config import EvaluateCommand
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.few_steps.model import OWN_SAMPLER, FewStep
from dkdm.data.reference import FeatureExtractor, Features, FeatureStatistics, Reference
from dkdm.errors import UsageError
from dkdm.evaluation.beside_teacher import NAMES, teacher_gap
from dkdm.evaluation.circumstances import Floor, floors_of, warnings_of
from dkdm.evaluation.comparison import describe, versions
from dkdm.evaluation.energy import teacher_distance
from dkdm.evaluation.evaluated import Against, Evaluation, Measured, SampledModel
from dkdm.evaluation.metrics import (
    METRICS,
    PER_SAMPLE,
    Sampled,
    check,
    known_labels,
    measure,
    missing,
    usual,
)
from dkdm.evaluation.shards import Drawing, Drawn, read_shards
from dkdm.runs.earlier import AS_GIVEN
from dkdm.runs.judges import Standard, named_metrics

NOT_YET = FeatureStatistics(torch.zeros(0), torch.zeros(0, 0), 0)
ALONE = ("is", "class_accuracy")  # made of samples alone, without the reference's
FEWEST = 6  # samples that every metric can be computed of


@dataclass(frozen=True, eq=False)
class Plan:
    """What is drawn, and what is measured of it.

    - `own`, `teachers`, `others`: the samples of the model, of its teacher, and of the model whose
      samples are the reference, which may be the teacher.
    - `metrics`, `beside`: by their names, those of `METRICS` and those that need a teacher alone.
    """

    command: EvaluateCommand
    weights: str
    standard: Standard
    metrics: tuple[str, ...]
    beside: tuple[str, ...]
    own: Drawing
    teachers: Drawing | None
    others: Drawing | None

    @property
    def drawings(self) -> list[Drawing]:
        """All that is drawn, each once."""
        found = [self.own, self.teachers, self.others]
        return [each for i, each in enumerate(found) if each and each not in found[:i]]


def check_names(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is no metric."""
    for name in names:
        if name not in METRICS and name not in NAMES:
            raise UsageError(
                f"--metrics: there is no {name!r}: give all, or some of "
                f"{', '.join([*METRICS, *NAMES])}"
            )


def chosen_metrics(
    command: EvaluateCommand, standard: Standard, teacher: Denoiser | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of `METRICS`, and of what needs a teacher alone.

    Raises UsageError for one that cannot be measured, and if nothing can.
    """
    names, known = named_metrics(command.measurement), _reference_to_come(standard)
    metrics = tuple(name for name in names if name in METRICS)
    beside = tuple(name for name in names if name in NAMES)
    if not names:
        beside = NAMES if teacher else ()
        if known:
            every = [name for name, each in METRICS.items() if not missing(each, known)]
            every = every if command.measurement.metrics == "all" else list(usual(known))
            metrics = tuple(name for name in every if name not in PER_SAMPLE)
    against = [name for name in metrics if name not in PER_SAMPLE]
    if against and known is None:
        raise UsageError(
            f"--metrics {against[0]} needs a reference that fits these samples: give --reference; "
            f"{' and '.join(NAMES)} need a teacher alone"
        )
    check(metrics, known)
    check_count(metrics, command.sampling.num_samples)
    if not metrics and not beside:
        raise UsageError(
            "nothing can be measured: give --reference with images or a model, or --teacher MODEL, "
            f"against which {' and '.join(NAMES)} need no images"
        )
    return metrics, beside


def check_count(names: Sequence[str], count: int) -> None:
    """Raise UsageError for samples that are too few for one of the metrics."""
    for name in names:
        if count < (fewest := min(METRICS[name].least, FEWEST)):
            raise UsageError(f"--num-samples {count} is too few for {name}: give {fewest} or more")


def _reference_to_come(standard: Standard) -> Reference | None:
    """The reference with all that it will have when its samples are drawn."""
    if standard.reference is not None or standard.network is None:
        return standard.reference
    spatial = NOT_YET if "spatial" in standard.network.gives else None
    assert standard.model is not None
    return Reference(standard.model.name, standard.network, NOT_YET, spatial, lambda: NOT_YET.mean)


def measured(plan: Plan, root: Path) -> Evaluation:
    """Measure what all processes have drawn."""
    own = read_shards(plan.own, root)
    teachers = _read(plan.teachers, root)
    others = teachers if plan.others is plan.teachers else _read(plan.others, root)
    reference = plan.standard.reference or _reference_of(plan, others)
    sampling, drawing = plan.command.sampling, plan.own
    model = SampledModel(drawing.denoiser.name, plan.weights, drawing.guidance_scale)
    return Evaluation(
        model=model,
        num_samples=sampling.num_samples,
        sampler=OWN_SAMPLER if isinstance(drawing.denoiser, FewStep) else sampling.sampler,
        num_steps=sampling.num_steps,
        seed=sampling.seed,
        batch_size=sampling.batch_size,
        guidance_interval=sampling.guidance_interval,
        sample_shape=drawing.denoiser.sample_shape,
        reference=against(reference, plan.command.measurement.resize) if reference else None,
        metrics=_metrics(plan, own, reference, others) if plan.metrics else {},
        **_beside_teacher(plan, own, teachers),
        warnings=(
            *warnings_of(plan.metrics, sampling.num_samples, plan.standard.network),
            *(reference.warnings if reference else ()),
        ),
        device=describe(drawing.denoiser.device),
        versions=versions(),
        judges=drawing.single.judges if drawing.single else {},
    )


def _read(drawing: Drawing | None, root: Path) -> Drawn | None:
    return None if drawing is None else read_shards(drawing, root)


def _reference_of(plan: Plan, others: Drawn | None) -> Reference | None:
    """Drawn samples as a reference."""
    if others is None or others.features is None or plan.others is None:
        return None
    assert plan.standard.network is not None
    return _as_reference(plan.others.denoiser.name, plan.standard.network, others.features)


def _as_reference(name: str, network: FeatureExtractor, seen: Features) -> Reference:
    spatial = None if seen.spatial is None else FeatureStatistics.of(seen.spatial)
    statistics = FeatureStatistics.of(seen.features)
    return Reference(f"samples of {name}", network, statistics, spatial, lambda: seen.features)


def against(reference: Reference, resize: str) -> Against:
    """What samples were measured against, in words; resize: how images are brought to Inception."""
    network = reference.network
    how = resize if network.name.startswith("inception") else None
    images = reference.statistics.count
    return Against(reference.name, images, network.name, network.in_words, how)


def _metrics(
    plan: Plan, own: Drawn, reference: Reference | None, others: Drawn | None
) -> Mapping[str, Measured]:
    assert own.features is not None  # what is measured is seen
    labels = own.labels if reference is None else known_labels(own.labels, reference)
    found = measure(Sampled(own.features, labels), reference, plan.metrics).values
    floors = _floors(plan, reference, others) if reference else {}
    return {name: Measured(value, *floors.get(name, ())) for name, value in found.items()}


def _floors(plan: Plan, reference: Reference, others: Drawn | None) -> Mapping[str, Floor]:
    """What the reference itself would be given, and of how many images, as far as it is known."""
    if others is not None and others.features is not None:
        return _floors_of_drawn(plan.metrics, reference, others.features, others.labels)
    return floors_of(reference, plan.metrics, plan.own.sampling.num_samples)


def _floors_of_drawn(
    names: tuple[str, ...], reference: Reference, features: Features, labels: Tensor | None
) -> Mapping[str, Floor]:
    """One half of the drawn samples measured against the other.

    What needs no other samples is measured of all of them.
    """
    count, half = len(features.features), len(features.features) // 2
    alone = [name for name in names if name in ALONE]
    found = measure(Sampled(features, labels), reference, alone).values
    floors = {name: Floor(value, count) for name, value in found.items()}
    enough = [n for n in names if n not in ALONE and half >= min(METRICS[n].least, FEWEST)]
    if enough:
        first, second = (features.rows(i) for i in torch.arange(2 * half).tensor_split(2))
        against = _as_reference(reference.name, reference.network, second)
        found = measure(Sampled(first), against, enough).values
        floors |= {name: Floor(value, half) for name, value in found.items()}
    return floors


def _beside_teacher(plan: Plan, own: Drawn, teachers: Drawn | None) -> dict[str, Any]:
    """The fields of an `Evaluation` that a teacher gives."""
    found: dict[str, Any] = dict.fromkeys(("teacher", *NAMES))
    single = plan.own.single
    if single is not None and single.teacher is not None:
        found["teacher"] = SampledModel(single.teacher.name, AS_GIVEN, single.scale)
    if plan.teachers is None or teachers is None:
        return found
    model, scale = plan.teachers.denoiser, plan.teachers.guidance_scale
    found["teacher"] = SampledModel(model.name, AS_GIVEN, scale)
    if "teacher_distance" in plan.beside:
        assert own.samples is not None and teachers.samples is not None
        found["teacher_distance"] = teacher_distance(own.samples, teachers.samples)
    if "gap" in plan.beside:
        assert teachers.samples is not None
        asked = plan.own.cond, plan.command.sampling.seed, scale, plan.own.guidance_scale
        found["gap"] = teacher_gap(model, plan.own.denoiser, teachers.samples, *asked)
    return found
