"""Prompts encoded by a pipeline of diffusers without its denoiser and autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.conditioning import Condition
from dkdm.errors import DkdmError, UsageError, in_a_line, raised_as
from dkdm.models.components import Component
from dkdm.models.effective import class_config
from dkdm.models.pipelines import Encoding, encoding_of, text_pipelines
from dkdm.models.place import device_of_run
from dkdm.models.prompts import Prompts, TextEncoders, folder_fingerprint
from dkdm.reading.allowed import component_class
from dkdm.reading.fields import Fields, read_json


def text_conditioning(folder: Path, bundle: Bundle) -> Prompts:
    """Prompts for a text pipeline, none given yet; its encoders are loaded when first needed.

    Raises UsageError for a pipeline whose prompts dkdm does not know how to encode, DkdmError if
    transformers is not installed.
    """
    encoding = encoding_of(bundle.pipeline)
    if encoding is None:
        raise UsageError(
            f"{folder}: how {bundle.pipeline} encodes prompts is not known; dkdm reads "
            f"{', '.join(text_pipelines())}"
        )
    if find_spec("transformers") is None:
        raise DkdmError(f"{folder}: prompts need transformers: pip install 'dkdm[text]'")
    encoders = {name: part for name, part in bundle.components.items() if _is_text(name)}
    described = repr(encoding.all_arguments(bundle))
    described += repr([part.class_name for part in encoders.values()])
    if encoding.asks_transformer:
        described += f" {token_width(folder, bundle)}"
    folders = [part.folder for part in encoders.values()]
    fingerprint = folder_fingerprint(folders, str(bundle.pipeline), described)
    loaded = LazyEncoders(folder, bundle, encoding)
    return Prompts(TextEncoders(loaded.encode, loaded.release, fingerprint))


def _is_text(name: str) -> bool:
    return name.startswith(("text_encoder", "tokenizer"))


@dataclass(frozen=True)
class LazyEncoders:
    """A pipeline without denoiser and autoencoder, loaded when the first prompt is encoded."""

    folder: Path
    bundle: Bundle
    encoding: Encoding

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline, until `release`."""
        kind, loaded = str(self.bundle.pipeline), {}
        for name, part in self.bundle.components.items():
            if _is_text(name):
                options = {"dtype": torch.float32} if name.startswith("text_encoder") else {}
                loaded[name] = part.load(**options)
        unused = dict.fromkeys(["scheduler", *self.encoding.absent(kind, list(loaded))])
        with self._fitting():
            pipeline = getattr(diffusers, kind)(**loaded, **unused)
        pipeline = pipeline.to(device_of_run())
        if self.encoding.asks_transformer and pipeline.text_encoder_3 is None:
            config = SimpleNamespace(joint_attention_dim=token_width(self.folder, self.bundle))
            object.__setattr__(pipeline, "transformer", SimpleNamespace(config=config))
        return pipeline

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Embeddings of prompts, one row each."""
        rows, empty = self._encode(prompts), [i for i, prompt in enumerate(prompts) if not prompt]
        if not empty:
            return rows
        if self.bundle.entries.get(self.encoding.zero_empty or "", False):
            for value in rows.values():
                value[empty] = 0
        elif self.encoding.bare_empty:
            bare = self._encode([""], negative=True)
            for name, value in rows.items():
                value[empty] = bare[name]
        return rows

    def _encode(self, prompts: Sequence[str], negative: bool = False) -> Condition:
        pipeline, outputs = self.pipeline, self.encoding.outputs
        arguments = self.encoding.all_arguments(self.bundle)
        arguments |= {"prompt": list(prompts), "device": pipeline.device}
        if negative:
            arguments |= {"do_classifier_free_guidance": True, "negative_prompt": list(prompts)}
        with self._fitting():
            encoded = pipeline.encode_prompt(**arguments)
        found = zip(outputs, encoded[len(outputs) if negative else 0 :], strict=False)
        return {name: value.cpu() for name, value in found if name is not None}

    def _fitting(self) -> AbstractContextManager[None]:
        """Around what classes raise that were not made for each other."""
        parts = self.bundle.components.items()
        listed = ", ".join(f"{k}: {part.class_name}" for k, part in parts if _is_text(k))
        said = f"{self.folder}: prompts cannot be encoded by {listed}"
        return raised_as(lambda error: DkdmError(f"{said}: {in_a_line(error)}"))

    def release(self) -> None:
        vars(self).pop("pipeline", None)


def token_width(folder: Path, bundle: Bundle) -> int:
    """Width of a text token: the denoiser's, or without one that of all encoders together."""
    file = folder / "transformer" / "config.json"
    raw = read_json(file, "the config of its transformer") if file.is_file() else {}
    own = class_config(raw, str(raw.get("_class_name")), str(file)) if raw else {}
    saved = Fields({**bundle.entries, **own}, str(file))
    if "joint_attention_dim" in saved.values:
        return saved.whole("joint_attention_dim", low=1)
    encoders = [part for name, part in bundle.components.items() if name.startswith("text_encoder")]
    return sum(encoder_width(part) for part in encoders)


def encoder_width(part: Component) -> int:
    """Width of a text encoder's embeddings, by its config and its class's defaults."""
    file = part.folder / "config.json"
    raw = read_json(file, "a text encoder's config")
    made = component_class(part.folder, part.library, part.class_name)
    kind = getattr(made, "config_class", None)
    said = f"{file} is not of a {part.class_name}"
    with raised_as(lambda error: UsageError(f"{said}: {in_a_line(error)}")):
        values = raw if kind is None else {"hidden_size": kind.from_dict(raw).hidden_size}
    return Fields(values, str(file)).whole("hidden_size", low=1)
