"""Options that are left open, decided by the teacher: what the student predicts, and its weights.

An error of eps is sigma / alpha times as large in x_0, so a short run of an eps student is worst at
the noisiest levels, where every sample starts; `docs/evidence.md` has the numbers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dkdm.config import DistillConfig, StudentOptions, read_config
from dkdm.core.checkpoint import checkpoints
from dkdm.core.denoiser import Denoiser
from dkdm.core.process import Process
from dkdm.errors import UsageError


def with_defaults(config: DistillConfig, teacher: Denoiser, found: Path | None) -> DistillConfig:
    """The config with `student_prediction` and `loss_weighting` decided.

    A new student of an eps teacher that clips x_0 predicts v, capped at low noise; so does one that
    goes on from a run of such a student. found: the checkpoint that the run goes on from, if any;
    its run decides both. Raises UsageError if that run cannot be found.
    """
    begun = _begun(found.parent if found else Path(config.student_choice.student_init))
    prediction, weighting = config.student_choice.student_prediction, config.loss.loss_weighting
    if prediction is None and begun is not None:
        prediction = begun.student_choice.student_prediction
    elif prediction is None and _predicts_v(config.student_choice, teacher):
        if found:
            raise UsageError(
                f"{found} has no config.json of its run beside it: say what its student predicts, "
                "--student-prediction epsilon or v_prediction"
            )
        prediction = "v_prediction"
        weighting = "capped" if weighting == "auto" else weighting
    if weighting == "auto":
        weighting = begun.loss.loss_weighting if begun and found else "uniform"
    return replace(config, student_prediction=prediction, loss_weighting=weighting)


def _begun(folder: Path) -> DistillConfig | None:
    """The config of the distillation in a folder, if one is there."""
    file = folder / "config.json"
    config = read_config(file) if file.is_file() and checkpoints(folder) else None
    return config if isinstance(config, DistillConfig) else None


def _predicts_v(choice: StudentOptions, teacher: Denoiser) -> bool:
    new = choice.student_init == "random" and choice.student_process == "teacher"
    predicts_eps = teacher.parameterization.prediction == "epsilon"
    # else the teacher's error of eps, 1 / alpha times as large in v, would be the target
    clips = teacher.process.clipping.range is not None
    return new and predicts_eps and clips and _keeps_variance(teacher.process)


def _keeps_variance(process: Process) -> bool:
    """Whether alpha^2 + sigma^2 = 1 at all levels, as v is defined for."""
    total = process.alpha**2 + process.sigma**2
    return torch.allclose(total, torch.ones_like(total))
