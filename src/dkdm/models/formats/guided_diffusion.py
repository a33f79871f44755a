"""Checkpoints of openai/guided-diffusion, openai/improved-diffusion and forever208/DDPM-IP.

A file of theirs holds the weights alone; the rest is in the flags of the command that wrote
or sampled it. What the shapes of the weights say is checked against these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.process import Process
from dkdm.errors import UsageError
from dkdm.models.architectures import ARCHITECTURES
from dkdm.models.formats.flags import one_of, read_flags
from dkdm.models.formats.state_dict import Weights, frozen
from dkdm.models.options import LoadOptions
from dkdm.models.schedulers import from_scheduler_config
from dkdm.networks.adm import AdmUNet

_OWN_KEYS = (
    "time_embed.0.weight",
    "input_blocks.0.0.weight",
    "middle_block.1.qkv.weight",
    "output_blocks.0.0.in_layers.0.weight",
    "out.2.weight",
)


def recognizes(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of an ADM UNet (a classifier has no way up)."""
    return all(key in tensors for key in _OWN_KEYS)


def load(weights: Weights, options: LoadOptions) -> Denoiser:
    """The model whose flags are `options.flags`, as `image_sample.py` of its repository reads them.

    Raises UsageError for flags that are missing, unknown or contradicted by the weights, KeyError
    for weights that are missing.
    """
    said = _said_by_shapes(weights)
    flags = _flags(options.flags, weights.path, said)
    _check_agreement(flags, said, weights.path)
    network = _network(flags, said)
    classes = said["num_class_embeds"]
    return Denoiser(
        frozen(network, weights.tensors, weights.path, options.dtype),
        from_scheduler_config(_scheduler(flags)),
        Parameterization("sample" if flags.predict_xstart else "epsilon", _variance(flags)),
        ARCHITECTURES["AdmUNet"].shape(dict(network.config), options.sample_size),
        Unconditional() if classes is None else ClassLabels(classes),
        time=_rescaled_time if _rescales_time(flags) else None,
    )


def _said_by_shapes(weights: Weights) -> dict[str, Any]:
    """The part of AdmUNet's config that names and shapes determine."""
    shapes = {name: tuple(value.shape) for name, value in weights.tensors.items()}
    channels = shapes["time_embed.0.weight"][1]
    blocks, levels, updown = _levels(list(shapes))
    starts = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [shapes[f"input_blocks.{i}.0.in_layers.2.weight"][0] for i in starts]
    time = shapes["input_blocks.1.0.emb_layers.1.weight"][0]
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": channels,
        "num_res_blocks": blocks,
        "channel_mult": tuple(width / channels for width in widths),
        "attention_resolutions": tuple(
            2**k for k, i in enumerate(starts) if f"input_blocks.{i}.1.qkv.weight" in shapes
        ),
        "use_scale_shift_norm": time == 2 * widths[0],
        "resblock_updown": updown,
        "num_class_embeds": shapes.get("label_emb.weight", (None,))[0],
    }


def _levels(names: list[str]) -> tuple[int, int, bool]:
    """Residual blocks a level, levels, and whether residual blocks resample.

    On the way up, the last of the blocks of a level is followed by what doubles the size.
    """
    found = [re.match(r"output_blocks\.(\d+)\.(\d)\.(\w+)\.", name) for name in names]
    stages = [(int(one[1]), int(one[2]), one[3]) for one in found if one]
    count = 1 + max((stage for stage, _, _ in stages), default=0)
    ups = [one for one in stages if one[1] > 0 and one[2] in ("conv", "in_layers")]
    blocks = min((stage for stage, _, _ in ups), default=count - 1)
    return blocks, count // (blocks + 1), any(kind == "in_layers" for _, _, kind in ups)


def _truth(word: str) -> bool:
    if word.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if word.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise ValueError("use True or False")


# What each flag is read by, and the default that the repositories share.
_KNOWN: dict[str, tuple[Callable[[str], Any], Any]] = {
    "image_size": (int, 64),
    "num_channels": (int, 128),
    "num_res_blocks": (int, 2),
    "num_heads": (int, 4),
    "num_heads_upsample": (int, -1),
    "num_head_channels": (int, -1),
    "attention_resolutions": (str, "16,8"),
    "channel_mult": (str, ""),
    "dropout": (float, 0.0),
    "class_cond": (_truth, False),
    "use_scale_shift_norm": (_truth, True),
    "resblock_updown": (_truth, False),
    "use_new_attention_order": (_truth, False),
    "learn_sigma": (_truth, False),
    "sigma_small": (_truth, False),
    "diffusion_steps": (int, 1000),
    "noise_schedule": (one_of("linear", "cosine"), "linear"),
    "predict_xstart": (_truth, False),
    "rescale_timesteps": (_truth, None),
    "clip_denoised": (_truth, True),
}
_IGNORED = (
    "timestep_respacing", "use_kl", "rescale_learned_sigmas", "use_checkpoint", "use_fp16",
    "num_samples", "batch_size", "use_ddim", "model_path", "data_dir", "schedule_sampler", "lr",
    "weight_decay", "lr_anneal_steps", "microbatch", "ema_rate", "log_interval", "save_interval",
    "resume_checkpoint", "fp16_scale_growth", "input_pertub",
)  # fmt: skip
_ONLY_IMPROVED = ("sigma_small",)
_ONLY_GUIDED = ("num_head_channels", "channel_mult", "resblock_updown", "use_new_attention_order")


def _flags(text: str, path: Path, said: Mapping[str, Any]) -> SimpleNamespace:
    """The flags, with the repositories' defaults; `given` names those in the text."""
    if not text.strip():
        known = {key: value for key, value in _as_flags(said, None).items() if value != ""}
        raise UsageError(
            f"{path}: the weights say {_shown(known)}, and attention where the image is "
            f"{', '.join(map(str, said['attention_resolutions'])) or 'never'} times smaller; they "
            "do not say --image_size, --num_heads or --num_head_channels, "
            "--use_new_attention_order, --noise_schedule, --diffusion_steps, --predict_xstart and "
            "--rescale_timesteps: give --teacher-flags with the model and diffusion flags of "
            "the command that made it"
        )
    readers = {name: read for name, (read, _) in _KNOWN.items()} | dict.fromkeys(_IGNORED, str)
    given = read_flags(text.replace("\\\n", " "), readers)
    defaults = {name: default for name, (_, default) in _KNOWN.items()}
    return SimpleNamespace(**(defaults | given), given=tuple(given))


def _as_flags(said: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
    """What the weights say, spelled as flags; attention needs the image size."""
    factors = said["attention_resolutions"]
    sizes = [] if image_size is None else sorted((image_size // f for f in factors), reverse=True)
    return {
        "num_channels": said["model_channels"],
        "num_res_blocks": said["num_res_blocks"],
        "channel_mult": ",".join(f"{mult:g}" for mult in said["channel_mult"]),
        "attention_resolutions": ",".join(map(str, sizes)),
        "learn_sigma": said["out_channels"] == 2 * said["in_channels"],
        "class_cond": said["num_class_embeds"] is not None,
        "use_scale_shift_norm": said["use_scale_shift_norm"],
        "resblock_updown": said["resblock_updown"],
    }


def _shown(flags: Mapping[str, Any]) -> str:
    return " ".join(f"--{key} {value}" for key, value in flags.items())


def _check_agreement(flags: SimpleNamespace, said: Mapping[str, Any], path: Path) -> None:
    found = _as_flags(said, flags.image_size)
    asked = {key: getattr(flags, key) for key in found}
    if not flags.channel_mult:
        asked["channel_mult"] = found["channel_mult"]
    if _attends_at(flags, len(said["channel_mult"])) == set(said["attention_resolutions"]):
        asked["attention_resolutions"] = found["attention_resolutions"]
    wrong = {key: value for key, value in asked.items() if value != found[key]}
    if wrong:
        raise UsageError(
            f"{path}: --teacher-flags say {_shown(wrong)} (their defaults, if left out), the "
            f"weights {_shown({key: found[key] for key in wrong})}, at --image_size "
            f"{flags.image_size}"
        )


def _attends_at(flags: SimpleNamespace, levels: int) -> set[int]:
    """The factors of downsampling that the flags put attention at."""
    try:
        sizes = [int(size) for size in flags.attention_resolutions.split(",")]
        factors = {flags.image_size // size for size in sizes}
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"--teacher-flags: --attention_resolutions {flags.attention_resolutions}: give "
            "sizes in pixels, such as 16,8"
        ) from error
    return factors & {2**level for level in range(levels)}


def _network(flags: SimpleNamespace, said: Mapping[str, Any]) -> AdmUNet:
    try:
        return AdmUNet(
            **said,
            sample_size=flags.image_size,
            num_heads=flags.num_heads,
            num_head_channels=_unless_minus_one(flags.num_head_channels),
            num_heads_upsample=_unless_minus_one(flags.num_heads_upsample),
            use_new_attention_order=flags.use_new_attention_order,
            dropout=flags.dropout,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"--teacher-flags do not make a network: {error}") from error


def _unless_minus_one(value: int) -> int | None:
    return None if value == -1 else value


def _scheduler(flags: SimpleNamespace) -> dict[str, Any]:
    """The scheduler of their beta schedules: linear for any T, and cosine (arXiv 2102.09672)."""
    config = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": flags.diffusion_steps,
        "clip_sample": flags.clip_denoised,
        "timestep_spacing": "linspace",
    }
    if flags.noise_schedule == "cosine":
        return config | {"beta_schedule": "squaredcos_cap_v2"}
    start, end = 0.1 / flags.diffusion_steps, 20 / flags.diffusion_steps
    return config | {"beta_schedule": "linear", "beta_start": start, "beta_end": end}


def _variance(flags: SimpleNamespace) -> Any:
    if flags.learn_sigma:
        return "learned_range"
    return "fixed_small" if flags.sigma_small else "fixed_large"


def _rescales_time(flags: SimpleNamespace) -> bool:
    """Whether the network is fed t * 1000 / T; without the flag, the two repositories differ."""
    if flags.rescale_timesteps is not None or flags.diffusion_steps == 1000:
        return bool(flags.rescale_timesteps)
    improved = any(name in flags.given for name in _ONLY_IMPROVED)
    if improved == any(name in flags.given for name in _ONLY_GUIDED):
        raise UsageError(
            f"--teacher-flags: with --diffusion_steps {flags.diffusion_steps}, give "
            "--rescale_timesteps too: improved-diffusion's default is True, guided-diffusion's and "
            "DDPM-IP's False"
        )
    return improved


def _rescaled_time(process: Process) -> Tensor:
    return torch.arange(process.num_levels, dtype=torch.float64) * (1000 / process.num_levels)
