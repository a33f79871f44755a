"""Weights and inputs that any program can compute: functions of a name and a shape alone.

The expected numbers of some tests are outputs of the original repositories' own code, run once with
these weights and inputs.
"""

import math
import zlib

import numpy as np
import torch


def numbers(name, *shape):
    """Standard normal numbers that depend on name and shape only, float32."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(state.standard_normal(shape).astype(np.float32))


def filled(network):
    """The same network with every weight a function of its name."""
    network.load_state_dict(state_of(network.state_dict()))
    return network.eval()


def state_of(shapes):
    """Weights for the names and shapes of a state dict; others than floats stay as they are."""
    return {
        name: _weight(name, value.shape) if value.is_floating_point() else value
        for name, value in shapes.items()
    }


def _weight(name, shape):
    values = numbers(name, *shape)
    if len(shape) > 1:
        return values / math.sqrt(math.prod(shape[1:]))
    return 0.1 * values + (1.0 if name.endswith("weight") else 0.0)


def few(tensor):
    """Six numbers of a tensor, spread over it, and its mean square."""
    flat = tensor.detach().double().flatten()
    picked = flat[torch.linspace(0, len(flat) - 1, 6).long()]
    return [*picked.tolist(), float(flat.square().mean())]
