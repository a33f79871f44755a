"""The device's part of a step: fixed shapes, no number read by the host, nothing sent from it.

Each function reads tensors at fixed places and writes such tensors, so that a graph can hold it.
The mathematics is that of `Pool`, `Objective` and `Denoiser`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dkdm.core.captured.optimizers import step_unless, stepped_by
from dkdm.core.captured.placed import Placed
from dkdm.core.denoisers.conditioning import Condition
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.objectives.objective import Objective
from dkdm.core.saving.progress import LossPerLevel
from dkdm.core.sources.chains import Guidance, row_mask
from dkdm.core.sources.moves import answer, moved
from dkdm.core.training.bad_steps import norm_of_all
from dkdm.core.training.learning import Ema

Values = dict[str, Tensor]


@dataclass(eq=False)
class DevicePart:
    """What learns from a pool, and what it reads.

    guidance, eta, start_std: laws of the pool. given: levels `t` and `s` of a batch, conditions by
    `teacher.NAME` and `student.NAME`, the learning `rates`, and the average's `share` of a step.
    new: of chains that begin below T-1 their places `at` in the batch, levels `s` and conditions,
    and `valid`, which of them there are. x: states of the batch, [B, ...]. noise: [2, B, ...] for
    moves, and for chains that begin. accumulates: batches of an optimizer step. features: what
    learns beside the network. What comes out is next, the batch's next states; loss, its mean;
    norm, of the gradient; and output, what the teacher's network said, [B, C or 2C, ...], which
    `again` reads.
    """

    guidance: Guidance
    eta: float
    start_std: float
    teacher: Placed
    student: Placed
    objective: Objective
    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    losses: LossPerLevel
    max_grad_norm: float
    accumulates: int
    given: Values
    new: Values
    x: Tensor
    noise: Tensor
    features: nn.Module | None = None
    output: Tensor = field(init=False)
    next: Tensor = field(init=False)
    loss: Tensor = field(init=False)
    norm: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.next = torch.zeros_like(self.x)
        count, _, *sides = self.x.shape
        self.output = self.x.new_zeros(count, self.teacher.out_channels, *sides)
        self.loss, self.norm = torch.zeros(2, device=self.x.device)

    def learn(self) -> None:
        """One batch: target, loss, gradients, and next states; new chains begin as pure noise."""
        batch = self._batch()
        with torch.no_grad():
            target = answer(self.teacher, self.guidance, batch)
            self.output.copy_(target.raw)
        self._match(batch, target)
        with torch.no_grad():
            z, start = self.noise
            x = moved(self.teacher, batch, target, z, self.eta)
            begun = self.start_std * start
            self.next.copy_(torch.where(row_mask(self.given["s"] < 0, x), begun, x))

    def again(self) -> None:
        """One batch that the teacher has evaluated before: loss and gradients."""
        batch = self._batch()
        self._match(batch, self.teacher.read(self.output, batch))

    def _batch(self) -> Batch:
        given = self.given
        return Batch(self.x, given["t"], named(given, "teacher"), None, given["s"])

    def _match(self, batch: Batch, target: Prediction) -> None:
        seen = batch._replace(cond=named(self.given, "student"))
        loss = self.objective(self.student, seen, target)
        (loss.mean() / self.accumulates).backward()
        self.losses.add(batch.t, loss.detach())
        self.loss.copy_(loss.detach().mean())

    def update(self) -> None:
        """Clip the gradients, step the optimizer if they are finite, move the average."""
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
        self.norm.copy_(norm_of_all(norm, self.features))
        with stepped_by(self.optimizer, self.given["rates"]):
            step_unless(self.optimizer, ~self.norm.isfinite())
        self.optimizer.zero_grad(set_to_none=self.accumulates == 1)
        if self.ema is not None:
            self.ema.move(self.network, self.given["share"])

    @torch.no_grad()
    def restart(self) -> None:
        """Move chains that begin below T-1 there from pure noise; rows that are not valid stay."""
        new, at, teacher = self.new, self.new["at"], self.teacher
        z, start = self.noise[:, at]
        t = torch.full_like(at, teacher.process.num_levels - 1)
        x = self.start_std * start
        batch = Batch(x, t, named(new, "teacher"), None, new["s"])
        target = answer(teacher, self.guidance, batch)
        x = moved(teacher, batch, target, z, self.eta)
        self.next.index_copy_(0, at, torch.where(row_mask(new["valid"], x), x, self.next[at]))

    def state(self) -> dict[str, list[Tensor]]:
        """All that the functions change, but the gradients, by what it is."""
        groups = self.optimizer.param_groups
        weights = [weight.detach() for group in groups for weight in group["params"]]
        averaged = [] if self.ema is None else list(self.ema.weights.values())
        found = {
            "weights": [*weights, *averaged],
            "buffers": list(self.network.buffers()),
            "sums of losses": [self.losses.sums],
        }
        for entry in self.optimizer.state.values():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    found.setdefault(name, []).append(value)
        return found


def named(values: Values, group: str) -> Condition:
    """The conditions of a group, such as those named `teacher.class_labels`."""
    first = f"{group}."
    return {k.removeprefix(first): v for k, v in values.items() if k.startswith(first)}
