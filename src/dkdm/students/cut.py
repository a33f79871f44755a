"""Students cut from the teacher: fewer blocks, narrower, or half as deep.

Each is the teacher's class with a few numbers of its config changed, so that conditions, learned
variance and the rest stay. `start.py` gives them their weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dkdm.core.objectives.positions import evenly
from dkdm.errors import UsageError
from dkdm.models.architectures import architecture_of, with_layout
from dkdm.students.interface import Interface, preset

Config = Mapping[str, Any]

_PER_STAGE = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "cross_attention_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
)


def fewer_blocks(interface: Interface, mid_block: bool, innermost: bool) -> nn.Module:
    """A UNet with the first residual block of each stage down, the first and last of each up.

    mid_block, innermost: whether these stages are kept. Source: BK-SDM (arXiv 2305.15798,
    sec. 3.1). Raises UsageError for other networks, and if there is nothing to remove.
    """
    network = _teacher(interface, with_layout("unet"))
    config: Config = network.config
    changes: dict[str, Any] = {"layers_per_block": 1}
    if not mid_block:
        changes["mid_block_type"] = None
    if not innermost:
        changes |= _without_innermost(config)
    layers = config["layers_per_block"]
    same = {"layers_per_block": layers if isinstance(layers, int) else max(layers)}
    if all({**config, **same}[key] == value for key, value in changes.items()):
        raise UsageError("the teacher's stages have one residual block each already")
    return _like(network, changes, interface)


def _without_innermost(config: Config) -> dict[str, Any]:
    if len(config["block_out_channels"]) == 1:
        raise UsageError("the teacher has a single stage, and the innermost one is to be removed")
    cut = {
        key: tuple(config[key][:-1])
        for key in _PER_STAGE
        if isinstance(config.get(key), (list, tuple))
    }
    up_ordered = ("up_block_types", "reverse_transformer_layers_per_block")
    return cut | {key: tuple(config[key][1:]) for key in up_ordered if config.get(key)}


def narrower(interface: Interface, share: float) -> nn.Module:
    """The teacher's network with a share of every width, in whole heads and groups.

    Heads keep their width; the number of groups of a normalization shrinks with the widths. Raises
    UsageError for other networks, and if no width can shrink.
    """
    network = _teacher(interface, with_layout("unet", "transformer"))
    config: Config = network.config
    is_unet = architecture_of(network).layout == "unet"
    changes = _thin_unet(network, share) if is_unet else _fewer_heads(config, share)
    if all(config[key] == value for key, value in changes.items()):
        raise UsageError("the teacher's widths are one head or one group each already")
    return _like(network, changes, interface)


def _thin_unet(network: Any, share: float) -> dict[str, Any]:
    config: Config = network.config
    heads = _widths_of_heads(network)
    groups = max(1, _nearest((config["norm_num_groups"] or 1) * share))
    units = [head or groups for head in heads]
    widths = [
        unit * max(1, _nearest(width * share / unit))
        for width, unit in zip(config["block_out_channels"], units, strict=True)
    ]
    changes: dict[str, Any] = {"block_out_channels": tuple(widths)}
    if config["norm_num_groups"]:
        changes["norm_num_groups"] = _largest_divisor(math.gcd(*widths), groups)
    if config.get("attn_norm_num_groups"):
        limit = max(1, _nearest(config["attn_norm_num_groups"] * share))
        changes["attn_norm_num_groups"] = _largest_divisor(widths[-1], limit)
    if architecture_of(network).counts_heads:
        counts = [w // head if head else 1 for w, head in zip(widths, heads, strict=True)]
        changes["attention_head_dim"] = tuple(counts)
    return changes


def _widths_of_heads(network: Any) -> list[int | None]:
    """Width of an attention head in each stage; None for a stage without attention."""
    config: Config = network.config
    widths, kinds = config["block_out_channels"], config["down_block_types"]
    attends = ["Attn" in kind for kind in kinds]
    attends[-1] |= config["mid_block_type"] is not None and config.get("add_attention", True)
    given = config["attention_head_dim"]
    if not architecture_of(network).counts_heads:
        return [given if attending else None for attending in attends]
    counts = [given] * len(widths) if isinstance(given, int) else given
    return [w // n if a else None for w, n, a in zip(widths, counts, attends, strict=True)]


def _fewer_heads(config: Config, share: float) -> dict[str, Any]:
    heads = max(1, _nearest(config["num_attention_heads"] * share))
    changes = {"num_attention_heads": heads}
    if "caption_projection_dim" in config:
        changes["caption_projection_dim"] = heads * config["attention_head_dim"]
    return changes


def half_as_deep(interface: Interface) -> nn.Module:
    """A transformer with half of the blocks, evenly spaced in the teacher.

    Raises UsageError for networks whose config has no `num_layers`, and for a single block.
    """
    network = _teacher(interface)
    config: Config = getattr(network, "config", {})
    if not isinstance(config, Mapping) or "num_layers" not in config:
        raise UsageError(
            "only a diffusers transformer, with num_layers in its config, can be half as deep; the "
            f"teacher's network is a {type(network).__name__} without num_layers"
        )
    counts = {key: config[key] for key in ("num_layers", "num_single_layers") if config.get(key)}
    if max(counts.values()) == 1:
        raise UsageError("the teacher has a single block")
    changes: dict[str, Any] = {key: (count + 1) // 2 for key, count in counts.items()}
    if config.get("dual_attention_layers"):
        kept = enumerate(evenly(changes["num_layers"], config["num_layers"]))
        dual = config["dual_attention_layers"]
        changes["dual_attention_layers"] = tuple(i for i, there in kept if there in dual)
    return _like(network, changes, interface)


def _teacher(interface: Interface, classes: Sequence[str] = ()) -> Any:
    network = interface.teacher
    if not isinstance(network, nn.Module):
        raise UsageError("this teacher has no network that a student could be cut from")
    if classes and type(network).__name__ not in classes:
        raise UsageError(
            f"this preset is cut from {', '.join(classes[:-1])} or {classes[-1]}; the teacher's "
            f"network is a {type(network).__name__}"
        )
    return network


def _like(network: Any, changes: Config, interface: Interface) -> nn.Module:
    """A new network of the same class and config, but for the changes.

    It returns half of the teacher's channels if the variance is not learned.
    """
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    if config.get("out_channels") == 2 * interface.out_channels:
        config["out_channels"] = interface.out_channels
    try:
        made: nn.Module = network.from_config({**config, **changes})
        return made
    except (TypeError, ValueError) as error:
        kind = type(network).__name__
        raise UsageError(f"{kind} refuses {dict(changes)}: {error}") from error


def _nearest(number: float) -> int:
    return math.floor(number + 0.5)


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, limit + 1) if number % n == 0)


PRESETS = [
    preset("bk-base", "the teacher's UNet, one block a stage down and two up",
           fewer_blocks, mid_block=True, innermost=True),
    preset("bk-small", "bk-base without the middle block",
           fewer_blocks, mid_block=False, innermost=True),
    preset("bk-tiny", "bk-small without the innermost stage",
           fewer_blocks, mid_block=False, innermost=False),
    *(preset(f"thin-{percent}", f"the teacher's network with {percent} % of every width",
             narrower, share=percent / 100) for percent in (75, 50, 25)),
    preset("shallow-50", "the teacher's transformer with half of its blocks", half_as_deep),
]  # fmt: skip
