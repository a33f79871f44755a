"""What two models expect of a clean sample on the way to it, from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.diffusion.prediction import Prediction, clip_x_0
from dkdm.core.diffusion.steps import sample
from dkdm.core.objectives.positions import evenly
from dkdm.core.saving.checkpoint import write_tensors
from dkdm.core.saving.checksums import sums_of
from dkdm.errors import DkdmError
from dkdm.evaluation.cost import undisturbed
from dkdm.evaluation.results import read_tensors_of
from dkdm.evaluation.same_noise import Sampling, decoded, shared_noise

TRAJECTORIES = "samples/trajectories.safetensors"
COLUMNS = 8  # moments that are kept of a trajectory, the finished sample among them
PARTS = {"teacher", "student", "teacher_t", "student_t"}


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Samplings of a teacher and a student from the same noise, at a few moments.

    teacher, student: [N, K, ...] the clean samples they expected, as images where they are latents;
    the last of K is the finished sample. teacher_t, student_t: int64 [K - 1] levels that they
    expected it at. labels: int64 [N] classes or prompts, None without.
    """

    teacher: Tensor
    student: Tensor
    teacher_t: Tensor
    student_t: Tensor
    labels: Tensor | None = None

    def save(self, run_dir: Path) -> None:
        """Write `samples/trajectories.safetensors` into a run folder."""
        tensors = {name: getattr(self, name) for name in sorted(PARTS)}
        tensors |= {} if self.labels is None else {"labels": self.labels}
        write_tensors(run_dir / TRAJECTORIES, tensors, sums_of(tensors))


def read_trajectories(run_dir: Path) -> Trajectories | None:
    """Read what `Trajectories.save` wrote; None if there is no file, as in earlier runs.

    Raises `DkdmError` if it is damaged.
    """
    if not (run_dir / TRAJECTORIES).exists():
        return None
    tensors = read_tensors_of(run_dir, TRAJECTORIES)
    if tensors.keys() - {"labels"} != PARTS:
        raise DkdmError(f"{TRAJECTORIES} holds {', '.join(tensors)}, no trajectories")
    found = Trajectories(**tensors)
    if not _fit(found):
        raise DkdmError(f"{TRAJECTORIES} holds tensors that do not fit together")
    return found


def _fit(found: Trajectories) -> bool:
    samples, shape = (found.teacher, found.student), found.teacher.shape
    if not 3 <= len(shape) <= 6 or not min(shape):
        return False
    labels = torch.zeros(shape[0], dtype=torch.int64) if found.labels is None else found.labels
    whole = found.teacher_t, found.student_t, labels
    sizes = (shape[1] - 1,), (shape[1] - 1,), (shape[0],)
    return (
        all(each.shape == shape and each.is_floating_point() for each in samples)
        and not any(each.is_floating_point() for each in whole)
        and [tuple(each.shape) for each in whole] == [*sizes]
    )


@torch.no_grad()
def trajectory(
    denoiser: Denoiser, cond: Condition, sampling: Sampling, guidance_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw samples by DDIM and keep the x_0 that was expected at evenly spaced steps.

    cond: one row a sample. Returns levels int64 [K - 1] and clean samples [N, K, ...] in pixels on
    the CPU, the last the finished ones; K is `COLUMNS`, less if there are fewer steps. The same
    samples as `same_noise.draw` gives for this `sampling`.
    """
    process, seen = denoiser.process, dict[int, Tensor]()
    steps = process.timesteps(sampling.num_steps)
    kept = [steps[i] for i in evenly(min(COLUMNS - 1, len(steps)), len(steps))]

    def predict(x: Tensor, t: Tensor) -> Prediction:
        found = denoiser.predict(Batch(x, t, cond), guidance_scale)
        if int(t[0]) in kept:
            seen[int(t[0])] = clip_x_0(found, x, *process.at(t), process.clipping).x_0
        return found

    noise = shared_noise(denoiser, sampling.seed, range(sampling.num_samples))
    x = process.start_std * noise(-1).to(denoiser.device)
    with undisturbed(denoiser):
        last = sample(predict, process, denoiser.parameterization, x, steps, noise)
    states = torch.stack([*(seen[t] for t in kept), last], dim=1)
    pixels = decoded(denoiser, states.flatten(0, 1))
    return torch.tensor(kept), pixels.unflatten(0, states.shape[:2])


def trajectories(
    teacher: Denoiser, student: Denoiser, sampling: Sampling, guidance: tuple[float, float]
) -> Trajectories:
    """The first samples of a comparison on their way, of both models.

    guidance: scales of teacher and student.
    """
    cond: Mapping[str, Tensor] = student.conditioning.in_turns(sampling.num_samples)
    levels, ways = zip(
        trajectory(teacher, dict(cond), sampling, guidance[0]),
        trajectory(student, dict(cond), sampling, guidance[1]),
        strict=True,
    )
    labels = cond.get("prompt", cond.get("class_labels"))
    return Trajectories(*ways, *levels, labels)
