"""All that dkdm must know of a pipeline of diffusers: one `Pipeline` for each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dkdm.core.denoisers.bundle import Bundle
from dkdm.errors import UsageError
from dkdm.models.effective import listed, stock_class
from dkdm.reading.fields import as_named

EMBEDS, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"
DENOISERS = ("unet", "transformer")
_SECOND = ("transformer_2", "unet_2")
AUTOENCODERS = ("vae", "vqvae")
LEFT_OUT = (
    "safety_checker", "feature_extractor", "image_encoder", "movq", "mel", "watermark",
)  # fmt: skip
_NOT_TEXT = (*DENOISERS, *_SECOND, *AUTOENCODERS, *LEFT_OUT)


@dataclass(frozen=True)
class Encoding:
    """How a pipeline encodes prompts: what its `encode_prompt` takes and returns.

    encoders: classes that each text encoder may be of. outputs: names of what `encode_prompt`
        returns, None for what is not needed. arguments: given to it.
    defaults: arguments of `encode_prompt` that are taken from the pipeline's `__call__`.
    zero_empty: the entry of model_index.json that says that an empty prompt is all zeros.
    bare_empty: whether an empty prompt goes without the instruction that stands before the others;
        the pipeline encodes it as its negative prompt, and returns that after the prompts' own.
    asks_transformer: whether it asks the denoiser's config for the width of a missing encoder.
    """

    encoders: Mapping[str, tuple[str, ...]]
    outputs: tuple[str | None, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    defaults: tuple[str, ...] = ()
    zero_empty: str | None = None
    bare_empty: bool = False
    asks_transformer: bool = False

    def all_arguments(self, bundle: Bundle) -> dict[str, Any]:
        """What `encode_prompt` takes beside prompts; the bundle's entries come first."""
        call = inspect.signature(
            stock_class(str(bundle.pipeline), "DiffusionPipeline").__call__
        ).parameters
        defaults = {name: call[name].default for name in self.defaults}
        given = {name: bundle.entries[name] for name in self.defaults if name in bundle.entries}
        return {**self.arguments, **defaults, **given}

    def absent(self, pipeline: str, encoders: Sequence[str]) -> list[str]:
        """Parameters of the pipeline that are neither its scheduler nor one of its encoders."""
        init = inspect.signature(stock_class(pipeline, "DiffusionPipeline").__init__).parameters
        present = {"self", "scheduler", *encoders}
        return [
            name
            for name, parameter in init.items()
            if name not in present and (parameter.default is parameter.empty or name in _NOT_TEXT)
        ]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of diffusers that dkdm reads.

    network: class of its denoiser. factors: entries of an autoencoder's config that it reads to
        standardize latents; None: all.
    encoding: of prompts; None without text. named: what the class of a pipeline with the same
        components has in its name, if components alone do not tell.
    schedulers: the only ones it samples with, since it scales neither its network's input nor the
        first noise; None: any. flow: whether it samples flows, or else the others.
    output: attribute of its result with the samples. asks_size: whether it asks for the pixels.
    """

    name: str
    network: str
    factors: tuple[str, ...] | None = None
    encoding: Encoding | None = None
    named: str = ""
    schedulers: tuple[str, ...] | None = None
    flow: bool = False
    output: str = "images"
    asks_size: bool = False

    def is_like(self, kind: str, network: str, encoders: Mapping[str, str]) -> bool:
        """Whether a pipeline of the class `kind` has the same network and text encoders."""
        if self.encoding is None or network != self.network or self.named not in kind:
            return False
        legal = self.encoding.encoders
        return all(value in legal.get(name, ()) for name, value in encoders.items())


_SCALE, _SHIFT, _EACH = ("scaling_factor",), ("shift_factor",), ("latents_mean", "latents_std")
_CLIP, _PROJECTED, _T5 = ("CLIPTextModel",), ("CLIPTextModelWithProjection",), ("T5EncoderModel",)
_GEMMA = ("Gemma2Model", "Gemma2PreTrainedModel", "Gemma2ForCausalLM", "AutoModel")
_UNGUIDED = {"do_classifier_free_guidance": False}
_LENGTH = "max_sequence_length"

_STABLE_DIFFUSION = Encoding(
    {"text_encoder": _CLIP}, (EMBEDS,), {**_UNGUIDED, "num_images_per_prompt": 1}
)
_SDXL = Encoding(
    {"text_encoder": _CLIP, "text_encoder_2": _PROJECTED},
    (EMBEDS, None, POOLED),
    {**_UNGUIDED, "prompt_2": None},
    zero_empty="force_zeros_for_empty_prompt",
)
_SD3 = Encoding(
    {"text_encoder": _PROJECTED, "text_encoder_2": _PROJECTED, "text_encoder_3": _T5},
    (EMBEDS, None, POOLED),
    {**_UNGUIDED, "prompt_2": None, "prompt_3": None},
    (_LENGTH,),
    asks_transformer=True,
)
_FLUX = Encoding(
    {"text_encoder": _CLIP, "text_encoder_2": _T5}, (EMBEDS, POOLED), {"prompt_2": None}, (_LENGTH,)
)
_PIXART = Encoding({"text_encoder": _T5}, (EMBEDS, MASK), _UNGUIDED, (_LENGTH,))
_SANA = Encoding(
    {"text_encoder": _GEMMA},
    (EMBEDS, MASK),
    _UNGUIDED,
    (_LENGTH, "complex_human_instruction"),
    bare_empty=True,
)
_LUMINA = replace(_SANA, defaults=(_LENGTH, "system_prompt"))
_WAN = Encoding({"text_encoder": ("UMT5EncoderModel",)}, (EMBEDS,), _UNGUIDED, (_LENGTH,))

PIPELINES = {
    each.name: each
    for each in (
        Pipeline("DDPMPipeline", "UNet2DModel"),
        Pipeline("LDMPipeline", "UNet2DModel", _SCALE),
        Pipeline("AudioDiffusionPipeline", "UNet2DModel", _SCALE),
        Pipeline(
            "DanceDiffusionPipeline", "UNet1DModel", schedulers=("IPNDMScheduler",), output="audios"
        ),
        Pipeline(
            "DiTPipeline",
            "DiTTransformer2DModel",
            _SCALE,
            schedulers=("DDPMScheduler", "DDIMScheduler"),
        ),
        Pipeline("StableDiffusionPipeline", "UNet2DConditionModel", _SCALE, _STABLE_DIFFUSION),
        Pipeline("StableDiffusionXLPipeline", "UNet2DConditionModel", _SCALE + _EACH, _SDXL),
        Pipeline("PixArtAlphaPipeline", "PixArtTransformer2DModel", _SCALE, _PIXART, "Alpha"),
        Pipeline("PixArtSigmaPipeline", "PixArtTransformer2DModel", _SCALE, _PIXART, "Sigma"),
        Pipeline(
            "StableDiffusion3Pipeline", "SD3Transformer2DModel", _SCALE + _SHIFT, _SD3, flow=True
        ),
        Pipeline(
            "FluxPipeline",
            "FluxTransformer2DModel",
            _SCALE + _SHIFT,
            _FLUX,
            flow=True,
            asks_size=True,
        ),
        Pipeline("SanaPipeline", "SanaTransformer2DModel", _SCALE, _SANA, flow=True),
        Pipeline(
            "Lumina2Pipeline",
            "Lumina2Transformer2DModel",
            _SCALE + _SHIFT,
            _LUMINA,
            flow=True,
            asks_size=True,
        ),
        Pipeline(
            "WanPipeline",
            "WanTransformer3DModel",
            _EACH,
            _WAN,
            flow=True,
            output="frames",
            asks_size=True,
        ),
    )
}


def encoding_of(pipeline: str | None) -> Encoding | None:
    """How a pipeline encodes prompts; None if it does not, or dkdm does not know how."""
    known = PIPELINES.get(str(pipeline))
    return known.encoding if known else None


def text_pipelines() -> list[str]:
    """The pipelines whose prompts dkdm can encode."""
    return [name for name, each in PIPELINES.items() if each.encoding]


def family_of(index: Mapping[str, Any], network: str, where: Path) -> str | None:
    """The pipeline whose conventions hold; None if nothing depends on it.

    network: class of the denoiser. Raises UsageError for text encoders of no pipeline that dkdm
    reads, and for parts that none has.
    """
    kind = index.get("_class_name")
    name = kind if isinstance(kind, str) else ""
    if name in PIPELINES:
        return name
    encoders = {k: v for k, v in listed(index).items() if k.startswith("text_encoder")}
    if not encoders:
        return name or None
    found = [known.name for known in PIPELINES.values() if known.is_like(name, network, encoders)]
    if not found:
        parts = ", ".join(f"{part} {value}" for part, value in encoders.items())
        raise UsageError(
            f"{where}: how {name or 'this pipeline'} encodes prompts is not known ({network}, "
            f"{parts}): dkdm reads the parts of {', '.join(text_pipelines())}"
        )
    return found[0]


def check_parts(index: Mapping[str, Any], where: Path) -> None:
    """Raise UsageError for components that no pipeline has which dkdm reads."""
    known = ("scheduler", *DENOISERS, *_SECOND, *AUTOENCODERS, *LEFT_OUT)
    others = [
        f"{as_named(name)} ({as_named(kind)})"
        for name, kind in listed(index).items()
        if not name.startswith(("_", "text_encoder", "tokenizer")) and name not in known
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
    second = next((name for name in _SECOND if name in listed(index)), None)
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
