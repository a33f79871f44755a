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
from torch.utils._pytree import tree_leaves

from dkdm.checks.findings import Finding
from dkdm.checks.student.behaviour import listed
from dkdm.checks.student.case import Case, differ
from dkdm.core.saving.checkpoint import load_network_weights, load_strict, save_network
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
        remedy = (
            "safetensors saves shared tensors once under each name: samples are the same, but "
            "diffusers loads them as separate weights"
        )
        yield Finding("shared weights", "warning", listed(groups), remedy)


def plain_tensors(case: Case) -> Iterator[Finding]:
    """Tensors that are plain attributes: they are not saved and do not change device."""
    names = list(_attributes(case.network, Tensor))
    if names:
        what = f"neither saved nor moved: {listed(names)}"
        remedy = 'use self.register_buffer("name", tensor), so that they are saved and moved'
        yield Finding("plain tensors", "warning", what, remedy)


def _attributes(network: nn.Module, *kinds: type) -> dict[str, Any]:
    """The plain attributes of all layers that are of these kinds, by name."""
    hidden = ("_modules", "_parameters", "_buffers", "training")
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, module in network.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, kinds) and name not in hidden
    }


def plain_modules(case: Case) -> Iterator[Finding]:
    """Layers in a plain list, tuple or dict, which PyTorch does not know of."""
    known = set(case.network.modules())
    names = [
        name
        for name, value in _attributes(case.network, list, tuple, dict).items()
        if any(each not in known and each.state_dict() for each in _modules_in(value))
    ]
    if names:
        what = f"layers that are neither trained, saved nor moved: {listed(names)}"
        remedy = "put them into an nn.ModuleList or nn.ModuleDict"
        yield Finding("plain modules", "problem", what, remedy)


def _modules_in(value: Any) -> list[nn.Module]:
    """The modules in a list, tuple or dict, however deep."""
    return [each for each in tree_leaves(value) if isinstance(each, nn.Module)]


@torch.no_grad()
def reload(case: Case) -> list[Finding]:
    """The weights in another network from the same factory."""
    if case.remake is None:
        return [Finding("reload", "ok", "not tried: the network was given as an object")]
    remade: nn.Module = case.remake().network.to(case.student.device)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        save_network(case.perturbed, Path(folder))
        try:
            load_network_weights(remade, Path(folder))
        except DkdmError as error:
            what = f"the factory makes another network each time: {str(error).partition(': ')[2]}"
            return [Finding("reload", "problem", what, "let it depend on its arguments only")]
    if _answers_alike(case, remade):
        what = "gives the same output in another network from the factory"
        return [Finding("reload", "ok", what)]
    hidden = listed(_hidden_state(case.network, remade)) or "not found: look for random numbers"
    what = f"another network with the same weights answers differently; not in state_dict: {hidden}"
    remedy = (
        "register what is random or learned as a buffer or parameter: otherwise a saved student "
        "cannot be restored"
    )
    return [Finding("reload", "problem", what, remedy)]


def _answers_alike(case: Case, other: nn.Module) -> bool:
    """Whether a network with the weights of the perturbed one gives the same output."""
    probe = case.probe(3)
    mine, theirs = (case.answer_alike(each, probe) for each in (case.perturbed, other.eval()))
    return not differ(mine, theirs)


def _hidden_state(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of tensors and numbers that differ between two networks but are not saved."""
    saved = one.state_dict().keys()
    mine, yours = (
        {**dict(each.named_buffers()), **_attributes(each, Tensor, int, float)}
        for each in (one, other)
    )
    return sorted(k for k in mine if k not in saved and _unlike(mine[k], yours.get(k)))


def _unlike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not torch.equal(one, other)
    return isinstance(one, Tensor) or isinstance(other, Tensor) or bool(one != other)


@torch.no_grad()
def shipping(case: Case) -> list[Finding]:
    """The file that a finished run holds, loaded as diffusers loads it."""
    origin, note = origin_of(case.network), shipping_note(case.network)
    if origin is None:
        what = f"diffusers loads {type(case.network).__name__} from the folder that dkdm writes"
        return [Finding("shipping", "ok", what)]
    if origin.factory is None:
        return [Finding("shipping", "warning", str(note), "give module:factory, not an object")]
    try:
        shipped = _made_by_file(shipment(origin).text, origin.save_config)
        load_strict(shipped, case.perturbed.state_dict(), "the shipped file")
        same = _answers_alike(case, shipped)
    except Exception as error:
        what = f"its file does not work alone: {in_a_line(error)}"
        remedy = "let the factory's module run by itself, and read only attributes of conditioning"
        return [Finding("shipping", "warning", what, remedy)]
    if not same:
        what = "the shipped file answers differently"
        return [Finding("shipping", "warning", what, "see reload")]
    if note:
        return [Finding("shipping", "warning", note, "put all of its code into one file")]
    return [Finding("shipping", "ok", "as one file; diffusers loads it without dkdm")]


def _made_by_file(text: str, save_config: Any) -> Any:
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
