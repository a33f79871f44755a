"""Steps whose gradient is not finite: they change no weight, are counted, and end a run at last."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dkdm.core.sources import Source
from dkdm.errors import DkdmError

SPIKE = 5.0  # times the median of recent losses
RECENT = 20  # lines of metrics that the median is of
FEWEST = 10  # without so many no loss is a spike
ROLL_BACKS = 3  # until a run is given up


class BadSteps:
    """How many steps were bad, counted on the device; the host looks where it looks anyway.

    most: bad steps in a row after which the run rolls back. total, row: how many there were, and
    in a row until now. rolled_back: how often the run went back. fresh: entries of the source that
    were not finite and began anew.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self.most = most
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.rolled_back = self.known = self.fresh = 0
        self.recent: deque[float] = deque(maxlen=RECENT)

    def note(self, norm: Tensor) -> Tensor:
        """Count an update by the norm of its gradient, or by another number that is the same in all
        processes; returns whether it is bad, on the device."""
        bad = ~norm.detach().isfinite()
        total, row = self.counts
        self.counts = torch.stack([total + bad, (row + 1) * bad])
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
        self.rolled_back = before.rolled_back + 1
        self.known, self.fresh = before.known, before.fresh

    def news(self) -> int:
        """Bad steps since this was asked last."""
        known, self.known = self.known, self.total
        return self.known - known

    def given_up(self, step: int, folder: Path | None) -> DkdmError:
        """The error that ends a run which goes wrong again and again."""
        return DkdmError(
            f"the gradient is not finite (NaN or infinite) by step {step}: {self.total} steps were "
            f"bad, and the run went back {self.rolled_back} times. The last good checkpoint is "
            f"{folder or '(none yet)'}. Try a lower --learning-rate or --max-grad-norm, or "
            "--mixed-precision no, with --resume-from-checkpoint latest; dkdm inspect looks at the "
            "teacher"
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
            "recent": torch.tensor(list(self.recent), dtype=torch.float64),
            "rolled_back": self.rolled_back,
            "known": self.known,
            "fresh": self.fresh,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = state["counts"].to(self.counts.device)
        self.recent = deque(state["recent"].tolist(), RECENT)
        self.rolled_back = int(state["rolled_back"])
        self.known = int(state.get("known", self.total))
        self.fresh = int(state.get("fresh", 0))


def mended(source: Source) -> int:
    """Begin anew what of a source is not finite; returns how many entries."""
    mend = getattr(source, "mend", None)
    return 0 if mend is None else int(mend())


def unchanged(optimizer: torch.optim.Optimizer, bad: Tensor) -> bool:
    """Let a bad step change nothing; returns whether the optimizer is to be left out for that.

    AdamW's fused kernel on a CUDA device looks at the flag itself, so that the host need not wait.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    if bad.device.type == "cuda" and all(group.get("fused") for group in inner.param_groups):
        inner.grad_scale, inner.found_inf = None, bad.float()
        return False
    return bool(bad)
