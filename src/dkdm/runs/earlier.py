"""A run that exists already, as its folder says: its options, its teacher, the weights it ships."""

from __future__ import annotations

from pathlib import Path

from dkdm.config import DistillConfig, TrainConfig, read_config
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.saving.checkpoint import checkpoints
from dkdm.core.training.selection import RECORD, read_best
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.circumstances import weights_in_words
from dkdm.evaluation.results import read_evaluation
from dkdm.reading.fields import Fields, read_json
from dkdm.reading.made_here import was_made_here
from dkdm.reading.places import expanded
from dkdm.reading.plugins import named_code, split

AS_GIVEN = "as they are given"
Run = DistillConfig | TrainConfig


def run_folder(place: str | Path) -> Path:
    """The folder of a run: the place itself, or the one it is a checkpoint or the best weights of.

    The place need not be a run.
    """
    path = expanded(place)
    is_part = (path / RECORD).is_file() or path in checkpoints(path.parent)
    return path.parent if is_part else path


def run_of(place: str | Path) -> Run | None:
    """The options of the run that a place belongs to; None if it belongs to none.

    Raises UsageError for a run whose config.json is damaged.
    """
    file = run_folder(place) / "config.json"
    if not file.is_file():
        return None
    named = read_json(file, "a config").get("kind")
    kinds = DistillConfig.__name__, TrainConfig.__name__
    return read_config(file) if named in kinds else None


def distillation_of(place: str | Path) -> DistillConfig | None:
    """The options of the distillation that a place belongs to; None if it belongs to none."""
    run = run_of(place)
    return run if isinstance(run, DistillConfig) else None


def teacher_of(run: Run | None, otherwise: str = "give --teacher") -> Denoiser:
    """The teacher that a run names.

    otherwise: how to name it instead. Raises UsageError for code that only the run's folder names,
    and for what is no distillation.
    """
    from dkdm.models import chosen_teacher  # diffusers, which who only reads a folder does not need
    from dkdm.runs.teachers import named_teachers, teachers_of

    if not isinstance(run, DistillConfig):
        raise UsageError("the model is no run that names its teacher: give --teacher MODEL")
    choice, names = run.teacher_choice, named_teachers(run)
    for spec in (each for name in (*names, choice.factory) for each in named_code(name)):
        if not was_made_here({"spec": spec}, split(spec)[0]):
            raise UsageError(
                f"the run names code as its teacher, {spec}. If you trust that code, {otherwise} "
                f"{choice.model}"
            )
    return chosen_teacher(choice) if len(names) == 1 else teachers_of(run)


def weights_of(place: str | Path, run: Run | None) -> str:
    """Which weights a folder ships, in words: as its run says, or by the run's options."""
    path = expanded(place)
    if run is None:
        return AS_GIVEN
    decay = run.optimizing.ema_decay if run.optimizing.use_ema else None
    if (path / RECORD).is_file():
        best = read_best(path)
        step = Fields(best, str(path / RECORD)).whole("step")
        return weights_in_words(step, decay, f"the best by {best.get('metric')}")
    try:
        said = read_evaluation(path).weights
    except DkdmError:  # a run without a comparison at its end
        said = ""
    return said or weights_in_words(run.training.max_train_steps, decay)
