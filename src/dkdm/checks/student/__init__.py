"""Check a student before its first step: what fails, what to know, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dkdm.checks.findings import Finding, not_ok
from dkdm.checks.student import behaviour, graphs, saving, training
from dkdm.checks.student.case import Case
from dkdm.config import ProcessName
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import PredictionType
from dkdm.core.saving.progress import track
from dkdm.errors import DkdmError
from dkdm.evaluation.cost import count_macs, evaluations_in_turns
from dkdm.evaluation.numbers import count
from dkdm.models.custom_network import Factory
from dkdm.models.student_process import with_process
from dkdm.shipping.graph.fault_line import fault_line, in_a_line
from dkdm.students import given_student, untried_student_of

__all__ = ["LOOKS", "Checkup", "check_student", "first_look"]

Look = Callable[[Case], Iterable[Finding]]
TIMED_BATCH = 8


@dataclass(frozen=True)
class Checkup:
    """The findings. failure: the error that ended the check early, if one did."""

    findings: list[Finding]
    failure: DkdmError | None = None

    @property
    def passed(self) -> bool:
        """Whether no finding keeps the student from being trained."""
        return all(each.status != "problem" for each in self.findings)


def check_student(
    student: str | Denoiser | nn.Module,
    teacher: Denoiser,
    *,
    prediction: PredictionType | None = None,
    process: ProcessName = "teacher",
    compile_backend: str | None = "aot_eager",
    export: bool = True,
    factory: Factory | None = None,
    only: Collection[str] | None = None,
) -> Checkup:
    """Try all that a student goes through, on small batches; takes seconds to a minute.

    student: a preset, a config.json, `module:factory`, or an object. prediction, process: the
    student's, if they are not the teacher's; see `with_process`. compile_backend: for
    torch.compile; None skips it. export: whether to try torch.export. factory: see
    `students.student_of`. only: names of the looks to take (see `LOOKS`); None takes all. Changes
    nothing but torch's compiler cache, which is emptied.
    """
    like = with_process(teacher, prediction, process)
    remake: Callable[[], Denoiser] | None = None
    try:
        if isinstance(student, str):
            remake = partial(untried_student_of, student, like, factory)
            made = remake()
        else:
            made = given_student(student, like)
    except DkdmError as error:
        return Checkup([_not_made(error)], error)
    try:
        case = Case(made, teacher, remake)
    except Exception as error:
        return _ended([], _not_copied(error), f"{made.name}: the network cannot be copied", error)
    findings = [_size(case)]
    try:
        findings += behaviour.shapes(case)
    except Exception as error:
        last = _not_called(case, error)
        return _ended(findings, last, f"{made.name}: the network fails", error)
    if findings[-1].status == "ok":
        looks = LOOKS | {"torch.compile": partial(graphs.compiles, backend=compile_backend or "")}
        skipped = {"torch.compile": compile_backend is None, "torch.export": not export}
        names = [n for n in looks if (only is None or n in only) and not skipped.get(n)]
        with track(len(names), 0, "checking") as show:
            for done, name in enumerate(names, start=1):
                findings += _looked(name, looks[name], case)
                show(done)
    return Checkup(findings)


def first_look(student: Denoiser, teacher: Denoiser) -> list[Finding]:
    """Inputs that a custom network ignores or mixes, and parameters that it does not use.

    A dozen evaluations of three samples and one backward pass; no random state is touched.
    """
    try:
        case = Case(student, teacher, None)
    except Exception as error:
        return [_not_copied(error)]
    with torch.random.fork_rng():
        return not_ok([each for name in FIRST for each in _looked(name, LOOKS[name], case)])


def _looked(name: str, look: Look, case: Case) -> Iterator[Finding]:
    """The findings of one look; an error is a finding too."""
    try:
        yield from look(case)
    except Exception as error:
        remedy = "the network fails here: correct that line"
        yield Finding(name, "problem", in_a_line(error, case.network), remedy)


def _ended(before: list[Finding], last: Finding, what: str, error: Exception) -> Checkup:
    failure = DkdmError(f"{what}: {last.what}")
    failure.__cause__ = error
    return Checkup([*before, last], failure)


def _not_made(error: DkdmError) -> Finding:
    cause = error.__cause__
    what = str(error) if cause is None else f"{error}{fault_line(error)}"
    remedy = (
        "put the module and all that it imports into the current folder, or install them"
        if isinstance(cause, ImportError)
        else "write a factory that is called as make(sample_shape, out_channels, conditioning) and "
        "returns an nn.Module"
    )
    return Finding("factory", "problem", what, remedy)


def _not_called(case: Case, error: Exception) -> Finding:
    names = "".join(f", {name}=..." for name in case.probe(1) if name not in ("x", "t"))
    remedy = f"let it be called as network(x_t, t{names}), with t as one float for each sample"
    return Finding("forward", "problem", in_a_line(error, case.network), remedy)


def _not_copied(error: Exception) -> Finding:
    remedy = (
        "make copy.deepcopy(network) work: its weights are averaged in a copy; for weight_norm use "
        "torch.nn.utils.parametrizations"
    )
    return Finding("copy", "problem", in_a_line(error), remedy)


def _size(case: Case) -> Finding:
    mine, theirs = case.student.num_parameters, case.teacher.num_parameters
    share = f", {mine / theirs:.1%} of the teacher's" if theirs else ""
    return Finding("network", "ok", f"{type(case.network).__name__}, {mine:,} parameters{share}")


def _speed(case: Case) -> list[Finding]:
    """Multiply-accumulates and evaluations a second, beside the teacher's."""
    models = case.student, case.teacher
    macs = [count_macs(model) for model in models]
    rates = evaluations_in_turns(models, TIMED_BATCH, 0.5)
    share = f" ({macs[0] / macs[1]:.1%} of the teacher's)" if macs[1] else ""
    what = (
        f"{count(macs[0])} MACs an evaluation{share}; {rates[0]:,.0f} evaluations a second in "
        f"batches of {TIMED_BATCH}, the teacher {rates[1]:,.0f}"
    )
    return [Finding("speed", "ok", what)]


LOOKS: dict[str, Look] = {
    "null condition": behaviour.null_class,
    "inputs": behaviour.untouched,
    "depends": behaviour.dependence,
    "samples": behaviour.batch_statistics,
    "gradients": training.gradients,
    "learns": training.learning,
    "bfloat16": behaviour.precision,
    "device": graphs.devices,
    "checkpointing": training.checkpointing,
    "shared weights": saving.shared,
    "plain tensors": saving.plain_tensors,
    "plain modules": saving.plain_modules,
    "reload": saving.reload,
    "shipping": saving.shipping,
    "torch.compile": graphs.compiles,
    "torch.export": graphs.exports,
    "speed": _speed,
}
FIRST = ("inputs", "depends", "samples", "gradients")
