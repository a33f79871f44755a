"""The teacher and the student of a run, as its options name them."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from dkdm.config import (
    EvaluationOptions,
    GivenConditions,
    GuidanceOptions,
    StudentOptions,
    TeacherConditions,
)
from dkdm.core.denoisers.conditioning import for_student, restrict_classes
from dkdm.core.denoisers.decoding import no_decoder
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.inputs import refuse_without_rows, try_conditioning, with_rows
from dkdm.core.denoisers.kinds import kind_of
from dkdm.core.denoisers.matching import covered, same_levels
from dkdm.core.few_steps.model import FewStep
from dkdm.errors import UsageError
from dkdm.models import with_texts
from dkdm.models.custom_network import is_own
from dkdm.models.student_process import with_process
from dkdm.students import given_student, student_of
from dkdm.students.space import check_same_samples


def teacher_warning(teacher: Denoiser, seconds: float, name: str = "the teacher") -> str:
    """What a quick check finds wrong with a teacher; empty if nothing.

    seconds: of one evaluation. name: what it is called. The check never ends a run:
    what a network raises is the warning.
    """
    from dkdm.checks.inspection import quick_check

    try:
        found = quick_check(teacher, 1 / max(seconds, 1e-9))
    except Exception as error:
        return f"warning: {name} could not be checked: {type(error).__name__}: {error}"
    if found is None:
        return f"warning: {name} is too slow for a quick check; dkdm inspect checks it"
    if found.denoises:
        return ""
    start = "does not denoise as it is read" if found.denoises is False else "could not be judged"
    what = "".join(f"; {each.what}; {each.remedy}" for each in found.warnings[-1:])
    advice = "dkdm inspect says more; --no-check skips this check"
    return f"warning: {name} {start}{what}. {advice}"


def name_of(model: str | Denoiser | nn.Module | None) -> str | None:
    """How a model that was given is called; None if none was."""
    if isinstance(model, nn.Module):
        return type(model).__name__
    return model.name if isinstance(model, Denoiser) else model


def copy_of(model: str | Denoiser | nn.Module | None) -> str | Denoiser | nn.Module | None:
    """A model that was given with weights of its own; a name as it is."""
    if isinstance(model, Denoiser):
        return replace(model, network=copy.deepcopy(model.network))
    return copy.deepcopy(model)


def open_student(
    teacher: Denoiser,
    choice: StudentOptions,
    taught_variance: bool = True,
    factory: str | None = None,
    given: str | Denoiser | nn.Module | None = None,
) -> Denoiser:
    """Build the student that the options choose, or read the network that was given in its place.

    taught_variance: whether something teaches a variance; a student without it has a fixed one.
    factory: the code that makes a folder's custom network.
    """
    if isinstance(given, Denoiser):
        return given_student(like_teacher(given, teacher), teacher)
    read_as = teacher.parameterization
    if read_as.learns_variance and not taught_variance:
        teacher = replace(teacher, parameterization=replace(read_as, variance="fixed_small"))
    reading = choice.student_prediction, choice.student_process
    if isinstance(given, nn.Module):
        return given_student(given, with_process(teacher, *reading))
    return student_of(choice.student, teacher, *reading, factory)


def refuse_shared_network(teacher: Denoiser, student: str | Denoiser | nn.Module | None) -> None:
    """Raise UsageError for a student whose network is the teacher's."""
    network = student.network if isinstance(student, Denoiser) else student
    if isinstance(network, nn.Module) and network is teacher.network:
        raise UsageError(
            "student and teacher are the same network, which would change while it teaches: give "
            "the student copy.deepcopy(network)"
        )


def like_teacher(student: Denoiser, teacher: Denoiser) -> Denoiser:
    """A student that was given, with the conditions of its teacher, and its decoder if it has none.

    Raises UsageError if the two have samples of different shapes.
    """
    coders = student.bundle.autoencoder, teacher.bundle.autoencoder
    check_same_samples(student.sample_shape, teacher.sample_shape, coders)
    return replace(
        student,
        conditioning=for_student(teacher.conditioning),
        bundle=student.bundle if student.bundle.components else teacher.bundle,
        decode=student.decode or teacher.decode,
        guidance_interval=teacher.guidance_interval,
    )


def student_warnings(student: Denoiser, teacher: Denoiser) -> list[str]:
    """A line for each problem with a custom network; `dkdm check-student` says more.

    Networks of diffusers and dkdm are not looked at.
    """
    if not isinstance(student.network, nn.Module) or not is_own(student.network):
        return []
    from dkdm.checks.student import first_look

    return [f"warning: {each}" for each in first_look(student, teacher)]


def student_reading(student: Denoiser, teacher: Denoiser) -> str:
    """A line on the student's process and parameterization, if they differ from the teacher's."""
    own, other = student.parameterization.prediction, teacher.parameterization.prediction
    if own == other and same_levels(student.process, teacher.process):
        return ""
    unseen = int((~covered(student.process, teacher.process)).sum())
    return (
        f"          {own} on the {student.process.num_levels} levels of "
        f"{student.process.scheduler.get('_class_name', 'its process')} that the teacher "
        f"({other}) has; {unseen} of the teacher's levels weigh nothing"
    )


def ready_teacher(
    teacher: Denoiser,
    conditions: TeacherConditions,
    guidance: GuidanceOptions,
    evaluation: EvaluationOptions,
    seed: int = 0,
) -> Denoiser:
    """The same teacher, which draws the classes or prompts and is guided as the options say.

    Raises UsageError if it does not have them, if a text teacher is given no prompts, and if it
    cannot do the guidance, condition dropout or random conditioning that is asked for.
    """
    if isinstance(teacher, FewStep):
        raise UsageError(
            f"--teacher {teacher.name} draws in a few steps and knows no levels between: "
            "give its own teacher, or the folder plain/ in it"
        )
    if teacher.embeds_guidance and guidance.chain_only:
        raise UsageError(
            "--guidance-on chain: this teacher takes the guidance scale as an input, so that one "
            "evaluation cannot be guided and unguided; use --guidance-on target"
        )
    interval = guidance.interval or teacher.guidance_interval
    teacher = replace(with_conditions(teacher, conditions, seed), guidance_interval=interval)
    guided = not guidance.is_off or evaluation.sampling_guidance_scale != 1
    check_null_condition(teacher, guided, conditions.condition_dropout)
    return teacher


def with_conditions(teacher: Denoiser, conditions: TeacherConditions, seed: int) -> Denoiser:
    """The same teacher, which draws the classes or prompts that the options name."""
    refuse_without_rows(teacher.conditioning, teacher.name)
    try_conditioning(teacher.conditioning)
    chosen = restrict_classes(teacher.conditioning, conditions.classes, conditions.class_weights)
    given = (conditions.prompts, conditions.negative_prompt, conditions.max_prompts)
    conditioning = with_texts(replace(teacher, conditioning=chosen), *given, seed).conditioning
    if conditions.random_conditioning and kind_of(conditioning).asks is None:
        raise UsageError(
            "--random-conditioning: the teacher is unconditional; leave this option out"
        )
    decode = None if teacher.decode is no_decoder else teacher.decode
    return replace(teacher, conditioning=conditioning, decode=decode)


def given_conditions(
    model: Denoiser, given: GivenConditions, default: str | None = None
) -> Denoiser:
    """The model with the prompts or rows that were given; default: a prompt if none was."""
    prompts = given.prompts
    if prompts is None and kind_of(model.conditioning).asks == "prompt":
        prompts = default
    model = replace(model, conditioning=with_rows(model.conditioning, given.cond))
    return with_texts(model, prompts, given.negative_prompt)


def check_null_condition(model: Denoiser, guided: bool, dropout: float = 0.0) -> None:
    """Evaluate a model under the null condition, if training or sampling will do so.

    The null condition of a text model is a prompt like any other.
    """
    if dropout or (guided and not model.embeds_guidance):
        null = model.conditioning.null(2)
        if kind_of(model.conditioning).asks != "prompt":
            model.check(null)
