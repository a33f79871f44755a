"""Whether training went well: the first loss that is not finite, without waiting for the device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dkdm.core import checkpoint
from dkdm.errors import DkdmError


class Finite:
    """Watches the losses and weights of a run, which `output_dir` holds the checkpoints of."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.first_bad_step = torch.tensor(-1)

    def note(self, loss: Tensor, step: int) -> None:
        """Remember the first step whose loss is not finite."""
        known = self.first_bad_step.to(loss.device)
        bad = ~loss.isfinite() & (known < 0)
        self.first_bad_step = torch.where(bad, step, known)

    def check(self, network: nn.Module | None = None, step: int = 0) -> None:
        """Raise DkdmError if a loss was not finite, or a weight is not by this step."""
        bad = int(self.first_bad_step)
        if bad >= 0:
            raise self._error(f"the loss became NaN or infinite at step {bad}")
        weights = [p for p in network.parameters() if p.is_floating_point()] if network else []
        if weights and not bool(torch.stack([p.isfinite().all() for p in weights]).all()):
            raise self._error(f"the weights became NaN or infinite by step {step}")

    def _error(self, what: str) -> DkdmError:
        kept = checkpoint.checkpoints(self.output_dir)
        return DkdmError(
            f"{what}. The last good checkpoint is {kept[-1] if kept else '(none yet)'}. Try a "
            "lower --learning-rate, a lower --max-grad-norm or --mixed-precision no, with "
            "--resume-from-checkpoint latest"
        )
