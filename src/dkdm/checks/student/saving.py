"""Whether a network that is saved and loaded again is the same, here and as the shipped file."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkdm.checks.findings import Finding
from dkdm.checks.student.behaviour import listed
from dkdm.checks.student.case import Case, differ
from dkdm.core.checkpoint import load_network_weights, load_strict, save_network
from dkdm.errors import DkdmError
from dkdm.models.custom_network import OWN_CLASS, origin_of
from dkdm.shipping.custom_network import shipment, shipping_note
from dkdm.shipping.graph.fault_line import in_a_line


def shared(case: Case) -> Iterator[Finding]:
    """Weights that have several names."""
    names: dict[int, list[str]] = {}
    for name, tensor in case.network.state_dict(keep_vars=True).items():
        if tensor.numel():
            names.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    groups = [" = ".join(group) for group in names.values() if len(group) > 1]
    if groups:
        yield Finding(
            "shared weights",
            "warning",
            listed(groups),
            "safetensors saves shared tensors once under each name: samples are the same, but "
            "diffusers loads them as separate weights",
        )


def plain_tensors(case: Case) -> Iterator[Finding]:
    """Tensors that are plain attributes: they are not saved and do not change device."""
    names = [name for name, _ in _plain(case.network)]
    if names:
        remedy = 'use self.register_buffer("name", tensor), so that they are saved and moved'
        yield Finding(
            "plain tensors", "warning", f"neither saved nor moved: {listed(names)}", remedy
        )


def _plain(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}".lstrip("."), value


def plain_modules(case: Case) -> Iterator[Finding]:
    """Layers in a plain list, tuple or dict, which PyTorch does not know of."""
    known = set(case.network.modules())
    names = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in case.network.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (list, tuple, dict))
        and name not in ("_modules", "_parameters", "_buffers")
        and any(each not in known and each.state_dict() for each in _modules(value))
    ]
    if names:
        what = f"layers that are neither trained, saved nor moved: {listed(names)}"
        remedy = "put them into an nn.ModuleList or nn.ModuleDict"
        yield Finding("plain modules", "problem", what, remedy)


def _modules(value: Any) -> Iterator[nn.Module]:
    """The modules in a list, tuple or dict, however deep."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _modules(each)


@torch.no_grad()
def reload(case: Case) -> Iterator[Finding]:
    """The weights in another network from the same factory."""
    if case.remake is None:
        yield Finding("reload", "ok", "not tried: the network was given as an object")
        return
    remade = case.remake().to(case.student.device)
    with tempfile.TemporaryDirectory() as folder:
        save_network(case.perturbed, Path(folder))
        try:
            load_network_weights(remade, Path(folder))
        except DkdmError as error:
            what = f"the factory makes another network each time: {str(error).partition(': ')[2]}"
            yield Finding("reload", "problem", what, "let it depend on its arguments only")
            return
    probe = case.probe(3)
    if not differ(
        case.answer_alike(case.perturbed, probe), case.answer_alike(remade.eval(), probe)
    ):
        yield Finding("reload", "ok", "gives the same output in another network from the factory")
        return
    hidden = listed(_hidden_state(case.network, remade)) or "not found: look for random numbers"
    yield Finding(
        "reload",
        "problem",
        f"with the same weights, another network answers differently; not in state_dict: {hidden}",
        "register what is random or learned as a buffer or parameter: otherwise a saved student "
        "cannot be restored",
    )


def _hidden_state(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of tensors and numbers that differ between two networks but are not saved."""
    saved = one.state_dict().keys()
    mine, yours = ({**dict(n.named_buffers()), **dict(_plain(n))} for n in (one, other))
    names = [k for k in mine.keys() & yours.keys() if k not in saved and _unlike(mine[k], yours[k])]
    for (prefix, a), (_, b) in zip(one.named_modules(), other.named_modules(), strict=False):
        for name, value in vars(a).items():
            if (
                isinstance(value, (int, float))
                and value != vars(b).get(name)
                and name != "training"
            ):
                names.append(f"{prefix}.{name}".lstrip("."))
    return sorted(names)


def _unlike(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or bool((one != other).any())


@torch.no_grad()
def shipping(case: Case) -> Iterator[Finding]:
    """The file that a finished run holds, loaded as diffusers loads it."""
    origin = origin_of(case.network)
    if origin is None:
        name = type(case.network).__name__
        yield Finding("shipping", "ok", f"diffusers loads {name} from the folder that dkdm writes")
        return
    note = shipping_note(case.network)
    if origin.factory is None:
        yield Finding("shipping", "warning", str(note), "give module:factory instead of an object")
        return
    try:
        shipped = _made_by_file(shipment(origin).text, origin.save_config)
        load_strict(shipped, case.perturbed.state_dict(), "the shipped file")
        probe = case.probe(3)
        found = case.answer_alike(shipped.eval(), probe)
        same = not differ(case.answer_alike(case.perturbed, probe), found)
    except Exception as error:
        remedy = "let the factory's module run by itself, and read only attributes of conditioning"
        yield Finding(
            "shipping", "warning", f"its file does not work alone: {in_a_line(error)}", remedy
        )
        return
    if not same:
        what, remedy = "the shipped file answers differently", "see reload"
        yield Finding("shipping", "warning", what, remedy)
    elif note:
        yield Finding("shipping", "warning", note, "put all of its code into one file")
    else:
        yield Finding("shipping", "ok", "as one file; diffusers loads it without dkdm")


def _made_by_file(text: str, save_config: Any) -> Any:
    """The network that the shipped file makes."""
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng():
        file = Path(name) / "dkdm_shipped_for_a_check.py"
        file.write_text(text, encoding="utf-8")
        save_config(Path(name))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module  # dataclasses and pickles look their module up
        try:
            spec.loader.exec_module(module)
            kind = getattr(module, OWN_CLASS)
            return kind.from_config(kind.load_config(name))
        finally:
            del sys.modules[file.stem]
