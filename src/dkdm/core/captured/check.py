"""Whether the graphs of a step give what its functions give when they are called one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dkdm.core.captured.graph import fresh
from dkdm.core.captured.part import DevicePart
from dkdm.errors import DkdmError

Outcome = dict[str, list[Tensor]]
SAMPLE = 2**14  # values of a tensor that are looked at, about
# Both ways start the same kernels, and mostly agree to the bit. The order of sums may differ, and
# the algorithm of a convolution: each rounds the factors, and layers add their errors up. What goes
# wrong in a graph (memory that holds something else by then, a value of another step) is wrong by
# as much as the value itself.
ROUNDINGS = 8
TF32 = 2**-10  # what convolutions round their factors to, whatever the dtype
# AdamW moves a weight by its rate however small the gradient is, and Muon by its direction: where a
# gradient is nothing but rounding, its weight goes anywhere. So all weights are looked at together.
OF_MOVES = 0.25
SMALL = 0.01  # of the largest: tensors below it may be rounding alone, such as a gradient that is 0


def outcome(part: DevicePart, runs: Mapping[str, Callable[[], None]]) -> Outcome:
    """What the sections of a step give one after the other, by what it is; all is as before then.

    Next states by sample; of weights, averages and the optimizer's state how they change.
    """
    found: Outcome = {"next states": [], "losses": [], "norms of the gradient": []}
    given = part.next, part.loss, part.norm
    with fresh(part):
        before = {value.data_ptr(): sampled(value) for value in _flat(part.state())}
        for value in given:  # what is not written shall not pass for what was written before
            value.zero_()
        for run in runs.values():
            run()
            for values, value in zip(found.values(), given, strict=True):
                values += map(sampled, value if value.ndim else [value])
        for kind, values in part.state().items():
            after = ((sampled(value), before.get(value.data_ptr())) for value in values)
            found[kind] = [new if old is None else new - old for new, old in after]
    found["weights"] = [torch.cat(found["weights"])]
    return found


def check(found: Outcome, expected: Outcome, dtypes: Sequence[torch.dtype]) -> None:
    """Raise DkdmError unless two outcomes are equal to rounding. dtypes: what is computed in."""
    rounding = ROUNDINGS * max(TF32, *(torch.finfo(dtype).eps for dtype in dtypes))
    for kind, values in expected.items():
        distance = apart(found[kind], values)
        if not distance <= (OF_MOVES if kind == "weights" else rounding):
            raise DkdmError(
                f"graphs of it do not give what single calls give: {kind} differ by {distance:.2g} "
                "times their size"
            )


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest distance of a tensor to the expected one, in terms of its norm."""
    if not expected:
        return 0.0
    norms = torch.stack([value.norm() for value in expected])
    pairs = zip(found, expected, strict=True)
    distances = torch.stack([(one - other).norm() for one, other in pairs])
    apart = distances / norms.clamp(min=SMALL * float(norms.max()))
    return float(torch.where(distances == 0, 0.0, apart).max())


def sampled(value: Tensor) -> Tensor:
    """Some values of a tensor, evenly spaced, float32 [n]; 0 where they are not finite."""
    flat = value.detach().flatten()
    some = flat[:: flat.numel() // SAMPLE | 1]  # an odd stride meets all columns of most matrices
    return torch.nan_to_num(some.float().clone(), nan=0.0, posinf=0.0, neginf=0.0)


def _flat(state: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
    return [value for values in state.values() for value in values]
