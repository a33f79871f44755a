"""The config of a component as the stock pipeline object of diffusers holds it after loading.

A config on disk leaves keys out that its class has defaults for, may name a class that diffusers
has renamed, and is corrected by the constructors of some pipelines. All who ask what a folder says
ask here, and never the JSON. Nothing is built: defaults come from signatures. What constructors
write over a solver's kind is left as it is: it changes no step of dkdm.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from dkdm.errors import UsageError
from dkdm.models.architectures import ARCHITECTURES
from dkdm.networks import HOMES, network_class
from dkdm.reading.fields import Fields, read_json, shown
from dkdm.reading.values import FINITE

Config = dict[str, Any]

SCHEDULER = "scheduler"
SMALLEST = 1e-6  # of factors that latents are divided by
_OWN_DEFAULTS = "_use_default_values"  # keys that diffusers saw no value for


def effective_config(root: Path, index: Mapping[str, Any], name: str) -> Config:
    """The config that a stock pipeline's component holds after `from_pretrained(root)`.

    index: of model_index.json. name: of the component in it; its class is the one that the index
    lists, whatever its own config says; of one that is not listed, what its config says. Keys that
    the class does not know are kept, as diffusers does. Raises UsageError if the config is missing
    or an entry has a value that cannot be.
    """
    file = config_file(root, name)
    raw = read_json(file, f"the config of its {name}")
    kind = network_name(listed(index).get(name) or str(raw.get("_class_name")), raw)
    config = class_config(raw, kind, str(file))
    if name == SCHEDULER:
        converted = _CONVERTING.get(str(index.get("_class_name")))
        if converted and converted != kind:
            config = class_config(raw, converted, str(file))
    return _corrected(config, index, name, str(file))


def config_file(root: Path, name: str) -> Path:
    """Where the config of a component lies."""
    file = "scheduler_config.json" if name == SCHEDULER else "config.json"
    return place_of(root, name) / file


def place_of(root: Path, name: str) -> Path:
    """Where a component lies: in a folder of its name or, without one, in the root folder."""
    return root / name if (root / name).is_dir() else root


def listed(index: Mapping[str, Any]) -> dict[str, str]:
    """The class of each component that model_index.json lists.

    A component is [library, class]; [null, null] is one that is not there.
    """
    pairs = {name: v for name, v in index.items() if isinstance(v, (list, tuple)) and len(v) == 2}
    return {
        name: kind
        for name, (library, kind) in pairs.items()
        if isinstance(library, str) and isinstance(kind, str) and name not in _LISTS
    }


_LISTS = ("_class_name", "class_names")  # of two names, and no component


def network_name(kind: str, config: Mapping[str, Any]) -> str:
    """The class that diffusers makes of a listed one."""
    older = (kind, str(config.get("norm_type")))
    found = (name for name, known in ARCHITECTURES.items() if known.older == older)
    return next(found, kind)


def class_config(config: Mapping[str, Any], name: str, where: str) -> Config:
    """The config that an object of the class `name` holds when it is made from a config.

    where: the file, for messages. A class of neither diffusers nor dkdm adds nothing. Raises
    UsageError if an entry without a default is missing, or has a value that cannot be.
    """
    skipped = config.get(_OWN_DEFAULTS)
    skipped = skipped if isinstance(skipped, list) else []
    given = {k: v for k, v in config.items() if k not in skipped and k != _OWN_DEFAULTS}
    known = arguments(name)
    missing = [k for k, v in known.items() if v is inspect.Parameter.empty and k not in given]
    if missing:
        raise UsageError(f"{where}: {', '.join(missing)} is missing, and {name} has no default")
    made = {**known, **given, "_class_name": name or config.get("_class_name")}
    made |= _written_by_constructor(name, made)
    _check(Fields(made, where))
    return made


@lru_cache
def arguments(name: str) -> Config:
    """The arguments that a class takes from its config, with their defaults."""
    twin, lacks = _NEEDS_A_PACKAGE.get(name, (name, ()))
    kind = network_class(twin) if twin in HOMES else stock_class(twin)
    if kind is None:
        return {}
    left_out = {"self", "kwargs", *lacks, *getattr(kind, "ignore_for_config", [])}
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in left_out}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}


_NEEDS_A_PACKAGE = {  # scipy, torchsde: a class with the same arguments and those it lacks
    "LMSDiscreteScheduler": (
        "EulerDiscreteScheduler",
        ("rescale_betas_zero_snr", "timestep_type", "final_sigmas_type"),
    ),
    "DPMSolverSDEScheduler": ("KDPM2DiscreteScheduler", ()),
}


def stock_class(name: object, base: str = "ConfigMixin") -> Any:
    """A class of diffusers that derives from `base`; None if it has none of this name."""
    import diffusers  # seconds, which who only looks for a folder need not wait

    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else 0
    known = isinstance(found, type) and issubclass(found, getattr(diffusers, base))
    return found if known else None


_CONVERTING = {"DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}


def _written_by_constructor(name: str, config: Config) -> Config:
    levels = _LEVELS.get(name)
    if levels:
        return {"block_out_channels": config[levels], "force_upcast": False}
    if name == "UNet2DConditionModel" and config["encoder_hid_dim"] is not None:
        return {"encoder_hid_dim_type": config["encoder_hid_dim_type"] or "text_proj"}
    return {}


_LEVELS = {
    "AutoencoderTiny": "decoder_block_out_channels",
    "AsymmetricAutoencoderKL": "up_block_out_channels",
    "ConsistencyDecoderVAE": "encoder_block_out_channels",
}


def _corrected(config: Config, index: Mapping[str, Any], name: str, where: str) -> Config:
    """What the constructor of Stable Diffusion's pipelines makes of old configs."""
    made_by = [rule for rule, kinds in _CORRECTIONS.items() if index.get("_class_name") in kinds]
    changes: Config = {}
    if name == SCHEDULER:
        if "steps_offset" in made_by and "steps_offset" in config:
            changes["steps_offset"] = 1
        if "clip_sample" in made_by and config.get("clip_sample") is True:
            changes["clip_sample"] = False
    elif name == "unet" and "sample_size" in made_by and _is_old(config, where):
        size = config.get("sample_size")
        changes |= {"sample_size": 64} if isinstance(size, int) and size < 64 else {}
    return config | changes


def _is_old(config: Config, where: str) -> bool:
    version = config.get("_diffusers_version")
    if version is None:
        return False
    try:
        return Version(Version(str(version)).base_version) < Version("0.9.0.dev0")
    except InvalidVersion as error:
        raise UsageError(
            f"{where}: _diffusers_version is {shown(version)}: give a version such as 0.42.1"
        ) from error


_CLIPPING = (
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionPAGPipeline",
    "StableDiffusionPAGImg2ImgPipeline", "StableDiffusionPAGInpaintPipeline",
    "StableDiffusionPipelineSafe", "StableDiffusionInpaintPipelineLegacy",
    "LEditsPPPipelineStableDiffusion",
)  # fmt: skip
_STEPPING = (
    "CycleDiffusionPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionDiffEditPipeline",
)  # fmt: skip
_SIZED = ("StableDiffusionDepth2ImgPipeline", "StableDiffusionImageVariationPipeline")
_CORRECTIONS = {  # entry: the pipelines that correct it
    "clip_sample": _CLIPPING,
    "steps_offset": (*_CLIPPING, *_STEPPING),
    "sample_size": (*_CLIPPING, *_STEPPING, *_SIZED),
}


def pipeline_entries(index: Mapping[str, Any]) -> Config:
    """The entries of model_index.json that are no components, with the pipeline's own defaults."""
    parts = listed(index)
    found = {k: v for k, v in index.items() if k not in parts and not k.startswith("_")}
    cls = stock_class(index.get("_class_name"), "DiffusionPipeline")
    if cls is None:
        return found
    defaults = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
    settings = {
        name: value
        for name, value in defaults.items()
        if isinstance(value, (bool, int, float, str)) or name == "boundary_ratio"
    }
    return {**settings, **found}


def _check(fields: Fields) -> None:
    for name in _POSITIVE:
        fields.whole(name, None, low=1)
    for name in _SIDES:
        _check_sides(fields, name)
    fields.number("shift_factor", None)
    channels = fields.values.get("latent_channels") or fields.values.get("z_dim")
    for name in ("latents_mean", "latents_std"):
        if fields.values.get(name) is not None:
            low = SMALLEST if name == "latents_std" else -FINITE
            length = len(fields.numbers(name, low=low))
            if isinstance(channels, int) and length != channels:
                raise UsageError(
                    f"{fields.where}: {name} has {length} numbers: give {channels}, one for "
                    "each channel of the latents"
                )
    if "scaling_factor" in fields.values:
        fields.number("scaling_factor", low=SMALLEST)


_OF_VECTORS = ("sample_size", "ResidualMLP")


def _check_sides(fields: Fields, name: str) -> None:
    """One whole number from 1, or a list of them; a network of vectors has none."""
    value = fields.values.get(name)
    of_vectors = value in ([], ()) and (name, fields.values.get("_class_name")) == _OF_VECTORS
    if value is None or of_vectors:
        return
    each = value if isinstance(value, (list, tuple)) and value else [value]
    if any(type(v) is not int or not 1 <= v < 2**31 for v in each):
        raise fields.wrong(name, value, "a whole number, 1 or more, or a list of them")


_POSITIVE = (
    "in_channels", "out_channels", "latent_channels", "z_dim", "num_class_embeds",
    "num_embeds_ada_norm", "scale_factor_spatial", "scale_factor_temporal", "joint_attention_dim",
    "pooled_projection_dim",
)  # fmt: skip
_SIDES = (
    "sample_size", "patch_size", "block_out_channels", "encoder_block_out_channels",
    "cross_attention_dim",
)  # fmt: skip
