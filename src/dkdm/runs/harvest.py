"""Write finished samples of a teacher as a data set: those that a run kept, then drawn ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dkdm.config import DistillConfig, GivenConditions, GivenModel, HarvestOptions, parse_interval
from dkdm.core.denoisers.conditioning import ClassLabels, Condition, restrict_classes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import kind_of
from dkdm.core.denoisers.modes import evaluating
from dkdm.core.denoisers.teachers import Teachers
from dkdm.core.diffusion.solvers import spacing_of
from dkdm.core.saving import checkpoint
from dkdm.core.saving.folders import remove_leftovers
from dkdm.core.saving.progress import track
from dkdm.core.sources.finished import (
    ABOUT,
    SHARD,
    Samples,
    SampleShards,
    joined_samples,
    of_tensors,
)
from dkdm.data.real_images import AT_ONCE
from dkdm.data.reference import Features, Reference
from dkdm.data.sample_files import FORMATS, Part, SampleFiles
from dkdm.errors import UsageError
from dkdm.evaluation.circumstances import floors_of, warnings_of
from dkdm.evaluation.comparison import describe, versions
from dkdm.evaluation.evaluated import Evaluation, Measured, SampledModel
from dkdm.evaluation.fingerprint import hash_of
from dkdm.evaluation.metrics import Sampled, measure, usual
from dkdm.evaluation.results import EVALUATION
from dkdm.evaluation.same_noise import Sampling, batches, decoded, shown_shape
from dkdm.evaluation.shards import check_finite
from dkdm.models import chosen_teacher
from dkdm.models.place import ready_to_draw
from dkdm.reading.files import check_output
from dkdm.reading.lock import locked
from dkdm.reading.places import expanded
from dkdm.runs.arms import FINISHED
from dkdm.runs.earlier import AS_GIVEN, distillation_of, run_folder, run_of, teacher_of
from dkdm.runs.measure import against, check_count
from dkdm.runs.models import check_null_condition, given_conditions, ready_teacher
from dkdm.runs.outputs import named_reference


@dataclass(frozen=True)
class Harvest:
    """What was written: the samples that a run had kept, those drawn, and what they are worth.

    measured: None without a reference.
    """

    folder: Path
    kept: int
    drawn: int
    evaluations: int
    usage: str
    measured: Evaluation | None = None


def harvest(
    how: HarvestOptions, teacher: Denoiser | None = None, run: Path | None = None
) -> Harvest:
    """Write `how.num_samples` finished samples into a folder; the same call goes on where it ended.

    teacher: draws what lacks; None takes the run's. run: the folder of a distillation, whose kept
    samples come first. Samples of no class are left out. Raises UsageError for an output that holds
    something else and for samples that are no images, DkdmError for damaged files and for samples
    that are not finite.
    """
    config = None if run is None else _config_of(run)
    if teacher is None:
        teacher = teacher_of(config, "harvest")
    teacher, scale = _ready(teacher, how, config), _scale(how, config)
    each = _evaluations(teacher, how, scale)
    check_null_condition(teacher, guided=scale != 1)
    files, reference = _files(how, teacher), _reference(how, teacher)
    found = None if config is None or run is None else _last_kept(run, config, teacher, how)
    count = 0 if found is None else len(found[0])
    turns = teacher.conditioning.in_turns(how.num_samples)
    about = {
        "samples": how.num_samples,
        "kept": count,
        "model": str(run or teacher.name),
        "conditions": hash_of(turns),
        "steps": how.steps,
        "sampler": how.sampler,
        "seed": how.seed,
        "guidance": scale,
        "guidance_interval": teacher.guidance_interval,
        "format": how.format,
    }
    SampleShards(how.output).claim(about)
    teacher = ready_to_draw(teacher, how.cuda_graphs)
    with (
        locked(how.output, "dkdm harvest"),
        evaluating(teacher.network, teacher.call),
        track(how.num_samples, 0, "harvest") as progress,
    ):
        for number, rows in enumerate(_parts(count, how.num_samples)):
            if not files.has(number, rows):
                own = found if rows.stop <= count else None
                samples, cond = _samples(teacher, own, rows, turns, how, scale)
                files.write(number, _part(teacher, rows, samples, cond, files.images))
            progress(rows.stop)
        files.finish(range(how.num_samples))
        remove_leftovers(how.output)
    drawn = how.num_samples - count
    usage = files.usage(shown_shape(teacher) if files.images else teacher.sample_shape)
    measured = None
    if reference is not None:
        measured = _measured(files, teacher, reference, count, how, scale)
        measured.write(how.output / EVALUATION)
    return Harvest(how.output, count, drawn, each * drawn, usage, measured)


def _evaluations(teacher: Denoiser, how: HarvestOptions, scale: float) -> int:
    """How often the network is evaluated for a sample; by heun again at the end of a step."""
    spacing = spacing_of(how.sampler, teacher.process, teacher.parameterization.prediction)
    levels = torch.tensor(teacher.process.timesteps(how.steps, spacing))
    visited = torch.cat([levels, levels[1:]]) if how.sampler == "heun" else levels
    return int(teacher.evaluations_at(visited, scale != 1).sum())


def harvest_of(choice: GivenModel, conditions: GivenConditions, how: HarvestOptions) -> Harvest:
    """What `dkdm harvest` does: `harvest` of a run or of a model, as the command line names it.

    Raises UsageError for options of a model beside a run, which names its teacher itself.
    """
    check_output("--output", how.output, folder=True, overwrite=True)
    run = expanded(choice.model)
    if run_folder(run) != run or not isinstance(run_of(run), DistillConfig):
        return harvest(how, given_conditions(chosen_teacher(choice), conditions))
    if choice != type(choice)(choice.model) or conditions != GivenConditions():
        raise UsageError(
            f"{choice.model} is a run, whose teacher is read with the run's own model and "
            "condition options: leave these out, or harvest the teacher by its name"
        )
    return harvest(how, run=run)


def kept(run: Path) -> Samples | None:
    """The samples that a run kept, the oldest first; None if it kept none.

    Raises DkdmError for damaged files.
    """
    last = checkpoint.newest(run) or run
    file = last / checkpoint.SOURCE / f"{FINISHED}.safetensors"
    if not file.is_file():
        return None
    state, shards = checkpoint.read_tensors(file), SampleShards(run / FINISHED)
    rest = [of_tensors(state)] if "samples" in state else []
    whole = (int(state["count"]) - sum(len(samples) for samples, _ in rest)) // SHARD
    numbers = [number for number in shards.numbers() if number < whole]
    parts = [shards.read(number) for number in numbers] + rest
    return joined_samples(parts) if parts else None


def _config_of(run: Path) -> DistillConfig:
    config = distillation_of(run)
    if config is None:
        raise UsageError(f"{run} is no distillation: give its folder, or a model")
    return config


def _ready(teacher: Denoiser, how: HarvestOptions, config: DistillConfig | None) -> Denoiser:
    """The teacher with the classes or prompts of its run, or those that are asked for."""
    if config is not None and not isinstance(teacher, Teachers):  # these are ready
        asked = config.conditions, config.guidance, config.evaluation, config.run.seed
        teacher = ready_teacher(teacher, *asked)
    interval = parse_interval(how.guidance_interval) or teacher.guidance_interval
    conditioning = restrict_classes(teacher.conditioning, how.classes)
    return replace(teacher, conditioning=conditioning, guidance_interval=interval)


def _scale(how: HarvestOptions, config: DistillConfig | None) -> float:
    """The guidance scale: as asked, or the middle of the run's."""
    if how.guidance_scale is not None:
        return how.guidance_scale
    return 1.0 if config is None else sum(config.guidance.scales) / 2


def _files(how: HarvestOptions, teacher: Denoiser) -> SampleFiles:
    """The files to write. Raises UsageError if they cannot be written, or hold no such samples."""
    check_output("--output", how.output, folder=True, overwrite=True)
    conditioning = teacher.conditioning
    classes = conditioning.num_classes if isinstance(conditioning, ClassLabels) else None
    files = FORMATS[how.format](how.output, classes)
    shape = shown_shape(teacher) if files.images else (3, 1, 1)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(
            f"--format {how.format}: samples of shape {shape} are no grey or colour images: use "
            "--format safetensors"
        )
    if how.output.is_dir() and any(how.output.iterdir()) and not (how.output / ABOUT).is_file():
        raise UsageError(f"--output {how.output} holds other files: give another folder")
    return files


def _reference(how: HarvestOptions, teacher: Denoiser) -> Reference | None:
    """What the set is measured against. Raises UsageError if it does not fit the samples."""
    if how.reference is None:
        return None
    shape = shown_shape(teacher)
    reference = named_reference(how.reference, how, shape, str(teacher.device))
    if reason := reference.refusal(shape):
        raise UsageError(f"--reference {how.reference} {reason}")
    check_count(usual(reference), how.num_samples)
    for warning in warnings_of(usual(reference), how.num_samples, reference.network):
        print(f"warning: {warning}", file=sys.stderr)
    return reference


def _parts(kept_count: int, count: int) -> list[range]:
    """The set in parts of one shard; kept and drawn samples are not in the same."""
    ends = [*range(SHARD, kept_count, SHARD), kept_count]
    ends += [*range(kept_count + SHARD, count, SHARD), count]
    starts = [0, *ends]
    return [range(a, b) for a, b in zip(starts, ends, strict=False) if b > a]


def _last_kept(
    run: Path, config: DistillConfig, teacher: Denoiser, how: HarvestOptions
) -> Samples | None:
    """The last samples that a run kept, as many as it was to keep and are asked for."""
    found = kept(run)
    if found is None:
        return None
    samples, cond = _of_classes(found, teacher)
    first = max(0, len(samples) - min(how.num_samples, config.pool.keep_finished))
    return samples[first:], {key: value[first:] for key, value in cond.items()}


def _of_classes(found: Samples, teacher: Denoiser) -> Samples:
    """Kept samples of a class that is drawn, or of a prompt; not those of "no class"."""
    samples, cond = found
    conditioning, right = teacher.conditioning, torch.ones(len(samples), dtype=torch.bool)
    if isinstance(conditioning, ClassLabels):
        right = torch.isin(cond["class_labels"], torch.tensor(conditioning.drawn))
    elif "prompt" in cond:
        right = cond["prompt"] > 0
    return samples[right], {key: value[right] for key, value in cond.items()}


def _samples(
    teacher: Denoiser,
    found: Samples | None,
    rows: range,
    turns: Condition,
    how: HarvestOptions,
    scale: float,
) -> Samples:
    """Kept samples, or drawn ones: sample i depends on (seed, i) alone."""
    here = slice(rows.start, rows.stop)
    if found is not None:
        return found[0][here], {key: value[here] for key, value in found[1].items()}
    sampling = Sampling(how.num_samples, how.steps, how.seed, how.sampler, how.batch_size)
    drawn = []
    for _, batch in batches(teacher, turns, sampling, scale, rows):
        check_finite(teacher, batch)
        drawn.append(batch)
    return torch.cat(drawn), {key: value[here] for key, value in turns.items()}


def _part(teacher: Denoiser, rows: range, samples: Tensor, cond: Condition, images: bool) -> Part:
    """Samples as they are written: pictures of them, their classes, their prompts."""
    shown = decoded(teacher, samples) if images else samples
    captions = None
    if "prompt" in cond:
        names = kind_of(teacher.conditioning).shown_names(int(cond["prompt"].max())) or ()
        captions = [names[number] for number in cond["prompt"].tolist()]
    return Part(rows, shown, samples, cond.get("class_labels"), captions)


def _measured(
    files: SampleFiles,
    teacher: Denoiser,
    reference: Reference,
    kept_count: int,
    how: HarvestOptions,
    scale: float,
) -> Evaluation:
    """What the set is worth, from the images as they were written."""
    names, count = usual(reference), how.num_samples
    found = measure(_seen(files, teacher, reference, kept_count, count), reference, names)
    floors = floors_of(reference, names, count)
    warnings, interval = warnings_of(names, count, reference.network), teacher.guidance_interval
    warnings += reference.warnings
    if kept_count:
        warnings.append(f"the first {kept_count:,} samples were kept while the run trained")
    return Evaluation(
        model=SampledModel(teacher.name, AS_GIVEN, scale),
        num_samples=count,
        sampler=how.sampler,
        num_steps=how.steps,
        seed=how.seed,
        batch_size=how.batch_size,
        guidance_interval=None if interval is None else f"{interval[0]:g}:{interval[1]:g}",
        sample_shape=teacher.sample_shape,
        reference=against(reference, how.resize),
        metrics={
            name: Measured(value, *floors.get(name, ())) for name, value in found.values.items()
        },
        teacher=None,
        teacher_distance=None,
        gap=None,
        warnings=tuple(warnings),
        device=describe(teacher.device),
        versions=versions(),
    )


def _seen(
    files: SampleFiles, teacher: Denoiser, reference: Reference, kept_count: int, count: int
) -> Sampled:
    """The set as the network of the reference sees it: with Inception the longest part."""
    features, labels, done = [], [], 0
    with track(count, 0, f"features of {files.folder.name}") as progress:
        for number, rows in enumerate(_parts(kept_count, count)):
            images, own = files.read(number, rows)
            for batch in images.split(AT_ONCE):
                shown = batch if files.images else decoded(teacher, batch)
                features.append(reference.network(shown))
                progress(done := done + len(batch))
            labels += [] if own is None else [own]
    return Sampled(Features.joined(features), torch.cat(labels) if labels else None)
