"""One network that does two things, denoise and jump, and how it knows which it is asked for.

At time t it denoises. Where the time can be mirrored it jumps at -t, see `mirror`; where it cannot,
a flag tells it, see `flag`. What ships of either is an ordinary network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import nn

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.few_steps import flag, mirror
from dkdm.errors import UsageError


class Tasks(Protocol):
    """How a network does both: the modules `mirror` and `flag`."""

    def both(self, model: Denoiser) -> Denoiser:
        """The model on 2T levels: t as it is, and t + T, which jumps from the same level."""

    def jumping(self, model: Denoiser) -> nn.Module:
        """A copy of the network that jumps at each level, without anything special."""

    def denoising(self, model: Denoiser) -> nn.Module:
        """A copy of a network that `jumping` made that denoises again, with the same weights."""


def tasks_of(model: Denoiser) -> Tasks:
    """How the network of a model does both."""
    return flag if flag.is_flagged(model) else mirror


def for_both_tasks(model: Denoiser, seen: Denoiser) -> Denoiser:
    """A model whose network can do both.

    seen: the same as it looks from the levels of the source. Raises UsageError if it cannot.
    """
    if mirror.can_mirror(seen):
        return model
    flagged = flag.with_flag(seen)
    if flagged is None:
        raise UsageError(
            f"{model.name}: --objective consistency has to tell it when to jump, by its time as "
            "sines and cosines or by the bias of a layer that sees its time or its states, and it "
            "has neither: give such a layer a bias, or use --objective few-step"
        )
    return replace(model, network=flagged)
