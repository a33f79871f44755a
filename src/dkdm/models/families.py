"""Which pipeline's conventions hold for a folder: by its class or its components' classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dkdm.errors import UsageError
from dkdm.models.effective import listed_class
from dkdm.models.pipelines import PIPELINES, text_pipelines
from dkdm.reading.fields import as_named

LEFT_OUT = (
    "safety_checker", "feature_extractor", "image_encoder", "movq", "mel", "watermark",
)  # fmt: skip
KNOWN_PARTS = ("scheduler", "unet", "transformer", "vae", "vqvae", *LEFT_OUT)


def family_of(index: Mapping[str, Any], network: str, where: Path) -> str | None:
    """The pipeline whose conventions hold; None if nothing depends on it.

    network: class of the denoiser. Raises UsageError for text encoders of no pipeline that dkdm
    reads, and for parts that none has.
    """
    kind = index.get("_class_name")
    name = kind if isinstance(kind, str) else ""
    if name in PIPELINES:
        return name
    encoders = {
        part: listed_class(index, part)
        for part in index
        if part.startswith("text_encoder") and listed_class(index, part)
    }
    if not encoders:
        return name or None
    found = [known.name for known in PIPELINES.values() if known.is_like(name, network, encoders)]
    if not found:
        listed = ", ".join(f"{part} {value}" for part, value in encoders.items())
        raise UsageError(
            f"{where}: how {name or 'this pipeline'} encodes prompts is not known ({network}, "
            f"{listed}): dkdm reads the parts of {', '.join(text_pipelines())}"
        )
    return found[0]


def check_parts(index: Mapping[str, Any], where: Path) -> None:
    """Raise UsageError for components that no pipeline has which dkdm reads."""
    known = (*KNOWN_PARTS, *_SECOND)
    others = [
        f"{as_named(name)} ({as_named(listed_class(index, name))})"
        for name in index
        if listed_class(index, name)
        and not name.startswith(("_", "text_encoder", "tokenizer"))
        and name not in known
        and _is_part(index[name])
    ]
    if others:
        raise UsageError(
            f"{where}: {as_named(index.get('_class_name'))} has parts that dkdm does not know: "
            f"{', '.join(others)}. If the model denoises without them, set them to [null, null] in "
            "model_index.json"
        )


def check_times(index: Mapping[str, Any], where: Path) -> None:
    """Raise UsageError for a pipeline that asks another network, or other times, at some levels."""
    kind = as_named(index.get("_class_name"))
    second = next((name for name in _SECOND if listed_class(index, name)), None)
    if second or index.get("boundary_ratio") is not None:
        named = second or "boundary_ratio"
        raise UsageError(
            f"{where}: {kind} has two denoisers, one for each half of the noise levels ({named} in "
            "model_index.json), and a teacher is one network. Wrap both in a network that chooses "
            "by its time, and give it as --teacher module:factory"
        )
    if index.get("expand_timesteps"):
        raise UsageError(
            f"{where}: {kind} feeds its network a time for each token (expand_timesteps in "
            "model_index.json), and a teacher is fed one for each sample. Wrap the network in "
            "Python, --teacher module:factory"
        )


_SECOND = ("transformer_2", "unet_2")


def _is_part(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and isinstance(value[0], str)
