"""A denoiser's network as one file: ONNX, or PyTorch's exported program."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dkdm.config import EXPORTED
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.given import denoiser_given
from dkdm.core.saving.folders import replace_files
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.numbers import count
from dkdm.reading.arguments import given
from dkdm.reading.files import check_output, write_text
from dkdm.shipping.graph.description import describe_graph, sampling_tables
from dkdm.shipping.graph.formats import Evaluate, Format, opened, require_onnx, runtime, write
from dkdm.shipping.graph.network import GraphNetwork, graph_network, random_inputs
from dkdm.shipping.graph.tracing import batch_range, trace

__all__ = ["export_graph", "largest_difference"]

TRACED_ROWS = 3
CHECKED_BATCHES = (1, 2, 5)
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def export_graph(
    denoiser: Denoiser,
    output: str | Path,
    *,
    format: Format = "onnx",
    opset: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a denoiser's network as a graph, a description beside it, and check the file.

    output: the file; .json is appended for its description. format: "onnx" or "torch-export" (a
    .pt2 file). opset: of ONNX, 18 or newer; None leaves the choice to the exporter.
    The network is put into evaluation mode. The file computes in the network's precision; inputs
    and output are float32. Returns the description. Raises UsageError for files that exist and for
    a network that cannot be traced, naming the module; DkdmError if packages are missing or if the
    file computes something else than the network (the file is kept).
    """
    denoiser = denoiser_given("export_graph: denoiser", denoiser)
    output = Path(given("export_graph: output", output, Path, "give the file to write"))
    _check(denoiser, format, opset)
    output, beside, weights = check_files(output, format, overwrite)
    inputs = random_inputs(denoiser, TRACED_ROWS)
    network = graph_network(denoiser, inputs)
    _say(f"tracing {type(denoiser.network).__name__}, {count(denoiser.num_parameters)} parameters")
    program = trace(network, inputs, denoiser.name)
    low, high = batch_range(program)
    facts = describe_graph(denoiser, inputs, (low, high))
    batches = [n for n in CHECKED_BATCHES if low <= n and (high is None or n <= high)] or [low]
    _say(f"writing {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    weights.unlink(missing_ok=True)
    replace_files(
        output.parent,
        lambda partial: write(program, partial / output.name, format, opset, facts),
    )
    _say(f"comparing it with PyTorch, batches of {', '.join(map(str, batches))}")
    difference = largest_difference(denoiser, network, opened(output, format), batches)
    tolerance = TOLERANCES[denoiser.dtype or torch.float32]
    check = {
        "with": runtime(format),
        "batches": batches,
        "largest_difference": difference,
        "tolerance": tolerance,
        "passed": difference <= tolerance,
    }
    facts |= {"format": format, "check": check, "process": sampling_tables(denoiser)}
    write_text(beside, json.dumps(facts, indent=1) + "\n")
    if not check["passed"]:
        raise DkdmError(
            f"{output} does not compute what the network does: its output differs by "
            f"{difference:.2g} of the largest value, more than {tolerance:g} "
            f"({check['with']}); try another --opset, or --format torch-export"
        )
    return facts


@torch.no_grad()
def largest_difference(
    denoiser: Denoiser, network: GraphNetwork, evaluate: Evaluate, batches: Sequence[int]
) -> float:
    """Largest |difference| between file and network over batches, by the largest |output|.

    nan if either output is not finite; for an output of zeros, the other's largest value.
    """
    worst = 0.0
    for batch in batches:
        inputs = random_inputs(denoiser, batch, seed=1)
        expected = network(**inputs)
        found = evaluate(inputs)
        if found.shape != expected.shape or not torch.stack([found, expected]).isfinite().all():
            return float("nan")
        largest = expected.abs().max().item() or 1.0
        worst = max(worst, (found - expected).abs().max().item() / largest)
    return worst


def check_files(output: Path, format: Format, overwrite: bool = False) -> tuple[Path, Path, Path]:
    """The paths of graph, description and weights. Raises UsageError for one not to be written."""
    check_output("--output", output, suffixes=(Path(EXPORTED[format]).suffix,), overwrite=overwrite)
    beside = (output.with_name(f"{output.name}.{end}") for end in ("json", "data"))
    description, weights = (check_output("--output", p, overwrite=overwrite) for p in beside)
    return output, description, weights


def _check(denoiser: Denoiser, format: Format, opset: int | None) -> None:
    if denoiser.dtype not in (*TOLERANCES, None):
        legal = "float32, float16 or bfloat16"
        raise UsageError(f"{denoiser.name} is in {denoiser.dtype}: load it in {legal}")
    if denoiser.device.type != "cpu":
        raise UsageError(f"{denoiser.name} is on {denoiser.device}: move it to the CPU")
    if format == "torch-export":
        if opset is not None:
            raise UsageError(f"--opset {opset}: torch-export has no opsets; leave it out")
        return
    require_onnx(opset)
    if denoiser.dtype == torch.bfloat16:
        raise UsageError(
            "onnxruntime does not compute in bfloat16 on a CPU, so the file could not be checked: "
            "use --dtype float32 or float16, or --format torch-export"
        )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
