"""Inputs and output: shapes, precision, and what the output depends on."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dkdm.checks.findings import Finding, Status
from dkdm.checks.student.case import Case, Probe, differ, with_rows_of
from dkdm.core.denoisers.kinds import null_or_none
from dkdm.shipping.graph.fault_line import in_a_line


@torch.no_grad()
def shapes(case: Case) -> Iterator[Finding]:
    """The output's shape for several batches, in both modes, and at the first and last level."""
    network = case.copied()
    for count, training, reach in ((3, False, 0.8), (1, False, 0.8), (3, True, 0.8), (2, False, 1)):
        probe = case.probe(count, reach=reach)
        output = case.answer(network.train(training), probe)
        wanted = (count, case.student.out_channels, *probe["x"].shape[2:])
        if tuple(output.shape) != wanted:
            mode = "training" if training else "evaluation"
            given = f"{count} samples of {tuple(case.student.sample_shape)}"
            what = f"gives {tuple(output.shape)} for {given} in {mode} mode, instead of {wanted}"
            remedy = "return as many channels as the factory's second argument says"
            yield Finding("shapes", "problem", what, remedy)
            return
        if not output.isfinite().all():
            times = ", ".join(f"{time:g}" for time in probe["t"].tolist())
            what = f"not finite for {count} random samples at t = {times}"
            remedy = "look for a division by zero, a log or a root of the times, or empty weights"
            yield Finding("shapes", "problem", what, remedy)
            return
    yield Finding("shapes", "ok", f"{wanted[1:]}, finite, for 1 and 3 samples")


@torch.no_grad()
def null_class(case: Case) -> list[Finding]:
    """Whether it takes the null condition, which guidance and condition dropout need."""
    if not null_or_none(case.student.conditioning, 2):
        return []
    try:
        case.answer(case.perturbed, case.probe(2, null=True))
    except Exception as error:
        remedy = "with null_class, a table of classes needs max(num_classes, null_class + 1) rows"
        return [Finding("null condition", "problem", in_a_line(error, case.perturbed), remedy)]
    return [Finding("null condition", "ok", "works")]


@torch.no_grad()
def untouched(case: Case) -> list[Finding]:
    """Whether it leaves its inputs unchanged: the loss and the teacher's step read them again."""
    before = case.probe(3)
    fed = {name: value.clone() for name, value in before.items()}
    case.evaluate(case.perturbed, fed)
    changed = [name for name in fed if not torch.equal(fed[name], before[name])]
    what = f"the network changes its {' and '.join(changed)} in place"
    remedy = "write x = x + ... instead of x += ..., and call no .mul_() on an argument"
    return [Finding("inputs", "problem", what, remedy)] if changed else []


@torch.no_grad()
def precision(case: Case) -> Iterator[Finding]:
    """bfloat16, as weights and by autocast."""
    probe = case.probe(3)
    floating = {n: v for n, v in probe.items() if v.is_floating_point() and n != "t"}
    half = probe | {name: value.bfloat16() for name, value in floating.items()}

    def as_weights() -> Tensor:
        network = nn.Module.to(case.copied(), torch.bfloat16)  # diffusers' own to() logs advice
        return case.answer(network.eval(), half)

    def by_autocast() -> Tensor:
        with torch.autocast(case.student.device.type, torch.bfloat16):
            return case.answer(case.copied().eval(), probe)

    cast = "cast what you compute from t to x.dtype before the first layer (t stays float32)"
    without = "--mixed-precision bf16 fails: leave it out, or correct this line"
    for name, try_it, remedy in (
        ("bfloat16 weights", as_weights, cast),
        ("autocast", by_autocast, without),
    ):
        try:
            output = try_it()
        except Exception as error:
            yield Finding(name, "warning", in_a_line(error, case.network), remedy)
            continue
        finite = bool(output.isfinite().all())
        what = f"works, gives {str(output.dtype).removeprefix('torch.')}" if finite else "overflows"
        yield Finding(name, "ok" if finite else "warning", what, None if finite else remedy)


@torch.no_grad()
def dependence(case: Case) -> Iterator[Finding]:
    """Whether each sample's output depends on each of its inputs, and on nothing else."""
    one = case.probe(3)
    other = case.other_probe(one)
    output = case.answer(case.perturbed, one)
    if differ(output, case.answer(case.perturbed, one)):
        what = "two evaluations of the same input differ in evaluation mode"
        remedy = "draw random numbers in training mode only; what it depends on was not checked"
        yield Finding("deterministic", "warning", what, remedy)
        return
    for name in one:
        if name in case.student.constants or name == "guidance":
            continue
        if torch.equal(one[name], other[name]):
            what = f"could not be checked: {name} has a single value"
            yield Finding(f"uses {name}", "ok", what)
            continue
        changed = case.answer(case.perturbed, {**one, name: other[name]})
        if not differ(output, changed):
            status: Status = "problem" if name in ("x", "t") else "warning"
            what = f"the output does not depend on {name}"
            yield Finding(f"uses {name}", status, what, _UNUSED.get(name, _UNUSED_CONDITION))
        elif mixes(case, case.perturbed, one, other, name):
            what = f"a sample's output depends on the {name} of other samples in its batch"
            remedy = f"look for {name}[0], or a mean or a reshape over the batch"
            yield Finding(f"uses {name}", "problem", what, remedy)
        else:
            yield Finding(f"uses {name}", "ok", "each sample by itself")


_UNUSED = {
    "x": "feed x through the network",
    "t": "embed t and add it: otherwise the network cannot tell how much noise there is",
}
_UNUSED_CONDITION = "embed it, or use a teacher without it: otherwise samples do not follow it"


def mixes(case: Case, network: nn.Module, one: Probe, other: Probe, name: str) -> bool:
    """Whether a sample's output changes with another sample's input."""
    before = case.answer_alike(network, one)
    for rows, rest in (([0], [1, 2]), ([1, 2], [0])):
        after = case.answer_alike(network, with_rows_of(one, other, name, rows))
        if differ(before[rest], after[rest]):
            return True
    return False


@torch.no_grad()
def batch_statistics(case: Case) -> list[Finding]:
    """Whether samples influence one another in training mode, as with BatchNorm."""
    network, probe = copy.deepcopy(case.perturbed).train(), case.probe(3)
    if not mixes(case, network, probe, case.other_probe(probe), "x"):
        return [Finding("samples", "ok", "are independent in training")]
    kind = nn.modules.batchnorm._BatchNorm
    norms = [name for name, module in network.named_modules() if isinstance(module, kind)]
    names = f" through BatchNorm: {listed(norms)}" if norms else ""
    remedy = "use GroupNorm: batches hold all noise levels in training, and one level in sampling"
    return [Finding("samples", "warning", f"influence one another in training{names}", remedy)]


def listed(names: list[str], count: int = 4) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
