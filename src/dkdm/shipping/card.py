"""The model card: what a model is, what it came from, how to use it, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, constants

from dkdm.config import (
    DistillConfig,
    GuidanceOptions,
    SourceKind,
    TeacherConditions,
    TrainConfig,
    TrainingOptions,
)
from dkdm.core.denoiser import Denoiser
from dkdm.core.kinds import kind_of
from dkdm.data.named import load_reference
from dkdm.evaluation.metrics import Metrics
from dkdm.evaluation.numbers import count
from dkdm.evaluation.rows import Row
from dkdm.reading.files import render
from dkdm.shipping.licence import CARD, Origin, licence_of_student, origin_of
from dkdm.shipping.markdown import code, link, plain
from dkdm.shipping.pipeline_folder import shipping_notes, usage_snippet
from dkdm.version import __version__

NO_LICENCE = "the model card names no licence: give --license, or write 'license:' at the head of"
NO_IMAGES = "No image was read to train it."
SYNTHETIC = "It was trained on samples of the teacher, noised afresh; no image was read."


def write_card(
    folder: Path,
    denoiser: Denoiser,
    config: DistillConfig | TrainConfig,
    *,
    teacher: Denoiser | None = None,
    minutes: float | None = None,
    rows: Sequence[Row] = (),
    metrics: Metrics | None = None,
    measured_how: str = "",
    guidance_scale: float = 1.0,
) -> bool:
    """Write `README.md`, the model card; returns whether it names a licence.

    teacher: given for a distillation. minutes: the training's duration. rows: the table of
    measurements. metrics: the same numbers for the hub's index. measured_how: how they were
    measured. guidance_scale: the scale to sample with.
    """
    name = folder.absolute().name
    if isinstance(config, DistillConfig):
        origin = origin_of(config.teacher_choice)
        lead = _lead_of_distilled(denoiser, origin, teacher, config.pool.source)
        scale = config.evaluation.sampling_guidance_scale
        limits = _limits_of_distilled(denoiser, config.guidance, config.conditions, scale)
    else:
        origin, limits = None, []
        images = plain(Path(config.data.images).name)
        lead = f"{type(denoiser.network).__name__} trained on {images}."
    inherited = origin.licence if origin else {}
    licence = licence_of_student(config.hub.license, inherited)
    text = render(
        "dkdm.shipping",
        "card.md.j2",
        front_matter=_front_matter(name, denoiser, origin, licence, metrics),
        title=plain(name),
        lead=lead,
        images=[(caption, path) for path, caption in _IMAGES.items() if (folder / path).is_file()],
        usage=usage_snippet(name, denoiser, guidance_scale),
        notes=shipping_notes(denoiser),
        details=_details(denoiser, config.training, teacher, minutes),
        rows=[(row.label, *row.texts) for row in rows],
        measured_how=measured_how,
        features=load_reference(metrics.reference).features_in_words if metrics else "",
        limits=limits,
        prompted=kind_of(denoiser.conditioning).asks == "prompt",
        licence=_licence_text(licence, inherited, origin),
        hyperparameters=_hyperparameters(config.flat()),
        distilled=origin is not None,
        version=__version__,
    )
    (folder / CARD).write_text(text, encoding="utf-8")
    return bool(licence)


_IMAGES = {
    "samples/grid.png": "samples",
    "samples/comparison.png": "upper row the teacher, lower row the student, from the same noise",
}


def _front_matter(
    name: str,
    denoiser: Denoiser,
    origin: Origin | None,
    licence: Mapping[str, Any],
    metrics: Metrics | None,
) -> str:
    """What the hub reads, as YAML; it has no `base_model_relation` for a distillation."""
    task = _task(denoiser)
    results = _results(task, metrics) if task and metrics else None
    tags = ["diffusers", "diffusion", "dkdm"]
    tags += ["distillation", "data-free"] if origin else []
    tags += ["class-conditional"] if kind_of(denoiser.conditioning).asks == "class_labels" else []
    matter = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        **licence,
        base_model=origin.base_model if origin else None,
        tags=tags,
        eval_results=results,
        model_name=name if results else None,
    )
    return str(matter.to_yaml())


_DIMENSIONS = {3: "image", 4: "video"}  # of a sample; a sound has 2


def _task(denoiser: Denoiser) -> str | None:
    """The hub's name for what the model does; None if it has none."""
    kind = _DIMENSIONS.get(len(denoiser.sample_shape), "audio")
    if kind_of(denoiser.conditioning).asks == "prompt":
        return f"text-to-{kind}"
    return "unconditional-image-generation" if kind == "image" else None


_MEASURES = {  # of Metrics: type and name in the hub's index
    "fd": ("frechet-distance", "Frechet distance ({features})"),
    "class_accuracy": ("accuracy", "Class accuracy of samples, by that classifier"),
    "variance_ratio_mean": ("variance-ratio", "Diversity within a class (1 = real images)"),
}


def _results(task: str, metrics: Metrics) -> list[EvalResult]:
    reference = load_reference(metrics.reference)
    dataset: Any = {f"dataset_{key}": value for key, value in reference.dataset.items()}
    return [
        EvalResult(
            task_type=task,
            **dataset,
            metric_type=kind,
            metric_name=title.format(features=reference.features_in_words),
            metric_value=value,
            metric_args={"samples": metrics.num_samples},
        )
        for key, (kind, title) in _MEASURES.items()
        if (value := getattr(metrics, key)) is not None
    ]


def _sized(denoiser: Denoiser) -> str:
    return f"{type(denoiser.network).__name__}, {count(denoiser.num_parameters)} parameters"


_PAPER = "DKDM ([arXiv 2409.03550](https://arxiv.org/abs/2409.03550))"


def _lead_of_distilled(
    denoiser: Denoiser, origin: Origin, teacher: Denoiser | None, source: SourceKind
) -> str:
    """What it is, from what, and whether images were read."""
    size = f" ({_sized(teacher)})" if teacher else ""
    student = f"{type(denoiser.network).__name__} ({count(denoiser.num_parameters)} parameters)"
    data = SYNTHETIC if source == "synthetic" else NO_IMAGES
    return f"{student} distilled from {_shown_name(origin)}{size} with {_PAPER}. {data}"


def _shown_name(origin: Origin) -> str:
    if origin.hub_id is None:
        return code(origin.name)
    return link(origin.hub_id, f"{constants.HUGGINGFACE_CO_URL_HOME}{origin.hub_id}")


def _details(
    denoiser: Denoiser, training: TrainingOptions, teacher: Denoiser | None, minutes: float | None
) -> list[tuple[str, str]]:
    scheduler = denoiser.process.scheduler.get("_class_name", "no scheduler of diffusers")
    steps = f"{training.max_train_steps} steps of {training.train_batch_size}"
    time = "" if minutes is None else f", {minutes:.1f} minutes in its last process"
    details = [
        ("network", _sized(denoiser)),
        ("teacher", _sized(teacher) if teacher else ""),
        ("sample shape", " x ".join(map(str, denoiser.sample_shape))),
        ("conditioning", kind_of(denoiser.conditioning).summary()),
        ("process", f"{scheduler}, T = {denoiser.process.num_levels}"),
        ("prediction", denoiser.parameterization.prediction),
        ("training", f"{steps}{time}"),
        ("made with", f"dkdm {__version__}"),
    ]
    return [(name, plain(value)) for name, value in details if value]


def _limits_of_distilled(
    denoiser: Denoiser, guidance: GuidanceOptions, conditions: TeacherConditions, scale: float
) -> list[str]:
    """What a user should not expect of a student; scale: of the guidance it was evaluated with."""
    limits = []
    if not (guidance.is_off or guidance.chain_only or denoiser.embeds_guidance):
        limits.append(
            f"Guidance of {guidance.guidance_scale}{_inside(guidance)} is baked in: "
            "sample it without guidance."
        )
    elif guidance.interval is not None and scale != 1:
        limits.append(
            f"It was evaluated with guidance of {scale:g}"
            f"{_inside(guidance)}. `pipeline.py` guides at every level; `dkdm sample "
            f"--guidance-interval {guidance.guidance_interval}` guides as it was evaluated."
        )
    if conditions.classes is not None:
        limits.append(f"It learned the classes {', '.join(map(str, conditions.classes))} only.")
    return limits


def _inside(guidance: GuidanceOptions) -> str:
    """The levels that are guided, in words; empty if all are."""
    low, high = guidance.interval or (0, 1)
    return f" (at shares of noise {low:g} to {high:g})" if guidance.interval else ""


def _licence_text(
    licence: Mapping[str, Any], inherited: Mapping[str, Any], origin: Origin | None
) -> str:
    if not licence:
        unknown = "Unknown: none was given"
        theirs = f", and no card of the teacher, {_shown_name(origin)}, names one" if origin else ""
        rule = " The teacher's licence applies to what was learned from it." if origin else ""
        return f"{unknown}{theirs}.{rule}"
    name = _licence_name(licence)
    if not inherited:
        return f"{name}." if origin is None else f"{name}. No card of the teacher names a licence."
    if licence == inherited:
        return f"{name}, which is the teacher's."
    return (
        f"{name}. The teacher's is another, {_licence_name(inherited)}: see what it asks of models "
        "made from it."
    )


def _licence_name(licence: Mapping[str, Any]) -> str:
    name = licence.get("license_name") or licence.get("license") or "unnamed"
    return link(name, licence.get("license_link", ""))


_LEFT_OUT = {
    *("output_dir", "resume_from_checkpoint", "teacher", "teacher_flags", "images"),
    *("license", "push_to_hub", "hub_model_id", "hub_private"),
}
_NO_PATHS = ("negative_prompt", "teacher_revision", "teacher_subfolder")


def _hyperparameters(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, plain(value if name in _NO_PATHS else _without_path(value)))
        for name, value in options.items()
        if name not in _LEFT_OUT
    ]


def _without_path(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_without_path, value))
    return Path(value).name if isinstance(value, str | Path) else value
