"""How each network is called: what diffusers' pipelines do around their one line of inference.

A call takes (network, x, time, cond) and returns the output [B, C or 2C, ...]. x is a batch of
states, time the float [B] of `Process.network_time`, cond the embedded condition. Networks that are
called as `(x, time, **cond)` need nothing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    config = getattr(_unwrapped(network), "config", {})
    if config.get("time_embedding_type") == "learned":
        if bool((time != time.round()).any()):
            raise UsageError(
                "the network has a table of times (time_embedding_type learned), and the process "
                "has times between them: give it a process whose times are 0, 1, 2, ..."
            )
        time = time.long()
    return plain(network, x, time, cond)


def keywords(*names: str) -> Call:
    """A call by keywords, as diffusers' transformers want it; other conditions are left out."""

    def call(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        fed = {name: cond[name] for name in names if name in cond}
        return tensor_of(network(hidden_states=x, timestep=time, **fed))

    return call


def text_unet(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """UNet2DConditionModel and UNet3DConditionModel; SDXL's pooled embedding and sizes beside."""
    added = {"text_embeds": "pooled_projections", "time_ids": "time_ids"}
    fed: dict[str, Any] = {
        k: cond[k] for k in ("class_labels", "encoder_attention_mask") if k in cond
    }
    if "time_ids" in cond:
        fed["added_cond_kwargs"] = {name: cond[key] for name, key in added.items()}
    return tensor_of(network(x, time, cond.get("encoder_hidden_states"), **fed))


def pixart(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """PixArtTransformer2DModel, fed the image's size if it asks for it."""
    added = {name: cond.get(name) for name in ("resolution", "aspect_ratio")}
    fed = {k: cond[k] for k in ("encoder_hidden_states", "encoder_attention_mask")}
    return tensor_of(network(x, timestep=time, added_cond_kwargs=added, **fed))


def sana(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """SanaTransformer2DModel, which scales its time."""
    scale = getattr(_unwrapped(network), "config", {}).get("timestep_scale", 1.0)
    names = ("encoder_hidden_states", "encoder_attention_mask", "guidance")
    return keywords(*names)(network, x, time * scale, cond)


def lumina(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Lumina2Transformer2DModel: time runs from 0 at noise to 1 at data, and so does the flow."""
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return -keywords(*names)(network, x, 1 - time / 1000, cond)


def flux(network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """FluxTransformer2DModel: 2x2 latents packed into one token of 4C channels, time / 1000.

    Source: `FluxPipeline._pack_latents`, `_prepare_latent_image_ids`.
    """
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    text = cond["encoder_hidden_states"]
    ids = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    ids[..., 1] += torch.arange(rows, device=x.device)[:, None]
    ids[..., 2] += torch.arange(columns, device=x.device)[None, :]
    with _exact_times(network, x, time, cond.get("guidance")):
        output = network(
            hidden_states=pack_2x2(x),
            timestep=time / 1000,
            encoder_hidden_states=text,
            pooled_projections=cond["pooled_projections"],
            guidance=cond.get("guidance"),
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
        )
    return unpack_2x2(tensor_of(output), rows, columns)


@contextmanager
def _exact_times(
    network: Network, x: Tensor, time: Tensor, guidance: Tensor | None
) -> Iterator[None]:
    """Flux casts its time to the precision of its layers (978.26 becomes 976 in bfloat16) before it
    embeds it; in here it embeds the float32 one, and 1000 times the guidance likewise."""
    embedder = getattr(_unwrapped(network), "time_text_embed", None)
    exact = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if exact or not isinstance(embedder, nn.Module):
        yield
        return
    given = (time,) if guidance is None else (time, 1000 * guidance.float())
    handle = embedder.register_forward_pre_hook(lambda _, args: (*given, args[-1]))
    try:
        yield
    finally:
        handle.remove()


def _unwrapped(network: Any) -> Any:
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
    "SD3Transformer2DModel": keywords("encoder_hidden_states", "pooled_projections"),
    "FluxTransformer2DModel": flux,
    "SanaTransformer2DModel": sana,
    "Lumina2Transformer2DModel": lumina,
    "WanTransformer3DModel": keywords("encoder_hidden_states"),
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
