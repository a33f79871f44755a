"""Real images as the clean samples of a teacher, with its conditions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dkdm.config import ImageOptions
from dkdm.core.denoisers.conditioning import ClassLabels, Condition
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import kind_of
from dkdm.core.randomness import generator
from dkdm.data.images import ImageSet
from dkdm.data.named import load_images
from dkdm.data.training_set import TrainingData, encoded
from dkdm.errors import UsageError


def images_of(teacher: Denoiser, options: ImageOptions, seed: int) -> TrainingData:
    """The images that the options name, as samples of the teacher: in its range, or its latents.

    Raises UsageError for images that the teacher cannot have, and for images without its
    conditions; DkdmError for images that cannot be read.
    """
    assert options.images is not None
    image_set = load_images(options.images, pixel_shape(teacher))
    rows = torch.arange(len(image_set.images))
    if image_set.labels is not None and isinstance(teacher.conditioning, ClassLabels):
        rows = rows[torch.isin(image_set.labels, _taught(teacher.conditioning, image_set.labels))]
    labels = None if image_set.labels is None else image_set.labels[rows]
    rows = rows[balanced_share(labels, len(rows), options.images_share, seed)]
    conditions = {key: value[rows] for key, value in conditions_of(teacher, image_set).items()}
    return TrainingData(_as_samples(teacher, image_set.images[rows], seed), conditions)


def pixel_shape(teacher: Denoiser) -> tuple[int, ...]:
    """The shape of a teacher's pictures. Raises UsageError if images cannot be its samples."""
    if teacher.decode is not None:
        raise UsageError(
            "--images: the teacher's samples are decoded by a function, and nothing encodes images "
            "for it: choose another --source"
        )
    with torch.no_grad():
        blank = torch.zeros(1, *teacher.sample_shape, device=teacher.device)
        shape = tuple(teacher.to_pixels(blank).shape[1:])
    if len(shape) != 3:
        raise UsageError(
            f"--images: the teacher draws samples of shape {shape}, which are no images: choose "
            "another --source"
        )
    return shape


def balanced_share(labels: Tensor | None, count: int, share: float, seed: int) -> Tensor:
    """Rows of a share of `count` images, in order, int64: as many of every class, at least one.

    A smaller share with the same seed is a part of a larger one.
    """
    labels = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    kept = []
    for label in labels.unique().tolist():
        own = (labels == label).nonzero().flatten()
        order = torch.randperm(len(own), generator=generator("cpu", seed, "share", label))
        kept.append(own[order[: max(1, round(share * len(own)))]])
    return torch.cat(kept).sort().values


def conditions_of(teacher: Denoiser, image_set: ImageSet) -> Condition:
    """The teacher's condition of each image: none, its class, or its caption as a prompt.

    Raises UsageError if the images have no classes or others, or a prompt that was not given.
    """
    conditioning = teacher.conditioning
    asks = kind_of(conditioning).asks
    if asks is None:
        return {}
    if asks == "prompt":
        return conditioning.of(image_set.captions())  # type: ignore[attr-defined]
    if not isinstance(conditioning, ClassLabels):
        raise UsageError("--images: images have no condition like the teacher's: choose another")
    if image_set.labels is None:
        raise UsageError(
            "--images: the teacher has classes, and the images have none: put them into one folder "
            "for each class"
        )
    return {"class_labels": _ids(conditioning, image_set.labels)[image_set.labels]}


def _ids(conditioning: ClassLabels, labels: Tensor) -> Tensor:
    """The teacher's id of each class of the images, int64. Raises UsageError for other classes."""
    ids = replace(conditioning, classes=None, weights=None).drawn
    count = int(labels.max()) + 1
    if count != len(ids):
        raise UsageError(
            f"--images: the images have {count} classes, the teacher {len(ids)}: give one folder "
            "for each, in the order of the teacher's ids"
        )
    return torch.tensor(ids)


def _taught(conditioning: ClassLabels, labels: Tensor) -> Tensor:
    """The labels of the images whose classes are to be learnt."""
    ids = _ids(conditioning, labels)
    return torch.isin(ids, torch.tensor(conditioning.drawn)).nonzero().flatten()


def _as_samples(teacher: Denoiser, images: Tensor, seed: int) -> Tensor:
    """Images in [-1, 1] as the teacher's clean samples."""
    if teacher.bundle.autoencoder is not None:
        return encoded(teacher.bundle.autoencoder, images, seed)
    low, high = teacher.value_range
    return images if (low, high) == (-1.0, 1.0) else low + (images + 1) / 2 * (high - low)
