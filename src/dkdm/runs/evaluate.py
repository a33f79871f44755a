"""Measure a model's samples: drawn in shards that processes share, measured by the first one."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from dkdm.config import USUAL_STEPS, EvaluateCommand
from dkdm.core import processes
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.graphs import replayed
from dkdm.core.few_steps.model import FewStep, usual_steps
from dkdm.core.saving.progress import track
from dkdm.data.reference import Reference
from dkdm.errors import UsageError
from dkdm.evaluation.beside_teacher import NAMES
from dkdm.evaluation.circumstances import warnings_of
from dkdm.evaluation.comparison import check_shapes
from dkdm.evaluation.energy import MOST
from dkdm.evaluation.evaluated import Evaluation
from dkdm.evaluation.same_noise import Sampling
from dkdm.evaluation.shards import Drawing, draw_shards, missing_shards
from dkdm.models import chosen_teacher
from dkdm.models.place import place
from dkdm.reading.arguments import given
from dkdm.reading.files import cache_dir, check_output
from dkdm.runs.earlier import Run, weights_of
from dkdm.runs.judges import (
    Given,
    Standard,
    fitting,
    judged_teacher,
    known_run,
    named_metrics,
    ready,
    scales_of,
    single_images,
    standard_of,
)
from dkdm.runs.measure import (
    Plan,
    check_names,
    chosen_metrics,
    measured,
)

REFERENCE_SEED = 2**32  # beyond every --seed: samples that a model is measured against
RESULT = "evaluation.json"
PATIENCE = timedelta(days=7)  # how long a process waits for the others


def evaluate(
    model: str | Path | Denoiser,
    reference: Given = None,
    *,
    teacher: str | Path | Denoiser | None = None,
    **options: Any,
) -> Evaluation:
    """Measure a model's samples against real images, another model, or its teacher.

    model, reference, teacher: what the command line takes; models as a `Denoiser` too, and a
    reference as a `Reference`. options: those of `dkdm evaluate` by their names, such as
    num_samples=500, sampler="heun", metrics="fd,kid". Every process of `accelerate launch` draws
    its part and returns the same. Raises UsageError for options that do not fit together or to the
    model, DkdmError for samples that are not finite.
    """
    named = {"model": model, "reference": reference, "teacher": teacher}
    texts = {
        key: given(f"evaluate: {key}", value, str, "give a path, a name or a dkdm.Denoiser")
        for key, value in named.items()
        if value is not None and not isinstance(value, (Denoiser, Reference))
    }
    command = EvaluateCommand(**{**options, **texts})
    objects: dict[str, Any] = {key: value for key, value in named.items() if key not in texts}
    return run_evaluation(command, **objects)


def run_evaluation(
    command: EvaluateCommand,
    model: Denoiser | None = None,
    reference: Denoiser | Reference | None = None,
    teacher: Denoiser | None = None,
) -> Evaluation:
    """Measure as the options say; models and a reference that are given stand for their names."""
    with processes.quiet_unless_main():
        return _evaluated(command, model, reference, teacher)


def _evaluated(
    command: EvaluateCommand,
    model: Denoiser | None,
    reference: Denoiser | Reference | None,
    teacher: Denoiser | None,
) -> Evaluation:
    _check_first(command)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    plan = planned(command, state.device, model, reference, teacher)
    root = command.files.output or cache_dir("evaluations")
    count, network = command.sampling.num_samples, plan.standard.network
    warnings = warnings_of(plan.metrics, count, network)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for drawing in plan.drawings:
        draw_own(drawing, root, state.process_index, state.num_processes)
    state.wait_for_everyone()
    result = plan.own.folder(root) / RESULT
    if not state.is_main_process:
        state.wait_for_everyone()
        return Evaluation.read(result)
    found = measured(plan, root)
    for path in (result, command.files.json):
        if path is not None:
            found.write(path)
    state.wait_for_everyone()
    return found


def _check_first(command: EvaluateCommand) -> None:
    """Raise UsageError for what can be refused before a model is loaded."""
    files = command.files
    if files.json is not None:
        check_output("--json", files.json, suffixes=(".json",), overwrite=True)
    if files.output is not None:
        check_output("--output", files.output, folder=True, overwrite=True)
    device = command.measurement.feature_device
    try:
        torch.device(device or "cpu")
    except RuntimeError as error:
        raise UsageError(f"--feature-device {device}: give a device such as cpu or cuda") from error
    check_names(named_metrics(command.measurement))


def planned(
    command: EvaluateCommand,
    device: torch.device,
    model: Denoiser | None = None,
    reference: Denoiser | Reference | None = None,
    teacher: Denoiser | None = None,
) -> Plan:
    """Open all that the options name and check that it fits together; nothing is drawn."""
    run = None if model else known_run(command.model_choice.model)
    model = model or chosen_teacher(command.model_choice)
    steps = command.sampling.steps or usual_steps(model, USUAL_STEPS)
    command = replace(command, steps=steps)
    scales = scales_of(command, run, model)
    model = ready(model, command, scales[0])
    teacher = teacher or _teacher(command, run)
    if teacher is not None:
        check_shapes(teacher, model)
        teacher = ready(teacher, fitting(command, teacher), scales[1])
    for each in (model, teacher):
        if each is not None:
            place(each, device)
    if command.sampling.cuda_graphs:  # first, since the teacher may be the reference too
        model, teacher = replayed(model), teacher and replayed(teacher)
    given = reference or command.measurement.reference
    standard = standard_of(given, model, teacher, command, device, scales[0])
    metrics, beside = chosen_metrics(command, standard, teacher)
    if isinstance(model, FewStep):  # whose steps lead over many levels, not to the output at one
        beside = tuple(name for name in beside if name != "gap")
    if standard.model is not None:
        place(standard.model, device)
    own, teachers, others = _drawings(command, model, teacher, standard, scales, beside)
    place_of_network = command.measurement.feature_device or str(device)
    single = single_images(command, own, teacher, scales[1], metrics, place_of_network)
    own = replace(own, single=single)
    weights = weights_of(command.model_choice.model, run)
    return Plan(command, weights, standard, metrics, beside, own, teachers, others)


def _teacher(command: EvaluateCommand, run: Run | None) -> Denoiser | None:
    """The teacher, if something is measured with it."""
    names = named_metrics(command.measurement)
    asked = command.measurement.reference == "teacher" or bool(set(names) & {*NAMES, "lpips"})
    unwanted = names and not asked
    return None if unwanted else judged_teacher(command.teacher_choice, run, asked)


def _drawings(
    command: EvaluateCommand,
    model: Denoiser,
    teacher: Denoiser | None,
    standard: Standard,
    scales: tuple[float, float],
    beside: tuple[str, ...],
) -> tuple[Drawing, Drawing | None, Drawing | None]:
    how, network = command.sampling, standard.network
    cond = model.conditioning.in_turns(how.num_samples)
    sampling = Sampling(how.num_samples, how.num_steps, how.seed, how.sampler, how.batch_size)
    few = min(how.num_samples, MOST) if beside else 0
    own = Drawing(model, cond, sampling, scales[0], network, few)
    fixed, others = replace(sampling, seed=REFERENCE_SEED), None

    def steps_of(other: Denoiser) -> Sampling:
        """As the model; beside a few-step model, in the steps that the other one needs."""
        if not isinstance(model, FewStep):
            return fixed
        many = max(sampling.num_steps, USUAL_STEPS)
        return replace(fixed, num_steps=usual_steps(other, many))

    if standard.model is not None and network is not None:
        if standard.model is teacher:
            both = Drawing(standard.model, cond, steps_of(standard.model), scales[1], network, few)
            return own, both, both
        its = standard.model.conditioning.in_turns(how.num_samples)
        others = Drawing(standard.model, its, steps_of(standard.model), scales[0], network)
    if teacher is None or not beside:
        return own, None, others
    sampled = replace(steps_of(teacher), num_samples=few)
    return own, Drawing(teacher, cond, sampled, scales[1], None, few), others


def draw_own(drawing: Drawing, root: Path, rank: int, world: int) -> None:
    """Draw the shards of this process that are not on disk yet."""
    shards = missing_shards(drawing, root, rank, world)
    total = sum(len(shard.indices) for shard in drawing.shards(root)[rank::world])
    found = total - sum(len(shard.indices) for shard in shards)
    with track(total, found, f"drawing from {drawing.denoiser.name}") as show:
        draw_shards(drawing, root, shards, lambda count: show(found + count))
