"""One teacher or several, as a run's options name them, and what the student learns from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dkdm.config import DistillConfig, ImageOptions, PoolOptions, TeacherConditions
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.given import teacher_given
from dkdm.core.denoisers.matching import amplifies
from dkdm.core.denoisers.modes import put_into_evaluation, say_if
from dkdm.core.denoisers.teachers import Teachers, common_levels
from dkdm.core.randomness import derived_seed
from dkdm.core.sources.several import Several, Shared, shared_out
from dkdm.core.sources.source import Source
from dkdm.errors import UsageError
from dkdm.models import chosen_teacher
from dkdm.models.prompts import Prompts
from dkdm.reading.notes import say
from dkdm.runs import arms
from dkdm.runs.arms import ARMS, Arm, Teaching, mebibytes
from dkdm.runs.models import ready_teacher
from dkdm.runs.side_by_side import check_alike, classes_of, offsets_of, side_by_side
from dkdm.runs.source import SourcePlan

Given = str | Path | Denoiser
Part = tuple[Denoiser, DistillConfig]
POOLS = ("dynamic", "shuffled", "iterative")


def teachers_given(given: Given | Sequence[Given] | None) -> list[Denoiser | str] | None:
    """One teacher or several, as `distill` takes them. Raises UsageError for anything else."""
    if given is None:
        return None
    several: Sequence[Any] = given if isinstance(given, (list, tuple)) else [given]
    found = [teacher_given(each) for each in several]
    if not found:
        raise UsageError("teacher is an empty list: give one teacher or more")
    return found


def teacher_names(given: Sequence[Denoiser | str] | None) -> dict[str, Any]:
    """The options that name these teachers; none if none were given."""
    if given is None:
        return {}
    first, *others = (each.name if isinstance(each, Denoiser) else each for each in given)
    return {"teacher": first} | ({"more_teachers": tuple(others)} if others else {})


def named_teachers(config: DistillConfig) -> list[str]:
    """The names of all teachers of a run."""
    return [config.teacher_choice.model, *(config.teachers.more_teachers or ())]


def opened_teachers(
    config: DistillConfig, given: Sequence[Denoiser | str] | None = None
) -> list[Denoiser]:
    """All teachers of a run, in evaluation mode; the first are those that were given.

    Raises UsageError for options of several teachers that are not one for each.
    """
    check_numbers(config)
    found = []
    for each in [*(given or ()), *named_teachers(config)[len(given or ()) :]]:
        if not isinstance(each, Denoiser):
            each = chosen_teacher(replace(config.teacher_choice, model=each))
        say_if(put_into_evaluation(each.network, each.call, each.decode))
        found.append(each)
    return found


def check_numbers(config: DistillConfig) -> None:
    """Raise UsageError for options of several teachers that are not one for each."""
    options, count = config.teachers, len(named_teachers(config))
    for name in ("label_offset", "teacher_share", "teacher_pool_size"):
        given = getattr(options, name)
        if given is not None and (len(given) != count or count == 1):
            raise UsageError(
                f"{options.flag(name)} {' '.join(map(str, given))}: give a number for each of "
                "several teachers, --teacher A --teacher B"
            )
    if options.more_prompts is not None and len(options.more_prompts) != count - 1:
        files = 1 + len(options.more_prompts)
        raise UsageError(
            f"--prompts: {files} files for {count} teachers: give one for each, or one for all"
        )


def teachers_of(config: DistillConfig) -> Denoiser:
    """The several teachers of a run as one, with the run's conditions."""
    return ready_teachers(opened_teachers(config), config)


def ready_teachers(opened: Sequence[Denoiser], config: DistillConfig) -> Denoiser:
    """The teachers as one, which draw the classes or prompts and are guided as the options say.

    Raises UsageError as `ready_teacher` does, and for teachers that cannot teach one student.
    """
    check_alike(opened)
    asked = conditions_of_each(opened, config)
    more = config.guidance, config.evaluation, config.run.seed
    if len(opened) == 1:
        return ready_teacher(opened[0], asked[0], *more)
    ready = []
    for one, own in zip(opened, asked, strict=True):
        try:
            ready.append(ready_teacher(one, own, *more))
        except UsageError as error:
            raise UsageError(f"{one.name}: {error}") from error
    teachers = side_by_side(ready, config.teachers.label_offset)
    for line in shared_classes(teachers):
        say(f"note: {line}")
    return teachers


def shared_classes(teacher: Denoiser) -> list[str]:
    """A line for each class of the student that several teachers teach."""
    assert isinstance(teacher, Teachers)
    own, count = teacher.conditioning, len(teacher.members)
    if not isinstance(own, ClassLabels):
        return []
    label = [{"class_labels": torch.tensor([i])} for i in own.drawn]
    known = [sum(bool(place.knows(cond)) for place in teacher.places) for cond in label]
    names = [f" ({own.names[i]})" if own.names else "" for i in own.drawn]
    return [
        f"class {i}{name} has {times} of {count} teachers"
        for i, name, times in zip(own.drawn, names, known, strict=True)
        if times > 1
    ]


def conditions_of_each(
    teachers: Sequence[Denoiser], config: DistillConfig
) -> list[TeacherConditions]:
    """The classes and prompts of each teacher, by its own ids.

    Raises UsageError for classes that no teacher has, and for a teacher without any of them.
    """
    conditions, several = config.conditions, config.teachers
    if len(teachers) == 1:
        return [conditions]
    others = several.more_prompts or [conditions.prompts] * (len(teachers) - 1)
    found = [
        replace(conditions, prompts=file if isinstance(one.conditioning, Prompts) else None)
        for one, file in zip(teachers, [conditions.prompts, *others], strict=True)
    ]
    _refuse_prompts_of_none(teachers, conditions)
    if conditions.classes is None and conditions.class_weights is None:
        return found
    starts = offsets_of(teachers, several.label_offset)
    ranges = [range(at, at + classes_of(one)) for at, one in zip(starts, teachers, strict=True)]
    return [
        _own_classes(one, own, ids, conditions)
        for one, own, ids in zip(teachers, found, _checked(ranges, conditions), strict=True)
    ]


def _refuse_prompts_of_none(teachers: Sequence[Denoiser], conditions: TeacherConditions) -> None:
    texts = any(isinstance(one.conditioning, Prompts) for one in teachers)
    if conditions.prompts is not None and not texts:
        raise UsageError("--prompts was given, but no teacher is conditioned on text: remove it")


def _checked(ranges: Sequence[range], conditions: TeacherConditions) -> Sequence[range]:
    chosen = conditions.classes
    if chosen is None:
        raise UsageError("--class-weights: name the classes of all teachers too, --classes")
    strangers = [i for i in chosen if not any(i in ids for ids in ranges)]
    if strangers:
        raise UsageError(
            f"class id {', '.join(map(str, strangers))} is of no teacher: use 0 to "
            f"{max(ids.stop for ids in ranges) - 1}, one teacher's classes after the other's"
        )
    return ranges


def _own_classes(
    teacher: Denoiser, own: TeacherConditions, ids: range, conditions: TeacherConditions
) -> TeacherConditions:
    chosen = conditions.classes or ()
    places = [i for i, each in enumerate(chosen) if each in ids]
    if not places:
        raise UsageError(f"--classes: {teacher.name} has none of these: leave this teacher out")
    if not isinstance(teacher.conditioning, ClassLabels):
        return replace(own, classes=None, class_weights=None)
    weights = conditions.class_weights
    if weights is not None and len(weights) != len(chosen):
        raise UsageError(f"--class-weights: give {len(chosen)} numbers, one for each of --classes")
    return replace(
        own,
        classes=tuple(chosen[i] - ids.start for i in places),
        class_weights=None if weights is None else tuple(weights[i] for i in places),
    )


def shares_of(teacher: Teachers, config: DistillConfig) -> Sequence[float]:
    """The part of each teacher in a batch: as asked, or as many as it has classes or prompts."""
    return config.teachers.teacher_share or [_conditions(one) for one in teacher.members]


def _conditions(teacher: Denoiser) -> float:
    own = teacher.conditioning
    if isinstance(own, ClassLabels):
        return sum(own.weights or [1] * len(own.drawn))
    return len(own.texts) if isinstance(own, Prompts) else 1


@dataclass(frozen=True)
class TeachersArm(Arm):
    """An arm whose source is one of another arm for each of several teachers."""

    inner: Arm = Arm()

    def teaching(self, images: ImageOptions) -> Teaching:
        """Targets at the teachers' levels; none sees a whole batch, and variances differ."""
        return replace(self.inner.teaching(images), variance=False, features=False)

    def each(self, teacher: Denoiser, config: DistillConfig) -> list[Part]:
        """Every teacher with the options of its part."""
        assert isinstance(teacher, Teachers)
        total = config.training.batch_size
        counts = shared_out(total, shares_of(teacher, config))
        return [
            (one, part_of(config, number, count, total))
            for number, (one, count) in enumerate(zip(teacher.members, counts, strict=True))
        ]

    def plan(self, teacher: Denoiser, config: DistillConfig) -> SourcePlan:
        """Of all teachers together."""
        plans = [self.inner.plan(*part) for part in self.each(teacher, config)]
        return SourcePlan(*(sum(numbers) for numbers in zip(*plans, strict=True)))

    def size(self, teacher: Denoiser, config: DistillConfig) -> str:
        """How large it is, in words, and whose."""
        parts = self.each(teacher, config)
        of = ", ".join(f"{self.inner.plan(*part).entries:,} of {part[0].name}" for part in parts)
        count = self.plan(teacher, config).entries
        return f"{count:,} entries, {mebibytes(teacher, count, config.pool.pool_dtype)}: {of}"

    def make(
        self, teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
    ) -> Several:
        """A source for each teacher, with its replay."""
        assert isinstance(teacher, Teachers)
        parts, levels = (
            self.each(teacher, config),
            common_levels([one.process for one in teacher.members]),
        )
        shares = []
        for (one, own), place, at in zip(parts, teacher.places, levels.positions, strict=True):
            source = arms.make_source(one, student, own, device)
            clips = amplifies(student, one)
            clipping = replace(one.process.clipping, rederive_eps=True)
            shares.append(Shared(source, place, at, *([clipping] if clips else [])))
        counts = [own.training.batch_size for _, own in parts]
        return Several(shares, levels.process, counts)

    def prepare(self, source: Any, teacher: Denoiser, config: DistillConfig) -> None:
        """Let each teacher prepare its own."""
        for share, (one, own) in zip(source.shares, self.each(teacher, config), strict=True):
            arms.prepare_source(share.source, one, own)

    def shorter(self, pool: PoolOptions) -> str:
        """As for one teacher."""
        return self.inner.shorter(pool)


def part_of(config: DistillConfig, number: int, count: int, total: int) -> DistillConfig:
    """The options of one teacher's part: `count` of a batch of `total`, and its own randomness."""
    changes: Mapping[str, Any] = {"train_batch_size": count}
    size, own = config.pool.pool_size, config.teachers.teacher_pool_size
    if own is not None:
        changes = {**changes, "pool_size": own[number]}
    elif size is not None:
        changes = {**changes, "pool_size": max(count, round(size * count / total))}
    if number:
        seed = derived_seed(config.run.seed, "teacher", number) % 2**32
        changes = {**changes, "seed": seed}
    return replace(config, **changes)


def arm_of(teacher: Denoiser, config: DistillConfig) -> Arm:
    """What the student learns from. Raises UsageError for what several teachers cannot give."""
    arm = ARMS[config.pool.source]
    if not isinstance(teacher, Teachers):
        return arm
    if config.pool.source not in POOLS:
        raise UsageError(
            f"--source {config.pool.source} takes one teacher: give {', '.join(POOLS)}, or leave "
            "out the other teachers"
        )
    if config.pool.keep_finished:
        raise UsageError(
            "--keep-finished takes one teacher: remove it; dkdm harvest draws with all of them"
        )
    return TeachersArm(inner=arm)


def make_source(
    teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
) -> Source:
    """The source that the options ask for, unprepared."""
    if isinstance(teacher, Teachers):
        return arm_of(teacher, config).make(teacher, student, config, device)
    return arms.make_source(teacher, student, config, device)


def prepare_source(source: Source, teacher: Denoiser, config: DistillConfig) -> None:
    """Let the teachers prepare what `make_source` made."""
    if isinstance(teacher, Teachers):
        arm_of(teacher, config).prepare(source, teacher, config)
    else:
        arms.prepare_source(source, teacher, config)
