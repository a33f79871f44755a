"""The model card: what a model is, what it came from, how to use it, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from dkdm.config import DistillConfig, GuidanceOptions, RunConfig, TrainConfig, TrainingOptions
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
    config: RunConfig,
    *,
    teacher: Denoiser | None = None,
    minutes: float | None = None,
    rows: Sequence[Row] = (),
    metrics: Metrics | None = None,
    measured_how: str = "",
    guidance_scale: float = 1.0,
) -> bool:
    """Write `README.md`, the model card; returns whether it names a licence.

    teacher: of a distillation. minutes: that the training took. rows: of the table of
    measurements. metrics: the same for the hub's index. measured_how: how these numbers
    came about. guidance_scale: that it is to be sampled with.
    """
    origin = origin_of(config.teacher_choice) if isinstance(config, DistillConfig) else None
    name = folder.absolute().name
    inherited = origin.licence if origin else {}
    licence = licence_of_student(config.hub.license, inherited)
    text = render(
        "dkdm.shipping",
        "card.md.j2",
        front_matter=_yaml(_front_matter(name, denoiser, config, origin, licence, metrics)),
        title=plain(name),
        lead=_lead(denoiser, config, origin, teacher),
        images=_images(folder),
        usage=usage_snippet(name, denoiser, guidance_scale),
        notes=shipping_notes(denoiser),
        details=_details(denoiser, config.training, teacher, minutes),
        rows=[(row.label, *row.texts) for row in rows],
        measured_how=measured_how,
        features=load_reference(metrics.reference).features_in_words if metrics else "",
        limits=_limits(denoiser, config),
        licence=_licence_text(licence, inherited, origin),
        hyperparameters=_hyperparameters(config),
        distilled=isinstance(config, DistillConfig),
        version=__version__,
    )
    (folder / CARD).write_text(text, encoding="utf-8")
    return bool(licence)


def _yaml(values: Mapping[str, Any]) -> str:
    known = {key: value for key, value in values.items() if value is not None}
    return str(yaml.safe_dump(known, sort_keys=False, allow_unicode=True)).strip()


def _front_matter(
    name: str,
    denoiser: Denoiser,
    config: RunConfig,
    origin: Origin | None,
    licence: Mapping[str, Any],
    metrics: Metrics | None,
) -> dict[str, Any]:
    """What the hub reads.

    There is no `base_model_relation`: the hub has none for a distillation (adapter, merge,
    quantized, finetune).
    """
    task = _task(denoiser)
    return {
        "library_name": "diffusers",
        "pipeline_tag": task,
        **licence,
        "base_model": origin.base_model if origin else None,
        "tags": _tags(denoiser, config),
        "model-index": _model_index(name, task, metrics),
    }


_DIMENSIONS = {3: "image", 4: "video"}  # of a sample; a sound has 2


def _task(denoiser: Denoiser) -> str | None:
    """The hub's name for what the model does; None if it has none."""
    kind = _DIMENSIONS.get(len(denoiser.sample_shape), "audio")
    if kind_of(denoiser.conditioning).asks == "prompt":
        return f"text-to-{kind}"
    return "unconditional-image-generation" if kind == "image" else None


def _tags(denoiser: Denoiser, config: RunConfig) -> list[str]:
    tags = ["diffusers", "diffusion", "dkdm"]
    if isinstance(config, DistillConfig):
        tags += ["distillation", "data-free"]
    labelled = kind_of(denoiser.conditioning).asks == "class_labels"
    return tags + (["class-conditional"] if labelled else [])


_MEASURES = {  # of Metrics: type and name in the hub's index
    "fd": ("frechet-distance", "Frechet distance ({features})"),
    "class_accuracy": ("accuracy", "Class accuracy of samples, by that classifier"),
    "variance_ratio_mean": ("variance-ratio", "Diversity within a class (1 = real images)"),
}


def _model_index(name: str, task: str | None, metrics: Metrics | None) -> list[Any] | None:
    """The measurements as the hub's model-index."""
    if metrics is None or task is None:
        return None
    reference = load_reference(metrics.reference)
    measures = [
        {
            "type": kind,
            "name": title.format(features=reference.features_in_words),
            "value": value,
            "args": {"samples": metrics.num_samples},
        }
        for key, (kind, title) in _MEASURES.items()
        if (value := getattr(metrics, key)) is not None
    ]
    dataset = dict(reference.dataset)
    return [
        {
            "name": name,
            "results": [{"task": {"type": task}, "dataset": dataset, "metrics": measures}],
        }
    ]


def _sized(denoiser: Denoiser) -> str:
    return f"{type(denoiser.network).__name__}, {count(denoiser.num_parameters)} parameters"


_PAPER = "DKDM ([arXiv 2409.03550](https://arxiv.org/abs/2409.03550))"


def _lead(
    denoiser: Denoiser, config: RunConfig, origin: Origin | None, teacher: Denoiser | None
) -> str:
    """What it is, from what, and whether images were read."""
    network = type(denoiser.network).__name__
    if not isinstance(config, DistillConfig) or origin is None:
        images = config.data.images if isinstance(config, TrainConfig) else ""
        return f"{network} trained on {plain(Path(images).name)}."
    size = f" ({_sized(teacher)})" if teacher else ""
    student = f"{network} ({count(denoiser.num_parameters)} parameters)"
    data = SYNTHETIC if config.pool.source == "synthetic" else NO_IMAGES
    return f"{student} distilled from {_shown_name(origin)}{size} with {_PAPER}. {data}"


def _shown_name(origin: Origin) -> str:
    from huggingface_hub.constants import HUGGINGFACE_CO_URL_HOME

    if origin.hub_id is None:
        return code(origin.name)
    return link(origin.hub_id, f"{HUGGINGFACE_CO_URL_HOME}{origin.hub_id}")


def _images(folder: Path) -> list[tuple[str, str]]:
    """(caption, path) of the images in the folder."""
    known = {
        "samples": "samples/grid.png",
        "upper row the teacher, lower row the student, from the same noise": (
            "samples/comparison.png"
        ),
    }
    return [(caption, path) for caption, path in known.items() if (folder / path).is_file()]


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


def _limits(denoiser: Denoiser, config: RunConfig) -> list[str]:
    """What a user should not expect."""
    limits = []
    if isinstance(config, DistillConfig):
        limits.append(
            "It imitates its teacher and inherits its failures and biases; no filter was added. "
            "Read the teacher's card."
        )
        guidance, scale = config.guidance, config.evaluation.sampling_guidance_scale
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
        if config.conditions.classes is not None:
            limits.append(
                f"It learned the classes {', '.join(map(str, config.conditions.classes))} only."
            )
    if kind_of(denoiser.conditioning).asks == "prompt":
        limits.append("It may do worse on prompts unlike those it was trained with.")
    return [*limits, "It draws samples of the shape above; it was not trained on other sizes."]


def _inside(guidance: GuidanceOptions) -> str:
    """The levels that are guided, in words; empty if all are."""
    low, high = guidance.interval or (0, 1)
    return f" (at shares of noise {low:g} to {high:g})" if guidance.interval else ""


def _licence_text(
    licence: Mapping[str, Any], inherited: Mapping[str, Any], origin: Origin | None
) -> str:
    """The licence, and the teacher's if it is another one."""
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
    names = ", ".join(map(str, name)) if isinstance(name, list) else str(name)
    return link(names, str(licence.get("license_link", "")))


_ELSEWHERE = (
    "output_dir",
    "resume_from_checkpoint",
    "teacher",
    "teacher_flags",  # may hold paths
    "images",
    "license",
)
_HUB = ("push_to_hub", "hub_model_id", "hub_private")
_MAY_BE_PATHS = (
    "student",
    "student_init",
    "student_process",
    "teacher_lora",
    "teacher_scheduler",
    "network",
    "scheduler",
    "base",
    "prompts",
)


def _hyperparameters(config: RunConfig) -> list[tuple[str, str]]:
    """The options of the run, without the paths of this machine."""
    return [
        (name, plain(_without_path(value, name in _MAY_BE_PATHS)))
        for name, value in config.flat().items()
        if name not in (*_ELSEWHERE, *_HUB)
    ]


def _without_path(value: Any, may_be_path: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_without_path(item, may_be_path) for item in value)
    is_path = isinstance(value, Path) or (may_be_path and isinstance(value, str))
    return Path(value).name if is_path else value
