"""A student before its first step: what does not work, what to know, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dkdm.checks.findings import Finding, not_ok
from dkdm.checks.student import behaviour, graphs, saving, training
from dkdm.checks.student.case import Case
from dkdm.config import ProcessName
from dkdm.core.denoiser import Denoiser
from dkdm.core.prediction import PredictionType
from dkdm.core.progress import track
from dkdm.errors import DkdmError
from dkdm.evaluation.cost import count_macs, evaluations_per_second
from dkdm.models.own_network import Factory, is_own
from dkdm.models.student_process import with_process
from dkdm.shipping.graph.fault_line import fault_line, in_a_line, in_brackets
from dkdm.students import as_denoiser, given_student, untried_student_of

__all__ = ["Checkup", "check_student", "first_look"]

Look = Callable[[Case], Iterable[Finding]]
TIMED_BATCH = 8


@dataclass(frozen=True)
class Checkup:
    """What was found. failure: the error that ended it before the last check; None else."""

    findings: list[Finding]
    failure: DkdmError | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing that was found keeps the student from being trained."""
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
) -> Checkup:
    """Try all that a student will go through, on small batches; takes seconds to a minute.

    student: a preset, a config.json, `module:factory`, or an object. prediction, process: its own,
    where they are not the teacher's, see `matching.with_process`. compile_backend: of
    torch.compile; None leaves it out. export: whether torch.export is tried. factory: see
    `students.student_of`. Nothing is changed but torch's compiler cache, which is emptied.
    """
    like = with_process(teacher, prediction, process)
    try:
        learner = _made(student, like, factory)
    except DkdmError as error:
        return Checkup([_not_made(error)], error)
    rebuilt = partial(_remade, student, like, factory) if isinstance(student, str) else None
    try:
        case = Case(learner, teacher, rebuilt)
    except Exception as error:
        failure = DkdmError(f"{learner.name}: the network cannot be copied: {in_a_line(error)}")
        failure.__cause__ = error
        return Checkup([_not_copied(error)], failure)
    try:
        first = list(behaviour.shapes(case))
    except Exception as error:
        failure = DkdmError(f"{learner.name}: the network fails: {in_a_line(error, case.network)}")
        failure.__cause__ = error
        return Checkup([*_facts(case), _not_called(case, error)], failure)
    findings = [*_facts(case), *first]
    if first[-1].status == "ok":
        looks = _looks(compile_backend, export)
        with track(len(looks), 0, "checking") as show:
            for done, (name, look) in enumerate(looks.items(), start=1):
                findings += _looked(name, look, case)
                show(done)
    return Checkup(findings)


def first_look(student: Denoiser, teacher: Denoiser) -> list[Finding]:
    """Of a user's own network, inputs that it ignores or mixes and parameters that it does not use.

    A dozen evaluations of three samples and one backward pass; no random state is touched. Networks
    of diffusers and dkdm are not looked at.
    """
    network = student.network
    if not isinstance(network, nn.Module) or not is_own(network):
        return []
    try:
        case = Case(student, teacher, None)
    except Exception as error:
        return [_not_copied(error)]
    looks: dict[str, Look] = {
        "inputs": behaviour.untouched,
        "depends": behaviour.dependence,
        "samples": behaviour.batch_statistics,
        "gradients": training.gradients,
    }
    with torch.random.fork_rng():
        return not_ok([each for name, look in looks.items() for each in _looked(name, look, case)])


def _looks(compile_backend: str | None, export: bool) -> dict[str, Look]:
    looks: dict[str, Look] = {
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
    }
    if compile_backend is not None:
        looks["torch.compile"] = partial(graphs.compiles, backend=compile_backend)
    return looks | ({"torch.export": graphs.exports} if export else {}) | {"speed": _speed}


def _looked(name: str, look: Look, case: Case) -> Iterator[Finding]:
    """The findings of one check; one that fails is a finding too."""
    try:
        yield from look(case)
    except Exception as error:
        remedy = "the network fails here: mend that line"
        yield Finding(name, "problem", in_a_line(error, case.network), remedy)


def _made(
    student: str | Denoiser | nn.Module, teacher: Denoiser, factory: Factory | None
) -> Denoiser:
    if isinstance(student, str):
        return untried_student_of(student, teacher, factory)
    if isinstance(student, nn.Module):
        student = as_denoiser(type(student).__name__, student, teacher)
    return given_student(student)


def _remade(student: str, teacher: Denoiser, factory: Factory | None) -> nn.Module:
    model = untried_student_of(student, teacher, factory)
    network: nn.Module = model.network  # type: ignore[assignment]
    return network


def _not_made(error: DkdmError) -> Finding:
    cause = error.__cause__
    what = str(error) if cause is None else f"{error}{in_brackets(fault_line(error))}"
    remedy = (
        "the module must be importable where dkdm runs: in the current folder or installed, with "
        "all that it imports"
        if isinstance(cause, ImportError)
        else "a factory is called as make(sample_shape, out_channels, conditioning) and returns an "
        "nn.Module"
    )
    return Finding("factory", "problem", what, remedy)


def _not_called(case: Case, error: Exception) -> Finding:
    names = "".join(f", {name}=..." for name in case.probe(1).cond)
    remedy = f"it is called as network(x_t, t{names}), t a float for each sample"
    return Finding("forward", "problem", in_a_line(error, case.network), remedy)


def _not_copied(error: Exception) -> Finding:
    remedy = (
        "weights are averaged in a copy.deepcopy(network), which must work; for weight_norm take "
        "that of torch.nn.utils.parametrizations"
    )
    return Finding("copy", "problem", in_a_line(error), remedy)


def _facts(case: Case) -> Iterator[Finding]:
    mine, theirs = case.student.num_parameters, case.teacher.num_parameters
    share = f", {mine / theirs:.1%} of the teacher's" if theirs else ""
    yield Finding("network", "ok", f"{type(case.network).__name__}, {mine:,} parameters{share}")


def _speed(case: Case) -> Iterator[Finding]:
    """Multiply-accumulates and evaluations a second, beside the teacher's."""
    macs = [count_macs(model) for model in (case.student, case.teacher)]
    rates = [
        evaluations_per_second(model, TIMED_BATCH, 0.5) for model in (case.student, case.teacher)
    ]
    share = f" ({macs[0] / macs[1]:.1%} of the teacher's)" if macs[1] else ""
    yield Finding(
        "speed",
        "ok",
        f"{macs[0]:,} MACs an evaluation{share}; {rates[0]:,.0f} evaluations a second in batches "
        f"of {TIMED_BATCH}, the teacher {rates[1]:,.0f}",
    )
