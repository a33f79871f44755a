"""Transformer students: diffusers' DiT and MM-DiT. Sizes are those of arXiv 2212.09748, table 1."""

from __future__ import annotations

import diffusers
from torch import nn

from dkdm.core.denoisers.kinds import kind_of
from dkdm.errors import UsageError
from dkdm.students.interface import Interface, patch_sides, preset


def dit(interface: Interface, width: int, depth: int, heads: int) -> nn.Module:
    """diffusers' DiTTransformer2DModel. Raises UsageError for samples that are not square."""
    classes = interface.num_class_embeds or 1
    has_null = kind_of(interface.conditioning).facts().get("null_class") is not None
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=interface.sample_shape[0],
        out_channels=interface.out_channels,
        num_layers=depth,
        **_square(interface),
        num_embeds_ada_norm=classes - 1 if has_null else classes,
    )


def mmdit(interface: Interface, width: int, depth: int) -> nn.Module:
    """diffusers' SD3Transformer2DModel: image and text tokens attend to each other (MM-DiT).

    Raises UsageError for samples that are not square, and without text or its pooled embedding.
    """
    sizes = _square(interface)
    return diffusers.SD3Transformer2DModel(
        in_channels=interface.sample_shape[0],
        out_channels=interface.out_channels,
        num_layers=depth,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=interface.needed_text_width("encoder_hidden_states"),
        caption_projection_dim=width,
        pooled_projection_dim=interface.needed_text_width("pooled_projections"),
        pos_embed_max_size=sizes["sample_size"] // sizes["patch_size"],
        **sizes,
    )


def _square(interface: Interface) -> dict[str, int]:
    _, height, width = interface.shape_of("images")
    if height != width:
        raise UsageError(f"this preset needs square samples; the samples are {height}x{width}")
    return {"sample_size": height, "patch_size": patch_sides(interface)[0]}


PRESETS = [
    preset("dit-tiny", "a small transformer, for minutes on a CPU",
           dit, width=64, depth=4, heads=2),
    preset("dit-xs", "a small transformer, for an hour on a CPU", dit, width=96, depth=4, heads=3),
    preset("dit-s", "DiT-S", dit, width=384, depth=12, heads=6),
    preset("dit-b", "DiT-B", dit, width=768, depth=12, heads=12),
    preset("dit-l", "DiT-L", dit, width=1024, depth=24, heads=16),
    preset("mmdit-tiny", "a small SD3 transformer, for an hour on a CPU", mmdit, width=96, depth=5),
    preset("mmdit-s", "an SD3 transformer as wide and deep as DiT-S", mmdit, width=384, depth=12),
]  # fmt: skip
