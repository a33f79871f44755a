"""Reading the weights of foreign checkpoints, as data and never as code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dkdm.core.saving.checkpoint import load_strict, read_tensors
from dkdm.errors import DkdmError, UsageError
from dkdm.reading.fields import shown
from dkdm.reading.weights import more_than_weights, refuse_other_content, unknown_names


@dataclass(frozen=True)
class Weights:
    """The state dict of a checkpoint, of averaged weights if asked for and there."""

    path: Path
    tensors: dict[str, Tensor]


def read_weights(path: Path, ema: bool = True) -> Weights:
    """Read a .safetensors, .pt, .pth or .ckpt file without running anything in it.

    ema: take averaged weights if the file has them beside the plain ones. Names are those of the
    network itself: what DDP, FSDP and torch.compile put before them is taken off. Raises UsageError
    for a file that is missing or holds no weights at all, for a .pkl and for a file with code in
    it, DkdmError for one that cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix == ".pkl":
        raise UsageError(
            f"{path}: a .pkl is a program that runs when it is read, and dkdm never opens one. If "
            "you trust it, save its weights in two lines, with its repository at hand:\n"
            f'    net = pickle.load(open({path.name!r}, "rb"))["ema"]\n'
            f"    torch.save(net.state_dict(), {path.stem + '.pt'!r})"
        )
    refuse_other_content(path)
    if path.suffix == ".safetensors":
        return Weights(path, unwrapped(read_tensors(path)))
    loaded = _unpickle(path)
    if not isinstance(loaded, Mapping):
        raise DkdmError(f"{path}: not a state dict but {type(loaded).__name__}")
    tensors = _chosen(path, loaded, ema)
    _check_claims(path, tensors)
    return Weights(path, unwrapped(tensors))


def _check_claims(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise DkdmError for tensors that are larger than what is stored of them: they would take
    memory that no byte of the file stands for."""
    for name, tensor in tensors.items():
        claimed = tensor.numel() * tensor.element_size()
        if tensor.layout == torch.strided and claimed > tensor.untyped_storage().nbytes():
            raise DkdmError(
                f"{path}: {shown(name)} claims shape {shown(tuple(tensor.shape))}, more than is "
                "stored of it: save it again with .contiguous()"
            )
    stored = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()
    }
    if sum(stored.values()) > 2 * path.stat().st_size + 2**20:
        raise DkdmError(f"{path}: its weights are compressed: save them again with torch.save")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, without its values. Raises as `read_weights`."""
    refuse_other_content(path)
    with _opened(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def read_header(path: Path) -> dict[str, str]:
    """The texts in a safetensors header. Raises DkdmError if it cannot be read."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DkdmError(f"{path}: cannot be read as safetensors ({error})") from error


def _unpickle(path: Path) -> Any:
    """torch.load restricted to tensors and plain values; classes of trainers become inert."""
    try:
        unknown = unknown_names(path)
        foreign = [name for name in unknown if not name.startswith((*_INERT, *_HARMLESS))]
        if foreign:
            raise more_than_weights(path, sorted(foreign))
        stubs: list[Any] = [(_HARMLESS.get(name) or _stub(name), name) for name in unknown]
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        if refused := re.findall(r"GLOBAL (\S+)", str(error)):
            raise more_than_weights(path, refused) from error
        # torch's own text goes on with how to run whatever code the file holds.
        what = re.sub(r"\.? In PyTorch 2\.6.*", "", str(error).strip().partition("\n")[0])
        raise DkdmError(
            f"{path}: cannot be read as a torch checkpoint, or is cut short "
            f"({type(error).__name__}: {what})"
        ) from error


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


_AVERAGED = (
    "ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema_model_state_dict",
    "model_ema_state_dict", "params_ema", "ema_params", "ema_weights", "shadow_params", "shadow",
)  # fmt: skip
_PLAIN = (
    "state_dict", "model_state_dict", "network_state_dict", "model", "net", "network", "params",
    "module", "weights", "unet", "denoiser", "score_model", "generator",
)  # fmt: skip


def _chosen(path: Path, loaded: Mapping[Any, Any], ema: bool) -> dict[str, Tensor]:
    """The weights of a checkpoint, averaged ones if they lie beside them.

    Averages that are a list without names, as of torch_ema and improved-diffusion, get those of the
    plain weights, in their order. Raises UsageError if the two do not correspond, DkdmError
    if there are no weights.
    """
    plain = _find(loaded, _PLAIN, levels=4) or _tensors(loaded)
    average = _average(loaded) if ema else None
    if isinstance(average, list):
        average = _named(path, average, plain)
    tensors = average or plain
    if not isinstance(tensors, dict) or not tensors:
        raise DkdmError(
            f"{path}: no weights in it (found {', '.join(map(str, loaded)) or 'nothing'})"
        )
    return tensors


def _average(loaded: Mapping[Any, Any]) -> dict[str, Tensor] | list[Tensor] | None:
    """The averaged weights of a checkpoint, which a callback of Lightning may keep."""
    callbacks = loaded.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    places = [loaded, *(state for state in states if isinstance(state, Mapping))]
    found = (_find(place, _AVERAGED, levels=4) for place in places)
    return next((average for average in found if average), None)


def _tensors(values: Any) -> dict[str, Tensor]:
    if not isinstance(values, Mapping):
        return {}
    return {key: v for key, v in values.items() if isinstance(v, Tensor) and isinstance(key, str)}


def _find(
    loaded: Mapping[Any, Any], names: tuple[str, ...], levels: int
) -> dict[str, Tensor] | list[Tensor] | None:
    """The first of these entries that holds weights, at the top or some levels inside."""
    for name in names:
        value = loaded.get(name)
        if isinstance(value, (list, tuple)) and (listed := _listed(value)):
            return listed
        if isinstance(value, Mapping) and levels:
            inside = _find(value, tuple(dict.fromkeys((*names, *_PLAIN))), levels - 1)
            if found := inside or _tensors(value):
                return found
    return None


def _listed(value: Sequence[Any]) -> list[Tensor]:
    """The tensors of a list, or of the first list in it if it has one for each decay rate."""
    first = value[0] if value else None
    if isinstance(first, (list, tuple)):
        return _listed(first)
    return list(value) if all(isinstance(item, Tensor) for item in value) else []


def _named(path: Path, average: list[Tensor], plain: Any) -> dict[str, Tensor]:
    """A list of averages by the names of the plain weights, whose buffers stay as they are."""
    plain = plain if isinstance(plain, dict) else {}
    learned = {k: v for k, v in plain.items() if not _is_buffer(k, v)}
    for names in (list(plain), list(learned)):
        shapes = [plain[name].shape for name in names]
        if shapes == [value.shape for value in average]:
            return plain | dict(zip(names, average, strict=True))
    raise UsageError(
        f"{path}: its averaged weights are a list of {len(average)} tensors without names, which "
        f"do not correspond to its {len(plain)} weights with names. Save them with names first: "
        "ema.copy_to(network.parameters()); torch.save(network.state_dict(), FILE)"
    )


def _is_buffer(name: str, value: Tensor) -> bool:
    return not value.is_floating_point() or name.rpartition(".")[2].startswith("running_")


_WRAPPERS = r"(^|\.)(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_COUNTS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names that they have without DDP, FSDP, AveragedModel or torch.compile."""
    named = {k: v for k, v in tensors.items() if k not in _COUNTS} or dict(tensors)
    while any(re.search(_WRAPPERS, key) for key in named):
        named = {re.sub(_WRAPPERS, r"\1", key): value for key, value in named.items()}
    while named and all(key.startswith("module.") for key in named):
        named = without_prefix(named, "module.")
    return named


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, with it removed."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# What training code puts before a network's names.
_AVERAGES = ("ema_model.", "model_ema.", "ema.")
_HOLDERS = (
    "module.", "model.", "online_model.", "net.", "network.", "diffusion_model.", "denoiser.",
    "unet.", "state_dict.",
)  # fmt: skip


def views(weights: Weights, ema: bool = True, levels: int = 3) -> Iterator[Weights]:
    """The same weights, and what lies in them behind the names of what held the network.

    ema: averages come before plain weights, otherwise after them. levels: of nested names.
    """
    yield weights
    if levels == 0:
        return
    if ema and (average := _flat_average(weights.tensors)):
        yield from views(replace(weights, tensors=average), ema, levels - 1)
    for holder in (*_AVERAGES, *_HOLDERS) if ema else (*_HOLDERS, *_AVERAGES):
        inner = unwrapped(without_prefix(weights.tensors, holder))
        if inner:
            yield from views(replace(weights, tensors=inner), ema, levels - 1)


def _flat_average(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights behind `model.` with the averages of CompVis's LitEma in their places.

    These have the names without their dots. Empty if there are none or they are others'.
    """
    plain = without_prefix(tensors, "model.")
    average = without_prefix(tensors, "model_ema.")
    for count in ("decay", "num_updates"):
        average.pop(count, None)
    names = {key.replace(".", ""): key for key in plain}
    if not average or not average.keys() <= names.keys():
        return {}
    return plain | {names[name]: value for name, value in average.items()}


def frozen(
    network: nn.Module, tensors: Mapping[str, Tensor], path: Path, dtype: str = "float32"
) -> nn.Module:
    """The network with exactly these weights, in a precision named as in torch, ready to teach.

    Raises DkdmError if keys or shapes are not the network's.
    """
    load_strict(network, tensors, str(path))
    nn.Module.to(network, getattr(torch, dtype))  # diffusers' own warns of nothing
    return network.eval().requires_grad_(False)
