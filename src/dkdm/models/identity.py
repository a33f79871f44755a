"""Which model this is: hashes of its weights, its network and its noise process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.teachers import parts_of

CHUNK = 2**26  # bytes that are copied from a device at once


def identity_of(model: Denoiser) -> dict[str, str]:
    """What makes a model what it is, by name; several models: of each with its number.

    weights: SHA-256 of names, types, shapes and values. network: of its class and config. process:
    of its levels, what it predicts and its samples' shape.
    """
    found: dict[str, str] = {}
    parts = parts_of(model)
    for number, part in enumerate(parts, start=1):
        suffix = "" if len(parts) == 1 else f" of teacher {number}"
        network = part.network
        state = network.state_dict() if isinstance(network, nn.Module) else {}
        found |= {
            f"weights{suffix}": hash_of_weights(state),
            f"network{suffix}": _hash(_described(network)),
            f"process{suffix}": _hash(_process(part)),
        }
    return found


def kind_of(model: Denoiser) -> dict[str, str]:
    """`identity_of` without the weights, which a student changes."""
    return {"network": _hash(_described(model.network)), "process": _hash(_process(model))}


def hash_of_weights(state: Mapping[str, Any]) -> str:
    """SHA-256 of named tensors, wherever they are; of other values their JSON."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name} {_text(value)}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        plain = _plain(value.detach())
        if plain.is_meta:  # accelerate keeps its values elsewhere
            continue
        for chunk in plain.reshape(-1).split(max(1, CHUNK // plain.itemsize)):
            digest.update(chunk.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: Tensor) -> Tensor:
    """The values of a tensor of any class: of quantized ones, those that they stand for."""
    if type(value) in (Tensor, nn.Parameter):
        return value
    try:
        return value.dequantize()
    except (RuntimeError, NotImplementedError, AttributeError):
        return value.as_subclass(Tensor)


def _described(network: object) -> dict[str, Any]:
    config: Any = getattr(network, "config", None)  # a user's may be anything
    values = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    known = {str(k): v for k, v in values.items() if not str(k).startswith("_")}
    return {"class": type(network).__name__, "config": known}


def _process(model: Denoiser) -> dict[str, Any]:
    process, own = model.process, model.parameterization
    return {
        "alpha": _rounded(process.alpha),
        "sigma": _rounded(process.sigma),
        "network_time": _rounded(process.network_time),
        "predicts": repr(own),
        "shape": list(model.sample_shape),
    }


def _rounded(values: Tensor) -> list[str]:
    """Numbers to six digits: another machine rounds the last ones otherwise."""
    return [f"{value:.6g}" for value in values.tolist()]


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(values).encode()).hexdigest()


def _text(value: Any) -> str:
    """JSON; of objects the class alone, since their texts may name places in memory."""
    return json.dumps(value, sort_keys=True, default=lambda other: type(other).__name__)
