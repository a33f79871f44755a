"""Write finished samples of a teacher as a data set: those that a run kept, then drawn ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dkdm.config import DistillConfig, GivenModel, HarvestOptions, read_config
from dkdm.core import checkpoint
from dkdm.core.conditioning import ClassLabels, Condition, restrict_classes
from dkdm.core.denoiser import Denoiser
from dkdm.core.finished import (
    ABOUT,
    SHARD,
    Samples,
    SampleShards,
    joined_samples,
    of_tensors,
)
from dkdm.core.kinds import kind_of
from dkdm.core.modes import evaluating
from dkdm.core.progress import track
from dkdm.core.solvers import spacing_of
from dkdm.data.named import chosen_extractor, load_reference
from dkdm.data.reference import Features, Reference
from dkdm.data.sample_files import FORMATS, Part, SampleFiles
from dkdm.errors import UsageError
from dkdm.evaluation.metrics import Metrics, Sampled, measure, usual
from dkdm.evaluation.same_noise import Sampling, batches, decoded
from dkdm.models import chosen_teacher
from dkdm.reading.fields import read_json
from dkdm.reading.files import check_output
from dkdm.reading.made_here import was_made_here
from dkdm.reading.plugins import named_code, split
from dkdm.runs.arms import FINISHED
from dkdm.runs.models import ready_teacher


@dataclass(frozen=True)
class Harvest:
    """What was written: the samples that a run had kept, those drawn, and what they are worth."""

    folder: Path
    kept: int
    drawn: int
    evaluations: int
    usage: str
    metrics: Metrics | None = None


def harvest(
    how: HarvestOptions,
    teacher: Denoiser | None = None,
    run: Path | None = None,
    reference: Reference | None = None,
) -> Harvest:
    """Write `how.num_samples` finished samples into a folder; the same call goes on where it ended.

    teacher: draws what lacks; None takes the run's. run: the folder of a distillation, whose kept
    samples come first. Samples of no class are left out. Raises UsageError for an output that holds
    something else and for samples that are no images, DkdmError for damaged files.
    """
    config = None if run is None else _config_of(run)
    if teacher is None:
        teacher = _teacher_of(run, config)
    teacher = _with_conditions(teacher, how, config)
    scale = _scale(how, config)
    files = _files(how, teacher)
    found = None if run is None else _of_classes(kept(run), teacher)
    count = 0 if found is None else min(how.num_samples, len(found[0]))
    about = {"samples": how.num_samples, "kept": count, "model": str(run or teacher.name)}
    drawing = {"steps": how.steps, "sampler": how.sampler, "seed": how.seed, "guidance": scale}
    SampleShards(how.output).claim({**about, **drawing, "format": how.format})
    with (
        evaluating(teacher.network, teacher.call),
        track(how.num_samples, 0, "harvest") as progress,
    ):
        for number, rows in enumerate(_parts(count, how.num_samples)):
            if not files.has(number, rows):
                own = None if found is None else _last(found, count)
                samples, cond = _samples(teacher, own, rows, count, how, scale)
                files.write(number, _part(teacher, rows, samples, cond, files.images))
            progress(rows.stop)
    files.finish(range(how.num_samples))
    drawn = how.num_samples - count
    each = _evaluations(teacher, how, scale)
    measured = None if reference is None else _measured(files, teacher, reference, count, how)
    usage = files.usage(teacher.sample_shape if not files.images else _shape(teacher))
    return Harvest(how.output, count, drawn, each * drawn, usage, measured)


def _evaluations(teacher: Denoiser, how: HarvestOptions, scale: float) -> int:
    """How often the network is evaluated for a sample; by heun again at the end of a step."""
    spacing = spacing_of(how.sampler, teacher.process, teacher.parameterization.prediction)
    levels = torch.tensor(teacher.process.timesteps(how.steps, spacing))
    visited = torch.cat([levels, levels[1:]]) if how.sampler == "heun" else levels
    return int(teacher.evaluations_at(visited, scale != 1).sum())


def is_run(model: str) -> bool:
    """Whether this is the folder of a distillation."""
    path = Path(model) / "config.json"
    return path.is_file() and read_json(path, "a config").get("kind") == DistillConfig.__name__


def kept(run: Path) -> Samples | None:
    """The samples that a run kept, the oldest first; None if it kept none.

    Raises DkdmError for damaged files.
    """
    folders = checkpoint.checkpoints(run)
    file = folders[-1] / checkpoint.SOURCE / f"{FINISHED}.safetensors" if folders else run
    if not file.is_file():
        return None
    state, shards = checkpoint.read_tensors(file), SampleShards(run / FINISHED)
    rest = [of_tensors(state)] if "samples" in state else []
    whole = (int(state["count"]) - sum(len(samples) for samples, _ in rest)) // SHARD
    numbers = [number for number in shards.numbers() if number < whole]
    parts = [shards.read(number) for number in numbers] + rest
    return joined_samples(parts) if parts else None


def _config_of(run: Path) -> DistillConfig:
    config = read_config(run / "config.json")
    if not isinstance(config, DistillConfig):
        raise UsageError(f"{run} is no distillation: harvest its model with dkdm sample")
    return config


def _teacher_of(run: Path | None, config: DistillConfig | None) -> Denoiser:
    """The teacher of a run. Raises UsageError for code that only the run's folder names."""
    assert config is not None
    choice = config.teacher_choice
    for spec in [*named_code(choice.model), *named_code(choice.factory)]:
        if not was_made_here({"spec": spec}, split(spec)[0]):
            raise UsageError(
                f"{run}/config.json names code: {spec}. If you trust that code, harvest that "
                f"teacher by its name"
            )
    return chosen_teacher(choice)


def _with_conditions(
    teacher: Denoiser, how: HarvestOptions, config: DistillConfig | None
) -> Denoiser:
    """The teacher with the classes or prompts of its run, or those that are asked for."""
    if config is not None:
        asked = config.conditions, config.guidance, config.evaluation, config.run.seed
        teacher = ready_teacher(teacher, *asked)
    return replace(teacher, conditioning=restrict_classes(teacher.conditioning, how.classes))


def _scale(how: HarvestOptions, config: DistillConfig | None) -> float:
    """The guidance scale: as asked, or the middle of the run's."""
    if how.guidance_scale is not None:
        return how.guidance_scale
    return 1.0 if config is None else sum(config.guidance.scales) / 2


def _shape(teacher: Denoiser) -> tuple[int, ...]:
    blank = torch.zeros(1, *teacher.sample_shape)
    return tuple(decoded(teacher, blank).shape[1:])


def _files(how: HarvestOptions, teacher: Denoiser) -> SampleFiles:
    """The files to write. Raises UsageError if they cannot be written, or hold no such samples."""
    check_output("--output", how.output, folder=True, overwrite=True)
    conditioning = teacher.conditioning
    classes = conditioning.num_classes if isinstance(conditioning, ClassLabels) else None
    files = FORMATS[how.format](how.output, classes)
    shape = _shape(teacher) if files.images else (3, 1, 1)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(
            f"--format {how.format}: samples of shape {shape} are no grey or colour images: use "
            "--format safetensors"
        )
    if how.output.is_dir() and any(how.output.iterdir()) and not (how.output / ABOUT).is_file():
        raise UsageError(f"--output {how.output} holds other files: give another folder")
    return files


def _parts(kept_count: int, count: int) -> list[range]:
    """The set in parts of one shard; kept and drawn samples are not in the same."""
    ends = [*range(SHARD, kept_count, SHARD), kept_count]
    ends += [*range(kept_count + SHARD, count, SHARD), count]
    starts = [0, *ends]
    return [range(a, b) for a, b in zip(starts, ends, strict=False) if b > a]


def _of_classes(found: Samples | None, teacher: Denoiser) -> Samples | None:
    """Kept samples of a class that is drawn, or of a prompt; not those of "no class"."""
    if found is None or not found[1]:
        return found
    samples, cond = found
    conditioning, right = teacher.conditioning, torch.ones(len(samples), dtype=torch.bool)
    if isinstance(conditioning, ClassLabels):
        right = torch.isin(cond["class_labels"], torch.tensor(conditioning.drawn))
    elif "prompt" in cond:
        right = cond["prompt"] > 0
    return samples[right], {key: value[right] for key, value in cond.items()}


def _last(found: Samples, count: int) -> Samples:
    first = len(found[0]) - count
    return found[0][first:], {key: value[first:] for key, value in found[1].items()}


def _samples(
    teacher: Denoiser,
    found: Samples | None,
    rows: range,
    kept_count: int,
    how: HarvestOptions,
    scale: float,
) -> Samples:
    """Kept samples, or drawn ones: sample i depends on (seed, i) alone."""
    if rows.stop <= kept_count:
        assert found is not None
        return found[0][rows.start : rows.stop], {
            key: value[rows.start : rows.stop] for key, value in found[1].items()
        }
    turns = teacher.conditioning.in_turns(how.num_samples)
    sampling = Sampling(how.num_samples, how.steps, how.seed, how.sampler, how.batch_size)
    drawn = [batch for _, batch in batches(teacher, turns, sampling, scale, rows)]
    cond = {key: value[rows.start : rows.stop] for key, value in turns.items()}
    return torch.cat(drawn), cond


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
) -> Metrics:
    """What the set is worth, from the images as they were written."""
    features, labels = [], []
    for number, rows in enumerate(_parts(kept_count, how.num_samples)):
        images, own = files.read(number, rows)
        shown = images if files.images else decoded(teacher, images)
        features.append(reference.network(shown))
        labels += [] if own is None else [own]
    whole = torch.cat(labels) if labels else None
    return measure(Sampled(Features.joined(features), whole), reference, usual(reference))


def chosen_reference_of(how: HarvestOptions, teacher: Denoiser) -> Reference | None:
    """The reference that --reference names. Raises UsageError if it does not fit the samples."""
    if how.reference is None:
        return None
    shape, network = _shape(teacher), None
    if how.feature_network is not None:
        network = chosen_extractor(how.feature_network, how.resize, str(teacher.device))
    reference = load_reference(how.reference, network, shape=shape)
    reason = reference.refusal(shape)
    if reason:
        raise UsageError(f"--reference {how.reference} {reason}")
    return reference


def teacher_and_run(choice: GivenModel) -> tuple[Denoiser, Path | None]:
    """What the command line names: a run's teacher and its folder, or a model."""
    if is_run(choice.model):
        run = Path(choice.model)
        return _teacher_of(run, _config_of(run)), run
    return chosen_teacher(choice), None
