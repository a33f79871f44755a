"""Options that are left open, decided by the teacher and by what the student starts from.

An error of eps is sigma / alpha times as large in x_0, so a short run of an eps student is worst at
the noisiest levels, where every sample starts. Muon takes a new network further in as many steps
as AdamW. `docs/evidence.md` has the numbers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open

from dkdm.config import DistillConfig, RunConfig, StudentOptions
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.process import Process
from dkdm.core.saving.checkpoint import SOURCE
from dkdm.errors import UsageError
from dkdm.runs.earlier import distillation_of, run_of

Config = TypeVar("Config", bound=RunConfig)


def with_defaults(config: DistillConfig, teacher: Denoiser, found: Path | None) -> DistillConfig:
    """The config with `student_prediction`, `loss_weighting`, the optimizer and, where a run goes
    on, the size of its pool and the `teacher_dtype` of one that computed in float32 decided.

    A new student of an eps teacher that clips x_0 predicts v, capped at low noise; so does one that
    goes on from a run of such a student. found: the checkpoint that the run goes on from, if any;
    its run decides both. Raises UsageError if that run cannot be found.
    """
    choice = config.student_choice
    begun = distillation_of(found.parent) if found else _start_of(choice.student_init)
    prediction, weighting = choice.student_prediction, config.loss.loss_weighting
    if prediction is None and begun is not None:
        prediction = begun.student_choice.student_prediction
    elif prediction is None and _predicts_v(choice, teacher):
        if found:
            raise UsageError(
                f"{found} has no config.json of its run beside it: say what its student predicts, "
                "--student-prediction epsilon or v_prediction"
            )
        prediction = "v_prediction"
        weighting = "capped" if weighting == "auto" else weighting
    if weighting == "auto":
        weighting = begun.loss.loss_weighting if begun and found else "uniform"
    if found and begun is not None and begun.teacher_choice.dtype == "float32":
        config = replace(config, teacher_dtype=config.teacher_choice.dtype or "float32")
    config = replace(config, student_prediction=prediction, loss_weighting=weighting)
    config = with_pool_of(found, config)
    new = choice.student_init == "random" and choice.lora_rank is None
    return with_optimizer(config, found, new)


def with_pool_of(found: Path | None, config: DistillConfig) -> DistillConfig:
    """The config with the size of its pool, or of each teacher's, as in a checkpoint if left open.

    found: the checkpoint; None changes nothing.
    """
    if found is None or config.pool.pool_size is not None:
        return config
    sizes = pool_sizes_of(found)
    if len(sizes) == 1:
        return replace(config, pool_size=sizes[0])
    asked = config.teachers.teacher_pool_size
    return replace(config, teacher_pool_size=asked or tuple(sizes) or None)


def pool_sizes_of(found: Path) -> list[int]:
    """Entries of the pool in a checkpoint, or of the pools of several teachers."""
    source = found / SOURCE
    folders = sorted(source.glob("teacher-*"), key=lambda path: int(path.name.partition("-")[2]))
    sizes = [_pool_size_in(folder) for folder in folders or [source]]
    return [size for size in sizes if size is not None]


def _pool_size_in(folder: Path) -> int | None:
    for path in folder.glob("shard-*.safetensors"):
        with safe_open(path, "pt") as file:
            return int(file.get_tensor("size")) if "size" in set(file.keys()) else None
    return None


def with_optimizer(config: Config, found: Path | None, new: bool) -> Config:
    """The config with `optimizer`, `learning_rate` and `lr_scheduler` decided.

    found: the checkpoint that the run goes on from, if any: as before. new: whether the network
    starts from random weights. Raises UsageError for another optimizer than that of the run.
    """
    options, begun = config.optimizing, run_of(found.parent) if found else None
    if begun is not None:
        before = begun.optimizing.decided(new=False).optimizer
        if options.optimizer not in ("auto", before):
            raise UsageError(
                f"{found} was written by a run with --optimizer {before}: go on with the same, or "
                "start a new run"
            )
        options = replace(options, optimizer=before)
    if begun is not None and options.learning_rate is None:
        options = replace(options, learning_rate=begun.optimizing.learning_rate)
    if begun is not None and options.lr_scheduler == "auto":
        options = replace(options, lr_scheduler=begun.optimizing.lr_scheduler)
    options = options.decided(new and found is None)
    decided = ("optimizer", "learning_rate", "lr_scheduler")
    return replace(config, **{name: getattr(options, name) for name in decided})


def _start_of(student_init: str) -> DistillConfig | None:
    """The distillation whose weights a student starts from; None if it starts from others."""
    return None if student_init in ("random", "teacher") else distillation_of(student_init)


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
