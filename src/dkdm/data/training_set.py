"""What `dkdm train` learns from: images or their latents, and their conditions."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dkdm.config import TrainConfig
from dkdm.core.bundle import Bundle, Coder
from dkdm.core.conditioning import ClassLabels, Condition, Conditioning, Unconditional
from dkdm.core.denoiser import Denoiser
from dkdm.core.prediction import Parameterization
from dkdm.core.progress import track
from dkdm.data.images import ImageSet
from dkdm.data.named import load_images
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


def training_data(config: TrainConfig) -> tuple[TrainingData, Denoiser]:
    """Read, encode and caption the images; also return a model that has no network yet.

    Raises UsageError for options that do not fit together, DkdmError for images, captions or a
    base that cannot be read.
    """
    image_set = load_images(config.data.images, config.data.sample_shape)
    scheduler, bundle, text = None, Bundle(), None
    if config.model.base is not None:
        with understood(f"--base {config.model.base}"):
            scheduler, bundle, text = read_base(Path(config.model.base))
    if config.model.scheduler or scheduler is None:
        named = config.model.scheduler or DEFAULT_SCHEDULER
        scheduler = dict(named_config(named, None if bundle.autoencoder else 1.0))
    images = image_set.images
    conditioning, conditions = _conditions(config, image_set, text)
    if bundle.autoencoder is not None:
        images = encoded(bundle.autoencoder, images, config.run.seed)
    like = Denoiser(
        lambda x, *_, **__: x,
        from_scheduler_config(scheduler),
        Parameterization(prediction_type(scheduler)),
        tuple(images.shape[1:]),
        conditioning,
        bundle=bundle,
    )
    return TrainingData(images, conditions), like


def _conditions(
    config: TrainConfig, image_set: ImageSet, text: Prompts | None
) -> tuple[Conditioning, Condition]:
    """Captions if the base encodes text; otherwise the labels, if there are any."""
    if text is not None:
        captions = image_set.captions()
        prompts = with_prompts(text, sorted(set(captions)), config.conditions.negative_prompt)
        return prompts, prompts.of(captions)
    labels = image_set.labels
    if labels is None or not config.data.class_conditional:
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
