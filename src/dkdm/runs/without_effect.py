"""Options that are given and change nothing, since another option rules them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dkdm.config import DistillConfig, RunConfig
from dkdm.reading.options import flag
from dkdm.runs.arms import ARMS
from dkdm.runs.programs import OBJECTIVES
from dkdm.runs.side_by_side import listed
from dkdm.runs.source import OF_A_FILL


class Rule(NamedTuple):
    """Options that change nothing if `applies`, because of what `because` names."""

    because: str
    options: tuple[str, ...]
    applies: Callable[[Any], bool]


IN_EVERY_RUN = (
    Rule("--lr-scheduler constant", ("lr_warmup_steps",), lambda c: c.lr_scheduler == "constant"),
    Rule("--no-cuda-graphs", ("accelerate",), lambda c: not c.cuda_graphs),
    Rule("--no-use-ema", ("ema_decay",), lambda c: not c.use_ema),
    Rule(
        "this --loss-weighting",
        ("snr_gamma",),
        lambda c: c.loss_weighting not in ("auto", "capped", "min-snr"),
    ),
    Rule("no --validation-metric", ("validation_samples",), lambda c: c.validation_metric is None),
)
IN_A_DISTILLATION = (
    Rule("--feature-weight 0", ("feature_layers",), lambda c: not c.feature_weight),
    Rule("--guidance-scale 1", ("guidance_on",), lambda c: c.guidance.is_off),
    Rule("--teacher-device", ("teacher_prefetch",), lambda c: c.teacher_device is not None),
    Rule("--pool-size", ("rho",), lambda c: c.pool_size is not None),
    Rule("this --fill", ("fill_steps", "fill_entries"), lambda c: c.fill != "few-step"),
    Rule("--synthetic-samples", OF_A_FILL, lambda c: c.synthetic_samples is not None),
    Rule("this --source", ("synthetic_steps",), lambda c: c.source != "synthetic"),
    Rule("this --source", ("mixed_share",), lambda c: c.source != "mixed"),
    Rule(
        "this --source",
        ("images_share", "images_target"),
        lambda c: not ARMS[c.source].images,
    ),
)


def without_effect(config: RunConfig) -> list[str]:
    """A note for each reason why options that are not at their defaults change nothing."""
    default = type(config)()
    idle: dict[str, dict[str, None]] = {}
    for because, options, _ in filter(lambda rule: rule.applies(config), _rules(config)):
        given = [name for name in options if getattr(config, name) != getattr(default, name)]
        idle.setdefault(because, {}).update(dict.fromkeys(given))
    return [
        f"note: {listed([*map(flag, names)])} {'changes' if len(names) == 1 else 'change'} "
        f"nothing with {because}"
        for because, names in idle.items()
        if names
    ]


def _rules(config: RunConfig) -> tuple[Rule, ...]:
    if not isinstance(config, DistillConfig):
        return IN_EVERY_RUN
    arm, program = ARMS[config.pool.source], OBJECTIVES[config.few_steps.objective]
    return (
        *IN_EVERY_RUN,
        *IN_A_DISTILLATION,
        Rule("this --source", arm.ignores, lambda _: True),
        Rule("this --objective", program.ignores, lambda _: True),
    )
