"""How each network is called: what diffusers' pipelines do around their one line of inference.

A call takes (network, x, time, cond) and returns the output [B, C or 2C, ...]. x is a batch of
states, time the float [B] of `Process.network_time`, cond the embedded condition. Networks that are
called as `(x, time, **cond)` need nothing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dkdm.errors import UsageError

Network = nn.Module | Callable[..., Any]


class Call(Protocol):
    """One evaluation of a network."""

    def __call__(
        self, network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        """The network's output for states x [B, ...] at times [B]."""


def call_of(network: Network) -> Call:
    """The call for a network, found by the name of its class; `plain` for any other class."""
    return CALLS.get(type(network).__name__, plain)


def tensor_of(result: Any) -> Tensor:
    """The tensor of an output: itself, the first of a tuple, or the `.sample` of an object.

    Raises UsageError for anything else.
    """
    found = result[0] if isinstance(result, tuple) and result else result
    found = found if isinstance(found, Tensor) else getattr(found, "sample", None)
    if not isinstance(found, Tensor):
        raise UsageError(
            f"the network returned {type(result).__name__}: return a tensor, a tuple with it "
            "first, or an object with .sample"
        )
    return found


def takes(network: Network, argument: str) -> bool:
    """Whether a network can be fed a condition of this name."""
    forward = network.forward if isinstance(network, nn.Module) else network
    try:
        return argument in inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return False


def plain(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """`network(x, time, **cond)`: UNet1DModel, UNet2DModel, DiT and custom networks."""
    return tensor_of(network(x, time, **cond))


def unet(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """UNet2DModel; a table of times (`time_embedding_type: learned`) takes whole numbers."""
    config = getattr(unwrapped(network), "config", {})
    if config.get("time_embedding_type") == "learned":
        if bool((time != time.round()).any()):
            raise UsageError(
                "the network has a table of times (time_embedding_type learned), and the process "
                "has times between them: give it a process whose times are 0, 1, 2, ..."
            )
        time = time.long()
    return plain(network, x, time, cond)


# --- networks of diffusers: a run's pipeline.py holds the source of these, which need torch alone


def text_unet(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """UNet2DConditionModel and UNet3DConditionModel; for SDXL pooled embedding and sizes too."""
    fed = chosen(cond, "encoder_hidden_states", "class_labels", "encoder_attention_mask")
    fed.setdefault("encoder_hidden_states", None)
    if "time_ids" in cond:
        sizes = {"text_embeds": cond["pooled_projections"], "time_ids": cond["time_ids"]}
        fed["added_cond_kwargs"] = sizes
    return sample_of(network(x, time, **fed))


def pixart(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """PixArtTransformer2DModel; some are fed the size of the image."""
    sizes = {name: cond.get(name) for name in ("resolution", "aspect_ratio")}
    fed = chosen(cond, "encoder_hidden_states", "encoder_attention_mask")
    return sample_of(network(x, timestep=time, added_cond_kwargs=sizes, **fed))


def transformer(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """SD3Transformer2DModel and WanTransformer3DModel."""
    fed = chosen(cond, "encoder_hidden_states", "pooled_projections")
    return sample_of(network(hidden_states=x, timestep=time, **fed))


def sana(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """SanaTransformer2DModel, which scales its time."""
    scale = getattr(unwrapped(network), "config", {}).get("timestep_scale", 1.0)
    fed = chosen(cond, "encoder_hidden_states", "encoder_attention_mask", "guidance")
    return sample_of(network(hidden_states=x, timestep=time * scale, **fed))


def lumina(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Lumina2Transformer2DModel: time runs from 0 at noise to 1 at data, and so does the flow."""
    fed = chosen(cond, "encoder_hidden_states", "encoder_attention_mask")
    return -sample_of(network(hidden_states=x, timestep=1 - time / 1000, **fed))


def flux(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """FluxTransformer2DModel: 2x2 latents packed into one token of 4C channels, time / 1000.

    Source: `FluxPipeline._pack_latents`, `_prepare_latent_image_ids`.
    """
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    ids = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    ids[..., 1] += torch.arange(rows, device=x.device)[:, None]
    ids[..., 2] += torch.arange(columns, device=x.device)[None, :]
    with exact_times(network, x, time, cond.get("guidance")):
        output = network(
            hidden_states=pack_2x2(x),
            timestep=time / 1000,
            encoder_hidden_states=cond["encoder_hidden_states"],
            pooled_projections=cond["pooled_projections"],
            guidance=cond.get("guidance"),
            img_ids=ids.reshape(-1, 3),
            txt_ids=x.new_zeros(cond["encoder_hidden_states"].shape[1], 3),
        )
    return unpack_2x2(sample_of(output), rows, columns)


def sample_of(result: Any) -> Any:
    """The output of a network of diffusers: itself, the first of a tuple, or its `.sample`."""
    found = result[0] if isinstance(result, tuple) else result
    return getattr(found, "sample", found)


def chosen(cond: Mapping[str, Tensor], *names: str) -> dict[str, Any]:
    """The conditions of these names; networks of diffusers take no others."""
    return {name: cond[name] for name in names if name in cond}


def exact_times(network: Network, x: Tensor, time: Tensor, guidance: Tensor | None) -> Any:
    """A context in which Flux embeds the float32 time, and 1000 times the guidance likewise.

    It casts both to the precision of its layers first: 978.26 becomes 976 in bfloat16.
    """
    embedder = getattr(unwrapped(network), "time_text_embed", None)
    kind = x.device.type  # the meta device knows no autocast
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    exact = x.dtype == torch.float32 and not casts
    if exact or not isinstance(embedder, torch.nn.Module):
        return nullcontext()
    given = (time,) if guidance is None else (time, 1000 * guidance.float())
    return embedder.register_forward_pre_hook(lambda _, args: (*given, args[-1]))


def unwrapped(network: Any) -> Any:
    """The network that DDP or torch.compile has wrapped."""
    for name in ("module", "_orig_mod"):
        network = getattr(network, name, network)
    return network


def pack_2x2(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4C], channels of a token ordered (C, row, column)."""
    tokens = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    return tokens.flatten(3).flatten(1, 2)


def unpack_2x2(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_2x2` for rows x columns tokens."""
    x = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return x.flatten(4, 5).flatten(2, 3)


CALLS: dict[str, Call] = {
    "UNet2DModel": unet,
    "UNet2DConditionModel": text_unet,
    "UNet3DConditionModel": text_unet,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": transformer,
    "FluxTransformer2DModel": flux,
    "SanaTransformer2DModel": sana,
    "Lumina2Transformer2DModel": lumina,
    "WanTransformer3DModel": transformer,
}

IN_FLOAT32 = ("time_ids", "resolution", "aspect_ratio", "guidance")  # embedded as times are


def offloaded_to(network: nn.Module) -> torch.device | None:
    """The device that accelerate brings offloaded layers to; None for any other network."""
    for module in network.modules():
        executes = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if executes is not None:
            return torch.device(executes)
    return None


def embeds_guidance(network: Network) -> bool:
    """Whether a network is fed the guidance scale itself: Flux-dev, or a module that asks for it.

    diffusers' networks say so in their config, others by an argument named `guidance`.
    """
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        network = network.module
    config = getattr(network, "config", None)
    if isinstance(config, Mapping) and "guidance_embeds" in config:
        return bool(config["guidance_embeds"])
    return not type(network).__module__.startswith("diffusers.") and takes(network, "guidance")
