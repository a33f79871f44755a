"""State dicts of facebookresearch/DiT and willisma/SiT, tiny."""

import torch

from formula_weights import state_of

WIDTH, CLASSES = 32, 5


LAYERS = {
    "x_embedder.proj": (WIDTH, 4, 2, 2),
    "t_embedder.mlp.0": (WIDTH, 256),
    "t_embedder.mlp.2": (WIDTH, WIDTH),
    **{
        f"blocks.{i}.{name}": (rows * WIDTH, columns * WIDTH)
        for i in range(2)
        for name, rows, columns in (
            ("attn.qkv", 3, 1),
            ("attn.proj", 1, 1),
            ("mlp.fc1", 4, 1),
            ("mlp.fc2", 1, 4),
            ("adaLN_modulation.1", 6, 1),
        )
    },
    "final_layer.linear": (2 * 2 * 8, WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
}


def checkpoint():
    """The state dict of a DiT or SiT of width 32 with two blocks, for 4x8x8 latents."""
    shapes = {"pos_embed": (1, 16, WIDTH), "y_embedder.embedding_table.weight": (6, WIDTH)}
    for name, shape in LAYERS.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return state_of({name: torch.empty(shape) for name, shape in shapes.items()})


def sit_checkpoint():
    """Its variance channels are never trained, so they are zero."""
    state = checkpoint()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name].unflatten(0, (4, 2, 4))[:, 1] = 0
    return state
