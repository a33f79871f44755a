"""Numbers of single images, made while a shard's images are at hand: columns of its `Features`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dkdm.data.clip import ClipScore
from dkdm.data.perceptual import PerceptualDistance


def per_sample(
    images: Tensor,
    *,
    perceptual: PerceptualDistance | None = None,
    beside: Tensor | None = None,
    labels: Tensor | None = None,
    clip: ClipScore | None = None,
    prompts: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The columns that can be made of images [N, C, H, W] in [-1, 1]: `features._replace(**found)`.

    - `lpips`: if there are `perceptual` and `beside`, the teacher's images of the same noise.
    - `lpips_diversity`: if there is `perceptual`: to the next image of the same class, or simply
      the next without `labels` [N]; the last is compared with the first. NaN for the only one.
    - `clip`: if there are `clip` and a prompt for each image.

    Raises `UsageError` for images that do not fit.
    """
    found = {}
    if perceptual is not None:
        found["lpips_diversity"] = diversity(images, labels, perceptual)
        if beside is not None:
            found["lpips"] = perceptual(images, beside)
    if clip is not None and prompts is not None:
        found["clip"] = clip(images, prompts)
    return found


def diversity(images: Tensor, labels: Tensor | None, perceptual: PerceptualDistance) -> Tensor:
    """Distance [N] of each image to the next of its class; NaN where there is no other."""
    partner = next_of_class(len(images), labels)
    alone = partner == torch.arange(len(images))
    return perceptual(images, images[partner]).masked_fill(alone, torch.nan)


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
