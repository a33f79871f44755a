"""What a CUDA device would let its host wait for, or ask of it, seen on a CPU."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watched(TorchDispatchMode):
    """Counts operations, and refuses those whose result the host or a shape needs."""

    HOST = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "unique",
        "equal",
        "is_nonzero",
    )

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] += 1
        assert not name.startswith(self.HOST), name
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, name
        return function(*args, **(kwargs or {}))


class OfTheDevice(TorchDispatchMode):
    """Refuses operations on tensors of the host, sending them to a device included.

    A captured copy from the host reads its memory again in every replay, whatever lies there then.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs or {})):
            host = isinstance(value, torch.Tensor) and value.device.type == "cpu"
            assert not host, f"{function} of {tuple(value.shape)} on the host"
        return function(*args, **(kwargs or {}))
