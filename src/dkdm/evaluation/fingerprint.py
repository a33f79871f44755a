"""A short hash of all that a model's samples depend on: weights, process, conditions, decoder."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.graphs import unreplayed
from dkdm.core.denoisers.kinds import kind_of, null_or_none
from dkdm.core.denoisers.teachers import Teachers
from dkdm.evaluation.cost import probe
from dkdm.models.prompts import Prompts, folder_fingerprint


def fingerprint(denoiser: Denoiser) -> str:
    """Sixteen digits that change whenever other samples would be drawn from the same noise.

    A network that is no module is known by what it answers to two samples of noise.
    """
    digest = hashlib.sha256()
    several = denoiser.members if isinstance(denoiser, Teachers) else ()
    for model in (denoiser, *several):
        for part in _parts(model):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Eight digits of named tensors."""
    digest = hashlib.sha256()
    for part in _of_tensors(tensors):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:8]


def _parts(denoiser: Denoiser) -> Iterator[bytes]:
    process, network = denoiser.process, denoiser.network
    yield _text(
        process.scheduler,
        process.final,
        process.clipping,
        process.spacing,
        process.steps_offset,
        denoiser.parameterization,
        denoiser.sample_shape,
        denoiser.value_range,
        denoiser.guidance_interval,
        _source(network),
        _source(unreplayed(denoiser.call)),
        _source(denoiser.decode),
        {key: value for key, value in _config(network).items() if not key.startswith("_")},
    )
    tables = {"alpha": process.alpha, "sigma": process.sigma, "time": denoiser.network_time}
    rescale = {} if denoiser.rescale is None else {"rescale": denoiser.rescale}
    yield from _of_tensors(tables | rescale | dict(denoiser.constants))
    if isinstance(network, nn.Module):
        yield from _of_tensors(network.state_dict())
    else:
        with torch.no_grad():
            yield from _of_tensors({"answer": denoiser.predict(_noise(denoiser)).output})
    yield from _of_conditions(denoiser)
    coder = denoiser.bundle.autoencoder
    if coder is not None:
        yield folder_fingerprint([coder.component.folder]).encode()


def _of_conditions(denoiser: Denoiser) -> Iterator[bytes]:
    conditioning = denoiser.conditioning
    kind = kind_of(conditioning)
    yield _text(kind.label, kind.facts(), _source(conditioning))
    yield from _of_tensors(null_or_none(conditioning, 1) or {})
    if isinstance(conditioning, Prompts):
        yield _text(conditioning.encoders.fingerprint, conditioning.negative, conditioning.texts)


def _config(network: Any) -> Mapping[str, Any]:
    config = getattr(network, "config", None)
    return config if isinstance(config, Mapping) else {}


def _noise(denoiser: Denoiser) -> Any:
    batch = probe(denoiser, 2)
    random = torch.Generator().manual_seed(0)
    return batch._replace(x=torch.randn(batch.x.shape, generator=random).to(batch.x.device))


def _text(*values: Any) -> bytes:
    plain = [dict(value) if isinstance(value, Mapping) else value for value in values]
    return json.dumps(plain, sort_keys=True, default=str).encode()


def _source(thing: Any) -> str:
    """The name of a class or function, and its code as far as it can be read."""
    if thing is None:
        return ""
    kind = thing if inspect.isroutine(thing) else type(thing)
    try:
        return f"{kind.__module__}.{kind.__qualname__}\n{inspect.getsource(kind)}"
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"


def _of_tensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    for name, value in sorted(tensors.items()):
        yield f"{name} {tuple(value.shape)} {value.dtype}".encode()
        plain = value if type(value) in (Tensor, nn.Parameter) else value.dequantize()
        yield plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
