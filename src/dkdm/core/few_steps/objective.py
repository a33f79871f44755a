"""The loss of parallel-head distillation: head k against the teacher's velocity where it begins."""

from __future__ import annotations

import torch
from torch import Tensor

from dkdm.core.denoiser import Batch, Denoiser
from dkdm.core.devices import to_device
from dkdm.core.few_steps.heads import ParallelHeads
from dkdm.core.few_steps.rolled import Roll
from dkdm.core.prediction import Prediction


class HeadsObjective:
    """Mean squared error of the taught heads' outputs, in the student's own parameterization.

    The student was evaluated when the batch was drawn: its `rows` hold the outputs.
    """

    def __init__(self, student: ParallelHeads) -> None:
        self.student = student

    def __call__(self, student: Denoiser, batch: Batch, target: Prediction) -> Tensor:
        """The loss of every target, [B M]."""
        del student  # it has answered for this batch, before the teacher was asked
        roll: Roll = batch.rows
        count, targets = roll.asked.shape
        which = torch.arange(count).repeat_interleave(targets)
        on, asked = (to_device(each, roll.x.device) for each in (which, roll.asked.flatten()))
        heads = roll.outputs[on, asked]
        velocity, place = target.eps - target.x_0, roll.x[on]
        wanted = self.student.wanted(velocity, place, roll.first[which])
        return (heads - wanted).square().flatten(1).mean(1)
