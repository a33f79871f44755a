"""Whether torch.compile, torch.export and other devices can follow a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from dkdm.checks.findings import Finding
from dkdm.checks.student.case import Case, Probe
from dkdm.shipping.graph import TOLERANCES, largest_difference
from dkdm.shipping.graph.fault_line import at_line, fault_line, in_a_line
from dkdm.shipping.graph.network import GraphNetwork, random_inputs
from dkdm.shipping.graph.tracing import NotAGraphError, batch_range, quiet, trace


@contextmanager
def _anew() -> Iterator[None]:
    """Quiet, with a compiler that remembers nothing."""
    torch._dynamo.reset()
    counters.clear()
    try:
        with quiet():
            yield
    finally:
        torch._dynamo.reset()


def compiles(case: Case, backend: str = "aot_eager") -> list[Finding]:
    """torch.compile, forward and backward; graph breaks are counted and located."""
    called = partial(case.evaluate, case.copied().eval().requires_grad_(True))
    probe = case.probe(3)
    with torch.no_grad():
        expected = called(probe)
    with _anew():
        try:
            output = torch.compile(called, backend=backend)(probe)
            output.sum().backward()
        except Exception as error:
            what = f"fails ({backend}): {in_a_line(error, case.network)}"
            return [Finding("torch.compile", "warning", what, "train it without torch.compile")]
        broken = bool(counters["graph_break"])
        places = _breaks(called, probe, case.network) if broken else []
    if broken:
        where = f", {len(places)}: {', '.join(places)}" if places else ""
        what = f"works ({backend}), with graph breaks{where}"
        remedy = "avoid .item(), print and Python control flow on values of tensors there"
        return [Finding("torch.compile", "warning", what, remedy)]
    if (output - expected).abs().max() > 1e-3 * expected.abs().max().clamp(min=1e-6):
        what, remedy = f"({backend}) answers differently", "do not compile it"
        return [Finding("torch.compile", "warning", what, remedy)]
    return [Finding("torch.compile", "ok", f"works ({backend}), without graph breaks")]


def _breaks(called: Callable[[Probe], Tensor], probe: Probe, network: nn.Module) -> list[str]:
    explained: Any = torch._dynamo.explain(called)(probe)
    found = []
    for reason in explained.break_reasons:
        stack = [frame for frame in reason.user_stack if "/dkdm/" not in frame.filename]
        if stack:
            found.append(at_line(stack[-1].filename, stack[-1].lineno or 0, network))
    return list(dict.fromkeys(found))


@torch.no_grad()
def devices(case: Case) -> list[Finding]:
    """Whether it makes tensors on the CPU when all others are on another device, the meta one.

    What depends on the values of tensors cannot be checked there; only a real GPU can.
    """
    network = nn.Module.to(case.copied().eval(), "meta")
    probe = {name: value.to("meta") for name, value in case.probe(3).items()}
    with _anew(), FakeTensorMode(allow_non_fake_inputs=True):
        try:
            case.evaluate(network, probe)
        except Exception as error:
            if " different devices" not in str(error) and "two devices" not in str(error):
                what = f"could not be checked: {in_a_line(error, network)}"
                return [Finding("device", "ok", what)]
            what = f"fails on a GPU: it makes a tensor on the CPU{fault_line(error, network)}"
            remedy = "make it on x.device, as in torch.arange(n, device=x.device), or as a buffer"
            return [Finding("device", "warning", what, remedy)]
    return [Finding("device", "ok", "works on any device")]


def exports(case: Case) -> list[Finding]:
    """torch.export with any number of samples."""
    denoiser = replace(case.student, network=nn.Module.to(case.copied(), "cpu"))
    inputs = random_inputs(denoiser, 3)
    network = GraphNetwork(denoiser, inputs)
    try:
        program = trace(network, inputs, denoiser.name)
    except NotAGraphError as error:
        remedy = "correct it if you need the graph; training and sampling are not affected"
        return [Finding("torch.export", "warning", f"fails: {error.reason}", remedy)]
    module = program.module()
    difference = largest_difference(denoiser, network, lambda fed: module(**fed), (2,))
    if not difference <= TOLERANCES[torch.float32]:
        what, remedy = "the graph answers differently", "do not export it"
        return [Finding("torch.export", "warning", what, remedy)]
    _, limit = batch_range(program)
    what = "any number of" if limit is None else f"up to {limit}"
    return [Finding("torch.export", "ok", f"works for {what} samples")]
