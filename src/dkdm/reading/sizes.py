"""What a file describes is measured before it is made: networks, samples, levels.

The limits are far above any model there is. `DKDM_MAX_GIB` lifts those that are in memory.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from dkdm.errors import DkdmError, UsageError, in_a_line, raised_as
from dkdm.reading.fields import shown
from dkdm.reading.machine import usable_memory
from dkdm.reading.quantization import check_quantized

LIMIT = "DKDM_MAX_GIB"
GIB = 2**30
MAX_LEVELS = 100_000  # of a noise process
MAX_TENSORS = 50_000  # of a network
MAX_MODULES = 200_000
MAX_DESCRIBED_GIB = 1024.0  # of a network that is only described, on no device
MAX_SAMPLE_GIB = 1.0
MAX_LAYERS = 2_000
MAX_COUNT = 1_000_000  # heads, channels, classes
MAX_WHOLE = 10**8  # any other whole number of a network's config
MAX_TOKENS = 2**20  # of a sample of a transformer
MAX_ITEMS = 10_000
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack")
_LAYERS = re.compile(r"num_layers|num_.*_layers|num_blocks|num_res_blocks|layers_per|depth|repeat")
_COUNTS = re.compile(r"head|level|stage|mult|dim|channel|width|size|num_")
_NOT_COUNTS = re.compile(r"theta|_id$|token|rate|num_parameters")


def max_gib(otherwise: float) -> float:
    """The limit of $DKDM_MAX_GIB, or `otherwise`. Raises UsageError if it is not a number."""
    text = os.environ.get(LIMIT, "")
    if not text:
        return otherwise
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise UsageError(f"{LIMIT}={text}: give a positive number of GiB")
    return limit


def check_numbers(config: Mapping[str, Any], where: str) -> None:
    """Raise UsageError for numbers and lists that no network's config has.

    Numbers of layers are bounded by 2,000, of heads, channels and classes by 1e6, any other whole
    number by 1e8, a list by 10,000 entries; numbers are finite.
    """
    for name, value in config.items():
        _check_value(str(name), value, where)


def _check_value(name: str, value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        if len(value) > MAX_ITEMS * 100:
            raise UsageError(f"{where}: {name} has {len(value):,} entries, too many")
    elif isinstance(value, (list, tuple)):
        if len(value) > MAX_ITEMS:
            raise UsageError(
                f"{where}: {name} has {len(value):,} entries: give at most {MAX_ITEMS:,}"
            )
        for item in value:
            _check_value(name, item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where}: {name} is {value}: give a finite number")
    elif type(value) is int and abs(value) > _most(name):
        raise UsageError(f"{where}: {name} is {shown(value)}: give at most {_most(name):,}")


def _most(name: str) -> int:
    if _LAYERS.search(name):
        return MAX_LAYERS
    counts = _COUNTS.search(name) and not _NOT_COUNTS.search(name)
    return MAX_COUNT if counts else MAX_WHOLE


def check_sample(shape: Sequence[int], where: str, patch: int | None = None) -> tuple[int, ...]:
    """The shape of a sample (C, ...), of 1 or more values a side.

    patch: side of the tokens that a transformer cuts it into. Raises UsageError for a sample of
    more than 1 GiB and for more than 2^20 tokens.
    """
    if any(type(side) is not int or side < 1 for side in shape):
        raise UsageError(
            f"{where}: a sample of shape {shown(tuple(shape))}: give whole numbers above 0"
        )
    gib, limit = math.prod(shape) * 4 / GIB, max_gib(MAX_SAMPLE_GIB)
    if gib > limit:
        raise UsageError(
            f"{where}: a sample of shape {'x'.join(map(str, shape))} takes {gib:,.1f} GiB, two of "
            f"them {2 * gib:,.1f} GiB; the limit is {limit:,.1f} GiB: set {LIMIT} to lift it"
        )
    tokens = math.prod(shape[1:]) // max(patch or 1, 1) ** 2
    if patch is not None and tokens > MAX_TOKENS:
        raise UsageError(
            f"{where}: a sample of shape {'x'.join(map(str, shape))} makes {tokens:,} tokens: "
            f"give at most {MAX_TOKENS:,}"
        )
    return tuple(shape)


@contextmanager
def bounded(where: str, limit: float, reason: str) -> Iterator[None]:
    """Stop networks that are made here from holding more than `limit` numbers.

    reason: what the limit is, for the message. Raises UsageError the moment a tensor goes beyond
    it, before its memory is touched, and for more tensors or modules than any network has.
    """
    here, counted = threading.get_ident(), Counter[str]()

    def count(owner: nn.Module, name: str, held: nn.Module | torch.Tensor | None) -> None:
        del owner, name
        if held is None or threading.get_ident() != here:
            return
        if isinstance(held, nn.Module):
            counted["modules"] += 1
        else:
            counted["tensors"] += 1
            counted["numbers"] += held.numel()
        _check_counted(counted, limit, where, reason)

    with ExitStack() as handles:
        handles.enter_context(hooks.register_module_parameter_registration_hook(count))
        handles.enter_context(hooks.register_module_buffer_registration_hook(count))
        handles.enter_context(hooks.register_module_module_registration_hook(count))
        yield


def _check_counted(counted: Mapping[str, int], limit: float, where: str, reason: str) -> None:
    if counted["tensors"] > MAX_TENSORS or counted["modules"] > MAX_MODULES:
        raise UsageError(
            f"{where} describes a network of more than {MAX_TENSORS:,} weight tensors or "
            f"{MAX_MODULES:,} layers: reduce its numbers of layers"
        )
    if counted["numbers"] > limit:
        gib = counted["numbers"] * 4 / GIB
        raise UsageError(
            f"{where} describes a network of {counted['numbers']:,} numbers or more, {gib:,.1f} "
            f"GiB in float32; the limit is {reason}: reduce its sizes, or set {LIMIT} to the GiB "
            "that it may take"
        )


@contextmanager
def building(
    config: Mapping[str, Any], where: str, kind: str, files: Path | None = None
) -> Iterator[None]:
    """Around the construction of a network from a config that somebody else wrote.

    where: the file, kind: the class, for messages. files: the weights that it is loaded with, or
    their folder: it then may hold what they can fill; None is the machine's memory. Whatever a
    constructor raises becomes one UsageError (with weights, DkdmError) that names file and class.
    """
    check_numbers(config, where)
    if files is not None:
        check_quantized(config, where)

    def explained(error: Exception) -> DkdmError:
        reason = in_a_line(error)
        if files is None:
            return UsageError(f"{where}: {kind} cannot be made of it: {reason}")
        return DkdmError(f"{files}: the weights of {kind} cannot be loaded: {reason}")

    limit, reason = _room(files)
    with raised_as(explained), bounded(where, limit, reason):
        yield


def _room(files: Path | None) -> tuple[float, str]:
    """How many numbers a network may hold, and why."""
    asked = max_gib(0.0)
    if asked:
        return asked * GIB / 4, f"{asked:,.1f} GiB ({LIMIT})"
    if torch.get_default_device().type == "meta":
        return MAX_DESCRIBED_GIB * GIB / 4, f"{MAX_DESCRIBED_GIB:,.0f} GiB"
    if files is None:
        free = usable_memory()
        return free / 4, f"the {free / GIB:,.1f} GiB of memory that are free on this machine"
    found = [f for pattern in WEIGHTS for f in files.glob(pattern)] if files.is_dir() else [files]
    held = sum(file.stat().st_size for file in found)
    return 4.0 * held + 2**20, f"what the {held:,} bytes of weights beside it can fill"


def make_network(cls: Any, config: Mapping[str, Any], where: str) -> Any:
    """`cls.from_config(config)`, measured on torch's meta device before memory is taken.

    where: the file. Raises UsageError for a config that makes no network, or one that is too large.
    """
    if torch.get_default_device().type != "meta":
        _try_on_meta(cls, config, where)
    with building(config, where, cls.__name__):
        return cls.from_config(dict(config))


def _try_on_meta(cls: Any, config: Mapping[str, Any], where: str) -> None:
    limit, reason = _room(None)
    check_numbers(config, where)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), bounded(where, limit, reason):
            cls.from_config(dict(config))
    except DkdmError:
        raise
    except Exception:  # what cannot be measured is made, and says itself what is wrong
        return


def understood(where: str) -> AbstractContextManager[None]:
    """Around the reading of a model that somebody else made: what no check of an entry foresaw."""
    return raised_as(
        lambda error: UsageError(
            f"{where}: a value in its configs makes no sense to dkdm ({in_a_line(error)}): compare "
            "them with a model of the same kind that loads"
        )
    )
