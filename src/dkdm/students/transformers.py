"""Transformer students: diffusers' DiT and MM-DiT. Sizes are those of arXiv 2212.09748, table 1."""

from __future__ import annotations

from torch import nn

from dkdm.core.kinds import kind_of
from dkdm.errors import UsageError
from dkdm.students.interface import Interface, patch_size, preset


def dit(
    interface: Interface, width: int, depth: int, heads: int, patch: int | None = None
) -> nn.Module:
    """diffusers' DiTTransformer2DModel; patch: side in pixels, None is by the resolution.

    Raises UsageError for samples that are not square or not divisible by the patch.
    """
    from diffusers import DiTTransformer2DModel

    in_channels, height, _ = interface.image_shape
    classes = interface.num_class_embeds or 1
    has_null = kind_of(interface.conditioning).facts().get("null_class") is not None
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=in_channels,
        out_channels=interface.out_channels,
        num_layers=depth,
        sample_size=height,
        patch_size=patch_size(interface, patch, "a DiT"),
        num_embeds_ada_norm=classes - 1 if has_null else classes,
    )


def mmdit(interface: Interface, width: int, depth: int, patch: int | None = None) -> nn.Module:
    """diffusers' SD3Transformer2DModel: image and text tokens attend to each other (MM-DiT).

    patch: as in `dit`. Raises UsageError for a teacher without text.
    """
    from diffusers import SD3Transformer2DModel

    in_channels, height, _ = interface.image_shape
    side = patch_size(interface, patch, "an MM-DiT")
    text, pooled = interface.needs_text("an MM-DiT"), interface.pooled_width
    if pooled is None:
        raise UsageError("an MM-DiT needs a pooled text embedding, and the teacher has none")
    return SD3Transformer2DModel(
        sample_size=height,
        patch_size=side,
        in_channels=in_channels,
        out_channels=interface.out_channels,
        num_layers=depth,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=text,
        caption_projection_dim=width,
        pooled_projection_dim=pooled,
        pos_embed_max_size=height // side,
    )


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
