"""Graph files: a traced program written as ONNX or as PyTorch's .pt2, and opened again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dkdm.core.denoisers.conditioning import Condition
from dkdm.errors import DkdmError, UsageError, raised_as
from dkdm.shipping.graph.fault_line import causes
from dkdm.shipping.graph.tracing import quiet

Format = Literal["onnx", "torch-export"]
Evaluate = Callable[[Condition], Tensor]
OLDEST_OPSET = 18
MAX_PROTOBUF = 2**31 - 2**20  # bytes in one protobuf message, less the graph's own
SUMMARY = "dkdm"


def write(
    program: ExportedProgram, path: Path, format: Format, opset: int | None, facts: Mapping
) -> None:
    """Write a program; ONNX weights beyond 2 GB lie beside it in `FILE.data`."""
    if format == "onnx":
        _write_onnx(program, path, opset, facts)
    else:
        with quiet():
            torch.export.save(program, path, extra_files={SUMMARY: json.dumps(facts)})


def opened(path: Path, format: Format) -> Evaluate:
    """The written file as a function of inputs by name. Raises DkdmError if it does not load."""
    said = f"{path} was written, but does not load again"
    with raised_as(lambda error: DkdmError(f"{said}: {error}")), quiet():
        if format == "onnx":
            return _opened_onnx(path)
        module = torch.export.load(path).module()
        return torch.no_grad()(lambda inputs: module(**inputs))


def runtime(format: Format) -> str:
    """What opens files of a format, with its version."""
    name = "onnxruntime" if format == "onnx" else "torch"
    return f"{name} {version(name)}, CPU"


def require_onnx(opset: int | None) -> None:
    """Raise if ONNX cannot be written: packages are missing, or the opset is unknown."""
    try:
        with quiet():
            import onnx
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise DkdmError(f"--format onnx needs {error.name}: pip install 'dkdm[onnx]'") from error
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise UsageError(f"--opset {opset}: use {OLDEST_OPSET} to {newest}")


def _write_onnx(program: ExportedProgram, path: Path, opset: int | None, facts: Mapping) -> None:
    names = [entry["name"] for entry in facts["inputs"]]

    def explained(error: Exception) -> UsageError:
        return UsageError(f"ONNX cannot express this network: {_culprit(error, program)}")

    with raised_as(explained), quiet(), torch.no_grad():
        made = torch.onnx.export(
            program,
            input_names=names,
            output_names=["output"],
            opset_version=opset,
            verbose=False,
            dynamo=True,
        )
        assert made is not None
        _name_batch(made.model)
        made.model.metadata_props[SUMMARY] = json.dumps(facts)
        made.save(path, external_data=weight_bytes(program) > MAX_PROTOBUF)


def weight_bytes(program: ExportedProgram) -> int:
    """Size of all weights."""
    tensors = (*program.state_dict.values(), *program.constants.values())
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _name_batch(model: Any) -> None:
    import onnx_ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = onnx_ir.Shape(["batch", *value.shape[1:]])


def _culprit(error: Exception, program: ExportedProgram) -> str:
    chain = list(causes(error))
    found = re.search(r"translating node %(\w+?)(_\d+)? ", "\n".join(map(str, chain)))
    nodes = [node for node in program.graph.nodes if found and found[1] in str(node.target)]
    stacks = [list((node.meta.get("nn_module_stack") or {}).values()) for node in nodes]
    if not stacks or not stacks[0]:
        return f"{type(chain[-1]).__name__}: {str(chain[-1]).splitlines()[0]}"
    path, kind = stacks[0][-1]
    place = path.removeprefix("network").removeprefix(".") or "the network itself"
    return (
        f"{place} ({str(kind).rpartition('.')[2]}) uses {nodes[0].target}, which has no "
        "counterpart there; write it with other operations, or use --format torch-export"
    )


def _opened_onnx(path: Path) -> Evaluate:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}

    def evaluate(inputs: Condition) -> Tensor:
        fed = {name: value.numpy() for name, value in inputs.items() if name in names}
        return torch.from_numpy(session.run(["output"], fed)[0])

    return evaluate
