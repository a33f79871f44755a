"""From a network to a program: one trace with a batch of any size."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.export import Dim, ExportedProgram

from dkdm.core.denoisers.conditioning import Condition
from dkdm.errors import UsageError
from dkdm.shipping.graph.fault_line import HINT, Trail, reason
from dkdm.shipping.graph.network import GraphNetwork


class NotAGraphError(UsageError):
    """A network that cannot be traced. reason: what failed, in which module, at which line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be exported as a graph: {reason}; {HINT}")
        self.reason = reason


def trace(network: GraphNetwork, inputs: Condition, name: str) -> ExportedProgram:
    """The network as a program, the leading dimension of every input being the same `batch`.

    inputs: examples of 3 rows. Raises NotAGraphError naming the module that cannot be traced.
    """
    network.eval()
    trail = Trail(network)
    shapes: Any = {key: {0: Dim.DYNAMIC} for key in inputs}
    try:
        with torch.no_grad(), quiet(), plain_upsampling():
            program = torch.export.export(
                network, (), kwargs=inputs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise NotAGraphError(name, reason(error, trail)) from error
    finally:
        trail.remove()
    drop_idle_squeezes(program)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines and paths of this machine
    return program


def batch_range(program: ExportedProgram) -> tuple[int, int | None]:
    """Smallest and largest batch of a program; None means any. One row fits if two do."""
    inputs = program.graph_signature.user_inputs
    for node in program.graph.nodes:
        size = node.meta["val"].shape[0] if node.name in inputs else None
        bounds = program.range_constraints.get(getattr(getattr(size, "node", None), "expr", None))
        if bounds is not None:
            low, high = int(bounds.lower), bounds.upper
            return low if low > 2 else 1, int(high) if high.is_Integer else None
    return 1, None


def drop_idle_squeezes(program: ExportedProgram) -> None:
    """Remove `squeeze` of a dimension larger than 1: nothing in PyTorch, an error in ONNX."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim:
            before = node.args[0]
            if node.meta["val"].ndim == before.meta["val"].ndim:
                node.replace_all_uses_with(before)
                program.graph.erase_node(node)


@contextmanager
def plain_upsampling() -> Iterator[None]:
    """Let diffusers upsample alike whatever the batch, so that one trace holds for all.

    Its layer copies the memory of batches of 64 and more (and of very large ones) first, which
    does not change the numbers but makes torch.export bound the batch.
    """
    own = Upsample2D.forward
    Upsample2D.forward = _upsample
    try:
        yield
    finally:
        Upsample2D.forward = own


def _upsample(layer: Any, x: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
    if layer.norm is not None:
        x = layer.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if layer.use_conv_transpose:
        return layer.conv(x)
    if layer.interpolate:
        factor = 2.0 if output_size is None else None
        x = torch.nn.functional.interpolate(x, output_size, factor, mode="nearest")
    if not layer.use_conv:
        return x
    return layer.conv(x) if layer.name == "conv" else layer.Conv2d_0(x)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters: they print, log and warn about their internals."""
    disabled, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
