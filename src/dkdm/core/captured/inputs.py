"""What a captured step reads anew each time: one copy from pinned memory, nobody waits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes
AHEAD = 3  # steps that the host may be ahead of the device


class Inputs:
    """Tensors at fixed places of a device, overwritten together from the host.

    like: their shapes and dtypes by name. On a CPU the places are plain memory.
    """

    def __init__(self, like: Mapping[str, Tensor], device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        size = sum(map(_bytes, like.values()))
        self._there = torch.zeros(size, dtype=torch.uint8, device=device)
        self._here = [
            torch.zeros(size, dtype=torch.uint8, pin_memory=self.on_cuda) for _ in range(AHEAD)
        ]
        self._views = [_laid_out(each, like) for each in self._here]
        self._sent: list[torch.cuda.Event | None] = [None] * AHEAD
        self._turn = 0
        self.values = _laid_out(self._there, like)

    def send(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite all of them, after all work that the device has been given so far."""
        turn = self._turn = (self._turn + 1) % AHEAD
        sent, views = self._sent[turn], self._views[turn]
        if sent is not None:
            sent.synchronize()
        for name, view in views.items():
            view.copy_(values[name])
        self._there.copy_(self._here[turn], non_blocking=True)
        if self.on_cuda:
            self._sent[turn] = sent = sent or torch.cuda.Event()
            sent.record()


def _bytes(value: Tensor) -> int:
    """The room of a tensor, up to where the next one begins."""
    return math.ceil(value.numel() * value.element_size() / ALIGNMENT) * ALIGNMENT


def _laid_out(memory: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of the memory, one behind the other."""
    found, first = {}, 0
    for name, value in like.items():
        last = first + value.numel() * value.element_size()
        found[name] = memory[first:last].view(value.dtype).view(value.shape)
        first += _bytes(value)
    return found
