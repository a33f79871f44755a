"""What a model is measured against: its teacher, a reference."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dkdm.config import (
    DistillConfig,
    EvaluateCommand,
    JudgedTeacher,
    MeasurementOptions,
    TrainConfig,
    parse_interval,
)
from dkdm.core.denoisers.conditioning import restrict_classes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.inputs import GivenRows, with_rows
from dkdm.core.denoisers.kinds import kind_of
from dkdm.core.few_steps.model import check_sampling
from dkdm.data.clip import clip_score
from dkdm.data.named import (
    FASHION,
    REFERENCE_OF_CLASSES,
    chosen_extractor,
    chosen_reference,
)
from dkdm.data.perceptual import perceptual_distance
from dkdm.data.real_images import summarized_by_all
from dkdm.data.reference import FeatureExtractor, Reference
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.metrics import PER_SAMPLE
from dkdm.evaluation.same_noise import shown_shape
from dkdm.evaluation.shards import Drawing
from dkdm.evaluation.single_images import SingleImages
from dkdm.models import chosen_teacher, load_teacher, with_texts
from dkdm.models.locate import INDEX, is_hub_id
from dkdm.reading.notes import say
from dkdm.reading.places import expanded
from dkdm.runs.earlier import Run, run_of, teacher_of
from dkdm.runs.models import check_null_condition
from dkdm.runs.outputs import named_reference, sampling_guidance

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
Given = str | Path | Denoiser | Reference | None


@dataclass(frozen=True, eq=False)
class Standard:
    """What samples are measured against.

    - `reference`: real images; None if there are none, or samples of a model take their place.
    - `model`: whose samples are the reference; None if real images are.
    - `network`: whose features are compared; None if only what needs no image is measured.
    """

    reference: Reference | None = None
    model: Denoiser | None = None
    network: FeatureExtractor | None = None


def known_run(spec: str) -> Run | None:
    """The options of the run that a model is of; None for any other model."""
    try:
        return run_of(spec)
    except UsageError as error:
        _note(f"{spec} is measured as a model without a run ({error})")
        return None


def judged_teacher(choice: JudgedTeacher, run: Run | None, asked: bool) -> Denoiser | None:
    """The teacher that was named, or the one that the run names.

    asked: whether there has to be one. Raises UsageError if it is missing. A run's teacher that
    cannot be opened is left out with a note, unless it was asked for.
    """
    if choice.model:
        return chosen_teacher(choice)
    try:
        teacher = teacher_of(run)
    except DkdmError as error:
        if asked:
            raise
        if isinstance(run, DistillConfig):
            _note(f"the distance to the teacher is left out: {error}")
        return None
    assert isinstance(run, DistillConfig)  # by `teacher_of`
    return replace(teacher, guidance_interval=run.guidance.interval or teacher.guidance_interval)


def scales_of(command: EvaluateCommand, run: Run | None, model: Denoiser) -> tuple[float, float]:
    """Guidance scales of the model and of its teacher: as given, or as the run measured itself."""
    teachers, own = own_scales(run, model)
    given = command.sampling.guidance_scale
    own = own if given is None else given
    asked = command.teacher_choice.guidance_scale
    return own, next(scale for scale in (asked, teachers, own) if scale is not None)


def own_scales(run: Run | None, model: Denoiser) -> tuple[float | None, float]:
    """Guidance scales that a run measured its teacher and itself with; 1 without a run.

    None for the teacher, unless guidance was baked into the student.
    """
    if isinstance(run, TrainConfig):
        return None, run.evaluation.sampling_guidance_scale
    if run is None:
        return None, 1.0
    teachers, own = sampling_guidance(run.evaluation, run.guidance, model)
    baked = not (run.guidance.is_off or run.guidance.chain_only)
    return (teachers if baked else None), own


def ready(model: Denoiser, command: EvaluateCommand, scale: float) -> Denoiser:
    """The model with its conditions, guided as asked. Raises UsageError for what it cannot do."""
    sampling, conditions = command.sampling, command.conditions
    rows = restrict_classes(with_rows(model.conditioning, conditions.cond), sampling.classes)
    interval = parse_interval(sampling.guidance_interval) or model.guidance_interval
    model = replace(model, conditioning=rows, guidance_interval=interval)
    model = with_texts(model, conditions.prompts, conditions.negative_prompt)
    check_sampling(model, sampling.num_steps, scale)
    check_null_condition(model, guided=scale != 1)
    return model


def fitting(command: EvaluateCommand, judge: Denoiser) -> EvaluateCommand:
    """The options without conditions that a model of another kind does not have."""
    asks = kind_of(judge.conditioning).asks
    return replace(
        command,
        prompts=command.conditions.prompts if asks == "prompt" else None,
        classes=command.sampling.classes if asks == "class_labels" else None,
        cond=command.conditions.cond if isinstance(judge.conditioning, GivenRows) else None,
    )


def names_model(spec: str) -> bool:
    """Whether a reference is a model, rather than images."""
    path = expanded(spec)
    if path.is_dir():
        return any((path / name).is_file() for name in (INDEX, "config.json"))
    if path.is_file():
        return path.suffix in WEIGHTS and not _holds_samples(path)
    return ":" in spec or is_hub_id(spec)


def _holds_samples(path: Path) -> bool:
    """Whether a file has the samples that dkdm writes, or a single tensor, rather than weights."""
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except Exception:  # no safetensors, or damaged: what reads it says so
        return False
    return "samples" in names or len(names) == 1


def standard_of(
    given: Given,
    model: Denoiser,
    teacher: Denoiser | None,
    command: EvaluateCommand,
    device: torch.device,
    scale: float,
) -> Standard:
    """What samples are measured against, as it was given or is recognized; together.

    scale: that a model is guided by whose samples are the reference. Raises UsageError for a
    reference that is missing or does not fit the model's samples.
    """
    shape, how = shown_shape(model), command.measurement
    place = how.feature_device or str(device)

    def named(name: str) -> Reference:
        return named_reference(name, how, shape, place, named_metrics(how), summarized_by_all)

    if given is None:
        name = chosen_reference("auto", class_names_of(model))
        found = named(name) if name else None
        return Standard(found, None, found.network) if found and found.fits(shape) else Standard()
    judge = _model_of(given, teacher)
    if judge is not None:
        judge = judge if judge is teacher else ready(judge, fitting(command, judge), scale)
        if shown_shape(judge) != shape:
            raise _misfit(judge.name, f"draws samples of shape {shown_shape(judge)}, not {shape}")
        return Standard(None, judge, _extractor(model, how, place, shape))
    reference = given if isinstance(given, Reference) else named(str(given))
    if reason := reference.refusal(shape):
        raise _misfit(reference.name, reason)
    return Standard(reference, None, reference.network)


def named_metrics(how: MeasurementOptions) -> tuple[str, ...]:
    """The metrics that were named; none if all or the usual ones are asked for."""
    if how.metrics is None or how.metrics == "all":
        return ()
    return tuple(dict.fromkeys(name.strip() for name in how.metrics.split(",") if name.strip()))


def _misfit(name: str, reason: str) -> UsageError:
    return UsageError(
        f"--reference {name} {reason}; teacher_distance and gap need no images, and --teacher "
        "MODEL alone measures them"
    )


def _model_of(given: Given, teacher: Denoiser | None) -> Denoiser | None:
    if isinstance(given, Denoiser):
        return given
    if str(given) == "teacher":
        return teacher
    if isinstance(given, (str, Path)) and names_model(str(given)):
        return load_teacher(given)
    return None


def _extractor(
    model: Denoiser, how: MeasurementOptions, place: str, shape: tuple[int, ...]
) -> FeatureExtractor | None:
    """The network that fits the model's images; None if there is none for them.

    Raises UsageError for a file that is another network.
    """
    known = class_names_of(model) in REFERENCE_OF_CLASSES
    choice = FASHION if known and how.feature_network is None else how.feature_network
    try:
        found = chosen_extractor(choice, how.resize, place)
    except UsageError as error:
        if how.feature_network is not None or how.metrics is not None:
            raise
        _note(f"only what needs no image is measured: {error}")
        return None
    return found if found.fits(shape) else None


def single_images(
    command: EvaluateCommand,
    own: Drawing,
    teacher: Denoiser | None,
    scale: float,
    metrics: Sequence[str],
    place: str,
) -> SingleImages | None:
    """What makes LPIPS and the CLIP score of the model's images; None if neither is asked for.

    scale: that the teacher is guided by. Raises UsageError for weights that are missing, and for a
    CLIP score of a model without prompts.
    """
    asked, how = set(metrics) & set(PER_SAMPLE), command.measurement
    if not asked:
        return None
    shape = shown_shape(own.denoiser)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(
            f"--metrics {', '.join(sorted(asked))}: grey or RGB images are compared, and "
            f"{own.denoiser.name} draws samples of shape {shape}; teacher_distance and gap need no "
            "images"
        )
    perceptual, clip, prompts = None, None, None
    if asked & {"lpips", "lpips_diversity"}:
        perceptual = perceptual_distance(how.lpips_weights, how.lpips_backbone, place)
    if "clip" in asked:
        names = kind_of(own.denoiser.conditioning)
        if names.asks != "prompt" or how.clip_model is None:
            raise UsageError("--metrics clip needs a text model, --prompts and --clip-model MODEL")
        clip, prompts = clip_score(how.clip_model, place), names.shown_names(sys.maxsize)
    beside = teacher if "lpips" in asked else None
    return SingleImages(own.cond, own.sampling, perceptual, clip, beside, scale, prompts)


def class_names_of(model: Denoiser) -> tuple[str, ...] | None:
    """The names of the model's classes, if it has any."""
    names: Any = getattr(model.conditioning, "names", None)
    return names


def _note(text: str) -> None:
    say(f"note: {text}")
