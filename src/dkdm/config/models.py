"""Which teacher and which student, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from dkdm.config.values import ClassId, Count, Precision, PredictionType, ProcessName
from dkdm.reading.options import Options
from dkdm.reading.values import Range


class ModelChoice(Options, title="Model", renamed={"factory": "student_factory"}):
    """Which pretrained model, and how it is read."""

    model: str = "builtin:fashion"
    """The output folder of a run, a diffusers folder, a hub id, a checkpoint file, builtin:NAME, or
    module:factory."""
    subfolder: str | None = None
    """Subfolder of the pipeline inside the folder or repository."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Default: the repository's default branch."""
    variant: str | None = None
    """Variant of the weight files, such as fp16. Default: the plain files."""
    dtype: Precision | None = None
    """Precision of the weights. int8 quantizes linear layers with torchao and keeps the rest in
    bfloat16. Default: float32."""
    format: str | None = None
    """Format of a checkpoint file, such as guided-diffusion. Default: recognized by its keys."""
    config: Path | None = None
    """Config file of the original repository, for checkpoint formats that need one."""
    flags: str = ""
    """Flags of the original repository's scripts, as one string, for checkpoint formats that need
    them."""
    size: tuple[Count, ...] | None = None
    """Size of a sample as the network sees it (in latents, for a latent model): height width;
    frames height width; or length. Default: as the model's config says."""
    null_class: ClassId | Literal["none"] | None = None
    """Class id that means "no class", for guidance; "none" if there is no such id. Default: as the
    model's config says."""
    scheduler: str | None = None
    """Noise schedule of a network without its pipeline, such as a trainer's
    checkpoint-500/unet_ema: ddpm-linear, ddpm-cosine, flow, edm, or a scheduler_config.json or its
    folder."""
    lora: tuple[str, ...] | None = None
    """LoRA files to merge into the network: FILE, or FILE:WEIGHT such as style.safetensors:0.8."""
    factory: str | None = None
    """Code that makes the custom network of a run, module:factory; separate several with commas.
    Not needed for runs made on this machine. The name that a folder gives is never trusted."""


class GivenModel(ModelChoice, positional=("model",)):
    """Which pretrained model, and how it is read."""


class ExportedModel(GivenModel, renamed={"format": "teacher_format"}):
    """Which pretrained model, and how it is read."""


class TeacherChoice(ModelChoice, title="Teacher", prefix="teacher"):
    """The pretrained model to distil, and how it is read."""


class TeacherOptions(TeacherChoice, renamed={"check": "check"}):
    """The pretrained model to distil, and how it is read."""

    dtype: Precision | None = None
    """Precision of the weights and of the arithmetic. int8 quantizes linear layers with torchao and
    keeps the rest in bfloat16. Default: weights in float32, arithmetic as --mixed-precision."""
    device: str | None = None
    """Another device for the teacher and its pool, such as cuda:1; there it evaluates the next
    batch while the student learns (not yet run on two devices). Default: the student's."""
    prefetch: bool = False
    """On the student's device, let the teacher evaluate the next batch on a stream of its own while
    the student learns (not yet run on a device)."""
    offload: Literal["none", "layers"] = "none"
    """layers: keep the teacher in host memory and move one layer at a time to the device; slow, but
    small."""
    check: bool = True
    """Before the start, check for about five seconds that the teacher denoises, and warn if it does
    not. The check does not change the run."""


class SeveralTeachers(Options, title="Several teachers"):
    """Further teachers of the same student; each has a part of every batch."""

    more_teachers: tuple[str, ...] | None = None
    """Further teachers, read like the first; or give --teacher several times. Default: none."""
    more_prompts: tuple[str, ...] | None = None
    """Prompts of each further teacher, as --prompts; or give --prompts several times.
    Default: those of the first."""
    label_offset: tuple[Annotated[int, Range(0, 10**6)], ...] | None = None
    """First class id of each teacher among the student's. Default: one teacher's classes after the
    other's."""
    teacher_share: tuple[Annotated[float, Range(0, above=True)], ...] | None = None
    """Part of each teacher in a batch, relative to the others. Default: every class or prompt comes
    equally often; in the last part of a few-step run they always do."""
    teacher_pool_size: tuple[Count, ...] | None = None
    """Entries of each teacher's pool. Default: its part of --pool-size; without that, as if it were
    alone with its part of the batch."""


class StudentChoice(Options, title="Student"):
    """The model to train, and how it relates to its teacher."""

    student: str = "dit-xs"
    """A preset (see `dkdm students`), a diffusers config.json, or module:factory."""
    student_prediction: PredictionType | None = None
    """What the student predicts. Default: v_prediction if the teacher predicts epsilon and clips
    x_0, and the student starts from random weights; else what the teacher predicts, or what the
    scheduler given as --student-process says."""
    student_process: ProcessName = "teacher"
    """Noise process of the student: teacher, ddpm-linear, ddpm-cosine, flow, edm, or the path of a
    scheduler_config.json. Matched with the teacher's by the signal-to-noise ratio."""


class StudentOptions(StudentChoice):
    """The model to train, and how it relates to its teacher."""

    student_init: str = "random"
    """Weights to start from: random; teacher, as far as names and shapes allow; or a run, one of
    its checkpoints, a diffusers folder, or a file of weights."""
    lora_rank: Count | None = None
    """Train adapters of this rank; the weights they adapt stay fixed, and the adapters are merged
    at the end. Default: train all weights."""


class NetworkOptions(Options, title="Network"):
    """The model to train."""

    network: str = "unet-tiny"
    """A preset, a diffusers config.json, or module:factory."""
    base: str | None = None
    """Pipeline folder whose autoencoder, text encoders and scheduler the new model uses; its
    denoiser is not read. Default: train on pixels and class labels."""
    scheduler: str | None = None
    """Noise process: ddpm-linear, ddpm-cosine, flow, edm, or a diffusers scheduler_config.json.
    Default: the base's, or ddpm-cosine (v_prediction, fixed_small) without a base."""
    student_factory: str | None = None
    """Code that makes the custom network of a run, module:factory; separate several with commas.
    Not needed for runs made on this machine. The name that a folder gives is never trusted."""
