"""What goes in and comes out: shapes, precision, and what the output depends on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dkdm.checks.findings import Finding, Status
from dkdm.checks.student.case import Case, Probe, differ
from dkdm.errors import UsageError
from dkdm.shipping.graph.fault_line import in_a_line


@torch.no_grad()
def shapes(case: Case) -> Iterator[Finding]:
    """The output's shape, for several batches, in both modes, and at the outermost levels."""
    network = case.copied()
    for count, training, reach in ((3, False, 0.8), (1, False, 0.8), (3, True, 0.8), (2, False, 1)):
        probe = case.probe(count, reach=reach)
        output = case.answer(network.train(training), probe)
        expected = (count, case.channels, *probe.x.shape[2:])
        if tuple(output.shape) != expected:
            mode = "training" if training else "evaluation"
            what = f"{tuple(output.shape)} for {count} samples of {tuple(probe.x.shape[1:])} in "
            remedy = "the factory's second argument is the number of channels to give back"
            said = f"got {what}{mode} mode, expected {expected}"
            yield Finding("shapes", "problem", said, remedy)
            return
        if not output.isfinite().all():
            remedy = "look for a division by zero, a log or a root of the times, or empty weights"
            times = ", ".join(f"{time:g}" for time in probe.time.tolist())
            what = f"not finite for {count} fresh samples at t = {times}"
            yield Finding("shapes", "problem", what, remedy)
            return
    yield Finding("shapes", "ok", f"gives {expected[1:]}, finite, for 1 and 3 samples")


@torch.no_grad()
def null_class(case: Case) -> Iterator[Finding]:
    """Whether it can be told "nothing asked", which guidance and condition dropout need."""
    try:
        probe = case.probe(2, null=True)
    except UsageError:  # this teacher has no such condition
        return
    if not probe.cond:
        return
    try:
        case.answer(case.awake, probe)
    except Exception as error:
        remedy = "with null_class, a table of classes needs max(num_classes, null_class + 1) rows"
        yield Finding("null condition", "problem", in_a_line(error, case.awake), remedy)
    else:
        yield Finding("null condition", "ok", "can be told that nothing is asked")


@torch.no_grad()
def untouched(case: Case) -> Iterator[Finding]:
    """Whether it leaves what it is fed as it is: the loss and the teacher's step read it again."""
    call, probe = case.student.call, case.probe(3)
    assert call is not None
    fed = probe.copied()
    call(case.awake, fed.x, fed.time, fed.cond)
    before, after = ({"x": p.x, "t": p.time, **p.cond} for p in (probe, fed))
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if changed:
        what = f"the network changes its {' and '.join(changed)} in place"
        remedy = "write x = x + ... for x += ..., and no .mul_() and the like on an argument"
        yield Finding("inputs", "problem", what, remedy)


@torch.no_grad()
def precision(case: Case) -> Iterator[Finding]:
    """bfloat16, as weights and by autocast."""
    probe = case.probe(3)
    half = probe.to(torch.bfloat16)

    def as_weights() -> Tensor:
        network = nn.Module.to(case.copied(), torch.bfloat16)  # diffusers' own to() logs advice
        return case.answer(network.eval(), half)

    def by_autocast() -> Tensor:
        with torch.autocast(case.student.device.type, torch.bfloat16):
            return case.answer(case.copied().eval(), probe)

    cast = "cast what is computed from t to x.dtype before the first layer (t stays float32)"
    without = "--mixed-precision bf16 fails: expected to go without, or mend this line"
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
    """Whether the output depends on each input, on its own sample's alone, and on nothing else."""
    one = case.probe(3)
    other = case.other_probe(one)
    output = case.answer(case.awake, one)
    if differ(output, case.answer(case.awake, one)):
        what = "two evaluations of the same input differ in evaluation mode"
        remedy = "draw random numbers in training mode only: nothing below could be told apart"
        yield Finding("deterministic", "warning", what, remedy)
        return
    for name in case.inputs:
        if name in one.cond and torch.equal(one.cond[name], other.cond[name]):
            yield Finding(f"uses {name}", "ok", "cannot be told: it has one value only")
            continue
        changed = case.answer(case.awake, one.with_rows_of(other, name, range(3)))
        if not differ(output, changed):
            status: Status = "problem" if name in ("x", "t") else "warning"
            what = f"the output does not depend on {name}"
            yield Finding(f"uses {name}", status, what, _UNUSED.get(name, _UNUSED_CONDITION))
        elif mixes(case, case.awake, one, other, name):
            what = f"a sample's output depends on the {name} of the others in its batch"
            remedy = f"every sample has its own: look for {name}[0], a mean or a reshape over them"
            yield Finding(f"uses {name}", "problem", what, remedy)
        else:
            yield Finding(f"uses {name}", "ok", "each sample's own")


_UNUSED = {
    "x": "feed x through the network",
    "t": "embed t and add it: without it no network can tell how much noise there is",
}
_UNUSED_CONDITION = "embed it, or take a teacher without it: else samples will not follow it"


def mixes(case: Case, network: nn.Module, one: Probe, other: Probe, name: str) -> bool:
    """Whether some sample's output changes with another sample's input."""
    before = case.answer_alike(network, one)
    for rows, rest in (([0], [1, 2]), ([1, 2], [0])):
        after = case.answer_alike(network, one.with_rows_of(other, name, rows))
        if differ(before[rest], after[rest]):
            return True
    return False


@torch.no_grad()
def batch_statistics(case: Case) -> Iterator[Finding]:
    """Whether samples influence one another in training mode: BatchNorm does that."""
    network = case.copied().train()
    network.load_state_dict(case.awake.state_dict())
    probe = case.probe(3)
    if not mixes(case, network, probe, case.other_probe(probe), "x"):
        yield Finding("samples", "ok", "do not influence one another in training")
        return
    norms = [
        n for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    names = f" through BatchNorm: {listed(norms)}" if norms else ""
    yield Finding(
        "samples",
        "warning",
        f"influence one another in training{names}",
        "a batch holds all noise levels at once, sampling one at a time: GroupNorm does not mix "
        "them",
    )


def listed(names: list[str], count: int = 4) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
