"""Steps whose gradient is not finite: they change no weight, are counted, and end a run at last."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.core import processes
from dkdm.core.distributed.sharded import is_sharded, whole
from dkdm.core.sources.source import Source
from dkdm.core.training.muon import Muon
from dkdm.errors import DkdmError

SPIKE = 5.0  # times the median of recent losses
RECENT = 20  # lines of metrics that the median is of
FEWEST = 10  # without so many no loss is a spike
ROLL_BACKS = 3  # until a run is given up
AHEAD_OF = ("cuda",)  # devices that the host does not wait for
# what was not finite first, and what helps
CAUSES = {
    "state": "an entry of the source was not finite: it begins anew",
    "teacher": "the teacher's output was not finite, as when it overflows in half precision: give "
    "--teacher-dtype float32, or bfloat16, with --resume-from-checkpoint latest --accept-changes",
    "student": "the student's loss was not finite, though its teacher's output was: give a lower "
    "--learning-rate, or --mixed-precision no or bf16, with --resume-from-checkpoint latest",
    "gradient": "the gradient was not finite, though the loss was: give a lower --learning-rate, "
    "or --mixed-precision no or bf16, with --resume-from-checkpoint latest",
}


class BadSteps:
    """How many steps were bad, counted on the device; the host looks where it looks anyway.

    most: bad steps in a row after which the run rolls back. total, row: how many there were, and
    in a row until now. causes: how many for each of CAUSES, in this process. rolled_back: how often
    the run went back. fresh: entries of the source that were not finite and began anew.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self.most = most
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.causes = torch.zeros(len(CAUSES), dtype=torch.int64, device=device)
        self.seen = torch.zeros(len(CAUSES) - 1, device=device)
        self.told = [0] * len(CAUSES)
        self.rolled_back = self.known = self.fresh = 0
        self.recent: deque[float] = deque(maxlen=RECENT)

    def see(self, states: Tensor, output: Tensor, loss: Tensor) -> None:
        """Sum up a batch of the update to come, so that what is not finite in it stays known."""
        sums = [value.detach().sum(dtype=torch.float32) for value in (states, output, loss)]
        self.seen = self.seen + torch.stack([each.to(self.seen.device) for each in sums])

    def note(self, norm: Tensor) -> Tensor:
        """Count an update by the norm of its gradient, or by another number that is the same in all
        processes; returns whether it is bad, on the device."""
        norm = norm.detach()
        bad = ~norm.isfinite()
        total, row = self.counts
        self.counts = torch.stack([total + bad, (row + 1) * bad])
        wrong = ~torch.cat([self.seen, norm.reshape(1).to(self.seen)]).isfinite()
        self.causes = self.causes + (bad & wrong & (wrong.cumsum(0) == 1))
        self.seen = torch.zeros_like(self.seen)
        return bad

    @property
    def total(self) -> int:
        """Of the whole run."""
        return int(self.counts[0])

    @property
    def too_many(self) -> bool:
        """Whether the last steps were bad, as many as the limit."""
        return int(self.counts[1]) >= self.most

    @property
    def pace(self) -> float:
        """What the learning rate is multiplied by: half for each time that the run went back."""
        return 0.5**self.rolled_back

    def after_going_back(self, before: BadSteps) -> None:
        """Count on from what was known before a checkpoint was restored."""
        self.counts = torch.stack([before.counts[0], torch.zeros_like(before.counts[0])])
        self.causes, self.told = before.causes, before.told
        self.rolled_back = before.rolled_back + 1
        self.known, self.fresh = before.known, before.fresh

    def news(self) -> int:
        """Bad steps since this was asked last."""
        known, self.known = self.known, self.total
        return self.known - known

    def by_cause(self) -> dict[str, int]:
        """How many steps each of CAUSES made bad, of all processes; together."""
        *others, _ = processes.total(self.causes).tolist()
        # processes whose own batch was good have seen its gradient alone
        counts = [*others, max(0, self.total - sum(others))]
        return {name: count for name, count in zip(CAUSES, counts, strict=True) if count}

    def new_causes(self) -> list[str]:
        """What made the steps bad that this did not tell of yet, in words; together."""
        now = self.by_cause()
        before, self.told = self.told, [now.get(name, 0) for name in CAUSES]
        pairs = zip(CAUSES, self.told, before, strict=True)
        return [CAUSES[name] for name, count, known in pairs if count > known]

    def counted(self) -> dict[str, Any]:
        """What a line of metrics says, if there is anything to say; together."""
        found = {
            "bad_steps": self.total,
            "bad_steps_by_cause": self.by_cause() if self.total else {},
            "rolled_back": self.rolled_back,
            "entries_begun_anew": self.fresh,
        }
        return {name: value for name, value in found.items() if value}

    def given_up(self, step: int, folder: Path | None, causes: Mapping[str, int]) -> DkdmError:
        """The error that ends a run which goes wrong again and again. causes: see `by_cause`."""
        main = CAUSES[max(causes, key=lambda name: causes[name])]
        return DkdmError(
            f"the gradient is not finite (NaN or infinite) by step {step}: {self.total} steps were "
            f"bad, and the run went back {self.rolled_back} times. The last good checkpoint is "
            f"{folder or '(none yet)'}. Most often {main}; dkdm inspect looks at the teacher"
        )

    def spike(self, loss: float | None) -> float | None:
        """How many times the recent median a loss is, if it is a spike; notes the loss."""
        if loss is None:
            return None
        usual = median(self.recent) if len(self.recent) >= FEWEST else None
        self.recent.append(loss)
        return loss / usual if usual and loss > SPIKE * usual else None

    def state_dict(self) -> dict[str, Any]:
        """Counts, recent losses and how often the run went back."""
        return {
            "counts": self.counts,
            "causes": processes.total(self.causes),
            "told": torch.tensor(self.told),
            "recent": torch.tensor(list(self.recent), dtype=torch.float64),
            "rolled_back": self.rolled_back,
            "known": self.known,
            "fresh": self.fresh,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = state["counts"].to(self.counts.device)
        causes = state.get("causes", torch.zeros_like(self.causes)).to(self.counts.device)
        self.causes = causes * processes.is_main()
        former = [*[0] * (len(CAUSES) - 1), self.total]  # of a version that knew no causes
        self.told = state["told"].tolist() if "told" in state else former
        self.recent = deque(state["recent"].tolist(), RECENT)
        self.rolled_back = int(state["rolled_back"])
        self.known = int(state.get("known", self.total))
        self.fresh = int(state.get("fresh", 0))


def mended(source: Source) -> int:
    """Begin anew what of a source is not finite; returns how many entries."""
    mend = getattr(source, "mend", None)
    return 0 if mend is None else int(mend())


def norm_of_all(norm: Tensor, features: nn.Module | None) -> Tensor:
    """The norm of all gradients, of the network's and those of what learns beside it."""
    if features is None:
        return norm
    gradients = [weight.grad for weight in features.parameters() if weight.grad is not None]
    other = whole(nn.utils.get_total_norm(gradients))
    return torch.stack([norm, other.to(norm.device)]).norm()


def unchanged(optimizer: torch.optim.Optimizer, bad: Tensor) -> bool:
    """Let a bad step change nothing; returns whether the optimizer is to be left out for that.

    On a CUDA device fused AdamW and Muon look at the flag themselves, so that the host need not
    wait.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    if bad.device.type in AHEAD_OF and looks_itself(inner):
        inner.grad_scale, inner.found_inf = None, bad.float()
        return False
    return bool(bad)


def looks_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of this optimizer changes nothing if its `found_inf` is 1."""
    groups = optimizer.param_groups
    if isinstance(optimizer, Muon):
        return not any(is_sharded(weight) for group in groups for weight in group["params"])
    return all(group.get("fused") for group in groups)


def faults_in_words(lines: Sequence[Mapping[str, Any]]) -> str:
    """What lines of metrics, in their order, say of bad steps; empty if there were none."""
    last = lines[-1] if lines else {}
    causes = last.get("bad_steps_by_cause")
    by_cause = causes if isinstance(causes, Mapping) else {}
    named = [f"{name} {count}" for name in CAUSES if (count := _whole(by_cause, name))]
    of_which = f" ({', '.join(named)})" if named else ""
    bad, back, anew = (_whole(last, n) for n in ("bad_steps", "rolled_back", "entries_begun_anew"))
    spikes = sum("loss_spike" in line for line in lines)
    found = [
        f"{bad} steps were not finite and changed no weight{of_which}" if bad else "",
        f"{back} times back to a checkpoint, with half the learning rate each time" if back else "",
        f"{anew} entries of the source were not finite and began anew" if anew else "",
        f"{spikes} losses of {SPIKE:g} times the usual or more" if spikes else "",
    ]
    return "; ".join(filter(None, found))


def _whole(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if type(value) is int and value > 0 else 0
