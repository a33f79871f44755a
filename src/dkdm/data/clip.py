"""The CLIP score: how well an image fits its prompt, by a model that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from dkdm.data.resizing import eight_bits
from dkdm.errors import DkdmError, UsageError, in_a_line
from dkdm.models.locate import is_hub_id, locate
from dkdm.reading.allowed import component_class
from dkdm.reading.fields import read_json, shown
from dkdm.reading.places import expanded

BATCH = 50
OPTION = "--clip-model"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class ClipScore:
    """100 times the cosine between a CLIP model's embeddings of image and prompt, at least 0.

    Source: Hessel et al., CLIPScore (2021), section 3, with 100 in place of 2.5 and the prompt as
    it is. Images are rounded to 8 bits, their shorter side is brought to the model's size (bicubic
    with smoothing), and the middle square is taken.
    """

    name: str
    model: Any
    tokenizer: Any
    mean: Tensor
    std: Tensor

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return [N] float32 on the CPU of images [N, 1 or 3, H, W] in [-1, 1] and N prompts.

        Long prompts are cut at the model's length. Raises `UsageError` for other images or another
        number of prompts.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) != len(prompts):
            raise UsageError(
                f"{self.name} scores grey or RGB images [N, C, H, W], each with a prompt, not "
                f"{list(images.shape)} with {len(prompts)} prompts"
            )
        with torch.no_grad():
            return torch.cat(
                [
                    self._scores(batch, prompts[first : first + BATCH])
                    for first, batch in zip(
                        range(0, len(images), BATCH), images.split(BATCH), strict=True
                    )
                ]
            )

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        device = self.model.device
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(device)
        found = self.model(pixel_values=self.prepared(images).to(device), **tokens)
        cosine = cosine_similarity(found.image_embeds, found.text_embeds)
        return (100 * cosine).clamp(min=0).float().cpu()

    def prepared(self, images: Tensor) -> Tensor:
        """Return the model's view, float32 [N, 3, S, S], of images in [-1, 1]."""
        size = self.model.config.vision_config.image_size
        shape = images.shape[-2:]
        larger = [n * size // min(shape) for n in shape]
        pixels = interpolate(  # of whole pixels: rounded after each direction, as PIL does
            eight_bits(images.cpu()).byte(), larger, mode="bicubic", antialias=True
        )
        top, left = ((n - size) // 2 for n in larger)
        square = pixels[..., top : top + size, left : left + size]
        return (square.float() / 255 - self.mean) / self.std


def clip_score(given: str | Path, device: str = "cpu") -> ClipScore:
    """The score by the CLIP model in a folder or of a hub id, as transformers saves it.

    Raises `UsageError` if there is no such model, `DkdmError` if it cannot be loaded or
    transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise DkdmError(f"{OPTION} needs transformers: pip install 'dkdm[text]'")
    if not expanded(given).is_dir() and not is_hub_id(str(given)):
        raise UsageError(f"{OPTION} {given}: give the folder or the hub id of a CLIP model")
    folder = locate(str(given))
    found = read_json(folder / "config.json", "a CLIP model").get("model_type")
    if found != "clip":
        raise UsageError(f"{OPTION} {given}: its model_type is {shown(found)}: give a CLIP model")
    try:
        model, tokenizer = (
            component_class(folder, "transformers", name).from_pretrained(
                str(folder), local_files_only=True
            )
            for name in ("CLIPModel", "CLIPTokenizer")
        )
    except DkdmError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise DkdmError(f"{OPTION} {given} cannot be loaded: {in_a_line(error)}") from error
    mean, std = (
        torch.tensor(values)[:, None, None] for values in _normalization(folder, str(given))
    )
    model = model.float().to(device).eval().requires_grad_(False)
    return ClipScore(f"CLIP score ({given})", model, tokenizer, mean, std)


def _normalization(folder: Path, given: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of pixels that the model was trained with."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return MEAN, STD
    fields = read_json(file, "how CLIP's images are prepared")
    found = [fields.get("image_mean", MEAN), fields.get("image_std", STD)]
    for values in found:
        numbers = isinstance(values, (list, tuple)) and len(values) == 3
        if not numbers or not all(isinstance(x, (int, float)) for x in values):
            raise UsageError(f"{OPTION} {given}: {file.name} holds {shown(values)}: give 3 numbers")
    return found[0], found[1]
