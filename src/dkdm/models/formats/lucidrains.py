"""Checkpoints of lucidrains/denoising-diffusion-pytorch, as its Trainer saves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization, PredictionType
from dkdm.errors import UsageError
from dkdm.models.formats.flags import one_of, read_flags
from dkdm.models.formats.state_dict import Weights, frozen, without_prefix
from dkdm.models.options import LoadOptions
from dkdm.models.schedulers import from_scheduler_config
from dkdm.networks.lucidrains import LucidrainsUNet

OBJECTIVES: dict[str, PredictionType] = {
    "pred_v": "v_prediction",
    "pred_noise": "epsilon",
    "pred_x0": "sample",
}
FLAGS: dict[str, Callable[[str], Any]] = {
    "objective": one_of(*OBJECTIVES),
    "resnet_block_groups": int,
}


def recognizes(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a GaussianDiffusion around its Unet."""
    return "model.final_res_block.block1.proj.weight" in tensors


def load(weights: Weights, options: LoadOptions) -> Denoiser:
    """The Unet on the betas in the file, with x_0 clipped to [-1, 1], as `p_sample` does.

    Raises UsageError if image size or objective are not known, and for networks that are fed
    their own prediction or learn the variance; KeyError for weights that are missing.
    """
    flags = read_flags(options.flags, FLAGS)
    tensors, unet = weights.tensors, without_prefix(weights.tensors, "model.")
    config, betas = _config(unet, flags.get("resnet_block_groups", 8)), tensors["betas"]
    objective = flags.get("objective") or _objective(tensors)
    if objective is None:
        raise UsageError(
            f"{weights.path} does not say what its network predicts: give --teacher-flags "
            '"--objective pred_v" or pred_noise or pred_x0'
        )
    size = _size(options.sample_size, len(config["block_out_channels"]))
    _check_channels(weights, config)
    try:
        network = LucidrainsUNet(sample_size=size, **config)
    except ValueError as error:
        raise UsageError(f"--resnet-block-groups: {error}") from error
    process = from_scheduler_config(
        {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": len(betas),
            "trained_betas": betas.double().tolist(),
            "clip_sample": True,
            "variance_type": "fixed_small",
        }
    )
    return Denoiser(
        frozen(network, unet, weights.path, options.dtype),
        process,
        Parameterization(OBJECTIVES[objective], "fixed_small"),
        (config["in_channels"], *size),
    )


def _objective(tensors: Mapping[str, Tensor]) -> str | None:
    """What the network predicts, by the weight of the loss at an SNR of about 1/2; None if unknown.

    That weight is 1, SNR or SNR / (SNR + 1), whether or not a large SNR is clipped.
    """
    share = tensors["alphas_cumprod"].double()
    snr = share / (1 - share)
    level = (snr - 0.5).abs().argmin()
    expected = {"pred_noise": 1.0, "pred_x0": float(snr[level]), "pred_v": float(share[level])}
    found = float(tensors["loss_weight"][level]) if "loss_weight" in tensors else 0.0
    return next((name for name, value in expected.items() if abs(found - value) < 1e-4), None)


def _size(asked: tuple[int, ...] | None, levels: int) -> tuple[int, int]:
    halvings = 2 ** (levels - 1)
    if asked is None or len(asked) != 2 or any(side % halvings for side in asked):
        raise UsageError(
            "the file does not say how large its images are: give --teacher-size HEIGHT "
            f"WIDTH, both divisible by {halvings}, found {asked}"
        )
    return asked[0], asked[1]


def _check_channels(weights: Weights, config: Mapping[str, Any]) -> None:
    taken, given = config["in_channels"], config["out_channels"]
    if taken != given:
        raise UsageError(
            f"{weights.path}: the network takes {taken} channels and gives {given}: one with "
            "self_condition or learned_variance is not supported"
        )


def _config(unet: Mapping[str, Tensor], groups: int) -> dict[str, Any]:
    """What the names and shapes say of the network. Raises KeyError for a missing name.

    groups: of a normalization by groups (until version 1.11.1).
    """
    count = sum(key.startswith("downs.") and key.endswith(".2.mem_kv") for key in unet)
    full = tuple(f"downs.{i}.2.to_out.weight" in unet for i in range(count))
    memories = [unet[f"downs.{i}.2.mem_kv"].shape for i in range(count)]
    leaves = [f"downs.{i}.3.1.weight" for i in range(count - 1)] + [f"downs.{count - 1}.3.weight"]
    fourier = "time_mlp.0.weights" in unet
    return {
        "in_channels": unet["init_conv.weight"].shape[1],
        "out_channels": len(unet["final_conv.weight"]),
        "first_channels": len(unet["init_conv.weight"]),
        "block_out_channels": tuple(len(unet[name]) for name in leaves),
        "full_attention": full,
        "heads": tuple(shape[1] for shape in memories),
        "head_channels": tuple(
            shape[3 if whole else 2] for shape, whole in zip(memories, full, strict=True)
        ),
        "time_channels": unet["time_mlp.1.weight"].shape[1] - fourier,
        "fourier": fourier,
        "emb_channels": len(unet["time_mlp.1.weight"]),
        "norm_groups": groups if "mid_block1.block1.norm.bias" in unet else None,
    }
