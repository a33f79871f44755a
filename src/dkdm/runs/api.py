"""Whole runs: `train` and `distill`, from a config to a finished output folder."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from dkdm.checks.inspection import quick_check
from dkdm.checks.student import first_look
from dkdm.config import DistillConfig, TrainConfig
from dkdm.core.conditioning import Unconditional, for_student, parse_interval, restrict_classes
from dkdm.core.denoiser import Denoiser, no_decoder
from dkdm.core.feature_loss import Features, match_features
from dkdm.core.given import config_given, student_given, teacher_given
from dkdm.core.inputs import refuse_without_rows, try_conditioning
from dkdm.core.matching import covered, level_weights, on_levels_of, same_levels
from dkdm.core.modes import evaluating, put_into_evaluation, say_if
from dkdm.core.objective import Objective
from dkdm.core.pool import Guidance, Pool, Stride, empty_pool, fill_ancestral, fill_few_step
from dkdm.core.sources import Images, Synthetic, draw_set, empty_set
from dkdm.core.trainer import Trainer, make_trainable
from dkdm.errors import UsageError
from dkdm.models import chosen_teacher, place, with_texts
from dkdm.models.prompts import Prompts
from dkdm.models.student_process import with_process
from dkdm.runs.cost import advice, estimated, in_words, measured
from dkdm.runs.launch import claim_output, start_accelerator
from dkdm.runs.outputs import (
    compare_models,
    finish_distillation,
    finish_training,
    sample_grids,
    sampling_guidance,
    side_by_side_grids,
)
from dkdm.runs.training_set import training_data
from dkdm.shipping.hub import publish, reserve
from dkdm.shipping.pipeline_folder import component_name, write_pipeline
from dkdm.students import as_denoiser, given_student, student_of
from dkdm.students.lora import merge_lora
from dkdm.students.space import check_same_samples
from dkdm.students.start import begin


def distill(
    teacher: str | Path | Denoiser | None = None,
    student: str | Path | Denoiser | nn.Module | None = None,
    config: DistillConfig | None = None,
) -> Path:
    """Distil a teacher into a student without images; returns the output folder.

    teacher, student: what the command line takes, or a Denoiser; None takes the config's. A student
    may be a bare network too, called as `network(x_t, t, **cond)`. The folder is a diffusers
    pipeline with a model card, `report.html`, metrics and checkpoints. A teacher in training mode
    is put into evaluation mode, and stays in it.
    Raises UsageError for options that do not fit together, DkdmError for a run that fails.
    """
    teacher = None if teacher is None else teacher_given(teacher)
    student = None if student is None else student_given(student)
    config = DistillConfig() if config is None else config_given(config, DistillConfig)
    config = replace(
        config,
        teacher=_name_of(teacher) or config.teacher,
        student=_name_of(student) or config.student,
    )
    accelerator = start_accelerator(config)
    if not isinstance(teacher, Denoiser):
        return _distill(open_teacher(config), student, config, accelerator)
    called = teacher.network, teacher.call, teacher.decode
    say_if(put_into_evaluation(*called))
    with evaluating(*called, frozen=True):
        return _distill(with_conditions(teacher, config), student, config, accelerator)


def _distill(
    taught_by: Denoiser,
    student: str | Denoiser | nn.Module | None,
    config: DistillConfig,
    accelerator: Accelerator,
) -> Path:
    _refuse_shared_network(taught_by, student)
    if isinstance(student, Denoiser):
        coders = student.bundle.autoencoder, taught_by.bundle.autoencoder
        check_same_samples(student.sample_shape, taught_by.sample_shape, coders)
        bundle = student.bundle if student.bundle.components else taught_by.bundle
        given = replace(
            student,
            conditioning=for_student(taught_by.conditioning),
            bundle=bundle,
            decode=student.decode or taught_by.decode,
            guidance_interval=taught_by.guidance_interval,
        )
        learner = given_student(given)
    else:
        learner = open_student(taught_by, config, student)
    if _is_told_nothing(learner, config):
        learner.check(learner.conditioning.null(2))
    for caution in cautions(learner, taught_by):
        print(caution, file=sys.stderr)
    start = begin(learner, taught_by, config)
    print(f"student starts from {start}", file=sys.stderr)
    source, objective = lesson(taught_by, learner, config, accelerator.device)
    trainer = Trainer(
        config,
        objective.student,
        source,
        objective,
        accelerator,
        component_name(learner.network),  # type: ignore[arg-type]
        side_by_side_grids(config, taught_by),
        shipped=learner,
        teacher=taught_by,
        features=make_features(taught_by, learner, config),
        frozen=start.frozen,
        merge=merge_lora,
    )
    config = reserve(config)
    found = claim_output(config, accelerator)
    if found:
        trainer.resume(found)
    say_what_it_takes(taught_by, trainer, config)
    if not found:
        prepare(source, taught_by, config)
        trainer.save()
    started = time.monotonic()
    trainer.run()
    accelerator.end_training()
    finished = trainer.averaged()
    write_pipeline(config.output_dir, finished)
    comparison = compare_models(taught_by, finished, config)
    seconds = time.monotonic() - started
    finish_distillation(config, taught_by, finished, comparison, seconds)
    publish(config)
    return config.output_dir


def say_what_it_takes(teacher: Denoiser, trainer: Trainer, config: DistillConfig) -> None:
    """Say how long the run takes, and that the teacher does not denoise where it does not.

    The check's evaluations are not counted, and a resumed run is not checked again.
    """
    speeds = measured(teacher, trainer.student, config, trainer.accelerator.autocast)
    done, planned = trainer.step_number, planned_evaluations(teacher, config)
    needed = estimated(planned, config.max_train_steps, done, speeds)
    lines = [f"this run takes {in_words(needed)}", advice(needed, config)]
    if config.check and not done:
        lines.append(teacher_warning(teacher, speeds.evaluation))
    for line in lines:
        if line:
            print(line, file=sys.stderr)


def teacher_warning(teacher: Denoiser, seconds: float) -> str | None:
    """What is wrong with a teacher by a quick look; None where nothing is.

    seconds: of one evaluation. A look never ends a run: whatever a network raises is the warning.
    """
    try:
        found = quick_check(teacher, 1 / max(seconds, 1e-9))
    except Exception as error:
        return f"warning: the teacher could not be checked: {type(error).__name__}: {error}"
    if found is None:
        return "note: the teacher is too slow for a quick check; dkdm inspect checks it"
    if found.denoises:
        return None
    start = "does not denoise as it is read" if found.denoises is False else "could not be judged"
    what = "".join(f"; {each.seen}; {each.remedy}" for each in found.concerns[-1:])
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
    return with_conditions(chosen_teacher(config), config)


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


def cautions(student: Denoiser, teacher: Denoiser) -> list[str]:
    """A line for each thing that is odd about a user's own network; `check-student` says more."""
    found = first_look(student, teacher)
    return [f"warning: {each.name}: {each.what}; {each.remedy}" for each in found]


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
        if guided and not isinstance(conditioning, Prompts):
            teacher.check(null)
    if config.random_conditioning and isinstance(conditioning, Unconditional):
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


def lesson(
    teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
) -> tuple[Pool | Synthetic, Objective]:
    """What the student learns from, unfilled, and how; the objective's student is the same as it
    looks from the source's levels. Moves the teacher to the device.
    """
    weighting = config.loss_weighting, config.snr_gamma
    if config.source == "synthetic":
        place(teacher, device, config.teacher_offload)
        source = empty_set(
            teacher,
            student,
            set_size(teacher, config),
            seed=config.seed,
            condition_dropout=config.condition_dropout,
            device=device,
        )
        if student.embeds_guidance:
            scale = Guidance.parse(config.guidance_scale).low
            source.conditions["guidance"] = torch.full((len(source.images),), scale)
        return source, Objective(student, None, *weighting)
    objective = Objective(
        on_levels_of(student, teacher.process),
        teacher,
        *weighting,
        config.vlb_weight,
        level_weights(student, teacher, config.loss_weighting),
    )
    return make_pool(teacher, config, device), objective


def make_features(teacher: Denoiser, student: Denoiser, config: DistillConfig) -> Features | None:
    """The hidden features to match, if any. Raises UsageError where there are none to match."""
    if config.feature_weight == 0:
        return None
    if config.source == "synthetic":
        raise UsageError(
            "--feature-weight: with --source synthetic the teacher does not see the batches; "
            "expected 0, or another source"
        )
    return match_features(teacher, student, config.feature_layers, config.feature_weight)


def set_size(teacher: Denoiser, config: DistillConfig) -> int:
    """Samples in the synthetic set: as asked, or for as many evaluations as the dynamic source."""
    if config.synthetic_samples is not None:
        return config.synthetic_samples
    filling, training = planned_evaluations(teacher, replace(config, source="dynamic"))
    return max(
        config.train_batch_size,
        int((filling + training) // (config.synthetic_steps * guidance_factor(teacher, config))),
    )


def make_pool(teacher: Denoiser, config: DistillConfig, device: torch.device) -> Pool:
    """An unfilled pool as the config describes it. Moves the teacher to the device.

    Raises UsageError where it does not fit in memory.
    """
    place(teacher, device, config.teacher_offload)
    storage = torch.device("cpu") if config.pool_device == "cpu" else device
    return empty_pool(
        teacher,
        pool_entries(config, teacher.process.num_levels),
        storage,
        getattr(torch, config.pool_dtype),
        stride=Stride.parse(config.stride, teacher.process.num_levels),
        eta=config.eta,
        guidance=Guidance.parse(config.guidance_scale, config.guidance_on == "chain"),
        condition_dropout=config.condition_dropout,
        random_conditioning=config.random_conditioning,
        seed=config.seed,
        shards=config.shards,
    )


def pool_entries(config: DistillConfig, num_levels: int) -> int:
    """How many entries: the batch, or rho * T * batch but no more than the run draws."""
    batch = config.train_batch_size
    if config.source != "dynamic":
        return batch
    if config.pool_size is not None:
        if config.pool_size < batch:
            raise UsageError(f"--pool-size {config.pool_size} is smaller than a batch of {batch}")
        return config.pool_size
    drawn = config.max_train_steps * config.gradient_accumulation_steps * batch
    return max(batch, min(round(config.rho * num_levels * batch), drawn))


def prepare(source: Pool | Synthetic, teacher: Denoiser, config: DistillConfig) -> None:
    """Let the teacher prepare the source: fill the pool, or draw the synthetic set."""
    if isinstance(source, Pool):
        fill(source, config)
        return
    guidance = Guidance.parse(config.guidance_scale)
    if guidance.low != guidance.high:
        raise UsageError(
            f"--guidance-scale {config.guidance_scale}: --source synthetic takes one number"
        )
    steps, batch = config.synthetic_steps, config.train_batch_size
    draw_set(source, teacher, steps, guidance.low, batch)


def fill(pool: Pool, config: DistillConfig) -> None:
    """Prepare the pool as the config says; the iterative source stays pure noise at T-1."""
    if config.source == "iterative" or config.fill == "none":
        return
    if config.fill == "ancestral":
        fill_ancestral(pool, config.train_batch_size)
    else:
        fill_few_step(pool, config.fill_steps, config.train_batch_size)


def train(config: TrainConfig) -> Path:
    """Train a model on images; returns the output folder, a diffusers pipeline.

    Raises UsageError for options that do not fit together, DkdmError for a run that fails.
    """
    config = config_given(config, TrainConfig)
    accelerator = start_accelerator(config)
    data, like = training_data(config)
    student = student_of(config.network, like, factory=config.student_factory)
    if config.sampling_guidance_scale != 1 and not student.embeds_guidance:
        student.conditioning.null(1)
    source = Images(
        data.images,
        data.conditions,
        student.process,
        student.parameterization,
        student.conditioning,
        config.seed,
        config.condition_dropout,
        accelerator.device,
    )
    objective = Objective(student, None, config.loss_weighting, config.snr_gamma)
    name = component_name(student.network)  # type: ignore[arg-type]
    trainer = Trainer(config, student, source, objective, accelerator, name, sample_grids(config))
    config = reserve(config)
    found = claim_output(config, accelerator)
    if found:
        trainer.resume(found)
    started = time.monotonic()
    trainer.run()
    accelerator.end_training()
    finished = trainer.averaged()
    write_pipeline(config.output_dir, finished)
    finish_training(config, finished, time.monotonic() - started)
    publish(config)
    return config.output_dir


def describe(config: DistillConfig) -> str:
    """What a distillation would do and cost, in words; nothing is written."""
    teacher = open_teacher(config)
    student = open_student(teacher, config)
    odd = "".join(f"\n{caution}" for caution in cautions(student, teacher))
    filling, training = planned_evaluations(teacher, config)
    if config.source == "synthetic":
        what, entries, width = "samples", set_size(teacher, config), 4
    else:
        what, entries = "entries", pool_entries(config, teacher.process.num_levels)
        width = getattr(torch, config.pool_dtype).itemsize
    place_for_dry_run(teacher, student, config)
    speeds = measured(teacher, student, config)
    needed = estimated((filling, training), config.max_train_steps, 0, speeds)
    caution = advice(needed, config)
    odd += f"\n{caution}" if caution else ""
    mebibytes = entries * torch.Size(teacher.sample_shape).numel() * width / 2**20
    return (
        f"teacher   {teacher.name}: {teacher.num_parameters:,} parameters\n"
        f"student   {student.name}: {student.num_parameters:,} parameters "
        f"({student.num_parameters / teacher.num_parameters:.1%})\n"
        f"{_kind_of(student, teacher)}"
        f"start     {begin(student, teacher, config)}\n"
        f"source    {config.source}: {entries:,} {what}, {mebibytes:,.1f} MiB\n"
        f"cost      {filling:,} teacher evaluations to prepare, {training:,} to train, "
        "and restarts of chains\n"
        f"time      {in_words(needed)}\n"
        f"output    {config.output_dir}{odd}"
    )


def place_for_dry_run(teacher: Denoiser, student: Denoiser, config: DistillConfig) -> None:
    """Bring both models to where they would compute."""
    network: nn.Module = student.network  # type: ignore[assignment]
    make_trainable(network.train())
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        place(teacher, device, config.teacher_offload)
        network.to(device)


def _kind_of(student: Denoiser, teacher: Denoiser) -> str:
    """A line on the student's process and parameterization, where they are not the teacher's."""
    own, other = student.parameterization.prediction, teacher.parameterization.prediction
    if own == other and same_levels(student.process, teacher.process):
        return ""
    unseen = int((~covered(student.process, teacher.process)).sum())
    return (
        f"          {own} on the {student.process.num_levels} levels of "
        f"{student.process.scheduler.get('_class_name', 'its process')} that the teacher "
        f"({other}) has; {unseen} of the teacher's levels weigh nothing\n"
    )


def guidance_factor(teacher: Denoiser, config: DistillConfig) -> float:
    """Evaluations of the teacher that one prediction takes, over all levels equally."""
    guided = not Guidance.parse(config.guidance_scale).is_off and not teacher.embeds_guidance
    return 1 + float(teacher.guided_levels().double().mean()) if guided else 1


def planned_evaluations(teacher: Denoiser, config: DistillConfig) -> tuple[int, int]:
    """Teacher evaluations to prepare the source, and to train from it, without restarts."""
    doubled = guidance_factor(teacher, config)
    if config.source == "synthetic":
        return round(set_size(teacher, config) * config.synthetic_steps * doubled), 0
    batch = config.train_batch_size * config.gradient_accumulation_steps
    training = round(config.max_train_steps * batch * doubled)
    if config.source == "iterative" or config.fill == "none":
        return 0, training
    levels = teacher.process.num_levels
    per_entry = levels / 2 if config.fill == "ancestral" else config.fill_steps
    return round(pool_entries(config, levels) * per_entry * doubled), training
