"""Every option of a run: one a line, typed, with its unit and what None means.

The dataclasses are the command line: a field `train_batch_size` is `--train-batch-size`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from dkdm.errors import UsageError
from dkdm.names import PredictionType
from dkdm.reading.arguments import NamedArguments, described, is_array, scalar
from dkdm.reading.fields import SHOWN, is_name, read_json, shown
from dkdm.reading.typed import made_of

SourceKind = Literal["dynamic", "shuffled", "iterative", "synthetic"]
FillKind = Literal["few-step", "ancestral", "none"]
LossWeighting = Literal["uniform", "snr", "min-snr", "student"]
ProcessName = str


# Smallest and largest value of each number; None is no bound.
RANGES: dict[str, tuple[float, float | None]] = {
    "checkpointing_steps": (1, None),
    "checkpoints_total_limit": (1, None),
    "condition_dropout": (0, 1),
    "ema_decay": (0, 1),
    "eta": (0, 1),
    "evaluation_samples": (0, None),
    "feature_weight": (0, None),
    "fill_steps": (1, None),
    "gradient_accumulation_steps": (1, None),
    "learning_rate": (0, None),
    "logging_steps": (1, None),
    "lora_rank": (1, None),
    "lr_warmup_steps": (0, None),
    "max_grad_norm": (0, None),
    "max_prompts": (1, None),
    "max_train_steps": (1, None),
    "pool_size": (1, None),
    "random_conditioning": (0, 1),
    "rho": (0, None),
    "sample_shape": (1, None),
    "shards": (1, None),
    "snr_gamma": (0, None),
    "synthetic_samples": (1, None),
    "synthetic_steps": (1, None),
    "teacher_size": (1, None),
    "train_batch_size": (1, None),
    "validation_sampling_steps": (1, None),
    "validation_steps": (0, None),
    "vlb_weight": (0, None),
    "weight_decay": (0, None),
}


@dataclass(frozen=True)
class RunConfig(NamedArguments):
    """What every training run has."""

    output_dir: Path = Path("runs/run")
    """Folder of the run: checkpoints, metrics and, at the end, the model."""
    seed: int = 0
    """Every random choice of the run follows from it."""
    max_train_steps: int = 1000
    """Optimizer steps."""
    train_batch_size: int = 128
    """Samples an optimizer step sees, before accumulation, over all processes together."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged into one optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = (
        "constant_with_warmup"
    )
    """Course of the learning rate over the run."""
    lr_warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this L2 norm."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the networks' arithmetic; weights stay float32."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights, and ship it."""
    ema_decay: float = 0.9999
    """Decay of that average a step; it starts lower and warms up, (1 + n) / (10 + n)."""
    condition_dropout: float = 0.0
    """Probability that a condition is replaced by the null one (needed for guided sampling)."""
    loss_weighting: LossWeighting = "uniform"
    """Weight of each noise level: 1 on the network's output; SNR / clipped SNR on x_0; or, for a
    student of another process, as densely as its own levels lie."""
    snr_gamma: float = 5.0
    """Largest SNR that min-snr weighs with."""
    checkpointing_steps: int = 1000
    """Optimizer steps between checkpoints; one more is written at the end."""
    checkpoints_total_limit: int | None = 2
    """Checkpoints kept; None keeps all."""
    resume_from_checkpoint: str | None = None
    """'latest' or the path of a checkpoint of this run; None starts anew."""
    validation_steps: int = 1000
    """Optimizer steps between sample grids; 0 draws none."""
    validation_sampling_steps: int = 25
    """Sampler steps of the grids and of the final evaluation."""
    logging_steps: int = 10
    """Optimizer steps between lines in metrics.jsonl."""
    report_to: str = "auto"
    """Trackers beside metrics.jsonl, comma-separated: tensorboard, trackio, wandb; none; or auto,
    which is TensorBoard where it is installed."""
    evaluation_samples: int = 1000
    """Samples drawn from each model for the final distances; 0 skips them."""
    sampling_guidance_scale: float = 1.0
    """Guidance of the sample grids and the final distances; 1 is none, and costs half."""
    evaluation_reference: Literal["auto", "none", "fashion-test", "fashion-train"] = "auto"
    """Real images the final distances are measured against; auto knows Fashion-MNIST by its class
    names."""
    negative_prompt: str = ""
    """The prompt that guidance leads away from."""
    license: str | None = None
    """Licence of the model, by the hub's name for it (apache-2.0, mit, openrail, other ...), for
    its card; None is the teacher's, where the teacher's own card names one."""
    push_to_hub: bool = False
    """Upload the finished run to the Hugging Face hub. Log in with `hf auth login` or HF_TOKEN."""
    hub_model_id: str | None = None
    """Repository to upload to, USER/NAME; None is the output folder's name under your account."""
    hub_private: bool = False
    """Make a new repository private."""

    meant: ClassVar[Mapping[str, str]] = {
        "batch_size": "train_batch_size",
        "epochs": "max_train_steps",
        "iterations": "max_train_steps",
        "lr": "learning_rate",
        "max_steps": "max_train_steps",
        "num_steps": "max_train_steps",
        "output": "output_dir",
        "prediction": "student_prediction",
        "resume": "resume_from_checkpoint",
        "steps": "max_train_steps",
    }

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, name, _checked(name, hint, getattr(self, name)))
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise UsageError(
                f"--license {shown(self.license)}: expected the hub's name of a licence, in lower "
                "case, such as apache-2.0, mit, cc-by-nc-4.0, openrail, or other"
            )


@dataclass(frozen=True)
class FactoryChoice:
    """Which code may make the custom networks of runs that are given as folders."""

    student_factory: str | None = None
    """Code that makes the custom network of a run, module:factory; several with commas. Not needed
    for runs that this machine made; the name that a folder gives is not trusted."""


@dataclass(frozen=True)
class TrainConfig(FactoryChoice, RunConfig):
    """Train a model on images (a teacher, or a baseline)."""

    images: str = "fashion-mnist"
    """'fashion-mnist' or a folder of images; class subfolders become labels, a text file beside
    each image (cat.txt for cat.png) its caption."""
    base: str | None = None
    """A pipeline folder whose autoencoder, text encoders and scheduler the new model uses (it needs
    no denoiser); None trains on pixels and class labels."""
    class_conditional: bool = True
    """Whether the images' class labels are learnt, where there are any."""
    network: str = "unet-tiny"
    """A preset, a diffusers config.json, or module:factory."""
    sample_shape: tuple[int, int, int] = (1, 16, 16)
    """Channels, height, width the images are brought to."""
    scheduler: str | None = None
    """Noise process: ddpm-linear, ddpm-cosine, flow, edm, or a diffusers scheduler_config.json;
    None is the base's own, or else ddpm-cosine (v_prediction, fixed_small)."""


@dataclass(frozen=True)
class TeacherChoice(FactoryChoice):
    """Which teacher, and how it is read."""

    teacher: str = "builtin:fashion"
    """A diffusers folder, a hub id, builtin:NAME, a run, or module:factory."""
    teacher_subfolder: str | None = None
    """Subfolder of the pipeline inside the folder or repository."""
    teacher_revision: str | None = None
    """Branch, tag or commit on the hub; None is the default branch."""
    teacher_variant: str | None = None
    """Weight variant such as fp16; None is the plain files."""
    teacher_dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """Precision the teacher's weights are held in; int8 is that of its linear layers, by torchao,
    beside bfloat16."""
    teacher_format: str | None = None
    """Format of a checkpoint file (guided-diffusion, ...); None tells it from its keys."""
    teacher_config: Path | None = None
    """Config file of the original repository, for formats that have one."""
    teacher_flags: str = ""
    """Flags of the original repository's scripts, as one string, for formats that have them."""
    teacher_size: tuple[int, ...] | None = None
    """Height and width (frames, height, width; or length) of a sample as the network sees it,
    in latents where it works on these; None is what its config says."""
    teacher_null_class: int | Literal["none"] | None = None
    """Class id that means "no class", for guidance; it is not learnt as a class. "none": there is
    no such id. None: as the teacher's config says."""
    teacher_scheduler: str | None = None
    """Scheduler of a teacher that is a network alone, such as a trainer's checkpoint-500/unet_ema:
    ddpm-linear, ddpm-cosine, flow, edm, or a scheduler_config.json or its folder."""
    teacher_lora: tuple[str, ...] | None = None
    """LoRA files merged into the teacher: FILE, or FILE:WEIGHT such as style.safetensors:0.8."""


@dataclass(frozen=True)
class StudentChoice:
    """Which student, and what it is to its teacher."""

    student: str = "dit-xs"
    """A preset (see `dkdm students`), a diffusers config.json, or module:factory."""
    student_prediction: PredictionType | None = None
    """What the student predicts; None is what the teacher does, or its own process's scheduler."""
    student_process: ProcessName = "teacher"
    """Noise process of the student: teacher, ddpm-linear, ddpm-cosine, flow, edm, or the path of a
    scheduler_config.json; matched with the teacher's by the signal-to-noise ratio."""


@dataclass(frozen=True)
class DistillConfig(StudentChoice, TeacherChoice, RunConfig):
    """Distil a teacher into a student without images."""

    check: bool = True
    """Check for about five seconds before the start that the teacher denoises, and warn if it does
    not. The check does not change the run; --no-check skips it."""
    teacher_offload: Literal["none", "layers"] = "none"
    """Keep the teacher in host memory and move a layer at a time to the device: slow, but small."""
    student_init: str = "random"
    """What the student's weights start from: random; teacher, as far as names and shapes allow; or
    a run, a checkpoint of one, a diffusers folder or a file of weights."""
    lora_rank: int | None = None
    """Rank of adapters on the weights that the student starts from, which then stay as they are
    and are merged with them in the end; None trains all weights."""
    source: SourceKind = "dynamic"
    """Where noisy samples come from: the paper's ladder iterative, shuffled, dynamic; or, as a
    baseline, synthetic: finished samples of the teacher, noised afresh (data-free training)."""
    synthetic_samples: int | None = None
    """Size of the synthetic set; None is as many as cost what the dynamic source would."""
    synthetic_steps: int = 50
    """Sampler steps, each a teacher evaluation, of a sample of the synthetic set."""
    rho: float = 0.4
    """Pool entries as a share of T * batch (dynamic); never more than the run can draw."""
    pool_size: int | None = None
    """Pool entries; None derives them from rho."""
    pool_dtype: Literal["float32", "float16"] = "float32"
    """Precision the pool is stored in."""
    pool_device: Literal["device", "cpu"] = "device"
    """Where the pool is stored: beside the models, or in host memory."""
    shards: int = 8
    """Logical parts of the pool, each with its own random numbers; keep it over a run's life."""
    fill: FillKind = "few-step"
    """How the pool is prepared: few-step samples noised again, exact ancestral, or pure noise."""
    fill_steps: int = 20
    """Teacher evaluations an entry of the few-step fill."""
    stride: str = "1"
    """Levels a state moves a step: a number, or random:M for a uniform law of mean M."""
    eta: float = 1.0
    """Noise of a move: 1 is ancestral (DDPM), 0 deterministic (DDIM)."""
    guidance_scale: str = "1"
    """Guidance of the teacher: a number, or LOW:HIGH for a scale drawn for each chain; 1 is none.
    Costs double, except for a teacher that is fed the scale."""
    guidance_interval: str | None = None
    """LOW:HIGH, the shares of noise sigma / (alpha + sigma) between which guidance acts (arXiv
    2404.07724), such as 0.3:0.7. Outside, the teacher is not guided (or is fed a scale of 1). None:
    everywhere."""
    guidance_on: Literal["target", "chain"] = "target"
    """What is guided: chain and target, so that it is baked into the student; or the chain alone,
    so that the student learns the unguided model where guided samples lie."""
    classes: tuple[int, ...] | None = None
    """Class ids the student is to learn; None is all of the teacher's."""
    prompts: str | None = None
    """Text file with one prompt a line, or a pattern of several ('prompts/*.txt'), for text
    models."""
    max_prompts: int = 50_000
    """Of longer files, so many prompts are drawn at random."""
    class_weights: tuple[float, ...] | None = None
    """How often each of these is drawn; None is equally."""
    random_conditioning: float = 0.0
    """Largest probability, at the highest noise, that a noisy state is shown under another
    condition than its own; it falls to e^-5 of that at the lowest (arXiv 2504.02011)."""
    feature_weight: float = 0.0
    """Weight of the distance between hidden features of student and teacher; 0 is none."""
    feature_layers: str = "auto"
    """Which: those of the same name, or else of the same resolution (auto, name, resolution); or
    pairs teacher's=student's of module names, 'mid_block=transformer_blocks.2,...'."""
    vlb_weight: float = 1.0
    """Weight of the variational term (DKDM Eq. 21) where both models learn their variance."""


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The type of every option."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _checked(name: str, hint: Any, value: Any) -> Any:
    """An option's value in the type that it has. Raises UsageError for any other."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    accepted = []
    for kind in kinds:
        if kind is type(None):
            if value is None:
                return None
            accepted.append("None")
            continue
        try:
            return _as(kind, name, value)
        except _WrongError as error:
            accepted.append(str(error))
    as_typed = isinstance(value, str) and value.isprintable() and len(value) <= SHOWN
    shown = value if as_typed or isinstance(value, (int, float)) else described(value)
    flag, way = name.replace("_", "-"), ", or ".join(accepted)
    raise UsageError(f"--{flag} {shown}: give {way} ({name})")


class _WrongError(Exception):
    """What is accepted in place of a value."""


def _as(kind: Any, name: str, value: Any) -> Any:
    """A value as one of the types that options have."""
    if typing.get_origin(kind) is tuple:
        return _as_tuple(kind, name, value)
    if typing.get_origin(kind) is Literal:
        words = typing.get_args(kind)
        return _accept(value, type(value) is str and value in words, ", ".join(words))
    if kind is Path:
        return Path(_accept(value, isinstance(value, (str, Path)), "a path"))
    value = scalar(value)
    if kind is bool:
        return _accept(value, type(value) is bool, "True or False")
    if kind is str:
        plain = isinstance(value, (str, Path, int, float)) and not isinstance(value, bool)
        return str(_accept(value, plain, "a string"))
    return _as_number(kind, name, value)


def _as_number(kind: type, name: str, value: Any) -> Any:
    low, high = RANGES.get(name, (-math.inf, None))
    what = "a whole number" if kind is int else "a number"
    if low != -math.inf:
        what += f" from {low:g} to {high:g}" if high is not None else f", {low:g} or more"
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    legal = type(value) in ((int,) if kind is int else (int, float)) and math.isfinite(value)
    legal = legal and low <= value <= (math.inf if high is None else high)
    return kind(_accept(value, legal, what))


def _as_tuple(kind: Any, name: str, value: Any) -> tuple[Any, ...]:
    kinds = typing.get_args(kind)
    value = value.tolist() if is_array(value) and value.ndim else value
    value = _accept(value, isinstance(value, (tuple, list)), "a tuple")
    if kinds[-1] is ...:
        return tuple(_as(kinds[0], name, each) for each in value)
    _accept(value, len(value) == len(kinds), f"{len(kinds)} of them")
    return tuple(_as(each, name, v) for each, v in zip(kinds, value, strict=True))


def _accept(value: Any, legal: bool, otherwise: str) -> Any:
    """The value, if it is legal."""
    if not legal:
        raise _WrongError(otherwise)
    return value


def to_json(config: RunConfig) -> str:
    """The config as JSON with its kind, as written to `config.json`."""
    values = dataclasses.asdict(config)
    return json.dumps({"kind": type(config).__name__, **values}, indent=2, default=str) + "\n"


Config = TypeVar("Config", bound=RunConfig)


def from_mapping(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config from JSON values.

    Raises UsageError naming options that are unknown, or have a value of another type.
    """
    values = {key: value for key, value in values.items() if key != "kind"}
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        names = ", ".join(name if is_name(name) else shown(name) for name in unknown[:5])
        raise UsageError(f"config: unknown option {names} for {cls.__name__}")
    return made_of(cls, values, "config")


def read_config(path: Path) -> RunConfig:
    """Read a `config.json`. Raises UsageError where it is missing or not a config."""
    kinds = {cls.__name__: cls for cls in (TrainConfig, DistillConfig)}
    values = read_json(path, "the config.json of a run")
    if not isinstance(values.get("kind"), str) or values["kind"] not in kinds:
        raise UsageError(f"{path}: 'kind' must be one of {', '.join(kinds)}")
    try:
        return from_mapping(kinds[values["kind"]], values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
