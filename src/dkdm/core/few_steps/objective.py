"""The loss of parallel-head distillation: head k against the teacher's velocity where it begins."""

from __future__ import annotations

import torch
from torch import Tensor

from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.devices import to_device
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.few_steps.heads import ParallelHeads
from dkdm.core.few_steps.rolled import Roll


class HeadsObjective:
    """Mean squared error of the taught heads' outputs, in the student's own parameterization.

    The student was evaluated when the batch was drawn: its `rows` hold the outputs. anchor: weight
    of the same error of the student asked where the teacher was, which is the plain loss; one more
    evaluation of the student, unless it is 0.
    """

    def __init__(self, student: ParallelHeads, anchor: float = 0.0) -> None:
        self.student, self.anchor = student, anchor

    def __call__(self, student: Denoiser, batch: Batch, target: Prediction) -> Tensor:
        """The loss of every target, [B M]."""
        del student  # it has answered for this batch, before the teacher was asked
        roll: Roll = batch.rows
        count, targets = roll.asked.shape
        which, asked = torch.arange(count).repeat_interleave(targets), roll.asked.flatten()
        velocity, on = target.eps - target.x_0, to_device(which, roll.x.device)
        loss = self._error(roll.outputs[on], asked, velocity, roll.x[on], roll.first[which])
        if not self.anchor:
            return loss
        outputs = self.student.heads(roll.reached, asked, batch.cond)
        return loss + self.anchor * self._error(outputs, asked, velocity, roll.reached, asked)

    def _error(
        self, outputs: Tensor, asked: Tensor, velocity: Tensor, x: Tensor, first: Tensor
    ) -> Tensor:
        """Of one head of each of B M states x at the beginning of interval `first`, [B M]."""
        rows = torch.arange(len(x), device=x.device)
        heads = outputs[rows, to_device(asked, x.device)]
        wanted = self.student.wanted(velocity, x, first)
        return (heads - wanted).square().flatten(1).mean(1)
