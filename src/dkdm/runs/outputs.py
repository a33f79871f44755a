"""What a run shows: sample grids on the way; at its end distances, a model card and the report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkdm.config import (
    DistillConfig,
    EvaluationOptions,
    GuidanceOptions,
    RunConfig,
    RunOptions,
    SamplingOptions,
    TrainConfig,
    parse_interval,
)
from dkdm.core import checkpoint
from dkdm.core.conditioning import Condition, restrict_classes
from dkdm.core.denoiser import Denoiser
from dkdm.core.modes import evaluating, say_if
from dkdm.core.progress import track
from dkdm.data.named import chosen_reference
from dkdm.data.reference import Reference
from dkdm.errors import UsageError
from dkdm.evaluation.comparison import compare
from dkdm.evaluation.metrics import evaluate_images
from dkdm.evaluation.results import Comparison
from dkdm.evaluation.rows import comparison_rows, metric_rows
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.reading.files import atomic, check_output
from dkdm.report import write_report
from dkdm.report.grids import sample_grid
from dkdm.shipping.card import NO_LICENCE, write_card
from dkdm.shipping.pipeline_folder import shipping_notes

GRID_COLUMNS = 10
GRID_SAMPLES = 40
IMAGES = (".png", ".webp", ".jpg", ".jpeg")
TENSORS = ".safetensors"
UNGUIDED = GuidanceOptions()


def sample_grids(
    run: RunOptions,
    evaluation: EvaluationOptions,
    teacher: Denoiser | None = None,
    guidance: GuidanceOptions = UNGUIDED,
) -> Callable[[int, Denoiser], None]:
    """Writes samples/step-N.png: a row of the teacher's samples and one of the student's.

    Without a teacher: samples of every class.
    """
    count = GRID_SAMPLES if teacher is None else GRID_COLUMNS
    sampling = Sampling(count, evaluation.validation_sampling_steps, run.seed)
    drawn: list[Tensor] = []

    def write(step: int, student: Denoiser) -> None:
        for_teacher, for_student = sampling_guidance(evaluation, guidance, student)
        cond = student.conditioning.in_turns(count)
        if teacher is not None and not drawn:
            drawn.append(decoded(teacher, draw(teacher, cond, sampling, for_teacher)))
        own = decoded(student, draw(student, cond, sampling, for_student))
        _save_grid(run.output_dir, f"step-{step:06d}", torch.cat([*drawn, own]))

    return write


def _save_grid(output_dir: Path, name: str, samples: Tensor) -> None:
    grid = sample_grid(samples, GRID_COLUMNS)
    if grid is None:
        return
    folder = output_dir / "samples"
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
    teacher: Denoiser, student: Denoiser, config: DistillConfig, reference: Reference | None
) -> Comparison | None:
    """Compare both models by samples from the same noise, unless --evaluation-samples is 0."""
    evaluation, run = config.evaluation, config.run
    if evaluation.evaluation_samples == 0:
        return None
    for_teacher, for_student = sampling_guidance(evaluation, config.guidance, student)
    comparison = compare(
        teacher,
        student,
        num_samples=evaluation.evaluation_samples,
        num_steps=evaluation.validation_sampling_steps,
        seed=run.seed,
        guidance_teacher=for_teacher,
        guidance_student=for_student,
        reference=reference,
    )
    comparison.save(run.output_dir)
    return comparison


def reference_of(evaluation: EvaluationOptions, model: Denoiser) -> Reference | None:
    """What distances are measured against: as asked, or by the model's class names.

    Raises UsageError if the reference that was asked for does not fit the model's samples.
    """
    choice = evaluation.evaluation_reference
    reference = chosen_reference(choice, getattr(model.conditioning, "names", None))
    if reference is None:
        return None
    shape = tuple(decoded(model, torch.zeros(1, *model.sample_shape)).shape[1:])
    if reference.fits(shape):
        return reference
    if choice == "auto":
        return None
    raise UsageError(
        f"--evaluation-reference {choice} is for samples of shape "
        f"{' or '.join(map(str, reference.shapes))}, not {shape}: use auto or none"
    )


def write_results(
    config: DistillConfig,
    teacher: Denoiser,
    student: Denoiser,
    comparison: Comparison | None,
    seconds: float,
) -> None:
    """Write the grids, the model card and the report of a finished distillation."""
    evaluation, folder = config.evaluation, config.run.output_dir
    measured: dict[str, Any] = {}
    if comparison is not None:
        rows, metrics = comparison_rows(comparison), comparison.student.metrics
        measured = {"rows": rows, "metrics": metrics}
        samples = comparison.samples
        _save_grid(folder, "grid", samples["student"][:GRID_SAMPLES])
        rows_of_both = [samples[name][:GRID_COLUMNS] for name in ("teacher", "student")]
        _save_grid(folder, "comparison", torch.cat(rows_of_both))
    how = (
        f"{evaluation.evaluation_samples} samples of each from the same noise, "
        f"{evaluation.validation_sampling_steps} DDIM steps."
    )
    scale = sampling_guidance(evaluation, config.guidance, student)[1]
    _describe(config, student, seconds, how, scale, teacher=teacher, **measured)
    write_report(folder)


def write_results_of_training(
    config: TrainConfig, model: Denoiser, reference: Reference | None, seconds: float
) -> None:
    """Write the grid and the model card of a finished training, and measure the model."""
    evaluation, folder = config.evaluation, config.run.output_dir
    count, num_steps = evaluation.evaluation_samples, evaluation.validation_sampling_steps
    scale = evaluation.sampling_guidance_scale
    measured: dict[str, Any] = {}
    if count:
        cond = model.conditioning.in_turns(count)
        sampling = Sampling(count, num_steps, config.run.seed)
        samples = decoded(model, draw(model, cond, sampling, scale))
        _save_grid(folder, "grid", samples[:GRID_SAMPLES])
        if reference is not None:
            metrics = evaluate_images(samples.clamp(-1, 1), cond.get("class_labels"), reference)
            measured = {"rows": metric_rows(metrics), "metrics": metrics}
    how = f"{count} samples, {num_steps} DDIM steps, guidance {scale}."
    _describe(config, model, seconds, how, scale, **measured)


def _describe(
    config: RunConfig, model: Denoiser, seconds: float, how: str, scale: float, **card: Any
) -> None:
    """Write the model card; say what it lacks, and what loading the folder requires."""
    folder = config.run.output_dir
    about: dict[str, Any] = {"minutes": seconds / 60, "measured_how": how, "guidance_scale": scale}
    licensed = write_card(folder, model, config, **about, **card)
    notes = [] if licensed else [f"{NO_LICENCE} {folder}/README.md"]
    for note in [*notes, *shipping_notes(model)]:
        print(f"note: {note}", file=sys.stderr)


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
    cond = conditioning.in_turns(how.num_samples)
    sampling = Sampling(how.num_samples, how.steps, how.seed, eta=float(how.sampler == "ddpm"))
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
