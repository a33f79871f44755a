"""What `dkdm train` learns from: images or their latents, and their conditions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.config import DataOptions, NetworkOptions
from dkdm.core.denoisers.bundle import Bundle, Coder
from dkdm.core.denoisers.conditioning import ClassLabels, Condition, Conditioning, Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.saving.progress import track
from dkdm.data.images import ImageSet
from dkdm.data.named import load_images
from dkdm.errors import UsageError
from dkdm.models.pipeline_folder import read_base
from dkdm.models.prompts import Prompts, with_prompts
from dkdm.models.schedulers import from_scheduler_config, named_config, prediction_type
from dkdm.reading.sizes import understood

DEFAULT_SCHEDULER = "ddpm-cosine"
ENCODED_AT_ONCE = 200


class TrainingData(NamedTuple):
    """images: [N, ...] clean samples, latents if the base has an autoencoder; conditions: N rows
    each."""

    images: Tensor
    conditions: Condition


def training_data(
    data: DataOptions, network: NetworkOptions, negative_prompt: str = "", seed: int = 0
) -> tuple[TrainingData, Denoiser]:
    """Read, encode and caption the images; also return a model that has no network yet.

    Raises UsageError for options that do not fit together, DkdmError for images, captions or a
    base that cannot be read.
    """
    image_set = _of_classes(load_images(data.images, data.sample_shape), data.classes)
    scheduler, bundle, text = None, Bundle(), None
    if network.base is not None:
        with understood(f"--base {network.base}"):
            scheduler, bundle, text = read_base(Path(network.base))
    if network.scheduler or scheduler is None:
        named = network.scheduler or DEFAULT_SCHEDULER
        scheduler = dict(named_config(named, None if bundle.autoencoder else 1.0))
    images = image_set.images
    if text is not None:
        conditioning, conditions = _captions(image_set, text, negative_prompt)
    else:
        conditioning, conditions = _labels(image_set, data.class_conditional)
    if bundle.autoencoder is not None:
        images = encoded(bundle.autoencoder, images, seed)
    like = Denoiser(
        lambda x, *_, **__: x,
        from_scheduler_config(scheduler),
        Parameterization(prediction_type(scheduler)),
        tuple(images.shape[1:]),
        conditioning,
        bundle=bundle,
    )
    return TrainingData(images, conditions), like


def _of_classes(image_set: ImageSet, classes: Sequence[int] | None) -> ImageSet:
    """The images of these classes, which are numbered anew in this order; None keeps all."""
    if classes is None:
        return image_set
    labels, names = image_set.labels, image_set.class_names
    if labels is None:
        raise UsageError("--classes: the images have no classes: remove it")
    known = int(labels.max()) + 1
    wrong = sorted({each for each in classes if each >= known})
    if wrong or len(set(classes)) < len(classes):
        said = " ".join(map(str, classes))
        raise UsageError(f"--classes {said}: give each id once, from 0 to {known - 1}")
    place = torch.full((known,), -1)
    place[list(classes)] = torch.arange(len(classes))
    rows = (place[labels] >= 0).nonzero().flatten()

    def captions() -> tuple[str, ...]:
        every = image_set.captions()
        return tuple(every[row] for row in rows.tolist())

    named = tuple(names[each] for each in classes) if names else None
    return ImageSet(image_set.images[rows], place[labels[rows]], captions, named)


def _captions(
    image_set: ImageSet, text: Prompts, negative_prompt: str
) -> tuple[Conditioning, Condition]:
    captions = image_set.captions()
    prompts = with_prompts(text, sorted(set(captions)), negative_prompt)
    return prompts, prompts.of(captions)


def _labels(image_set: ImageSet, asked_for: bool) -> tuple[Conditioning, Condition]:
    labels = image_set.labels
    if labels is None or not asked_for:
        return Unconditional(), {}
    classes = int(labels.max()) + 1
    conditioning = ClassLabels(classes, null_class=classes, names=image_set.class_names)
    return conditioning, {"class_labels": labels}


def encoded(autoencoder: Coder, images: Tensor, seed: int) -> Tensor:
    """Draw the latents of all images, once each."""
    random = torch.Generator().manual_seed(seed)
    parts = []
    with track(len(images), 0, "encoding images") as progress:
        for part in images.split(ENCODED_AT_ONCE):
            parts.append(autoencoder.encode(part, random))
            progress(sum(map(len, parts)))
    autoencoder.idle()
    return torch.cat(parts)
