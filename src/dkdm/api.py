"""Whole runs: `train` and `distill`, from a config to a finished output folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from dkdm import checkpoint
from dkdm.conditioning import ClassLabels, Conditioning, Unconditional
from dkdm.config import DistillConfig, RunConfig, TrainConfig, read_config, to_json
from dkdm.datasets import load_images
from dkdm.denoiser import Denoiser
from dkdm.errors import UsageError
from dkdm.evaluation.classes import Metrics, evaluate_images
from dkdm.evaluation.comparison import FASHION_CLASS_NAMES, compare
from dkdm.evaluation.features import ReferenceName
from dkdm.evaluation.results import Comparison
from dkdm.evaluation.same_noise import Plan, balanced_condition, draw
from dkdm.export import component_name, write_card, write_pipeline
from dkdm.objective import Objective
from dkdm.pictures import grid
from dkdm.pool import Pool, Stride, empty_pool, fill_ancestral, fill_few_step
from dkdm.prediction import Parameterization
from dkdm.process import from_scheduler_config
from dkdm.progress import track
from dkdm.report import write_report
from dkdm.sources import Images
from dkdm.students import build_denoiser, student_of
from dkdm.teachers import load_teacher
from dkdm.trainer import Trainer

COSINE_V: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
}
REFERENCE: ReferenceName = "fashion-test"
TRACKERS = ("tensorboard", "trackio", "wandb")
GRID_COLUMNS = 10
GRID_SAMPLES = 40


def distill(
    teacher: str | Denoiser | None = None,
    student: str | Denoiser | None = None,
    config: DistillConfig | None = None,
) -> Path:
    """Distil a teacher into a student without images; returns the output folder.

    teacher, student: what the command line takes, or a Denoiser; None takes the config's. The
    folder is a diffusers pipeline with a model card, `report.html`, metrics and checkpoints.
    Raises UsageError for options that do not fit together, DkdmError for a run that fails.
    """
    config = config or DistillConfig()
    config = replace(
        config,
        teacher=_name_of(teacher) or config.teacher,
        student=_name_of(student) or config.student,
    )
    accelerator = _accelerator(config)
    taught_by = teacher if isinstance(teacher, Denoiser) else open_teacher(config)
    taught_by.conditioning = _restricted(taught_by.conditioning, config.classes)
    learner = student if isinstance(student, Denoiser) else student_of(config.student, taught_by)
    pool = make_pool(taught_by, config, accelerator.device)
    objective = Objective(
        learner, taught_by, config.loss_weighting, config.snr_gamma, config.vlb_weight
    )
    name = component_name(learner.network)  # type: ignore[arg-type]
    validate = _side_by_side(config, taught_by)
    trainer = Trainer(config, learner, pool, objective, accelerator, name, validate)
    found = _claim(config, accelerator)
    if found:
        trainer.resume(found)
    else:
        fill(pool, config)
        trainer.save()
    started = time.monotonic()
    trainer.run()
    accelerator.end_training()
    finished = trainer.averaged()
    write_pipeline(config.output_dir, finished)
    comparison = _compare(taught_by, finished, config)
    _finish_distillation(config, finished, comparison, time.monotonic() - started)
    return config.output_dir


def _name_of(model: str | Denoiser | None) -> str | None:
    return model.name if isinstance(model, Denoiser) else model


def open_teacher(config: DistillConfig) -> Denoiser:
    """Load the teacher a config names."""
    return load_teacher(
        config.teacher,
        subfolder=config.teacher_subfolder,
        revision=config.teacher_revision,
        variant=config.teacher_variant,
        dtype=config.teacher_dtype,
    )


def _restricted(conditioning: Conditioning, classes: tuple[int, ...] | None) -> Conditioning:
    if classes is None:
        return conditioning
    if not isinstance(conditioning, ClassLabels):
        raise UsageError("--classes was given, but the teacher has no classes")
    return replace(conditioning, classes=classes)


def make_pool(teacher: Denoiser, config: DistillConfig, device: torch.device) -> Pool:
    """An unfilled pool as the config describes it. Moves the teacher to the device.

    Raises UsageError where it does not fit in memory.
    """
    if isinstance(teacher.network, torch.nn.Module):
        teacher.network.to(device)
    storage = torch.device("cpu") if config.pool_device == "cpu" else device
    return empty_pool(
        teacher,
        pool_entries(config, teacher.process.num_levels),
        storage,
        getattr(torch, config.pool_dtype),
        stride=Stride.parse(config.stride, teacher.process.num_levels),
        eta=config.eta,
        guidance_scale=config.guidance_scale,
        condition_dropout=config.condition_dropout,
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
    scheduler = json.loads(Path(config.scheduler).read_text()) if config.scheduler else COSINE_V
    images, labels = load_images(config.images, config.sample_shape)
    conditioning = _conditioning_of(config, labels)
    process = from_scheduler_config(scheduler)
    parameterization = Parameterization(scheduler.get("prediction_type", "epsilon"))
    accelerator = _accelerator(config)
    student = build_denoiser(
        config.network, process, parameterization, config.sample_shape, conditioning
    )
    source = Images(
        images,
        labels,
        process,
        parameterization,
        conditioning,
        config.seed,
        config.condition_dropout,
        accelerator.device,
    )
    objective = Objective(student, None, config.loss_weighting, config.snr_gamma)
    name = component_name(student.network)  # type: ignore[arg-type]
    trainer = Trainer(config, student, source, objective, accelerator, name, _samples_of(config))
    found = _claim(config, accelerator)
    if found:
        trainer.resume(found)
    started = time.monotonic()
    trainer.run()
    accelerator.end_training()
    finished = trainer.averaged()
    write_pipeline(config.output_dir, finished)
    _finish_training(config, finished, time.monotonic() - started)
    return config.output_dir


def _conditioning_of(config: TrainConfig, labels: torch.Tensor | None) -> Conditioning:
    if labels is None:
        return Unconditional()
    classes = int(labels.max()) + 1
    names = FASHION_CLASS_NAMES if config.images == "fashion-mnist" else None
    return ClassLabels(classes, null_class=classes, names=names)


def _accelerator(config: RunConfig) -> Accelerator:
    set_seed(config.seed)
    AcceleratorState._reset_state()  # an earlier run in this process may have set another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=_trackers(config.report_to),
        project_dir=config.output_dir / "logs",
    )
    if accelerator.num_processes > 1:
        raise UsageError(
            f"started with {accelerator.num_processes} processes: expected one; several are not "
            "supported yet"
        )
    return accelerator


def _trackers(wanted: str) -> list[str]:
    """The trackers of `--report-to`. Raises UsageError for one that is not installed."""
    if wanted == "auto":
        return ["tensorboard"] if find_spec("tensorboard") else []
    names = [] if wanted == "none" else wanted.split(",")
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"--report-to {name}: expected {', '.join(TRACKERS)}, auto or none")
        if not find_spec(name):
            raise UsageError(f"--report-to {name}: not installed; pip install 'dkdm[{name}]'")
    return names


def _claim(config: RunConfig, accelerator: Accelerator) -> Path | None:
    """Take the output folder and start the trackers; returns the checkpoint to resume from.

    Raises UsageError where the folder holds another run and this is no resumption of it.
    """
    existing = config.output_dir / "config.json"
    if existing.is_file() and not config.resume_from_checkpoint:
        raise UsageError(
            f"--output-dir {config.output_dir} already holds a run: expected an empty folder, or "
            "--resume-from-checkpoint latest to go on with it"
        )
    found = None
    if config.resume_from_checkpoint:
        found = checkpoint.resolve(config.output_dir, config.resume_from_checkpoint)
    if existing.is_file() and type(read_config(existing)) is not type(config):
        raise UsageError(f"--output-dir {config.output_dir} holds a run of another command")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    existing.write_text(to_json(config))
    accelerator.init_trackers("dkdm", {key: str(value) for key, value in asdict(config).items()})
    return found


def _side_by_side(config: DistillConfig, teacher: Denoiser) -> Callable[[int, Denoiser], None]:
    """Writes samples/step-N.png: a row of the teacher's samples, one of the student's."""
    for_teacher, for_student = _guidance(config)
    plan = Plan(GRID_COLUMNS, config.validation_sampling_steps, config.seed)
    drawn: list[torch.Tensor] = []

    def write(step: int, student: Denoiser) -> None:
        before = teacher.evaluations
        cond = balanced_condition(student.conditioning, GRID_COLUMNS, config.seed)
        if not drawn:
            drawn.append(draw(teacher, cond, plan, for_teacher))
        teacher.evaluations = before
        both = torch.cat([drawn[0], draw(student, cond, plan, for_student)])
        _save_grid(config.output_dir, f"step-{step:06d}", both)

    return write


def _samples_of(config: TrainConfig) -> Callable[[int, Denoiser], None]:
    """Writes samples/step-N.png: samples of every class."""
    plan = Plan(GRID_SAMPLES, config.validation_sampling_steps, config.seed)

    def write(step: int, model: Denoiser) -> None:
        cond = balanced_condition(model.conditioning, GRID_SAMPLES, config.seed)
        samples = draw(model, cond, plan, config.sampling_guidance_scale)
        _save_grid(config.output_dir, f"step-{step:06d}", samples)

    return write


def _save_grid(output_dir: Path, name: str, samples: torch.Tensor) -> None:
    folder = output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid(samples, GRID_COLUMNS, scale=4).save(folder / f"{name}.png")


def _guidance(config: DistillConfig) -> tuple[float, float]:
    """Sampling guidance of teacher and student: baked into the student, or applied to both."""
    if config.guidance_scale != 1:
        return config.guidance_scale, 1.0
    return config.sampling_guidance_scale, config.sampling_guidance_scale


def _compare(teacher: Denoiser, student: Denoiser, config: DistillConfig) -> Comparison | None:
    if config.evaluation_samples == 0:
        return None
    for_teacher, for_student = _guidance(config)
    fashion = getattr(teacher.conditioning, "names", None) == FASHION_CLASS_NAMES
    comparison = compare(
        teacher,
        student,
        num_samples=config.evaluation_samples,
        num_steps=config.validation_sampling_steps,
        seed=config.seed,
        guidance_teacher=for_teacher,
        guidance_student=for_student,
        reference=REFERENCE if fashion else None,
    )
    comparison.save(config.output_dir)
    return comparison


def _finish_distillation(
    config: DistillConfig, student: Denoiser, comparison: Comparison | None, seconds: float
) -> None:
    lead = (
        f"{type(student.network).__name__} distilled from `{Path(config.teacher).name}` with DKDM "
        f"(arXiv 2409.03550): no image was read. {config.max_train_steps} steps of "
        f"{config.train_batch_size}, {seconds / 60:.1f} minutes."
    )
    rows: list[tuple[str, list[str]]] = []
    if comparison is not None:
        _save_grid(config.output_dir, "grid", comparison.samples["student"][:GRID_SAMPLES])
        rows = [("", ["teacher", "student"])]
        both = (comparison.teacher, comparison.student)
        rows += [("parameters", [f"{model.parameters:,}" for model in both])]
        rows += [("MACs an evaluation", [f"{model.macs:,}" for model in both])]
        measured = [model.metrics for model in both if model.metrics]
        rows += _metric_rows(measured)
    how = (
        f"{config.evaluation_samples} samples of each from the same noise, "
        f"{config.validation_sampling_steps} DDIM steps."
    )
    write_card(config.output_dir, student, config, lead=lead, metrics=rows, measured_how=how)
    write_report(config.output_dir)


def _finish_training(config: TrainConfig, model: Denoiser, seconds: float) -> None:
    rows: list[tuple[str, list[str]]] = []
    if config.evaluation_samples:
        plan = Plan(config.evaluation_samples, config.validation_sampling_steps, config.seed)
        cond = balanced_condition(model.conditioning, plan.num_samples, config.seed)
        samples = draw(model, cond, plan, config.sampling_guidance_scale).clamp(-1, 1)
        _save_grid(config.output_dir, "grid", samples[:GRID_SAMPLES])
        if config.images == "fashion-mnist":
            metrics = evaluate_images(samples, cond.get("class_labels"), REFERENCE)
            rows = [("", ["value"]), *_metric_rows([metrics])]
    lead = (
        f"{type(model.network).__name__} trained on {Path(config.images).name}: "
        f"{config.max_train_steps} "
        f"steps of {config.train_batch_size}, {seconds / 60:.0f} minutes in its last process."
    )
    how = (
        f"{config.evaluation_samples} samples, {config.validation_sampling_steps} DDIM steps, "
        f"guidance {config.sampling_guidance_scale}, against the {REFERENCE} statistics shipped "
        "with dkdm."
    )
    write_card(config.output_dir, model, config, lead=lead, metrics=rows, measured_how=how)


def _metric_rows(measured: list[Metrics]) -> list[tuple[str, list[str]]]:
    if not measured:
        return []
    fields = {
        "Frechet distance": "fd",
        "asked class recognised": "class_agreement",
        "variance within a class, of the real one": "variance_ratio_mean",
    }
    return [
        (name, [f"{getattr(m, key):.3f}" for m in measured])
        for name, key in fields.items()
        if all(getattr(m, key) is not None for m in measured)
    ]


def describe(config: DistillConfig) -> str:
    """What a distillation would do and cost, in words; nothing is written."""
    teacher = open_teacher(config)
    student = student_of(config.student, teacher)
    entries = pool_entries(config, teacher.process.num_levels)
    doubled = 2 if config.guidance_scale != 1 else 1
    batch = config.train_batch_size * config.gradient_accumulation_steps
    training = config.max_train_steps * batch * doubled
    filling = 0
    if config.source != "iterative" and config.fill != "none":
        per_entry = teacher.process.num_levels / 2
        per_entry = per_entry if config.fill == "ancestral" else config.fill_steps
        filling = round(entries * per_entry * doubled)
    size = entries * torch.Size(teacher.sample_shape).numel()
    mebibytes = size * getattr(torch, config.pool_dtype).itemsize / 2**20
    return (
        f"teacher   {teacher.name}: {teacher.num_parameters:,} parameters\n"
        f"student   {student.name}: {student.num_parameters:,} parameters "
        f"({student.num_parameters / teacher.num_parameters:.1%})\n"
        f"pool      {entries:,} entries, {mebibytes:,.1f} MiB\n"
        f"cost      {filling:,} teacher evaluations to fill, {training:,} to train, and restarts\n"
        f"output    {config.output_dir}"
    )


def sample_to_file(
    denoiser: Denoiser,
    output: Path,
    *,
    num_samples: int,
    num_steps: int,
    sampler: str = "ddim",
    seed: int = 0,
    classes: tuple[int, ...] | None = None,
    guidance_scale: float = 1.0,
    overwrite: bool = False,
) -> None:
    """Draw samples and write them as a picture, or as a tensor where output ends .safetensors.

    Raises UsageError for a file that exists, an unknown sampler and a class out of range.
    """
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists: expected another --output, or --overwrite")
    if sampler not in ("ddim", "ddpm"):
        raise UsageError(f"unknown sampler '{sampler}': expected ddim or ddpm")
    conditioning = _restricted(denoiser.conditioning, classes)
    cond = balanced_condition(conditioning, num_samples, seed)
    plan = Plan(num_samples, num_steps, seed, eta=float(sampler == "ddpm"))
    with track(num_samples, 0, "sampling") as progress:
        samples = draw(denoiser, cond, plan, guidance_scale, progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".safetensors":
        checkpoint.write_tensors(output, {"samples": samples, **cond})
    else:
        grid(samples, GRID_COLUMNS, scale=4).save(output)
