"""Checkpoints of facebookresearch/DiT and willisma/SiT, as diffusers' DiTTransformer2DModel.

Both have the same network (arXiv 2212.09748; SiT is arXiv 2401.08740) and nearly the same file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from dkdm.core.denoisers.calls import Network, plain
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization, VarianceType
from dkdm.core.diffusion.schedules import rectified_flow
from dkdm.errors import DkdmError, UsageError
from dkdm.models.architectures import architecture_of
from dkdm.models.formats.first_stage import latent_bundle
from dkdm.models.formats.flags import read_flags
from dkdm.models.formats.state_dict import Weights, frozen
from dkdm.models.options import LoadOptions
from dkdm.models.schedulers import NAMED, from_scheduler_config

FLAGS = {"num_heads": int, "vae": str}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the sizes S, B, L and XL
_PATCH = "x_embedder.proj.weight"
_LABELS = "y_embedder.embedding_table.weight"
_LAST = "final_layer.linear.weight"
_FIRST_BLOCK = "blocks.0.attn.qkv.weight"
_KEYS = (_PATCH, _LABELS, _LAST, _FIRST_BLOCK, "pos_embed")


def recognizes_dit(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a DiT: its learned variance tells it from a SiT."""
    second = _second_half(tensors)
    return second is not None and bool(second.any())


def recognizes_sit(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a SiT.

    It has output channels for a variance and never trains them: they stay zero, as initialized.
    """
    second = _second_half(tensors)
    return second is not None and not second.any()


def _second_half(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The rows of the last layer for the second half of 2C channels, if there is one."""
    if not tensors.keys() >= {*_KEYS}:
        return None
    _, channels, side, _ = tensors[_PATCH].shape
    rows = tensors[_LAST]
    if len(rows) != 2 * channels * side**2:
        return None
    return rows.unflatten(0, (-1, 2, channels))[:, 1]


def load_dit(weights: Weights, options: LoadOptions) -> Denoiser:
    """A DiT with its own process: linear betas, epsilon, no clipping, a class for "no class".

    Source: `create_diffusion` of the repository, and its `p_sample_loop(clip_denoised=False)`.
    """
    flags = read_flags(options.flags, FLAGS)
    network = _network(weights, options, flags.get("num_heads"))
    channels = network.config.in_channels
    learned = network.config.out_channels == 2 * channels
    variance: VarianceType = "learned_range" if learned else "fixed_large"
    return Denoiser(
        network,
        from_scheduler_config({**NAMED["ddpm-linear"], "variance_type": variance}),
        Parameterization("epsilon", variance),
        architecture_of(network).shape(network.config, None),
        _classes(network),
        bundle=latent_bundle(flags.get("vae"), channels, "DiTPipeline"),
    )


def load_sit(weights: Weights, options: LoadOptions) -> Denoiser:
    """A SiT on a straight flow of 1000 levels, fed the data's share of the way, 1 at the data.

    Its ODE runs over an even grid of times (`transport/integrators.py`), as the flow's levels are.
    """
    flags = read_flags(options.flags, FLAGS)
    network = _network(weights, options, flags.get("num_heads"))
    return Denoiser(
        network,
        rectified_flow(1000),
        Parameterization("flow_prediction"),
        architecture_of(network).shape(network.config, None),
        _classes(network),
        time="data_fraction",
        call=velocity_to_noise,
        bundle=latent_bundle(flags.get("vae"), network.config.in_channels),
    )


def velocity_to_noise(
    network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]
) -> Tensor:
    """SiT's velocity leads to the data: the negative of a flow's; variance channels are unused."""
    return -plain(network, x, time, cond)[:, : x.shape[1]]


def _classes(network: Any) -> ClassLabels:
    classes = network.config.num_embeds_ada_norm
    return ClassLabels(classes, null_class=classes)


def _network(weights: Weights, options: LoadOptions, heads: int | None) -> Any:
    tensors = dict(weights.tensors)
    positions = tensors.pop("pos_embed")
    width, channels, side, _ = tensors[_PATCH].shape
    depth = sum(key.endswith(".attn.qkv.weight") for key in tensors)
    if not heads and width not in HEADS:
        raise UsageError(
            f"a DiT of width {width}: the file does not say how many heads it has: give "
            '--teacher-flags "--num-heads N"'
        )
    heads = heads or HEADS[width]
    if width % heads:
        raise UsageError(f"--num-heads {heads}: give a divisor of the width, {width}")
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=len(tensors[_LAST]) // side**2,
        num_layers=depth,
        sample_size=math.isqrt(positions.shape[1]) * side,
        patch_size=side,
        num_embeds_ada_norm=len(tensors[_LABELS]) - 1,
        norm_eps=1e-6,
    )
    if network.pos_embed.pos_embed.shape != positions.shape:
        raise DkdmError(
            f"{weights.path}: pos_embed has shape {tuple(positions.shape)}: give one row of "
            f"{width} for each token of a square"
        )
    _use_original_frequencies(network)
    frozen(network, dict(_renamed(tensors, depth)), weights.path, options.dtype)
    network.pos_embed.pos_embed.copy_(positions)
    return network


def _use_original_frequencies(network: nn.Module) -> None:
    """diffusers spreads the frequencies of time over 127 intervals, the repositories over 128."""
    for module in network.modules():
        if isinstance(module, Timesteps):
            module.downscale_freq_shift = 0


_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}
_IN_EVERY_BLOCK = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_IN_ONE_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def _renamed(tensors: Mapping[str, Tensor], depth: int) -> Iterator[tuple[str, Tensor]]:
    """The weights by diffusers' names, which repeat the embedders of time and label in each block.

    Names that no DiT has are passed on, to be found unexpected.
    """
    for key, value in tensors.items():
        layer, _, kind = key.rpartition(".")
        block, _, inner = layer.removeprefix("blocks.").partition(".")
        if layer in _IN_EVERY_BLOCK:
            for i in range(depth):
                yield f"transformer_blocks.{i}.{_IN_EVERY_BLOCK[layer]}.{kind}", value
        elif not layer.startswith("blocks."):
            yield f"{_OUTSIDE.get(layer, layer)}.{kind}", value
        elif inner == "attn.qkv":
            for name, part in zip("qkv", value.chunk(3), strict=True):
                yield f"transformer_blocks.{block}.attn1.to_{name}.{kind}", part
        else:
            yield f"transformer_blocks.{block}.{_IN_ONE_BLOCK.get(inner, inner)}.{kind}", value
