"""The teacher and the student of a run, as its options name them."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from dkdm.checks.inspection import quick_check
from dkdm.checks.student import first_look
from dkdm.config import DistillConfig
from dkdm.core.chains import Guidance
from dkdm.core.conditioning import parse_interval, restrict_classes
from dkdm.core.decoding import no_decoder
from dkdm.core.denoiser import Denoiser
from dkdm.core.inputs import refuse_without_rows, try_conditioning
from dkdm.core.kinds import kind_of
from dkdm.errors import UsageError
from dkdm.models import chosen_teacher, with_texts
from dkdm.models.student_process import with_process
from dkdm.runs.outputs import (
    sampling_guidance,
)
from dkdm.students import as_denoiser, given_student, student_of


def teacher_warning(teacher: Denoiser, seconds: float) -> str | None:
    """What is wrong with a teacher by a quick look; None where nothing is.

    seconds: of one evaluation. A look never ends a run: whatever a network raises is the warning.
    """
    try:
        found = quick_check(teacher, 1 / max(seconds, 1e-9))
    except Exception as error:
        return f"warning: the teacher could not be checked: {type(error).__name__}: {error}"
    if found is None:
        return "warning: the teacher is too slow for a quick check; dkdm inspect checks it"
    if found.denoises:
        return None
    start = "does not denoise as it is read" if found.denoises is False else "could not be judged"
    what = "".join(f"; {each.what}; {each.remedy}" for each in found.warnings[-1:])
    advice = "dkdm inspect says more; --no-check skips this check"
    return f"warning: the teacher {start}{what}. {advice}"


def _refuse_shared_network(teacher: Denoiser, student: str | Denoiser | nn.Module | None) -> None:
    network = student.network if isinstance(student, Denoiser) else student
    if isinstance(network, nn.Module) and network is teacher.network:
        raise UsageError(
            "the student is the teacher's own network, which would change while it teaches: give "
            "the student copy.deepcopy(network)"
        )


def _name_of(model: str | Denoiser | nn.Module | None) -> str | None:
    if isinstance(model, nn.Module):
        return type(model).__name__
    return model.name if isinstance(model, Denoiser) else model


def open_teacher(config: DistillConfig) -> Denoiser:
    """Load the teacher a config names."""
    return with_conditions(chosen_teacher(config.teacher_choice), config)


def open_student(
    teacher: Denoiser, config: DistillConfig, given: str | nn.Module | None = None
) -> Denoiser:
    """Build the student a config names, or read a given network in its place."""
    own = teacher.parameterization
    if config.source == "synthetic" and own.learns_variance:  # nothing would teach it
        teacher = replace(teacher, parameterization=replace(own, variance="fixed_small"))
    reading = config.student_prediction, config.student_process
    if isinstance(given, nn.Module):
        like = with_process(teacher, *reading)
        return given_student(as_denoiser(type(given).__name__, given, like))
    return student_of(config.student, teacher, *reading, config.student_factory)


def student_warnings(student: Denoiser, teacher: Denoiser) -> list[str]:
    """A line for each thing that is odd about a user's own network; `check-student` says more."""
    return [f"warning: {each}" for each in first_look(student, teacher)]


def with_conditions(teacher: Denoiser, config: DistillConfig) -> Denoiser:
    """The same teacher, from now on drawing the classes or prompts that the config names.

    Raises UsageError where it has none of these, where a text teacher is given no prompts, and
    where guidance, condition dropout or random conditioning is asked of one that cannot do it.
    """
    guidance = Guidance.parse(config.guidance_scale, config.guidance_on == "chain")
    if teacher.embeds_guidance and guidance.chain_only:
        raise UsageError(
            "--guidance-on chain: this teacher is fed the guidance scale, and one evaluation "
            "cannot be guided and unguided; expected --guidance-on target"
        )
    refuse_without_rows(teacher.conditioning, teacher.name)
    try_conditioning(teacher.conditioning)
    given = (config.prompts, config.negative_prompt, config.max_prompts, config.seed)
    own = restrict_classes(teacher.conditioning, config.classes, config.class_weights)
    conditioning = with_texts(replace(teacher, conditioning=own), *given).conditioning
    guided = not guidance.is_off or config.sampling_guidance_scale != 1
    if config.condition_dropout or (guided and not teacher.embeds_guidance):
        null = conditioning.null(2)
        if guided and kind_of(conditioning).asks != "prompt":
            teacher.check(null)
    if config.random_conditioning and kind_of(conditioning).asks is None:
        raise UsageError("--random-conditioning was given, but the teacher is unconditional")
    decode = None if teacher.decode is no_decoder else teacher.decode
    interval = parse_interval(config.guidance_interval) or teacher.guidance_interval
    return replace(
        teacher,
        conditioning=conditioning,
        evaluations=0,
        decode=decode,
        guidance_interval=interval,
    )


def _is_told_nothing(student: Denoiser, config: DistillConfig) -> bool:
    """Whether a student meets the null condition, in training or where pictures are drawn."""
    guided = sampling_guidance(config, student)[1] != 1 and not student.embeds_guidance
    return config.condition_dropout > 0 or guided
