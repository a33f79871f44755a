"""How different samples of one class are: each is compared with the next, as they are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from dkdm.data.perceptual import PerceptualDistance


class Pairs:
    """The distance of each image to the next of its class, from images that come in batches.

    An image is kept until both of its pairs are complete, and one without another of its class is
    not kept at all. The last image of a class is compared with the first.

    `distances`: float32 [count], NaN for an image without another of its class, and until its pair
    is complete.
    """

    def __init__(self, count: int, labels: Tensor | None, perceptual: PerceptualDistance) -> None:
        self.partner = next_of_class(count, labels)
        self.perceptual = perceptual
        self.distances = torch.full((count,), torch.nan)
        self.seen = 0
        self._kept: dict[int, Tensor] = {}

    def add(self, images: Tensor) -> None:
        """Take the next images [N, C, H, W]."""
        before, self.seen = self.seen, self.seen + len(images)
        self._kept |= {before + i: image for i, image in enumerate(images)}
        each = torch.arange(len(self.partner))
        complete_at = torch.maximum(each, self.partner)
        paired = each != self.partner
        whole = each[paired & (complete_at >= before) & (complete_at < self.seen)]
        if len(whole):
            a, b = (self._images(which) for which in (whole, self.partner[whole]))
            self.distances[whole] = self.perceptual(a, b)
        waiting = each[paired & (complete_at >= self.seen)]
        needed = {*waiting.tolist(), *self.partner[waiting].tolist()}
        self._kept = {
            i: image if i < before else image.clone()  # a view would keep its whole batch
            for i, image in self._kept.items()
            if i in needed
        }

    def _images(self, which: Tensor) -> Tensor:
        return torch.stack([self._kept[i] for i in which.tolist()])


def next_of_class(count: int, labels: Tensor | None) -> Tensor:
    """For each of `count` samples, the number of the next one with its label, int64 [count].

    After the last of a class comes the first, so that every sample is in two pairs.
    """
    if labels is None:
        return (torch.arange(count) + 1) % count
    order = labels.cpu().argsort(stable=True)
    partner = torch.empty(count, dtype=torch.int64)
    sizes = labels.cpu()[order].unique_consecutive(return_counts=True)[1]
    for members in order.split(sizes.tolist()):
        partner[members] = members.roll(-1)
    return partner
