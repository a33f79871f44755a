"""What a run does between its steps: it draws a grid, and measures which weights are best."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dkdm.config import EvaluationOptions, GuidanceOptions, RunConfig
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.saving.tolerance import tolerated
from dkdm.core.training.selection import Selection
from dkdm.core.training.trainer import Trainer
from dkdm.data.reference import Reference
from dkdm.evaluation.circumstances import weights_in_words
from dkdm.evaluation.metrics import METRICS
from dkdm.evaluation.same_noise import Sampling
from dkdm.evaluation.validation import Validation, how_in_words, validation_seed, watched
from dkdm.reading.notes import say
from dkdm.runs.outputs import UNGUIDED, sampling_guidance
from dkdm.shipping.pipeline_folder import write_pipeline

Validate = Callable[[int, Denoiser], Mapping[str, float]]


def check_metric(evaluation: EvaluationOptions) -> None:
    """Raise UsageError if `--validation-metric` names none; before a model is loaded."""
    if evaluation.validation_metric is not None:
        watched(evaluation.validation_metric)


def validate_by_metric(
    trainer: Trainer,
    config: RunConfig,
    reference: Reference | None,
    teacher: Denoiser | None = None,
    guidance: GuidanceOptions = UNGUIDED,
) -> None:
    """Let a trainer measure `--validation-metric` after each grid, and keep the best weights.

    Raises UsageError for a metric that this run cannot measure.
    """
    evaluation, student, name = (
        config.evaluation,
        trainer.student,
        config.evaluation.validation_metric,
    )
    if name is None:
        return
    sampling = Sampling(
        evaluation.validation_samples,
        evaluation.validation_sampling_steps,
        validation_seed(config.run.seed),
    )
    scales = sampling_guidance(evaluation, guidance, student)
    validation = Validation(name, sampling, scales, teacher, reference)
    validation.rehearse(student)
    _say_if_few(name, sampling.num_samples)
    better = watched(name).better
    assert better is not None  # by `watched`
    how = {**validation.how, "ema_decay": config.optimizing.ema_decay if trainer.ema else None}
    trainer.selection = Selection(config.run.output_dir, better, how, write_pipeline)
    trainer.validate = _measuring(trainer.validate, validation, trainer.selection)


def _measuring(
    draw_grid: Validate | None, validation: Validation, selection: Selection
) -> Validate:
    def validate(step: int, student: Denoiser) -> Mapping[str, float]:
        found = dict(draw_grid(step, student)) if draw_grid else {}
        value = validation.measure(student)
        with tolerated("the best weights are not kept", selection.output_dir):
            selection.offer(step, value, student)
        return {**found, validation.name: value}

    return validate


def shipped_weights(trainer: Trainer, evaluation: EvaluationOptions) -> str:
    """Which weights a finished run ships, in words."""
    best = best_weights(trainer, evaluation) if evaluation.ship_best else None
    decay = trainer.optimizing.ema_decay if trainer.ema else None
    return best or weights_in_words(trainer.step_number, decay)


def best_weights(trainer: Trainer, evaluation: EvaluationOptions) -> str | None:
    """Which weights lie in `best/`, in words; None if none do."""
    selection = trainer.selection
    if selection is None or (best := selection.best) is None:
        return None
    how, metric = how_in_words(selection.how), selection.how["metric"]
    value = watched(metric).format(best.value)
    every = f"validated every {evaluation.validation_steps:,} steps"
    chosen = f"the best by {metric} ({value}; {how}), {every}"
    decay = trainer.optimizing.ema_decay if trainer.ema else None
    return weights_in_words(best.step, decay, chosen)


def _say_if_few(name: str, count: int) -> None:
    least = METRICS[name].least if name in METRICS else 0
    if count < least:
        say(
            f"note: {name} of {count} samples (--validation-samples) compares the steps of this "
            f"run; published values need {least:,} or more"
        )
