"""All that dkdm must know of a network class beyond its config: one `Architecture` for each.

A network that is not called as `network(x, time, **cond)` has its call in `core.denoisers.calls`,
by the name of its class. What a pipeline does around its network is in `pipelines`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.conditioning import Condition
from dkdm.errors import UsageError
from dkdm.models.custom_network import OWN_CLASS
from dkdm.networks import HOMES

Config = Mapping[str, Any]
Shape = tuple[int, ...]


def _sdxl_sizes(config: Config, shape: Shape, bundle: Bundle) -> Condition:
    """SDXL's micro-conditions: original size, crop corner, target size, in pixels."""
    if config.get("addition_embed_type") != "text_time":
        return {}
    if bundle.pipeline != "StableDiffusionXLPipeline":
        raise UsageError(
            "addition_embed_type text_time takes the pooled embedding of a second text encoder, "
            f"and {bundle.pipeline} has only one: give a folder with text_encoder_2 and "
            "tokenizer_2"
        )
    if bundle.entries.get("requires_aesthetics_score"):
        raise UsageError("the refiner of SDXL continues another model's images: distil SDXL")
    height, width = pixels(shape, bundle)
    return {"time_ids": torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)}


def _pixart_sizes(config: Config, shape: Shape, bundle: Bundle) -> Condition:
    """Resolution and aspect ratio, which PixArt-alpha for 1024 pixels takes."""
    asked = config.get("use_additional_conditions")
    if not (config.get("sample_size") == 128 if asked is None else asked):
        return {}
    height, width = pixels(shape, bundle)
    return {
        "resolution": torch.tensor([float(height), float(width)]),
        "aspect_ratio": torch.tensor([height / width]),
    }


def pixels(shape: Shape, bundle: Bundle) -> tuple[int, int]:
    """Height and width in pixels of a latent shape (C, ..., H, W)."""
    config = bundle.autoencoder.config if bundle.autoencoder else {}
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0]
    factor = config.get("scale_factor_spatial") or 2 ** (len(levels) - 1)
    return shape[-2] * factor, shape[-1] * factor


def _attends(config: Config) -> bool:
    """Whether a network has blocks that attend to a text; only UNets may have none."""
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    blocks = [middle, *config.get("down_block_types", ["CrossAttn"])]
    return any("CrossAttn" in str(block) for block in [*blocks, *config.get("up_block_types", [])])


Refused = Mapping[str, Mapping[str, str]]
_CLASS_EMBEDDINGS = dict.fromkeys(
    ("timestep", "identity", "projection", "simple_projection"),
    "continuous labels, which are no class ids",
)
_IMAGES = "embeddings of images"


@dataclass(frozen=True)
class Architecture:
    """A network class of diffusers or dkdm.

    sides: how many a sample has beside its channels, if the config does not list them.
    packed: whether its channels hold the 2x2 values of a sample that make a token.
    constants: (config, shape, bundle) -> what is always fed; None: nothing.
    text_widths, pooled_widths: entries of the config that may say how wide the embeddings of a
        token and of a whole prompt are; the first that is set does. Without text_widths it reads
        no text.
    classes: entry with the number of classes. extra_row: whether its table of classes has one row
        more, for no class.
    refused: entry -> {value: what it feeds the network, which neither classes nor prompts give}.
    layout: how its widths are cut and its tensors are sliced (`students`); None: they are not.
    counts_heads: whether `attention_head_dim` is the number of heads, and not their width.
    older: (class, norm_type) by which earlier configs name it.
    """

    name: str
    sides: int = 2
    packed: bool = False
    constants: Callable[[Config, Shape, Bundle], Condition] | None = None
    text_widths: tuple[str, ...] = ()
    pooled_widths: tuple[str, ...] = ("pooled_projection_dim",)
    classes: str = "num_class_embeds"
    extra_row: bool = False
    refused: Refused = field(default_factory=dict)
    layout: Literal["unet", "transformer"] | None = None
    counts_heads: bool = False
    older: tuple[str, str] | None = None

    def shape(self, config: Config, asked: Shape | None) -> Shape:
        """(C, ...) of a sample, by the config and the sides that were asked for.

        Raises UsageError for another number of sides, and if neither names them.
        """
        if self.name == OWN_CLASS:
            channels, *configured = config["sample_shape"]
        else:
            channels, configured = config["in_channels"], config.get("sample_size")
        if self.packed:  # Flux is made for 1024x1024 pixels
            channels, configured = channels // 4, configured or 128
        number = len(configured) if isinstance(configured, (list, tuple)) else self.sides
        if asked is not None and len(asked) != number:
            raise UsageError(
                f"--teacher-size: this network takes samples with {number} sides, found {asked}"
            )
        if asked is None and configured is None:
            raise UsageError(
                f"the network's config has no sample_size: give --teacher-size with the {number} "
                "sides of a sample as the network sees it, without its channels"
            )
        sides = (configured,) * number if isinstance(configured, int) else configured
        return int(channels), *(sides if asked is None else asked)

    def patch(self, config: Config) -> int:
        """Side of a token, which decides the length of the sequence."""
        found = 2 if self.packed else config.get("patch_size")
        return found if isinstance(found, int) and found else 1

    def needs_text(self, config: Config) -> bool:
        """Whether a network of this config is fed the embedding of a prompt."""
        return bool(self.text_widths) and _attends(config)


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("UNet2DModel", refused={"class_embed_type": _CLASS_EMBEDDINGS}, layout="unet"),
        *map(Architecture, HOMES),
        Architecture(OWN_CLASS, classes="num_classes"),
        Architecture("UNet1DModel", sides=1),
        Architecture(
            "DiTTransformer2DModel",
            classes="num_embeds_ada_norm",
            extra_row=True,
            layout="transformer",
            older=("Transformer2DModel", "ada_norm_zero"),
        ),
        Architecture(
            "UNet2DConditionModel",
            constants=_sdxl_sizes,
            text_widths=("encoder_hid_dim", "cross_attention_dim"),
            pooled_widths=("projection_class_embeddings_input_dim",),
            refused={
                "class_embed_type": _CLASS_EMBEDDINGS,
                "addition_embed_type": dict.fromkeys(
                    ("image", "image_hint", "text_image"), _IMAGES
                ),
                "encoder_hid_dim_type": dict.fromkeys(
                    ("image_proj", "text_image_proj", "ip_image_proj"), _IMAGES
                ),
            },
            layout="unet",
            counts_heads=True,
        ),
        Architecture(
            "PixArtTransformer2DModel",
            constants=_pixart_sizes,
            text_widths=("caption_channels", "cross_attention_dim"),
            older=("Transformer2DModel", "ada_norm_single"),
        ),
        Architecture(
            "SD3Transformer2DModel",
            text_widths=("joint_attention_dim",),
            layout="transformer",
        ),
        Architecture("FluxTransformer2DModel", packed=True, text_widths=("joint_attention_dim",)),
        Architecture(
            "SanaTransformer2DModel",
            text_widths=("caption_channels", "cross_attention_dim"),
        ),
        Architecture("Lumina2Transformer2DModel", text_widths=("cap_feat_dim",)),
        Architecture("WanTransformer3DModel", sides=3, text_widths=("text_dim",)),
    )
}


def architecture_of(network: object) -> Architecture:
    """The record of a network's class; one of a class that dkdm does not know says nothing."""
    name = type(network).__name__
    return ARCHITECTURES.get(name, Architecture(name))


def with_layout(*layouts: str) -> list[str]:
    """The classes whose widths are cut in one of these ways."""
    return [name for name, each in ARCHITECTURES.items() if each.layout in layouts]


def component_of(network: str) -> str:
    """The folder that a network of this class lies in, as diffusers names it."""
    return "transformer" if "Transformer" in network else "unet"


_WRAP = "wrap the model in Python, --teacher module:factory"


def check_embeddings(name: str, config: Config, has_encoders: bool, where: str) -> None:
    """Raise UsageError for a network that is fed what neither class ids nor prompts give it.

    name: its class. has_encoders: whether the folder has a text encoder. where: the folder.
    """
    known = ARCHITECTURES[name]
    for entry, refused in known.refused.items():
        kind = config.get(entry)
        if isinstance(kind, str) and kind in refused:
            raise UsageError(f"{where}: {entry} '{kind}' takes {refused[kind]}; {_WRAP}")
    if known.needs_text(config) and not has_encoders:
        raise UsageError(
            f"{where}: {name} is conditioned on text, but the folder lists no text encoder: give "
            f"a folder with text_encoder and tokenizer, or {_WRAP}"
        )
    if config.get("time_cond_proj_dim"):
        raise UsageError(
            f"{where}: time_cond_proj_dim takes an embedding of the guidance scale, as models that "
            f"were distilled to few steps do; distil the model that this one came from, or {_WRAP}"
        )
    if has_encoders and config.get("num_class_embeds"):
        raise UsageError(f"{where}: num_class_embeds beside prompts is not supported; {_WRAP}")
