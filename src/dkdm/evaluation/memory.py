"""How much memory an evaluation needs beside the weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.evaluation.cost import probe, undisturbed

MIB = 2**20


class LiveStorages(TorchDispatchMode):
    """Adds up what the operations inside allocate, as long as it is alive.

    network: its weights were there before; a view of one allocates nothing.
    """

    def __init__(self, network: object = None) -> None:
        super().__init__()
        there = network.state_dict().values() if isinstance(network, nn.Module) else ()
        self._before = [tensor.untyped_storage() for tensor in there]
        self.known = {id(storage) for storage in self._before}
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.known:
            return
        self.known.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


class _Attention(torch.autograd.Function):
    """Attention that keeps inputs and output for the backward pass, and no matrix of weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        del gradients
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device, attention takes the memory of the fused kernels that a GPU runs.

    Source: FlashAttention, arXiv 2205.14135. torch would count its plain formula there, with a
    weight for every pair of tokens. Replaced for all threads: a backward pass may recompute.
    """
    real = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type == "meta":
            fused: Tensor = _Attention.apply(query, key, value)
            return fused
        return real(query, key, value, *args, **kwargs)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real


@torch.no_grad()
def evaluation_mib(denoiser: Denoiser, batch_size: int) -> float:
    """Largest memory alive during one evaluation without gradients, in MiB, beside the weights.

    Counts tensors, not what a kernel allocates inside itself.
    """
    with undisturbed(denoiser), LiveStorages(denoiser.network) as storages:
        denoiser.predict(probe(denoiser, batch_size))
    return storages.peak / MIB


def weights_mib(denoiser: Denoiser) -> float:
    """Parameters and buffers, in MiB."""
    network = denoiser.network
    if not isinstance(network, torch.nn.Module):
        return 0.0
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.nbytes for tensor in tensors) / MIB


def peak_allocated(work: Callable[[], object]) -> int:
    """Largest number of bytes that torch's allocator gave out at once while `work` ran.

    On CUDA the caching allocator says it; on a CPU torch's profiler sees every allocation.
    """
    gc.collect()  # what is freed inside would count less than nothing
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    found = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    found.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in found), initial=0))
