"""Evaluation mode for all that a model calls: a module, or the modules behind a function."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from dkdm.reading.notes import say

WAS_TRAINING = "the teacher was in training mode; dkdm put it into evaluation mode"
DEPTH = 3  # a partial of a bound method of an object that holds a module


def modules_behind(*callables: Any) -> list[nn.Module]:
    """Every module that these call, with its submodules, each once.

    A module is taken as it is. Of a function, its closure, its defaults and the globals it names
    are searched; of a method, its object; of a partial, its function and arguments; of any other
    object, its attributes. Containers are searched too, `DEPTH` steps in all.
    """
    found: dict[int, nn.Module] = {}
    for each in callables:
        for root in _roots(each, DEPTH):
            found |= {id(module): module for module in root.modules()}
    return list(found.values())


def _roots(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth >= 0:
        for part in _parts(value):
            yield from _roots(part, depth - 1)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        return _held_by_function(value)
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return []
    return list(vars(value).values())


def _held_by_function(function: FunctionType) -> list[Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    modules = [value for value in named if isinstance(value, nn.Module)]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*cells, *modules, *defaults]


@contextmanager
def evaluating(*callables: Any, frozen: bool = False) -> Iterator[bool]:
    """Hold all modules behind these in evaluation mode; yields whether any was in training mode.

    frozen: whether their parameters require no gradients either. Afterwards everything is as it was
    found. Modules whose `train` keeps parts of them in training mode are held whole.
    """
    modules = modules_behind(*callables)
    modes = [module.training for module in modules]
    held = modules if frozen else []
    weights = [p for m in held for p in m.parameters(recurse=False) if p.requires_grad]
    _set_modes(modules, [False] * len(modules))
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield any(modes)
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        _set_modes(modules, modes)


def _set_modes(modules: list[nn.Module], modes: list[bool]) -> None:
    """Call `train` of modules in another mode, since a network may define its own, then insist."""
    for module, training in zip(modules, modes, strict=True):
        if module.training != training:
            with suppress(NotImplementedError):  # exported programs have no modes
                module.train(training)
    for module, training in zip(modules, modes, strict=True):
        if module.training != training:
            module.training = training


def put_into_evaluation(*callables: Any) -> bool:
    """Put all modules behind these into evaluation mode; returns whether any was not."""
    modules = modules_behind(*callables)
    was_training = any(module.training for module in modules)
    _set_modes(modules, [False] * len(modules))
    return was_training


def say_if(was_training: bool) -> None:
    """Say on stderr that dkdm changed the teacher's mode, if it did."""
    if was_training:
        say(WAS_TRAINING)


def silence_label_dropout(network: nn.Module) -> dict[Any, float]:
    """Switch off the dropout of labels that diffusers' DiT does by itself in training mode.

    Each of its blocks drops other labels, so that the student would not be fed the class of its
    target. Conditions are dropped when they are drawn instead. Returns what each layer dropped.
    """
    from diffusers.models.embeddings import LabelEmbedding

    layers = [layer for layer in network.modules() if isinstance(layer, LabelEmbedding)]
    odds: dict[Any, float] = {layer: layer.dropout_prob for layer in layers}
    for layer in layers:
        layer.dropout_prob = 0.0
    return odds


@contextmanager
def without_label_dropout(network: nn.Module) -> Iterator[None]:
    """Silence the dropout of labels in here, and put it back afterwards."""
    odds = silence_label_dropout(network)
    try:
        yield
    finally:
        for layer, before in odds.items():
            layer.dropout_prob = before
