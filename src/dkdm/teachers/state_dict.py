"""Reading the weights of foreign checkpoints, as data and never as code."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.checkpoint import load_strict, read_tensors
from dkdm.errors import DkdmError, UsageError

__all__ = ["Weights", "load_strict", "read_weights"]


@dataclass(frozen=True)
class Weights:
    """A checkpoint: its state dict, and the plain values that lay beside it.

    tensors: the weights, averaged ones where asked for and there. extra: everything else at the
    top of the file (configs, steps), as it was.
    """

    path: Path
    tensors: dict[str, Tensor]
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_weights(path: Path, ema: bool = True) -> Weights:
    """Read a .safetensors, .pt, .pth or .ckpt file without running anything in it.

    ema: take averaged weights where the file has them beside the plain ones. Raises UsageError for
    a file that is missing, for a .pkl and for a file with code in it, DkdmError for one that cannot
    be read.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return Weights(path, read_tensors(path))
    if path.suffix == ".pkl":
        raise UsageError(
            f"{path}: a .pkl is a program that runs when it is read, and is never opened here. "
            f"Where you trust it, save its weights in two lines, with its repository at hand:\n"
            f'    net = pickle.load(open("{path.name}", "rb"))["ema"]\n'
            f'    torch.save(net.state_dict(), "{path.stem}.pt")'
        )
    loaded = _unpickle(path)
    if not isinstance(loaded, Mapping):
        raise DkdmError(f"{path}: expected a state dict, found {type(loaded).__name__}")
    return Weights(path, *_split(path, dict(loaded), ema))


def _unpickle(path: Path) -> Any:
    """torch.load restricted to tensors and plain values; classes of trainers become inert."""
    try:
        unknown = _unknown_names(path)
        foreign = [name for name in unknown if not name.startswith((*_INERT, *_HARMLESS))]
        if foreign:
            raise _more_than_weights(path, sorted(foreign))
        stubs: list[Any] = [(_HARMLESS.get(name) or _stub(name), name) for name in unknown]
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        if refused := re.findall(r"GLOBAL (\S+)", str(error)):
            raise _more_than_weights(path, refused) from error
        # torch's own text goes on with how to run whatever code the file holds.
        what = re.sub(r"\.? In PyTorch 2\.6.*", "", str(error).strip().partition("\n")[0])
        raise DkdmError(
            f"{path}: cannot be read as a torch checkpoint, or is cut short "
            f"({type(error).__name__}: {what})"
        ) from error


def _unknown_names(path: Path) -> list[str]:
    """Classes and functions in a checkpoint that torch does not know as harmless.

    Before torch 1.6 a checkpoint was no zip file; `torch.load` itself refuses them there.
    """
    zipped = zipfile.is_zipfile(path)
    return torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []


def _more_than_weights(path: Path, names: list[str]) -> UsageError:
    return UsageError(
        f"{path}: holds more than weights ({', '.join(names[:3])}), which would run as code. Where "
        "you trust it, save its state dict alone: "
        "torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')"
    )


_INERT = ("pytorch_lightning.", "lightning.", "omegaconf.", "argparse.Namespace", "typing.")
_HARMLESS: dict[str, Any] = {
    "collections.defaultdict": lambda *_: {},
    **{f"builtins.{kind.__name__}": kind for kind in (bool, dict, float, int, list, str, tuple)},
}


def _stub(name: str) -> type:
    """A class without behaviour, in place of one that only describes a training run."""
    module, _, plain = name.rpartition(".")
    nothing = {"__init__": lambda *_: None, "__setstate__": lambda *_: None}
    return type(plain, (), {"__module__": module, **nothing})


def _split(
    path: Path, loaded: dict[str, Any], ema: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a checkpoint, averaged ones where they lie beside them, and the rest."""
    names = ("ema", "model_ema", "ema_model") if ema else ()
    for name in (*names, "state_dict", "model", "net", "network", "params"):
        inner = loaded.get(name)
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            rest = {key: value for key, value in loaded.items() if key != name}
            return {k: v for k, v in inner.items() if isinstance(v, Tensor)}, rest
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DkdmError(
            f"{path}: no weights in it (found {', '.join(map(str, loaded)) or 'nothing'})"
        )
    return tensors, {key: value for key, value in loaded.items() if key not in tensors}


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, with it removed."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def expect_keys(weights: Weights, what: str, *keys: str) -> None:
    """Raise DkdmError unless all these weights are there; `what` says whose they are."""
    missing = [key for key in keys if key not in weights.tensors]
    if missing:
        raise DkdmError(
            f"{weights.path}: not the weights of {what}: {', '.join(missing)} missing. "
            f"Found {', '.join(list(weights.tensors)[:3])}, ..."
        )


def frozen(
    network: nn.Module, tensors: Mapping[str, Tensor], path: Path, dtype: str = "float32"
) -> nn.Module:
    """The network with exactly these weights, in a precision named as in torch, ready to teach.

    Raises DkdmError where keys or shapes are not the network's.
    """
    load_strict(network, tensors, str(path))
    nn.Module.to(network, getattr(torch, dtype))  # diffusers' own warns of nothing
    return network.eval().requires_grad_(False)
