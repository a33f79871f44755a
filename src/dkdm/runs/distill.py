"""Distil a teacher into a student: from options to a finished folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from dkdm.checks.memory_plan import replay_mib
from dkdm.config import DistillConfig
from dkdm.core import processes
from dkdm.core.captured.choice import capture_steps
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.faster import faster
from dkdm.core.denoisers.given import config_given, student_given
from dkdm.core.denoisers.matching import on_levels_of
from dkdm.core.denoisers.modes import evaluating
from dkdm.core.denoisers.teachers import parts_of, pattern_of
from dkdm.core.distributed.lockstep import sharded_teacher
from dkdm.core.saving.checkpoint import checkpoints
from dkdm.core.saving.stopping import whole
from dkdm.core.training.precision import in_precision
from dkdm.core.training.trainer import Trainer
from dkdm.data.reference import Reference
from dkdm.evaluation.comparison import describe as described
from dkdm.evaluation.memory import MIB
from dkdm.evaluation.numbers import duration
from dkdm.evaluation.parts import write_whole
from dkdm.models.architectures import component_of
from dkdm.models.identity import identity_of, kind_of
from dkdm.models.place import place
from dkdm.reading.notes import each_once, say
from dkdm.runs.ahead import teacher_device
from dkdm.runs.batch_size import AUTO, Measure, with_batch_size
from dkdm.runs.cost import Estimate, Speeds, advice, estimated, in_words, measured
from dkdm.runs.defaults import with_defaults
from dkdm.runs.earlier import run_of
from dkdm.runs.launch import (
    anew,
    begun_by,
    carry_out,
    check_run_folder,
    checkpoint_of,
    filled_in,
    is_finished,
    start_accelerator,
)
from dkdm.runs.memory import explained
from dkdm.runs.models import (
    check_null_condition,
    copy_of,
    name_of,
    open_student,
    refuse_shared_network,
    student_reading,
    student_warnings,
    teacher_warning,
)
from dkdm.runs.objective import features_of
from dkdm.runs.outputs import reference_of, sample_grids, sampling_guidance
from dkdm.runs.programs import OBJECTIVES
from dkdm.runs.resume import check_changes, check_same, facts_of
from dkdm.runs.shared import check_shared
from dkdm.runs.source import SourcePlan
from dkdm.runs.teachers import (
    Given,
    opened_teachers,
    ready_teachers,
    teacher_names,
    teachers_given,
)
from dkdm.runs.validation import check_metric, validate_by_metric
from dkdm.runs.without_effect import without_effect
from dkdm.shipping.card import Measured
from dkdm.students.start import Start, start_student


def distill(
    teacher: Given | Sequence[Given] | None = None,
    student: str | Path | Denoiser | nn.Module | None = None,
    config: DistillConfig | None = None,
) -> Path:
    """Distil a teacher, or several, into a student without images; returns the output folder.

    teacher, student: what the command line takes, or a Denoiser; None takes the config's. A list of
    teachers teaches one student. A student may be a bare network too, called as
    `network(x_t, t, **cond)`. The folder is a diffusers
    pipeline with a model card, `report.html`, metrics and checkpoints. A teacher in training mode
    is put into evaluation mode, and stays in it.
    Raises UsageError for options that do not fit together, DkdmError for a run that fails.
    """
    with processes.quiet_unless_main(), each_once():
        return _distill(teachers_given(teacher), student, config)


def _distill(
    teachers: list[Denoiser | str] | None,
    student: str | Path | Denoiser | nn.Module | None,
    config: DistillConfig | None,
) -> Path:
    student = None if student is None else student_given(student)
    config = DistillConfig() if config is None else config_given(config, DistillConfig)
    config = replace(
        config,
        **teacher_names(teachers),
        student=name_of(student) or config.student_choice.student,
    )
    check_run_folder(config.run, config.checkpoints, DistillConfig)
    config = _with_batch_size(config, teachers, student)
    return _in_parts(config, teachers, student, without_effect(config))


def _with_batch_size(
    config: DistillConfig,
    teachers: Sequence[str | Denoiser] | None = None,
    student: str | Denoiser | nn.Module | None = None,
) -> DistillConfig:
    """The config with a number of samples in a batch: a run that goes on has one."""
    if config.training.train_batch_size != AUTO:
        return config
    begun = _begun_with(config) if config.checkpoints.resume_from_checkpoint else None
    if begun is not None:
        return replace(config, train_batch_size=begun)

    def try_with(tried: DistillConfig, measure: Measure) -> int:
        parts = [*OBJECTIVES[tried.few_steps.objective].before(tried), _last_as_first(tried)]
        return max(_tried(part, teachers, copy_of(student), measure) for part in parts)

    return with_batch_size(config, try_with)


def _tried(
    part: DistillConfig,
    teachers: Sequence[str | Denoiser] | None,
    student: str | Denoiser | nn.Module | None,
    measure: Measure,
) -> int:
    """What is measured of a part of a run before its first step, and what `--replay` will keep:
    of all processes, and all of it is copied whenever a batch is added."""
    ready = prepared(part, teachers, student)
    teacher = ready.teacher
    whole_batch = part.training.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    kept = 2 * replay_mib(teacher, part.pool, whole_batch)
    with evaluating(teacher.network, teacher.call, teacher.decode, frozen=True):
        return measure(ready.trainer, teacher) + round(kept * MIB)


def _begun_with(config: DistillConfig) -> int | None:
    """Samples in a batch of the run in the output folder, before its last part takes others."""
    program = OBJECTIVES[config.few_steps.objective]
    for part in program.before(config):
        if (run := run_of(part.run.output_dir)) is not None:
            return run.training.batch_size
    if (run := run_of(config.run.output_dir)) is None:
        return None
    size, steps = run.training.batch_size, run.training.max_train_steps
    sizes = round(size * steps / config.training.max_train_steps), size, 2 * size
    fitting = (
        each
        for each in sizes
        if each and program.last(replace(config, train_batch_size=each)).training.batch_size == size
    )
    return next(fitting, size)


def _in_parts(
    config: DistillConfig,
    teachers: Sequence[str | Denoiser] | None,
    student: str | Denoiser | nn.Module | None,
    notes: Sequence[str],
) -> Path:
    """Carry out all parts of a run, one after the other; the first that runs prints the notes."""
    program = OBJECTIVES[config.few_steps.objective]
    parts = [*program.before(config), config]
    for part in parts:
        check_run_folder(part.run, part.checkpoints, DistillConfig)
    for part in parts[:-1]:
        last = prepared(_last_as_first(config), teachers, student)  # refuses what it would later
        if not is_finished(part.run.output_dir):
            then = f"this is the first part; the next takes {in_words(last.needed)}"
            _in_parts(part, teachers, student, [then, *notes])
            config, notes = replace(config, resume_from_checkpoint=_of_the_next(config)), ()
    own = program.last(config)
    return distill_part(own, teachers, student, notes, config if own != config else None)


def _of_the_next(config: DistillConfig) -> str | None:
    """What the next part goes on from, after one that was trained: a checkpoint of its own."""
    latest = config.checkpoints.resume_from_checkpoint == "latest"
    return "latest" if latest and checkpoints(config.run.output_dir) else None


def distill_part(
    config: DistillConfig,
    teachers: Sequence[str | Denoiser] | None = None,
    student: str | Denoiser | nn.Module | None = None,
    notes: Sequence[str] = (),
    asked: DistillConfig | None = None,
) -> Path:
    """Carry out one part of a run, of the models that the options name or that are given.

    notes: lines that are printed once nothing can be refused any more. asked: what the run was
    asked for, if these are the options of its last part alone.
    """
    program = OBJECTIVES[config.few_steps.objective]
    begun = begun_by(config.run, config.checkpoints)
    changes = check_changes(config, begun, asked)
    ready = prepared(config, teachers, student)
    config, teacher, trainer = ready.config, ready.teacher, ready.trainer
    device = described(trainer.accelerator.device)
    said = [
        f"student starts from {ready.start}",
        f"computes on {device}",
        f"this run takes {in_words(ready.needed)}",
    ]
    said += [anew(config.run, config.checkpoints), *ready.warnings, *notes]
    if config.teacher_choice.check and trainer.step_number == 0:
        for one in parts_of(teacher):
            name = "the teacher" if one is teacher else one.name
            said.append(teacher_warning(one, ready.speeds.evaluation, name))
    for line in filter(None, said):
        say(line)

    def begin() -> None:
        if asked is not None and processes.is_main():
            decided = with_defaults(asked, pattern_of(teacher), None)
            write_whole(config.run.output_dir, decided)
        if not ready.is_new:
            return
        with filled_in(config.run.output_dir, trainer.about):
            program.prepare(trainer.source, ready.taught_by, config)
            with whole():
                trainer.save()
                trainer.saver.wait()

    def measure(finished: Denoiser, weights: str) -> Measured:
        about = config, ready.reference, weights, trainer.source
        return program.measure(teacher, finished, *about)

    with evaluating(teacher.network, teacher.call, teacher.decode, frozen=True):
        return carry_out(config, trainer, measure, begin, teacher, changes)


def describe(config: DistillConfig) -> str:
    """What `distill` would do and cost, in words; nothing is written.

    Raises what `distill` raises before its work, but for an output folder that is taken.
    """
    config = _with_batch_size(config)
    *before, last = (*OBJECTIVES[config.few_steps.objective].before(config), _last_as_first(config))
    with each_once():
        found = [_ready_to_describe(part) for part in (*before, last)]
    texts = [_described(ready) for ready in found]
    if before:
        texts[-1] = _described(found[-1], f"the weights of {before[-1].run.output_dir}")
        texts.append(_together([ready.needed for ready in found]))
    return "\n\n".join([*texts, *without_effect(config)])


def _ready_to_describe(config: DistillConfig) -> Ready:
    check_changes(config, begun_by(config.run, config.checkpoints))
    return prepared(config)


def _together(parts: Sequence[Estimate]) -> str:
    """What all parts of a run take."""
    evaluations = sum(sum(part.evaluations) for part in parts)
    seconds = sum(part.preparing + part.training for part in parts)
    return f"in all    {evaluations:,} teacher evaluations, {duration(seconds)}"


def _last_as_first(config: DistillConfig) -> DistillConfig:
    """The last part of a run, from the start of the first, while nothing has been trained."""
    last = OBJECTIVES[config.few_steps.objective].last(config)
    return replace(last, student_init=config.student_choice.student_init)


def _described(ready: Ready, start: str = "") -> str:
    """A part of a run. start: what it will start from, if that is not there yet."""
    config, teacher, student = ready.config, ready.teacher, ready.trainer.student
    program, plan = OBJECTIVES[config.few_steps.objective], ready.plan
    lines = [
        *(f"teacher   {one.name}: {one.num_parameters:,} parameters" for one in parts_of(teacher)),
        f"student   {student.name}: {student.num_parameters:,} parameters "
        f"({student.num_parameters / teacher.num_parameters:.1%})",
        student_reading(student, pattern_of(teacher)),
        f"start     {start or ready.start}",
        f"optimizer {config.optimizing.optimizer}, learning rate "
        f"{config.optimizing.learning_rate:g}",
        f"source    {program.describe(teacher, config)}",
        f"cost      {plan.preparing:,} teacher evaluations to prepare, {plan.training:,} to train, "
        "and restarts of chains",
        f"time      {in_words(ready.needed)}",
        f"output    {config.run.output_dir}",
        *ready.warnings,
    ]
    return "\n".join(filter(None, lines))


class Ready(NamedTuple):
    """A distillation up to the first write: nothing can be refused any more.

    config: with what the teacher decides. taught_by: the teacher in the precision of the run, which
    the student learns from; what is measured is the teacher as it was read. is_new: whether the
    source is still to be prepared; a checkpoint holds it.
    """

    config: DistillConfig
    teacher: Denoiser
    taught_by: Denoiser
    trainer: Trainer
    is_new: bool
    plan: SourcePlan
    start: Start
    speeds: Speeds
    needed: Estimate
    reference: Reference | None
    warnings: list[str]


def prepared(
    config: DistillConfig,
    teachers: Sequence[str | Denoiser] | None = None,
    student: str | Denoiser | nn.Module | None = None,
) -> Ready:
    """Teacher, student, source and trainer of a run; given models take the place of named ones."""
    run, training, evaluation = config.run, config.training, config.evaluation
    program, conditions = OBJECTIVES[config.few_steps.objective], config.conditions
    guidance = config.guidance
    check_metric(evaluation)
    program.check(config)
    found = checkpoint_of(run, config.checkpoints)
    accelerator = start_accelerator(run, training, config.checkpoints)
    if processes.world() > 1:
        given = (*(teachers or ()), student)
        check_shared(config, any(isinstance(each, (Denoiser, nn.Module)) for each in given))
    teacher = ready_teachers(opened_teachers(config, teachers), config)
    identity = identity_of(teacher)
    begun = begun_by(run, config.checkpoints)
    insists = config.checkpoints.accept_changes
    check_same("teacher", identity, begun, insists)
    pattern, teaching = pattern_of(teacher), program.teaching(teacher, config)
    config = with_defaults(config, pattern, found)
    factory = config.teacher_choice.factory
    for one in parts_of(teacher):
        refuse_shared_network(one, student)
    student = open_student(pattern, config.student_choice, teaching.variance, factory, student)
    kind = kind_of(student)
    check_same("student", kind, begun, insists)
    guided = sampling_guidance(evaluation, guidance, student)[1] != 1
    check_null_condition(student, guided, conditions.condition_dropout)
    warnings = student_warnings(student, pattern)
    plan = program.plan(teacher, config)
    start = start_student(student, pattern, config.student_choice, found)
    warnings.append(program.warning(student))
    student = program.student(student, teacher, config)
    for one in parts_of(teacher):
        place(one, teacher_device(config, accelerator.device), config.teacher_choice.offload)
    align = Trainer.align
    if processes.world() > 1 and training.fsdp in ("teacher", "both"):
        teacher, align = sharded_teacher(teacher, accelerator.device)
    else:
        teacher = faster(teacher, training.acceleration)
    taught_by = teacher if config.teacher_choice.dtype else in_precision(teacher, accelerator)
    features = features_of(teacher, student, config.loss, teaching)
    watched = features.watched if features is not None else lambda model: model
    source = program.source(watched(taught_by), student, config, accelerator.device)
    on_teacher_levels = watched(on_levels_of(student, source.process))
    trainer = Trainer(
        run.output_dir,
        training,
        config.optimizing,
        config.checkpoints,
        student,
        on_teacher_levels,
        source,
        program.loss(student, on_teacher_levels, taught_by, config, features, source),
        accelerator,
        component_of(type(student.network).__name__),
        sample_grids(run, evaluation, teacher, guidance),
        evaluation.validation_steps,
        features=features,
        frozen=start.frozen,
        merge=partial(program.finished, student),
        about={**facts_of(config), "teacher": identity, "student": kind},
        samples=program.samples(config),
        align=align,
    )
    reference = reference_of(evaluation, teacher)
    capture_steps(trainer)
    validate_by_metric(trainer, config, reference, teacher, guidance)
    processes.own_randomness(run.seed)
    if found:
        trainer.resume(found)
    with explained(trainer, teacher):
        speeds = measured(taught_by, student, training)
    needed = estimated(plan, training.max_train_steps, trainer.step_number, speeds)
    warnings.append(advice(needed, config.pool))
    about = plan, start, speeds, needed, reference, warnings
    return Ready(config, teacher, taught_by, trainer, found is None, *about)
