"""A teacher without its weights, for questions that need only its shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.models.architectures import Architecture
from dkdm.models.custom_network import OWN_CLASS, make, read_origin
from dkdm.models.effective import config_file, place_of
from dkdm.models.locate import INDEX, locate
from dkdm.models.options import LoadOptions
from dkdm.models.pipeline_folder import describe_pipeline_folder
from dkdm.models.pipelines import EMBEDS, MASK, POOLED, encoding_of
from dkdm.models.prompts import BlankEmbeddings, Prompts
from dkdm.networks import network_class
from dkdm.reading.plugins import distrust
from dkdm.reading.sizes import check_sample, make_network, understood

PROMPT_TOKENS = 77  # of CLIP, where the pipeline does not say


def sketch_teacher(
    spec: str, options: LoadOptions, subfolder: str | None = None, revision: str | None = None
) -> Denoiser | None:
    """A pipeline folder's teacher on torch's meta device, with blank prompts for a text model.

    Nothing but JSON is read (of a hub id, nothing else downloaded). None for what is no pipeline
    folder: it can only be loaded. Raises UsageError as `load_teacher` does.
    """
    if spec.partition(":")[1] and not spec.startswith("builtin:"):
        return None
    found = locate(spec, revision=revision, weights=False, subfolder=subfolder)
    folder = found / (subfolder or "")
    if not (folder / INDEX).is_file():
        return None
    with understood(str(folder)):
        return _sketch(folder, options, spec)


def _sketch(folder: Path, options: LoadOptions, name: str) -> Denoiser:
    distrust(folder)
    denoiser, component, known, config = describe_pipeline_folder(folder, options)
    with torch.device("meta"):
        if config.get("_class_name") == OWN_CLASS:
            origin = read_origin(config, place_of(folder, component))
            network = make(origin, folder, options.factory)
        else:
            kind, file = network_class(known.name), config_file(folder, component)
            network = make_network(kind, config, str(file))
    dtype = "bfloat16" if options.dtype == "int8" else options.dtype
    network = torch.nn.Module.to(network, "meta", getattr(torch, dtype))
    conditioning = denoiser.conditioning
    if isinstance(conditioning, Prompts):
        shapes = _shapes(config, known, denoiser)
        for embedding, shape in shapes.items():
            check_sample(shape, f"{folder}: {embedding}")
        conditioning = replace(conditioning, texts=("",), cache=BlankEmbeddings(shapes))
    return replace(denoiser, network=network, call=None, conditioning=conditioning, name=name)


def _shapes(
    config: dict[str, Any], known: Architecture, denoiser: Denoiser
) -> dict[str, tuple[int, ...]]:
    """The embeddings a text network expects, by its config."""
    encoding = encoding_of(denoiser.bundle.pipeline)
    if encoding is None:
        return {}
    tokens = int(encoding.all_arguments(denoiser.bundle).get("max_sequence_length", PROMPT_TOKENS))
    shapes: dict[str, tuple[int, ...]] = {EMBEDS: (tokens, _first(config, known.text_widths))}
    if MASK in encoding.outputs:
        shapes[MASK] = (tokens,)
    if POOLED in encoding.outputs:
        sizes = 6 * int(config.get("addition_time_embed_dim") or 0)
        shapes[POOLED] = (_first(config, known.pooled_widths) - sizes,)
    return shapes


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    found = next((config[name] for name in names if config.get(name)), 768)
    return int(found[0] if isinstance(found, (list, tuple)) else found)
