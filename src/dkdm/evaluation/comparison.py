"""Teacher and student side by side: samples from the same noise, distances, gaps, cost; and a
model alone."""

from __future__ import annotations

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition, Conditioning
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.kinds import kind_of
from dkdm.core.denoisers.matching import on_levels_of
from dkdm.core.denoisers.teachers import network_name
from dkdm.core.objectives.objective import simple_loss
from dkdm.core.randomness import generator
from dkdm.core.saving.progress import track
from dkdm.data.reference import Reference
from dkdm.errors import UsageError
from dkdm.evaluation.circumstances import measurement_of
from dkdm.evaluation.cost import (
    count_macs,
    evaluations_per_second,
    evaluations_per_step,
    undisturbed,
)
from dkdm.evaluation.energy import MOST, TeacherDistance, paired_teacher_distance
from dkdm.evaluation.memory import evaluation_mib, weights_mib
from dkdm.evaluation.metrics import evaluate_images, known_labels
from dkdm.evaluation.results import Comparison, LevelGap, ModelResult
from dkdm.evaluation.same_noise import Sampling, decoded, draw
from dkdm.version import __version__

GAP_LEVELS = 16
GAP_SAMPLES = 64
SPEED_BATCH = 64
MOST_SHOWN = 100


def compare(
    teacher: Denoiser,
    student: Denoiser,
    *,
    num_samples: int,
    num_steps: int,
    seed: int,
    guidance_teacher: float = 1.0,
    guidance_student: float = 1.0,
    reference: Reference | None = None,
) -> Comparison:
    """Sample both models from the same noise and measure what comes out.

    Conditions come in turns; both models sample by DDIM. Distances are those to `reference`. The
    models' modes stay as they were. Raises `UsageError` for models of different sample shapes and
    for numbers below 1, `DkdmError` for samples that are not finite or do not fit the reference.
    """
    check_shapes(teacher, student)
    sampling = Sampling(num_samples, num_steps, seed)
    cond = student.conditioning.in_turns(num_samples)
    with undisturbed(teacher), undisturbed(student), track(2 * num_samples, 0, "comparing") as show:
        drawn = draw(teacher, cond, sampling, guidance_teacher, show)
        copied = draw(student, cond, sampling, guidance_student, lambda n: show(num_samples + n))
        few = min(num_samples, GAP_SAMPLES)
        gaps = level_gaps(
            teacher, student, drawn[:few], cond, seed, guidance_teacher, guidance_student
        )
        apart = _from_other_noise(copied, drawn)
        drawn, copied = decoded(teacher, drawn), decoded(student, copied)
    labels = cond.get("class_labels")
    shown = cond.get("prompt", labels)
    return Comparison(
        teacher=_measure(teacher, drawn, labels, num_steps, guidance_teacher, reference),
        student=_measure(student, copied, labels, num_steps, guidance_student, reference),
        sample_shape=tuple(teacher.sample_shape),
        num_levels=teacher.process.num_levels,
        num_samples=num_samples,
        num_steps=num_steps,
        seed=seed,
        device=describe(student.device),
        gap_samples=few,
        gaps=gaps,
        same_noise_difference=float((drawn - copied).abs().mean()),
        other_noise_difference=_other_noise_difference(drawn, copied, shown),
        measurement=measurement_of(reference, num_samples) if reference else None,
        class_names=_class_names(student.conditioning, reference),
        versions=versions(),
        asked_for="prompt" if "prompt" in cond else "class",
        samples=_first_samples({"teacher": drawn, "student": copied}, shown),
        teacher_distance=apart,
    )


def measure_alone(
    model: Denoiser,
    *,
    num_samples: int,
    num_steps: int,
    seed: int,
    guidance_scale: float = 1.0,
    reference: Reference | None = None,
) -> Comparison:
    """Sample a model that has no teacher, and measure what comes out; the noise is that of
    `compare`.

    Raises `DkdmError` for samples that are not finite or do not fit the reference.
    """
    sampling = Sampling(num_samples, num_steps, seed)
    cond = model.conditioning.in_turns(num_samples)
    with undisturbed(model), track(num_samples, 0, "measuring") as show:
        drawn = decoded(model, draw(model, cond, sampling, guidance_scale, show))
    labels = cond.get("class_labels")
    return Comparison(
        teacher=None,
        student=_measure(model, drawn, labels, num_steps, guidance_scale, reference),
        sample_shape=tuple(model.sample_shape),
        num_levels=model.process.num_levels,
        num_samples=num_samples,
        num_steps=num_steps,
        seed=seed,
        device=describe(model.device),
        gap_samples=0,
        gaps=(),
        same_noise_difference=0.0,
        other_noise_difference=None,
        measurement=measurement_of(reference, num_samples) if reference else None,
        class_names=_class_names(model.conditioning, reference),
        versions=versions(),
        asked_for="prompt" if "prompt" in cond else "class",
        samples=_first_samples({"student": drawn}, cond.get("prompt", labels)),
    )


def check_shapes(teacher: Denoiser, student: Denoiser) -> None:
    """Raise UsageError for models whose samples have different shapes."""
    if tuple(teacher.sample_shape) != tuple(student.sample_shape):
        raise UsageError(
            f"the samples of {teacher.name} have shape {tuple(teacher.sample_shape)}, those of "
            f"{student.name} {tuple(student.sample_shape)}: compare models of one shape"
        )


@torch.no_grad()
def level_gaps(
    teacher: Denoiser,
    student: Denoiser,
    x_0: Tensor,
    cond: Condition,
    seed: int,
    guidance_teacher: float = 1.0,
    guidance_student: float = 1.0,
) -> tuple[LevelGap, ...]:
    """Measure how far the outputs are apart at `GAP_LEVELS` levels, least noise first.

    x_0: [N, ...] samples of the teacher, noised to each level; cond: at least N rows. A student of
    another process is compared at the same signal-to-noise ratios.
    """
    student, count = on_levels_of(student, teacher.process), len(x_0)
    rows = {key: value[:count] for key, value in cond.items()}
    gaps = []
    for level in torch.linspace(0, teacher.process.num_levels - 1, GAP_LEVELS).long().unique():
        t = level.repeat(count)
        eps = torch.randn(x_0.shape, generator=generator("cpu", seed, "gap", int(level)))
        x = teacher.process.add_noise(x_0, eps, t)
        target = teacher.predict(Batch(x.to(teacher.device), t, rows, t), guidance_teacher)
        target = target._replace(
            x_0=target.x_0.to(student.device), eps=target.eps.to(student.device)
        )
        found = student.predict(Batch(x.to(student.device), t, rows, t), guidance_student)
        nothing = found._replace(output=torch.zeros_like(found.output))
        gap = float(simple_loss(student, found, target, t).mean())
        power = float(simple_loss(student, nothing, target, t).mean())
        gaps.append(LevelGap(int(level), gap, gap / power if power else 0.0))
    return tuple(gaps)


def _measure(
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor | None,
    num_steps: int,
    guidance_scale: float,
    reference: Reference | None,
) -> ModelResult:
    metrics = None
    if reference is not None:
        metrics = evaluate_images(images, known_labels(labels, reference), reference)
    return ModelResult(
        name=denoiser.name,
        network=network_name(denoiser),
        parameters=denoiser.num_parameters,
        macs=count_macs(denoiser),
        evaluations_per_second=evaluations_per_second(denoiser, SPEED_BATCH),
        guidance_scale=guidance_scale,
        metrics=metrics,
        evaluations_per_step=evaluations_per_step(denoiser, num_steps, guidance_scale),
        weights_mib=weights_mib(denoiser),
        evaluation_mib=evaluation_mib(denoiser, 1),
    )


def _from_other_noise(student: Tensor, teacher: Tensor) -> TeacherDistance | None:
    """How far apart the samples are, whatever their noise; latents are compared as they are."""
    some = student[:MOST], teacher[:MOST]
    if len(teacher) < 2 or not all(each.isfinite().all() for each in some):
        return None
    return paired_teacher_distance(*some)


def _class_names(conditioning: Conditioning, reference: Reference | None) -> tuple[str, ...] | None:
    """The model's names or first prompts, by their numbers; without any, those of the reference."""
    kind = kind_of(conditioning)
    known = reference.network.class_names if reference and kind.asks == "class_labels" else None
    return kind.shown_names(MOST_SHOWN) or known


def _other_noise_difference(
    teacher: Tensor, student: Tensor, labels: Tensor | None
) -> float | None:
    """Compare with the next sample of the same class: the classes come in turns."""
    turn = 1 if labels is None else len(labels.unique())
    if len(teacher) <= turn:
        return None
    return float((teacher[turn:] - student[:-turn]).abs().mean())


def _first_samples(drawn: dict[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
    """Keep enough samples to look at: six for each class, 40 to 100 in all."""
    count = 40 if labels is None else min(max(40, 6 * len(labels.unique())), MOST_SHOWN)
    samples = drawn if labels is None else {**drawn, "labels": labels}
    return {key: value[:count].clone() for key, value in samples.items()}


def versions() -> dict[str, str]:
    """The versions of dkdm, torch and diffusers that are in use."""
    import diffusers  # seconds, which a page that is written anew need not wait

    return {
        "dkdm": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def describe(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return str(device)
