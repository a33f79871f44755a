"""Networks as CUDA graphs: the kernels of one call, captured once and replayed together.

A call of a small network costs the host more than the device: hundreds of kernels, each started by
itself. A graph starts them at once. It is bound to the shapes of its inputs, so that there is one
for each shape that comes again and again; other shapes are called as they are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dkdm.core.denoisers.calls import Call, Network, offloaded_to
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.teachers import Teachers

SIGHTS = 3  # calls of a shape before it is captured: some come once
MOST = {False: 16, True: 2}  # graphs that are kept, by whether they learn: each holds activations
WARM_UPS = 3

Replay = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(eq=False)
class Replayed:
    """A call of a network whose shapes that come again are captured and replayed.

    Equal to `call` to rounding. Networks with hooks, offloaded layers, several devices or
    recomputed activations, and those that cannot be captured, are called as they are.
    """

    call: Call
    seen: Counter[Any] = field(default_factory=Counter)
    graphs: dict[Any, Replay] = field(default_factory=dict)
    modules: dict[nn.Module, tuple[nn.Module, ...]] = field(default_factory=dict)
    refused: bool = False

    def __call__(
        self, network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        """The network's output for states x [B, ...] at times [B]."""
        if self.refused or not self._applies(network, x):
            return self.call(network, x, time, cond)
        learns = torch.is_grad_enabled()
        key = learns, id(network), network.training, *map(_form, (x, time, *cond.values())), *cond  # type: ignore[union-attr]
        replay = self.graphs.get(key)
        if replay is None:
            self.seen[key] += 1
            full = sum(known[0] == learns for known in self.graphs) >= MOST[learns]
            if self.seen[key] <= SIGHTS or full:
                return self.call(network, x, time, cond)
            replay = self._captured(network, x, time, cond)
            if replay is None:
                return self.call(network, x, time, cond)
            self.graphs[key] = replay
        return replay(x, time, cond)

    def _applies(self, network: Network, x: Tensor) -> bool:
        """Whether a call may be captured."""
        return x.device.type == "cuda" and self._is_plain(network)

    def _is_plain(self, network: Network) -> bool:
        """Whether a network is one module on one device, which nothing looks into."""
        if not isinstance(network, nn.Module) or isinstance(network, DistributedDataParallel):
            return False
        if network not in self.modules:
            self.modules[network] = tuple(network.modules())
            self.refused = self.refused or offloaded_to(network) is not None
        recomputes = getattr(network, "is_gradient_checkpointing", False) and network.training
        return not recomputes and not has_hooks(self.modules[network])

    def _captured(
        self, network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]
    ) -> Replay | None:
        capture = learning_graph if torch.is_grad_enabled() else graph
        try:
            with torch.random.fork_rng(devices=[x.device]), own_stream():
                return capture(self.call, network, x, time, cond)
        except Exception as error:
            self.refused = True
            name = type(network).__name__
            print(f"note: {name} is not replayed as a CUDA graph: {error}", file=sys.stderr)
            return None


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether some of these modules call more than their forward, which a graph would not."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)


@contextmanager
def own_stream() -> Iterator[None]:
    """Afterwards work goes on in the stream that is current: a capture that fails leaves its own,
    in which nothing waits for what others have begun."""
    home = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(home)


def _form(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.dtype


def graph(
    call: Call, network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]
) -> Replay:
    """A captured call that learns nothing; its results are copies."""
    fixed = [value.clone() for value in (x, time, *cond.values())]

    def called() -> Tensor:
        return call(network, fixed[0], fixed[1], dict(zip(cond, fixed[2:], strict=True)))

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            called()
    torch.cuda.current_stream().wait_stream(aside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        output = called()

    def replay(x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        torch._foreach_copy_(fixed, [x, time, *cond.values()])
        captured.replay()
        return output.clone()

    return replay


class _Called(nn.Module):
    """A call with tensors as its only inputs."""

    def __init__(self, call: Call, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names, self._call = network, names, call

    def forward(self, x: Tensor, time: Tensor, *cond: Tensor) -> Tensor:
        """As `call`; cond in the order of `names`."""
        return self._call(self.network, x, time, dict(zip(self.names, cond, strict=True)))


def learning_graph(
    call: Call, network: nn.Module, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]
) -> Replay:
    """A captured call and its backward pass, each a graph.

    The gradients are new in every pass as long as those of the last one are dropped (`zero_grad`
    with `set_to_none`).
    """
    called = _Called(call, network, tuple(cond)).train(network.training)
    fixed = tuple(value.clone() for value in (x, time, *cond.values()))
    with suppress(AttributeError):  # of later versions of torch; the streams differ on purpose
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    captured = torch.cuda.make_graphed_callables(called, fixed, allow_unused_input=True)

    def replay(x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output = captured(x, time, *cond.values())
        assert isinstance(output, Tensor)
        return output

    return replay


def replayed(model: Denoiser) -> Denoiser:
    """The same model, whose calls are replayed if it is on a CUDA device."""
    if isinstance(model, Teachers):
        return replace(model, members=tuple(map(replayed, model.members)))
    if model.device.type != "cuda" or isinstance(model.call, Replayed):
        return model
    assert model.call is not None
    return replace(model, call=Replayed(model.call))


def unreplayed(call: Call | None) -> Call | None:
    """The call that is replayed; any other as it is."""
    return call.call if isinstance(call, Replayed) else call
