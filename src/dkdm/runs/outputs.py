"""What a run shows: sample grids on the way; at its end distances, a model card and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dkdm.config import (
    USUAL_STEPS,
    EvaluationOptions,
    FeatureOptions,
    GuidanceOptions,
    RunOptions,
    SamplingOptions,
    parse_interval,
)
from dkdm.core.denoisers.conditioning import Condition, restrict_classes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.modes import evaluating, say_if
from dkdm.core.few_steps.model import usual_steps
from dkdm.core.saving import checkpoint
from dkdm.core.saving.progress import track
from dkdm.core.saving.tolerance import tolerated
from dkdm.core.sources.ahead import Ahead
from dkdm.core.sources.mixed import Mixed
from dkdm.core.sources.pool import Pool
from dkdm.core.sources.replay import Replayed
from dkdm.core.sources.several import Several
from dkdm.core.sources.source import Source
from dkdm.data.named import (
    REFERENCES,
    chosen_extractor,
    chosen_reference,
    load_reference,
    reference_path,
)
from dkdm.data.real_images import Look, summarized, summarized_by_all
from dkdm.data.reference import Reference
from dkdm.errors import UsageError
from dkdm.evaluation.circumstances import circumstances_of, warnings_of
from dkdm.evaluation.comparison import compare, measure_alone
from dkdm.evaluation.metrics import METRICS, missing_of_network, usual
from dkdm.evaluation.pool_state import states_of
from dkdm.evaluation.rows import comparison_rows
from dkdm.evaluation.same_noise import Sampling, decoded, draw, shown_shape
from dkdm.evaluation.trajectories import Trajectories, trajectories
from dkdm.models.place import ready_to_draw
from dkdm.reading.files import atomic, check_output
from dkdm.reading.notes import say
from dkdm.report.grids import sample_grid
from dkdm.report.images import reduced
from dkdm.shipping.card import Measured

GRID_COLUMNS = 10
GRID_SAMPLES = 40
TRAJECTORIES = 4  # samples whose way is kept
IMAGES = (".png", ".webp", ".jpg", ".jpeg")
TENSORS = ".safetensors"
UNGUIDED = GuidanceOptions()


def sample_grids(
    run: RunOptions,
    evaluation: EvaluationOptions,
    teacher: Denoiser | None = None,
    guidance: GuidanceOptions = UNGUIDED,
) -> Callable[[int, Denoiser], Mapping[str, float]]:
    """Writes samples/step-N.png: a row of the teacher's samples and one of the student's.

    Without a teacher: samples of every class. Nothing is measured.
    """
    count = GRID_SAMPLES if teacher is None else GRID_COLUMNS
    sampling = Sampling(count, evaluation.validation_sampling_steps, run.seed)
    drawn: list[Tensor] = []

    def write(step: int, student: Denoiser) -> Mapping[str, float]:
        for_teacher, for_student = sampling_guidance(evaluation, guidance, student)
        cond = student.conditioning.in_turns(count)
        if teacher is not None and not drawn:
            drawn.append(decoded(teacher, draw(teacher, cond, sampling, for_teacher)))
        own = decoded(student, draw(student, cond, sampling, for_student))
        save_grid(run.output_dir, f"step-{step:06d}", torch.cat([*drawn, own]))
        return {}

    return write


def save_grid(output_dir: Path, name: str, samples: Tensor) -> None:
    """Write samples/NAME.png in rows of `GRID_COLUMNS`; samples that are no images are left out."""
    grid = sample_grid(samples, GRID_COLUMNS)
    if grid is None:
        return
    folder = output_dir / "samples"
    with tolerated(f"samples/{name}.png was not written", output_dir):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / f"{name}.png") as partial:
            grid.save(partial)


def sampling_guidance(
    evaluation: EvaluationOptions, guidance: GuidanceOptions, student: Denoiser
) -> tuple[float, float]:
    """Guidance scales that samples of teacher and student are drawn with.

    A student of a guided target is sampled unguided, unless it takes the scale as an input.
    """
    if guidance.is_off or guidance.chain_only:
        return evaluation.sampling_guidance_scale, evaluation.sampling_guidance_scale
    middle = sum(guidance.scales) / 2
    return middle, middle if student.embeds_guidance else 1.0


def compare_models(
    teacher: Denoiser,
    student: Denoiser,
    run: RunOptions,
    evaluation: EvaluationOptions,
    guidance: GuidanceOptions,
    reference: Reference | None,
    weights: str,
) -> Measured:
    """Compare both models by samples from the same noise; write evaluation.json and the grids.

    weights: which ones the student has, in words.
    """
    count, num_steps = evaluation.evaluation_samples, evaluation.validation_sampling_steps
    scales = sampling_guidance(evaluation, guidance, student)
    if count == 0:
        return Measured(scales[1])
    comparison = compare(
        teacher,
        student,
        num_samples=count,
        num_steps=num_steps,
        seed=run.seed,
        guidance_teacher=scales[0],
        guidance_student=scales[1],
        reference=reference,
    )
    comparison = replace(comparison, weights=weights)
    comparison.save(run.output_dir)
    samples = [comparison.samples[name] for name in ("teacher", "student")]
    save_grid(run.output_dir, "grid", samples[1][:GRID_SAMPLES])
    save_grid(run.output_dir, "comparison", torch.cat([each[:GRID_COLUMNS] for each in samples]))
    few = Sampling(min(count, TRAJECTORIES), num_steps, run.seed)
    _on_the_way(teacher, student, few, scales).save(run.output_dir)
    rows, how = comparison_rows(comparison), circumstances_of(comparison).in_words()
    return Measured(scales[1], rows, how, comparison.student.metrics, comparison.measurement)


def _on_the_way(
    teacher: Denoiser, student: Denoiser, sampling: Sampling, guidance: tuple[float, float]
) -> Trajectories:
    """The first samples on their way, as large as the page shows them."""
    found = trajectories(teacher, student, sampling, guidance)
    shape = found.teacher.shape[:2]
    small = {
        name: reduced(getattr(found, name).flatten(0, 1)).unflatten(0, shape)
        for name in ("teacher", "student")
    }
    return replace(found, **small)


def save_pool(source: Source, output_dir: Path) -> None:
    """Write pool.json: how the entries lie now. Sources without a pool write nothing."""
    placed: list[tuple[Source, Tensor | None]] = [(source, None)]
    if isinstance(source, Several):
        placed = [(share.source, share.levels) for share in source.shares]
    pools = [(pool, levels) for each, levels in placed if (pool := _pool_of(each))]
    if pools:
        states_of(pools, source.process.num_levels).save(output_dir)


def _pool_of(source: Source) -> Pool | None:
    source = source.source if isinstance(source, (Replayed, Ahead)) else source
    pool = source.pool if isinstance(source, Mixed) else source
    return pool if isinstance(pool, Pool) else None


def measure_model(
    model: Denoiser,
    weights: str,
    run: RunOptions,
    evaluation: EvaluationOptions,
    reference: Reference | None,
) -> Measured:
    """Measure a model by its samples alone; write evaluation.json and a grid of them.

    weights: which ones it has, in words.
    """
    count, num_steps = evaluation.evaluation_samples, evaluation.validation_sampling_steps
    scale = evaluation.sampling_guidance_scale
    if count == 0:
        return Measured(scale)
    found = measure_alone(
        model,
        num_samples=count,
        num_steps=num_steps,
        seed=run.seed,
        guidance_scale=scale,
        reference=reference,
    )
    found = replace(found, weights=weights)
    found.save(run.output_dir)
    save_grid(run.output_dir, "grid", found.samples["student"][:GRID_SAMPLES])
    rows, how = comparison_rows(found), circumstances_of(found).in_words()
    return Measured(scale, rows, how, found.student.metrics, found.measurement)


def reference_of(evaluation: EvaluationOptions, model: Denoiser) -> Reference | None:
    """What distances are measured against: as asked, or by the model's class names; together.

    Raises UsageError if the reference that was asked for does not fit the model's samples, and for
    a distance of one sample.
    """
    choice = evaluation.evaluation_reference
    spec = chosen_reference(choice, getattr(model.conditioning, "names", None))
    if spec is None:
        return None
    shape = shown_shape(model)
    device = str(model.device)
    reference = named_reference(spec, evaluation, shape, device, look=summarized_by_all)
    reason = reference.refusal(shape)
    if reason and choice == "auto":
        return None
    if reason:
        raise UsageError(f"--evaluation-reference {choice} {reason}, or use auto or none")
    if evaluation.evaluation_samples == 1:
        raise UsageError(
            f"--evaluation-samples 1 is too few for a distance to {reference.name}: give 2 or "
            "more, or --evaluation-reference none"
        )
    if count := evaluation.evaluation_samples:
        names, network = usual(reference), reference.network
        for warning in warnings_of(names, count, network, "--evaluation-samples"):
            say(f"warning: {warning}")
    return reference


def named_reference(
    spec: str,
    how: FeatureOptions,
    shape: tuple[int, ...],
    place: str,
    metrics: Sequence[str] = (),
    look: Look = summarized,
) -> Reference:
    """The reference of this name, whose network is as asked, or the one that belongs to it.

    shape: of the samples that are to be measured. place: the network's device. metrics: that are to
    be measured. look: see `load_reference`. Raises UsageError for a network that does not serve
    them, before it sees an image.
    """
    if spec in REFERENCES:
        packaged = load_reference(spec)
        if how.feature_network is None or packaged.refusal(shape):
            return packaged
    else:
        reference_path(spec)  # a name that is wrong is refused before a network is asked for
    extractor = chosen_extractor(how.feature_network, how.resize, place)
    for name in metrics:
        if name in METRICS and (reason := missing_of_network(METRICS[name], extractor)):
            raise UsageError(f"{name} cannot be measured against {spec}: {reason}")
    return load_reference(spec, extractor, skip_bad=how.skip_bad, shape=shape, look=look)


def sample_to_file(denoiser: Denoiser, how: SamplingOptions) -> None:
    """Draw samples and write them as an image, or as a tensor if output ends in .safetensors.

    An image of videos shows their middle frames, an image of vectors and signals plots them; a
    tensor of a latent model holds latents. Raises UsageError for an output that cannot be written,
    for an image of samples with more dimensions than a video's, and for a class out of range.
    """
    output = how.output
    check_sample_file(output, how.overwrite)
    if output.suffix != TENSORS and not 1 <= len(denoiser.sample_shape) <= 4:
        raise UsageError(
            f"{output}: samples of shape {denoiser.sample_shape} cannot be drawn as an image: give "
            f"--output {output.with_suffix(TENSORS)}"
        )
    conditioning = restrict_classes(denoiser.conditioning, how.classes)
    interval = parse_interval(how.guidance_interval)
    denoiser = replace(denoiser, conditioning=conditioning, guidance_interval=interval)
    denoiser = ready_to_draw(denoiser, how.cuda_graphs)
    cond = conditioning.in_turns(how.num_samples)
    steps = how.steps or usual_steps(denoiser, USUAL_STEPS)
    sampling = Sampling(how.num_samples, steps, how.seed, how.sampler)
    with (
        evaluating(denoiser.network, denoiser.call) as changed,
        track(how.num_samples, 0, "sampling") as progress,
    ):
        say_if(changed)
        samples = draw(denoiser, cond, sampling, how.guidance_scale, progress)
    _write_samples(output, denoiser, samples, cond)


def _write_samples(output: Path, denoiser: Denoiser, samples: Tensor, cond: Condition) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as partial:
        if output.suffix == TENSORS:
            checkpoint.write_tensors(partial, {"samples": samples, **cond})
        else:
            image = sample_grid(decoded(denoiser, samples), GRID_COLUMNS)
            assert image is not None  # their rank was looked at before
            with_alpha = output.suffix.lower() in (".png", ".webp")
            (image if with_alpha else image.convert("RGB")).save(partial)


def check_sample_file(output: Path, overwrite: bool = False) -> None:
    """Raise UsageError unless samples can be written to this file; nothing is written."""
    if output.suffix != TENSORS and output.suffix.lower() not in IMAGES:
        raise UsageError(
            f"--output {output}: give a name that ends in {', '.join(IMAGES)}, or in {TENSORS} for "
            "the tensor"
        )
    check_output("--output", output, overwrite=overwrite)
