"""What of a run several processes can share, and what they cannot."""

from __future__ import annotations

from dkdm.config import DistillConfig
from dkdm.errors import UsageError


def check_shared(config: DistillConfig, has_objects: bool = False) -> None:
    """Raise UsageError for options of a run that only one process can carry out.

    has_objects: whether a model was given as an object, which every part of a run would shard.
    """
    training, objective = config.training, config.few_steps.objective
    unshared = {
        f"--objective {objective} with --fsdp, of models that are given as objects": (
            has_objects and objective != "dkdm" and training.fsdp != "none",
            "give their folders, or --fsdp none",
        ),
        "--mixed-precision fp16": (
            training.mixed_precision == "fp16" and training.fsdp != "none",
            "give bf16, or --fsdp none",
        ),
    }
    for option, (is_asked, remedy) in (unshared | _of_sharded_teachers(config)).items():
        if is_asked:
            raise UsageError(f"{option} cannot be shared by several processes: {remedy}")


def _of_sharded_teachers(config: DistillConfig) -> dict[str, tuple[bool, str]]:
    """What a teacher that all processes ask together cannot do: answer the main process alone."""
    if config.training.fsdp not in ("teacher", "both"):
        return {}
    asked, evaluation = f"--fsdp {config.training.fsdp}", config.evaluation
    alone = f"{asked} beside a validation, an evaluation or a check of the teacher"
    measures = evaluation.validation_steps or evaluation.evaluation_samples
    return {
        alone: (
            bool(measures) or config.teacher_choice.check,
            "give --validation-steps 0 --evaluation-samples 0 --no-check, and measure with dkdm "
            "evaluate",
        ),
        f"{asked} with several teachers": (
            bool(config.teachers.more_teachers),
            "give --fsdp student or none",
        ),
        f"{asked} with --teacher-prefetch": (config.teacher_choice.prefetch, "remove it"),
        f"{asked} with --source synthetic": (
            config.pool.source == "synthetic",
            "give another --source, or --fsdp student or none",
        ),
        f"{asked} with --teacher-offload or int8": (
            config.teacher_choice.offload != "none" or config.teacher_choice.dtype == "int8",
            "leave them out",
        ),
    }
