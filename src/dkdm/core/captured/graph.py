"""The device's part of a step as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch

from dkdm.core.captured.optimizers import states_of
from dkdm.core.captured.part import DevicePart
from dkdm.core.denoisers.graphs import own_stream

WARM_UPS = 3
Run = Callable[[], None]


@contextmanager
@torch.no_grad()
def fresh(part: DevicePart) -> Iterator[None]:
    """Whatever the part's functions do in here, all is as before afterwards.

    So is the random state. Gradients are zero, and an optimizer that had no state has one of zeros.
    """
    device = part.x.device
    before = [(value, value.clone()) for values in part.state().values() for value in values]
    known = {id(value) for value, _ in before}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for value, former in before:
            value.copy_(former)
        for value in states_of(part.optimizer):
            if id(value) not in known:
                value.zero_()
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad.zero_()


def captured(sections: Mapping[str, Sequence[Run]]) -> dict[str, Run]:
    """A graph of each section, the functions of which run one after the other.

    They are run a few times first, as a capture asks for. Raises what a capture raises.
    """
    with suppress(AttributeError):  # of later versions of torch; the streams differ on purpose
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    home, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(home)
    try:
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                for section in sections.values():
                    for function in section:
                        function()
    finally:
        home.wait_stream(aside)  # what was begun there ends before its traces are removed
    torch.cuda.synchronize()
    runs: dict[str, Run] = {}
    memory = None
    with own_stream():
        for name, section in sections.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                for function in section:
                    function()
            memory = graph.pool()
            runs[name] = graph.replay
    return runs
