"""The model card: what a model is, what it came from, how to use it, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData, constants

from dkdm.config import (
    DistillConfig,
    GuidanceOptions,
    RunConfig,
    SourceKind,
    TeacherConditions,
    TrainConfig,
)
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import kind_of
from dkdm.core.denoisers.teachers import parts_of
from dkdm.core.saving.progress import read_metrics
from dkdm.core.training.bad_steps import faults_in_words
from dkdm.core.training.selection import FOLDER as BEST
from dkdm.evaluation.few_steps import StepsTable
from dkdm.evaluation.metrics import Metrics
from dkdm.evaluation.numbers import count
from dkdm.evaluation.parts import earlier_part, read_whole, training_in_words
from dkdm.evaluation.results import Measurement
from dkdm.evaluation.rows import Row
from dkdm.reading.files import render, write_text
from dkdm.shipping.licence import (
    CARD,
    Origin,
    base_models,
    common_licence,
    licence_of_student,
    origins_of,
)
from dkdm.shipping.markdown import code, link, plain
from dkdm.shipping.pipeline_folder import shipping_notes, usage_snippet
from dkdm.version import __version__

NO_LICENCE = "the model card names no licence: give --license, or write 'license:' at the head of"
NO_IMAGES = "No image was read to train it."
LEARNT_FROM: dict[SourceKind, str] = {
    "synthetic": "It was trained on samples of the teacher, noised afresh; no image was read.",
    "images": "It was trained on images, noised afresh.",
    "mixed": "It was trained on states of the teacher's chains and on images.",
}


class Measured(NamedTuple):
    """What was measured of a finished model.

    - `guidance_scale`: that it is to be sampled with.
    - `rows`: the table of measurements; `how`: they came about, by names.
    - `metrics`: the same numbers for the hub's index; `measurement`: what they were
      measured against.
    - `steps`: what was drawn in each number of steps, of a few-step student.
    """

    guidance_scale: float = 1.0
    rows: Sequence[Row] = ()
    how: Sequence[tuple[str, str]] = ()
    metrics: Metrics | None = None
    measurement: Measurement | None = None
    steps: StepsTable | None = None


NOTHING = Measured()


def write_card(
    folder: Path,
    denoiser: Denoiser,
    config: DistillConfig | TrainConfig,
    *,
    teacher: Denoiser | None = None,
    minutes: float | None = None,
    weights: str = "",
    measured: Measured = NOTHING,
) -> bool:
    """Write `README.md`, the model card; returns whether it names a licence.

    teacher: given for a distillation. minutes: the training's duration. weights: which ones the
    folder holds, in words.
    """
    path = folder.absolute()
    name = f"{path.parent.name}/{BEST}" if path.name == BEST else path.name
    if isinstance(config, DistillConfig):
        origins = origins_of(config)
        data_free, taught = not config.reads_images, config.is_taught
        lead = (_lead_of_distilled if taught else _lead_of_trained)(
            denoiser, origins, teacher, config.pool.source
        )
        scale = config.evaluation.sampling_guidance_scale
        limits = _limits_of_distilled(denoiser, config.guidance, config.conditions, scale)
    else:
        origins, limits, data_free, taught = [], [], False, False
        images = plain(Path(config.data.images).name)
        lead = f"{type(denoiser.network).__name__} trained on {images}."
    inherited = common_licence(origins) if origins else {}
    licence = licence_of_student(config.hub.license, inherited)
    text = render(
        "dkdm.shipping",
        "card.md.j2",
        front_matter=_front_matter(name, denoiser, origins, licence, measured, taught, data_free),
        title=plain(name),
        lead=lead,
        images=[(caption, path) for path, caption in _IMAGES.items() if (folder / path).is_file()],
        usage=usage_snippet(name, denoiser, measured.guidance_scale),
        notes=shipping_notes(denoiser, folder),
        details=[
            *_details(denoiser, training_in_words(folder, config, minutes), teacher, weights),
            *_faults(folder),
        ],
        heads=_heads(measured.rows),
        rows=_with_floors(measured.rows),
        how=[(label, plain(words)) for label, words in measured.how],
        compares=_compares(measured),
        steps=measured.steps,
        limits=limits,
        prompted=kind_of(denoiser.conditioning).asks == "prompt",
        licence=_licence_text(licence, inherited, origins),
        hyperparameters=_hyperparameters(read_whole(folder, config)),
        begun_elsewhere=earlier_part(folder, config) is None,
        distilled=taught,
        version=__version__,
    )
    write_text(folder / CARD, text)
    return bool(licence)


_IMAGES = {
    "samples/grid.png": "samples",
    "samples/few-steps.png": "upper row the teacher in many steps, then the student, fewest first",
    "samples/comparison.png": "upper row the teacher, lower row the student, from the same noise",
}


def _front_matter(
    name: str,
    denoiser: Denoiser,
    origins: Sequence[Origin],
    licence: Mapping[str, Any],
    measured: Measured,
    taught: bool,
    data_free: bool,
) -> str:
    """What the hub reads, as YAML; it has no `base_model_relation` for a distillation.

    taught: whether by a teacher. data_free: whether no image was read.
    """
    task = _task(denoiser)
    results = _results(task, measured) if task else None
    tags = ["diffusers", "diffusion", "dkdm"]
    tags += ["distillation"] if taught else []
    tags += ["data-free"] if data_free else []
    tags += ["class-conditional"] if kind_of(denoiser.conditioning).asks == "class_labels" else []
    matter = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        **licence,
        base_model=base_models(origins) if origins else None,
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
    "fid": ("fid", "FID ({features})"),
    "class_accuracy": ("accuracy", "Class accuracy of samples, by that classifier"),
    "variance_ratio_mean": ("variance-ratio", "Diversity within a class (1 = real images)"),
}


def _heads(rows: Sequence[Row]) -> list[str]:
    values = ["teacher", "student"] if rows and rows[0].teacher is not None else ["value"]
    return [*values, "floor"] if any(row.floor is not None for row in rows) else values


def _with_floors(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells of a table; the floor's are empty where none is known."""
    if "floor" not in _heads(rows):
        return [(row.label, *row.texts) for row in rows]
    return [(row.label, *row.texts, row.floor_text) for row in rows]


def _results(task: str, measured: Measured) -> list[EvalResult] | None:
    """The measurements, for the hub's model-index; None without images that the hub knows."""
    metrics, measurement = measured.metrics, measured.measurement
    if metrics is None or measurement is None or not measurement.dataset:
        return None
    dataset: Any = {f"dataset_{key}": value for key, value in measurement.dataset.items()}
    return [
        EvalResult(
            task_type=task,
            **dataset,
            metric_type=kind,
            metric_name=title.format(features=measurement.features),
            metric_value=value,
            metric_args={"samples": metrics.num_samples},
        )
        for key, (kind, title) in _MEASURES.items()
        if (value := metrics.get(key)) is not None
    ]


def _compares(measured: Measured) -> str:
    """What the Frechet distance may be compared with; empty if there is none."""
    values = measured.metrics.values if measured.metrics else {}
    if "fd" in values:
        return (
            "The Frechet distance compares with others over the same features only, and is not the "
            "FID of the literature."
        )
    return "FID compares with values of as many samples only: fewer give higher ones." * (
        "fid" in values
    )


def _sized(denoiser: Denoiser) -> str:
    return f"{type(denoiser.network).__name__}, {count(denoiser.num_parameters)} parameters"


_PAPER = "DKDM ([arXiv 2409.03550](https://arxiv.org/abs/2409.03550))"


def _lead_of_distilled(
    denoiser: Denoiser, origins: Sequence[Origin], teacher: Denoiser | None, source: SourceKind
) -> str:
    """What it is, from what, and whether images were read."""
    student = f"{type(denoiser.network).__name__} ({count(denoiser.num_parameters)} parameters)"
    data = LEARNT_FROM.get(source, NO_IMAGES)
    return f"{student} distilled from {_shown_teachers(origins, teacher)} with {_PAPER}. {data}"


def _lead_of_trained(
    denoiser: Denoiser, origins: Sequence[Origin], teacher: Denoiser | None, source: SourceKind
) -> str:
    """What it is if the teacher lent its noise process and conditions alone."""
    del source
    return (
        f"{_sized(denoiser)}, trained on images with the noise process and the conditions of "
        f"{_shown_teachers(origins, teacher)}, which taught it nothing: the baseline of a "
        "distillation."
    )


def _shown_teachers(origins: Sequence[Origin], teacher: Denoiser | None) -> str:
    """The teachers' names, each with its size."""
    sizes = [f" ({_sized(part)})" for part in parts_of(teacher)] if teacher else [""] * len(origins)
    names = [_shown_name(origin) + size for origin, size in zip(origins, sizes, strict=True)]
    return " and ".join(names)


def _shown_name(origin: Origin) -> str:
    if origin.hub_id is None:
        return code(origin.name)
    return link(origin.hub_id, f"{constants.HUGGINGFACE_CO_URL_HOME}{origin.hub_id}")


def _details(
    denoiser: Denoiser, training: str, teacher: Denoiser | None, weights: str
) -> list[tuple[str, str]]:
    scheduler = denoiser.process.scheduler.get("_class_name", "no scheduler of diffusers")
    details = [
        ("network", _sized(denoiser)),
        *(("teacher", _sized(part)) for part in (parts_of(teacher) if teacher else ())),
        ("sample shape", " x ".join(map(str, denoiser.sample_shape))),
        ("conditioning", kind_of(denoiser.conditioning).summary()),
        ("process", f"{scheduler}, T = {denoiser.process.num_levels}"),
        ("prediction", denoiser.parameterization.prediction),
        ("training", training),
        ("weights", weights),
        ("made with", f"dkdm {__version__}"),
    ]
    return [(name, plain(value)) for name, value in details if value]


def _faults(folder: Path) -> list[tuple[str, str]]:
    """Steps of the run that went wrong, if there were any."""
    said = faults_in_words(read_metrics(folder / "metrics.jsonl"))
    return [("faults of the run", plain(said))] if said else []


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
    licence: Mapping[str, Any], inherited: Mapping[str, Any], origins: Sequence[Origin]
) -> str:
    if len(origins) > 1:
        return _licences_text(licence, origins)
    origin = next(iter(origins), None)
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


def _licences_text(licence: Mapping[str, Any], origins: Sequence[Origin]) -> str:
    """The student's licence, and that of each teacher."""
    own = f"{_licence_name(licence)}." if licence else "Unknown: none was given."
    each = "; ".join(
        f"{_shown_name(origin)}: {_licence_name(origin.licence) if origin.licence else 'unknown'}"
        for origin in origins
    )
    return f"{own} The teachers' licences apply to what was learned from them: {each}."


def _licence_name(licence: Mapping[str, Any]) -> str:
    name = licence.get("license_name") or licence.get("license") or "unnamed"
    return link(name, licence.get("license_link", ""))


_LEFT_OUT = {
    *("output_dir", "resume_from_checkpoint", "teacher", "teacher_flags", "images"),
    "more_teachers",
    *("license", "push_to_hub", "hub_model_id", "hub_private"),
}
_NO_PATHS = ("negative_prompt", "teacher_revision", "teacher_subfolder")


def _hyperparameters(config: RunConfig) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The options that differ from their defaults, and the others."""
    default = type(config)().flat()
    found: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for name, value in config.flat().items():
        if name not in _LEFT_OUT:
            shown = plain(value if name in _NO_PATHS else _without_path(value))
            found[value == default[name]].append((name, shown))
    return found


def _without_path(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_without_path, value))
    return Path(value).name if isinstance(value, str | Path) else value
