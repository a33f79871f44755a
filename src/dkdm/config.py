"""The options of every command, in groups (`reading.options`): each typed, with range and unit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from dkdm.errors import UsageError
from dkdm.reading.fields import read_json, shown
from dkdm.reading.options import Grouped, Options
from dkdm.reading.values import Range

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm", "edm_v"]
Resize = Literal["bilinear", "tensorflow", "bicubic"]
Sampler = Literal["ddim", "ddpm", "euler", "heun", "dpm"]
SourceKind = Literal["dynamic", "shuffled", "iterative", "synthetic", "images", "mixed"]
FillKind = Literal["few-step", "ancestral", "none"]
LossWeighting = Literal["auto", "uniform", "capped", "snr", "min-snr", "student"]
Precision = Literal["float32", "float16", "bfloat16", "int8"]
ProcessName = str
Acceleration = Literal["off", "networks", "graph", "compile"]
Accelerate = Literal["auto", Acceleration]
ObjectiveKind = Literal["dkdm", "few-step", "consistency"]
MOST_HEADS = 1024  # of a few-step student
EXPORTED = {"onnx": "student.onnx", "torch-export": "student.pt2", "int8": "student-int8"}

Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Share = Annotated[float, Range(0, 1)]
Scale = Annotated[float, Range(-1000, 1000)]
ClassId = Annotated[int, Range(0)]


def parse_stride(text: str) -> tuple[int, int]:
    """Smallest and largest of the strides '20' (always 20) or 'random:20' (1 to 39, mean 20).

    Raises UsageError for anything else.
    """
    read = re.fullmatch("(random:)?([0-9]{1,9})", text)
    if read is None or int(read[2]) < 1:
        raise UsageError(f"--stride {shown(text)}: give a number of levels or random:MEAN")
    mean = int(read[2])
    return (1, 2 * mean - 1) if read[1] else (mean, mean)


def parse_steps(text: str) -> tuple[int, ...]:
    """The numbers of sampling steps of '1:8' (1, 2, 4, 8), '4' or '1,4', rising.

    Raises UsageError for anything else.
    """
    numbers = [int(part) for part in re.split("[:,]", text) if re.fullmatch("[0-9]{1,4}", part)]
    legal = re.fullmatch("[0-9]+(:[0-9]+|(,[0-9]+)*)", text) and numbers and min(numbers) > 0
    if not legal or len(numbers) != len(re.split("[:,]", text)) or numbers[0] > numbers[-1]:
        raise UsageError(
            f"--student-steps {shown(text)}: give LOW:HIGH such as 1:8, which is 1, 2, 4 and 8, or "
            "numbers separated by commas"
        )
    if ":" not in text:
        return tuple(sorted(set(numbers)))
    doubled = (numbers[0] * 2**power for power in range(numbers[1].bit_length()))
    return tuple(sorted({*(steps for steps in doubled if steps < numbers[1]), numbers[1]}))


def parse_scale(text: str) -> tuple[float, float]:
    """Lowest and highest of the guidance scales '4' or '2:8'. Raises UsageError for others."""
    numbers = _numbers(text)
    legal = len(numbers) in (1, 2) and all(-1000 <= number <= 1000 for number in numbers)
    if not legal or numbers[0] > numbers[-1]:
        raise UsageError(
            f"--guidance-scale {shown(text)}: give a number from -1000 to 1000, or LOW:HIGH"
        )
    return numbers[0], numbers[-1]


def parse_interval(text: str | None) -> tuple[float, float] | None:
    """Read 'LOW:HIGH', shares of noise in 0..1; None is everywhere. Raises UsageError."""
    if text is None:
        return None
    numbers = _numbers(text)
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1] <= 1:
        raise UsageError(
            f"--guidance-interval {shown(text)}: give LOW:HIGH, shares of noise sigma / (alpha + "
            "sigma) from 0 (clean) to 1 (noise), such as 0.3:0.7"
        )
    return numbers[0], numbers[1]


def parse_utilization(text: str) -> tuple[float, float]:
    """Read a share in 0..1 or 'LOW:HIGH' as (low, high). Raises UsageError."""
    numbers = _numbers(text)
    if len(numbers) not in (1, 2) or not 0 < numbers[0] <= numbers[-1] <= 1:
        raise UsageError(
            f"--utilization {shown(text)}: give a share of the device's peak above 0 and up to 1, "
            "or LOW:HIGH, such as 0.07:0.4"
        )
    return numbers[0], numbers[-1]


def _numbers(text: str) -> list[float]:
    """The numbers between colons; none if one of them is no number."""
    try:
        return [float(part) for part in text.split(":")]
    except ValueError:
        return []


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
    """Further teachers, read like the first; --teacher A --teacher B says the same. Default:
    none."""
    more_prompts: tuple[str, ...] | None = None
    """Prompts of each further teacher, as --prompts; --prompts A --prompts B says the same.
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


class RunOptions(Options, title="Run"):
    """What comes out."""

    output_dir: Path = Path("runs/run")
    """Folder of the run: checkpoints, metrics, samples and, at the end, the model."""
    seed: Seed = 0
    """Seed of every random choice in the run."""


class TrainingOptions(Options, title="Training"):
    """How long, how much at once, and in which precision."""

    max_train_steps: Count = 1000
    """Optimizer steps."""
    train_batch_size: Count | Literal["auto"] = 128
    """Samples in a batch, over all devices together. An optimizer step takes
    --gradient-accumulation-steps batches. auto: the largest power of two that fits in memory, at
    most 1,024 a process, by steps that are tried before the run, which keeps the number. A larger
    batch is another run: it has a larger pool, and may want another learning rate."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the arithmetic of student and teacher while the pool is filled and the student
    learns. Weights, noise levels and what is measured stay float32; --teacher-dtype float32 keeps
    the teacher's arithmetic in float32."""
    allow_tf32: bool = False
    """On a CUDA device, let float32 matrix products round their factors to 10 bits (TF32), as
    convolutions do there in any case: faster, and other results. Not measured on a device yet."""
    gradient_accumulation_steps: Count = 1
    """Batches whose gradients are averaged into one optimizer step."""
    deterministic: bool = False
    """Use algorithms that give the same bits every time on a CUDA device too, at some cost in
    speed. On a CPU they do anyway, with the same number of threads."""
    fsdp: Literal["none", "student", "teacher", "both"] = "none"
    """What several processes shard (FSDP2), so that each has a part of every tensor. none: each has
    all of both models (DDP). student: its weights, their average, gradients and the optimizer's
    state. teacher: its weights; it is asked by all processes together."""
    accelerate: Accelerate = "auto"
    """How kernels are started on a CUDA device; results are equal to rounding. networks: all of a
    network's call at once, as a CUDA graph. graph: all of a step (not yet run on a device). off:
    one by one. What cannot be captured is started one by one. auto: networks. compile:
    torch.compile makes both networks faster, on a CPU too; it takes minutes the first time, is kept
    in the cache folder, and pays for long runs."""
    cuda_graphs: bool = True
    """--no-cuda-graphs is --accelerate off."""

    @property
    def batch_size(self) -> int:
        """`train_batch_size` in numbers. Raises UsageError for `auto`, which a run decides."""
        if self.train_batch_size == "auto":
            raise UsageError(
                "--train-batch-size auto: distill and train find it on their device; give a number"
            )
        return self.train_batch_size

    @property
    def acceleration(self) -> Acceleration:
        """What `accelerate` comes to."""
        chosen: Acceleration = "networks" if self.accelerate == "auto" else self.accelerate
        return chosen if self.cuda_graphs else "off"

    @property
    def of_student(self) -> Acceleration:
        """How a student's calls are made: gradients of a replayed one change those before."""
        compiled = self.acceleration == "compile"
        return self.acceleration if compiled or self.gradient_accumulation_steps == 1 else "off"

    @property
    def replays(self) -> bool:
        """Whether a student's calls are replayed as CUDA graphs."""
        return self.of_student in ("networks", "graph")


class OptimizerChoice(Options, title="Optimizer"):
    """Which optimizer."""

    optimizer: Literal["auto", "adamw", "muon"] = "auto"
    """adamw; or muon for matrices and convolutions (Jordan et al., 2024) and AdamW for the rest,
    with a tenth of the learning rate. auto: muon for a student that starts from random weights, if
    no --learning-rate is given; else adamw."""
    learning_rate: Annotated[float, Range(0, 1000)] | None = None
    """Peak learning rate. Default: 1e-4 for adamw, 0.02 for muon."""


class OptimizerOptions(OptimizerChoice):
    """The optimizer, its learning rate, and the average of the weights."""

    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = (
        "constant_with_warmup"
    )
    """How the learning rate changes over the run."""
    lr_warmup_steps: CountOrNone = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Range(0, 10)] = 0.0
    """Weight decay, of either optimizer."""
    max_grad_norm: Annotated[float, Range(0, above=True)] = 1.0
    """Largest L2 norm of the gradient; a larger one is scaled down to it."""
    max_bad_steps: Count = 10
    """Steps in a row whose gradient is not finite, which change no weight, until the run goes back
    to its last checkpoint with half the learning rate; after three times it ends."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights, and ship it."""
    ema_decay: Annotated[float, Range(0, 1, below=True)] = 0.9999
    """Decay of that average per step, and never more than (1 + n) / (10 + n) at step n."""

    def decided(self, new: bool) -> OptimizerOptions:
        """The same with optimizer and learning rate. new: the weights that learn are random."""
        optimizer, rate = self.optimizer, self.learning_rate
        if optimizer == "auto":
            optimizer = "muon" if new and rate is None else "adamw"
        if rate is None:
            rate = 0.02 if optimizer == "muon" else 1e-4
        return replace(self, optimizer=optimizer, learning_rate=rate)


class WeightingOptions(Options, title="Loss"):
    """What is minimized."""

    loss_weighting: LossWeighting = "auto"
    """How noise levels are weighted. uniform: equally, on the student's output. snr, min-snr: by
    the signal-to-noise ratio (capped at --snr-gamma), on the error of x_0. capped: by the same
    ratio plus 1, which is uniform for v_prediction but for the cap. student: by how densely the
    student's own process places its levels. auto: capped if --student-prediction is left open and
    becomes v_prediction, else uniform."""
    snr_gamma: Annotated[float, Range(0, above=True)] = 5.0
    """Largest signal-to-noise ratio that capped and min-snr use as a weight."""


class LossOptions(WeightingOptions):
    """What is minimized."""

    vlb_weight: Annotated[float, Range(0)] = 1.0
    """Weight of the variational term (DKDM Eq. 21), if both models learn their variance."""
    feature_weight: Annotated[float, Range(0)] = 0.0
    """Weight of the distance between hidden features of student and teacher; 0 leaves it out."""
    feature_layers: str = "auto"
    """Which features to compare. name: those of modules with the same name. resolution: of the same
    resolution. auto: by name, or by resolution if no names agree. Or pairs of module names,
    TEACHER=STUDENT, such as 'mid_block=transformer_blocks.2,...'."""


class FewStepOptions(Options, title="Few steps"):
    """A student that samples in a few steps."""

    objective: ObjectiveKind = "dkdm"
    """What the student learns. dkdm: to denoise as its teacher does, for many sampling steps.
    few-step: that first, and in the last part of the run to go several steps at once (parallel-head
    distillation). consistency: that first, and in the last part to jump to the end of the
    trajectory too, with the same weights for few and many steps."""
    student_steps: str = "1:8"
    """Numbers of sampling steps that a few-step student can draw in: LOW:HIGH, doubling, such as
    1:8 for 1, 2, 4 and 8; or a list such as 1,4. Each divides --few-step-heads."""
    few_step_share: Annotated[float, Range(0, 1, above=True)] | None = None
    """Share of --max-train-steps, the last ones, that learns few steps. Default: 0.35, or 1 if
    --student-init names a run or weights, which are not trained further first."""
    few_step_batch_size: Annotated[int, Range(1)] | None = None
    """States in a batch of few-step's last part, which takes more steps the smaller they are, for
    as many teacher evaluations. Default: half of --train-batch-size, in twice the steps."""
    few_step_heads: Annotated[int, Range(1, MOST_HEADS)] = 16
    """Intervals that the way from noise to data is cut into; the student predicts the mean velocity
    over each in one evaluation."""
    few_step_shift: Annotated[float, Range(0, 100, above=True)] = 1.0
    """Shift of these intervals towards noise: 1 cuts evenly in the share of noise, 3 puts more of
    them where there is much."""
    few_step_targets: Annotated[int, Range(1, 1024)] = 1
    """Heads that are taught at each state, one teacher evaluation each, for one evaluation of the
    student."""
    few_step_anchor: Annotated[float, Range(0, 1000)] = 1.0
    """Weight of the plain loss where the teacher was asked, beside that of the head which leads
    there: one more evaluation of the student a step, none of the teacher. 0 leaves it out."""
    few_step_on_policy: Share = 1.0
    """Share of the states that the student itself moves on; the teacher moves the others."""
    few_step_pool: Count = 256
    """States that few steps are learnt at, a batch or more."""
    few_step_learning_rate: Annotated[float, Range(0, 1000)] | None = None
    """Peak learning rate of this part. Default: optimizer and rate of the plain part, or of the run
    that --student-init names. A rate that is given is AdamW's, unless --optimizer says
    otherwise."""
    start_share: Share = 0.25
    """consistency: states of pure noise beside a batch, as a share of it, where sampling begins.
    Their teacher evaluations come on top."""
    pair_length: Annotated[float, Range(0, 1, above=True)] = 0.125
    """consistency: how far the two states of a pair lie apart on average, in the share of noise
    sigma / (alpha + sigma)."""
    pair_decay: Annotated[float, Range(0, 1, below=True)] = 0.95
    """consistency: decay of the average of the student that the pairs are led by, per batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_steps(self.student_steps)

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of sampling steps, rising."""
        return parse_steps(self.student_steps)


class ConditionOptions(Options, title="Condition"):
    """What the model is conditioned on."""

    condition_dropout: Share = 0.0
    """Probability of replacing a condition by the null condition. A model trained with 0 cannot be
    guided when it samples."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from, for text models."""


class LearntConditions(Options):
    """The classes or prompts that the student learns."""

    classes: tuple[ClassId, ...] | None = None
    """Class ids the student learns. Default: all of the teacher's."""
    class_weights: tuple[Annotated[float, Range(0)], ...] | None = None
    """Relative frequency of each class in --classes. Default: all equally often."""
    prompts: str | None = None
    """Text file with one prompt a line, or a pattern such as 'prompts/*.txt'. Text models need
    it."""
    max_prompts: Count = 50_000
    """Use at most this many prompts, drawn at random from longer files."""


class TeacherConditions(ConditionOptions, LearntConditions):
    """The classes or prompts that the student learns."""

    random_conditioning: Share = 0.0
    """Largest probability, at the highest noise level, of showing a noisy state under another
    condition than its own; it falls to e^-5 of that at the lowest (arXiv 2504.02011)."""


class GuidanceOptions(Options, title="Guidance"):
    """How the teacher is guided."""

    guidance_scale: str = "1"
    """Guidance scale of the teacher: a number, or LOW:HIGH to draw a scale for each chain. 1 turns
    guidance off. Guidance doubles the teacher's cost, unless the teacher takes the scale as an
    input."""
    guidance_interval: str | None = None
    """LOW:HIGH, the shares of noise sigma / (alpha + sigma) between which guidance acts (arXiv
    2404.07724), such as 0.3:0.7. Default: everywhere."""
    guidance_on: Literal["target", "chain"] = "target"
    """target: guide the pool and the target, which bakes guidance into the student. chain: guide
    only how states move; the student learns the unguided model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_scale(self.guidance_scale)
        parse_interval(self.guidance_interval)

    @property
    def scales(self) -> tuple[float, float]:
        """Lowest and highest guidance scale."""
        return parse_scale(self.guidance_scale)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The shares of noise between which guidance acts; None is everywhere."""
        return parse_interval(self.guidance_interval)

    @property
    def chain_only(self) -> bool:
        """Whether the target stays unguided."""
        return self.guidance_on == "chain"

    @property
    def is_off(self) -> bool:
        """Whether nothing is guided."""
        return self.scales == (1, 1)


class StorageOptions(Options, title="Pool"):
    """How large the pool is, where it lies, and what is kept of its batches."""

    pool_size: Count | None = None
    """Noisy samples in the pool, a batch or more. Default: follows from --rho; a batch for
    --source shuffled."""
    pool_dtype: Literal["float32", "float16"] = "float32"
    """Precision the pool is stored in."""
    pool_device: Literal["device", "cpu", "disk"] = "device"
    """Where the pool is stored: beside the models, in host memory, or in a file that is mapped into
    memory."""
    pool_dir: Path | None = None
    """Folder on whose disk --pool-device disk keeps the pool, in a file without a name, which is
    gone when the run ends; checkpoints hold the pool too. Default: that of --output-dir."""
    pool_pinned: bool = False
    """Let the states of a pool in host memory or on disk travel through pinned memory, so that
    nobody waits for them (not yet run on a device)."""
    replay: Annotated[int, Range(1, 1000)] = 1
    """How often an evaluation of the teacher is learnt from, on average. With 2, every second batch
    is drawn from those of the last 64 new batches, and the same --max-train-steps ask the teacher
    for half as many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool_dir is not None and self.pool_device != "disk":
            raise UsageError(
                f"--pool-dir {self.pool_dir}: the pool lies in memory; remove it, or give "
                "--pool-device disk"
            )
        if self.pool_pinned and self.pool_device == "device":
            raise UsageError(
                "--pool-pinned: the pool lies beside the models; remove it, or give --pool-device "
                "cpu or disk"
            )


class SourceOptions(Options):
    """Where noisy samples come from."""

    source: SourceKind = "dynamic"
    """dynamic: the paper's pool, a random subset of it each step. shuffled: at all noise levels
    too, but fixed groups that take turns. iterative: a batch, all at one level. synthetic: finished
    samples of the teacher with fresh noise (data-free training). images: real images with fresh
    noise (data-based training). mixed: the dynamic pool and images in each batch."""
    rho: Annotated[float, Range(0, 1000, above=True)] = 0.4
    """Size of the dynamic pool as a multiple of T * batch, for T noise levels; at least a batch, at
    most what the run can draw. --pool-size replaces it."""


class FillOptions(Options):
    """What the teacher is asked for before the first step."""

    fill: FillKind = "few-step"
    """How the pool is filled. few-step: finished samples, drawn in a few steps and noised afresh.
    ancestral: exact chains (slow). none: pure noise."""
    fill_steps: Count = 20
    """Teacher evaluations that the few-step fill spends on each sample it draws."""
    fill_entries: Annotated[int, Range(1, 1000)] = 1
    """Noisy samples that the few-step fill makes of each sample it draws, at levels far apart: with
    8 it costs an eighth."""


class PlannedPool(FillOptions, StorageOptions):
    """How large the pool is, where it lies, and what the teacher is asked for."""


class PoolOptions(FillOptions, StorageOptions, SourceOptions):
    """Where noisy samples come from: a pool of states that the teacher keeps denoising."""

    shards: Annotated[int, Range(1, 2**20)] = 8
    """Logical parts of the pool, each with its own random numbers. Do not change it when resuming a
    run."""
    fill_batch_size: Count | Literal["auto"] | None = None
    """Samples that the fill evaluates at once, in whole batches of --train-batch-size; the noise
    is the same for all, so that the pool differs by rounding only. auto: what the device is fastest
    with, found by doubling. Default: one batch."""
    stride: str = "1"
    """Noise levels that a noisy sample moves at once, fewer than the teacher has: a number, or
    random:M to draw it uniformly from 1 to 2M - 1."""
    eta: Share = 1.0
    """Noise added when a state moves: 1 is ancestral (DDPM), 0 deterministic (DDIM)."""
    keep_finished: CountOrNone = 0
    """Keep this many of the last samples that became clean, in the run's folder, for dkdm harvest;
    0 keeps none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_stride(self.stride)

    @property
    def strides(self) -> tuple[int, int]:
        """Smallest and largest stride."""
        return parse_stride(self.stride)


class SyntheticOptions(Options, title="Synthetic set"):
    """The set of finished samples that --source synthetic learns from."""

    synthetic_samples: Count | None = None
    """Samples in the set. Default: as many as cost what the dynamic pool would."""
    synthetic_steps: Count = 50
    """Sampler steps per sample, each one teacher evaluation."""


class ImageOptions(Options, title="Images"):
    """The real images that --source images and mixed learn from."""

    images: str | None = None
    """'fashion-mnist' or a folder of images; class subfolders are the teacher's classes in the
    order of their ids, a text file beside each image (cat.txt for cat.png) is its prompt."""
    images_share: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Share of the images to learn from, such as 0.05 for the paper's data-limited 5 %; drawn by
    --seed, the same share of every class. A smaller share is a part of a larger one."""
    images_target: Literal["noise", "teacher"] = "noise"
    """What is learnt from a noised image. noise: the noise that was added to it. teacher: what the
    teacher makes of it, one evaluation each."""
    mixed_share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5
    """Share of each batch that is images, for --source mixed."""


class CheckpointOptions(Options, title="Checkpoint"):
    """Checkpoints and logs."""

    checkpointing_steps: Count = 1000
    """Optimizer steps between checkpoints; one more is written at the end."""
    checkpoint_every: str | None = None
    """Time after which a checkpoint is written too, such as 90s, 10m or 2h. Default: by steps
    alone."""
    checkpoints_total_limit: Count | None = 2
    """Keep this many checkpoints; None keeps all."""
    resume_from_checkpoint: str | None = None
    """'latest', or the path of a checkpoint of this run. Default: start anew."""
    accept_changes: bool = False
    """Resume even if options that say what the run means, or the teacher, have changed."""
    logging_steps: Count = 10
    """Optimizer steps between lines in metrics.jsonl."""
    report_to: str = "auto"
    """Trackers in addition to metrics.jsonl, separated by commas (tensorboard, trackio, wandb);
    none; or auto: TensorBoard if it is installed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_every is not None and not self.seconds:
            raise UsageError(
                f"--checkpoint-every {shown(self.checkpoint_every)}: give a time such as 90s, 10m "
                "or 2h"
            )

    @property
    def seconds(self) -> float | None:
        """`checkpoint_every` in seconds; None if it is left open or is no time."""
        found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smh])", self.checkpoint_every or "")
        return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else None


class FeatureOptions(Options):
    """The network whose features are compared, and how it sees the images of a reference."""

    feature_network: str | None = None
    """Network whose features are compared: the file of the Inception network
    (inception-2015-12-05), download, which fetches it once, or fashion, the packaged one. Default:
    fashion for Fashion-MNIST, otherwise the file that was given before."""
    resize: Resize = "bilinear"
    """How images are brought to the Inception network's 299x299; published tables and statistics of
    ADM and EDM used tensorflow."""
    skip_bad: bool = False
    """Leave out images of the reference that cannot be read, instead of ending."""


class RunEvaluation(Options, title="Evaluation"):
    """Sample grids and a metric during the run, and the comparison at its end."""

    validation_steps: CountOrNone = 1000
    """Optimizer steps between sample grids; 0 draws no grids."""
    validation_sampling_steps: Count = 25
    """Sampler steps of the grids, of --validation-metric and of the final evaluation."""
    validation_metric: str | None = None
    """Metric measured with each grid, on the weights that would be shipped; the best weights are
    kept in best/. gap and teacher_distance need no images; fd, fid, kid, precision, class_accuracy
    ... need a reference. Default: none."""
    validation_samples: Annotated[int, Range(2, 10**6)] = 256
    """Samples drawn for --validation-metric, from the same noise every time."""
    ship_best: bool = False
    """Ship the best weights by --validation-metric instead of the last."""
    evaluation_samples: Annotated[int, Range(0, 10**6)] = 1000
    """Samples drawn from each model for the final distances; 0 skips them."""
    sampling_guidance_scale: Scale = 1.0
    """Guidance scale of the grids and of the final evaluation; 1 turns guidance off and costs
    half."""
    evaluation_reference: str = "auto"
    """Real images for the final distances: fashion-test, fashion-train, a folder of images, an .npz
    of images or statistics; none; or auto, which recognizes Fashion-MNIST by its class names."""


class EvaluationOptions(FeatureOptions, RunEvaluation):
    """Sample grids and a metric during the run, and the comparison at its end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_metric is not None and self.validation_steps == 0:
            raise UsageError(
                f"--validation-metric {self.validation_metric} with --validation-steps 0 is never "
                "measured: give the steps between measurements"
            )
        if self.ship_best and self.validation_metric is None:
            raise UsageError("--ship-best: give the metric that chooses, --validation-metric gap")


class HubOptions(Options, title="Hub"):
    """The model card's licence, and upload to the Hugging Face hub."""

    license: str | None = None
    """Licence of the model, by the hub's name for it (apache-2.0, mit, openrail, other, ...).
    Default: the teacher's, if the teacher's card names one."""
    push_to_hub: bool = False
    """Upload the finished run. Log in with `hf auth login` or HF_TOKEN first."""
    hub_model_id: str | None = None
    """Repository to upload to, USER/NAME. Default: the output folder's name under your account."""
    hub_private: bool = False
    """Make a new repository private."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise UsageError(
                f"--license {shown(self.license)}: give the hub's name of a licence, in lower "
                "case, such as apache-2.0, mit, cc-by-nc-4.0, openrail, or other"
            )


class DataOptions(Options, title="Data"):
    """The images to learn from."""

    images: str = "fashion-mnist"
    """'fashion-mnist' or a folder of images; class subfolders become labels, a text file beside
    each image (cat.txt for cat.png) its caption."""
    sample_shape: tuple[Count, Count, Count] = (1, 16, 16)
    """Channels, height and width the images are brought to."""
    class_conditional: bool = True
    """Learn the images' class labels, if there are any."""
    classes: tuple[ClassId, ...] | None = None
    """Learn the images of these classes only; the model numbers them 0, 1, ... in this order.
    Default: all."""


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


MEANT = {
    "batch_size": "train_batch_size",
    "load_best_model_at_end": "ship_best",
    "metric_for_best_model": "validation_metric",
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


class RunConfig(Grouped, meant=MEANT):
    """What every training run has."""

    run: RunOptions
    training: TrainingOptions
    conditions: ConditionOptions
    loss: WeightingOptions
    optimizing: OptimizerOptions
    checkpoints: CheckpointOptions
    evaluation: EvaluationOptions
    hub: HubOptions


class TrainConfig(RunConfig, command="train"):
    """Train a model on images (a teacher, or a baseline)."""

    data: DataOptions
    model: NetworkOptions


class DistillConfig(RunConfig, command="distill"):
    """Distil a teacher into a student without images."""

    teacher_choice: TeacherOptions
    teachers: SeveralTeachers
    student_choice: StudentOptions
    run: RunOptions
    training: TrainingOptions
    conditions: TeacherConditions
    guidance: GuidanceOptions
    pool: PoolOptions
    synthetic: SyntheticOptions
    images_choice: ImageOptions
    loss: LossOptions
    few_steps: FewStepOptions
    optimizing: OptimizerOptions
    checkpoints: CheckpointOptions
    evaluation: EvaluationOptions
    hub: HubOptions


def to_json(config: RunConfig) -> str:
    """The config as JSON with its kind, as written to `config.json`: every option by its name."""
    return (
        json.dumps({"kind": type(config).__name__, **config.flat()}, indent=2, default=str) + "\n"
    )


Config = TypeVar("Config", bound=RunConfig)


def from_mapping(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config from JSON values.

    Raises UsageError naming options that are unknown, or have a value of another type.
    """
    return cls(**{key: value for key, value in values.items() if key != "kind"})


def read_config(path: Path) -> TrainConfig | DistillConfig:
    """Read a `config.json`. Raises UsageError if it is missing or not a config."""
    kinds: dict[str, Any] = {cls.__name__: cls for cls in (TrainConfig, DistillConfig)}
    values = read_json(path, "the config.json of a run")
    if not isinstance(values.get("kind"), str) or values["kind"] not in kinds:
        raise UsageError(f"{path}: 'kind' must be one of {', '.join(kinds)}")
    try:
        config: TrainConfig | DistillConfig = from_mapping(kinds[values["kind"]], values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return config


class GivenModel(ModelChoice, positional=("model",)):
    """Which pretrained model, and how it is read."""


class ExportedModel(GivenModel, renamed={"format": "teacher_format"}):
    """Which pretrained model, and how it is read."""


class GivenConditions(Options, title="Condition"):
    """What the model is given beside noise."""

    prompts: str | None = None
    """For text models: a text file with one prompt a line, a pattern such as 'prompts/*.txt', or
    the prompt itself."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from, for text models."""
    cond: Path | None = None
    """For models with a custom conditioning: .safetensors or .npz with a tensor [N, ...] for each
    name, and null.NAME [1, ...] for guidance."""


class SampleFile(Options):
    """Where samples are written."""

    output: Path = Path("samples.png")
    """Image to write (.png, .jpg, .webp), or the tensor [N, C, ...] (.safetensors)."""


USUAL_STEPS = 25  # of samples that are drawn


class DrawOptions(Options, title="Sampling"):
    """What to draw, and how."""

    num_samples: Annotated[int, Range(1, 10**6)] = 40
    """Number of samples."""
    steps: Count | None = None
    """Sampler steps. Each is one network evaluation per sample, with heun two. Default: 25; of a
    few-step model, the most that it draws in."""
    sampler: Sampler = "ddim"
    """ddim, which is euler too; ddpm, which adds noise; heun and dpm (DPM-Solver++), which are of
    second order and need fewer steps."""
    seed: Seed = 0
    """Random seed. Sample i depends on nothing but the seed and i."""
    classes: tuple[ClassId, ...] | None = None
    """Class ids, repeated in turn. Default: all classes in turn."""
    guidance_interval: str | None = None
    """LOW:HIGH, the shares of noise (0 clean, 1 noise) between which guidance acts. Default:
    everywhere."""
    cuda_graphs: bool = True
    """On a CUDA device, start all kernels of a network's call at once, as a CUDA graph. Samples are
    equal to rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_interval(self.guidance_interval)

    @property
    def num_steps(self) -> int:
        """Sampler steps; 25 if they were left open."""
        return self.steps or USUAL_STEPS


class SamplingOptions(DrawOptions, SampleFile):
    """What to draw, and how."""

    guidance_scale: Scale = 1.0
    """Scale of classifier-free guidance; 1 turns it off."""
    overwrite: bool = False
    """Replace a file that exists."""


class ExportOptions(Options, title="Export", renamed={"to": "format"}):
    """What to write."""

    output: Path | None = None
    """File to write (its description goes beside it, as FILE.json), or the folder for int8.
    Default: student.onnx, student.pt2 or student-int8."""
    to: Literal["onnx", "torch-export", "int8"] = "onnx"
    """onnx; torch-export, a .pt2 file; or int8, a diffusers folder with linear layers in int8."""
    opset: Annotated[int, Range(18, 99)] | None = None
    """ONNX operator set. Default: the exporter's own choice."""
    overwrite: bool = False
    """Replace what exists."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to != "onnx" and self.opset is not None:
            raise UsageError(f"--opset {self.opset}: only --format onnx has opsets; remove --opset")

    @property
    def path(self) -> Path:
        """Where it is written."""
        return self.output or Path(EXPORTED[self.to])


class PrintOptions(Options, title="Print"):
    """What is printed."""

    json: bool = False
    """Print JSON for machines."""


class InspectOptions(Options, title="Check"):
    """How the model is checked, and what is shown."""

    output: Path | None = None
    """Image to write with a grid of the model's samples. Default: no image."""
    num_samples: Annotated[int, Range(1, 10**6)] = 8
    """Number of samples drawn for the check."""
    steps: Count | None = None
    """Sampler steps of the check. Default: 50."""
    samples: Path | None = None
    """Real samples to judge the model by, instead of its own: an array [N, C, ...] in the range it
    was trained on (.npy, .npz, .safetensors, .pt), or a folder of images."""


class MeasureOptions(Options, title="Measurement"):
    """How the students are timed."""

    measure: bool = True
    """Time the students, with random weights, alternating with the teacher."""
    measure_batch_size: Count = 8
    """Batch size used for timing."""
    measure_below: Annotated[float, Range(0)] = 60.0
    """Do not time networks with more parameters than this, in millions. On a CPU, very slow
    networks are not timed either."""
    steps: Count = 50
    """Sampler steps per sample, each one network evaluation."""


class CheckOptions(Options, title="Check"):
    """What is tried."""

    prompts: str | None = None
    """For text models: a text file with one prompt a line, a pattern such as 'prompts/*.txt', or
    the prompt itself."""
    compile: bool = True
    """Try torch.compile."""
    compile_backend: str = "aot_eager"
    """aot_eager only traces, which is quick; inductor is the backend that makes networks faster."""
    export: bool = True
    """Try torch.export."""


class PlannedTeacher(TeacherChoice, positional=("model",)):
    """The pretrained model to distil. Of a pipeline, only its configs are read."""

    offload: Literal["none", "layers"] = "none"
    """layers: keep the teacher in host memory and move one layer at a time to the device."""


class PlannedStudent(Options, title="Student", positional=("student",)):
    """The model to train."""

    student: str = "dit-xs"
    """A preset, a diffusers config.json, or module:factory."""


class PlanOptions(Options, title="Plan"):
    """The devices, and what is done on them."""

    gpus: Annotated[int, Range(1, 10**6)] = 1
    """Devices the batch is divided among."""
    memory: Annotated[float, Range(0, 10**6, above=True)] | None = None
    """Memory of a device in GiB. Default: that of this machine's GPU, or 24."""
    guidance: bool = False
    """Plan for a guided teacher, which doubles its batch."""
    device_tflops: Annotated[float, Range(0, 10**6, above=True)] = 989.0
    """Peak of a device in TFLOP/s, in the precision of the run. Default: H100 SXM, dense
    bfloat16."""
    utilization: str = "0.07:0.4"
    """LOW:HIGH, the shares of that peak between which the networks run. Default: from what a
    network of 57 M parameters reached at 32x32 (measured) to what large ones may (assumed)."""
    link: Annotated[float, Range(0, 10**6, above=True)] = 50.0
    """Rate of the network of each device in GB/s. Default: 400 Gb/s InfiniBand."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_utilization(self.utilization)

    @property
    def utilizations(self) -> tuple[float, float]:
        """Lowest and highest share of the peak."""
        return parse_utilization(self.utilization)


class ComparedOptions(Options, title="Runs", positional=("runs",)):
    """What is compared."""

    runs: tuple[str, ...] = ()
    """Two or more, each a run's output folder, the JSON of dkdm evaluate --json, or a model."""
    draw: bool = True
    """Draw ten samples from each model that is no run, from the noise of the runs' samples."""


class ComparisonFiles(PrintOptions):
    """What is printed, and where the page lies."""

    output: Path | None = None
    """Page to write (.html), or the table as Markdown (.md). Default: the table is printed only."""
    overwrite: bool = False
    """Replace a file that exists."""


class PageOptions(Options, title="Page"):
    """Where the page is shown: on this machine alone."""

    port: Annotated[int, Range(1, 65535)] = 7860
    """Port of 127.0.0.1 that a browser on this machine opens."""


class GivenRun(Options, title="Run", positional=("run",)):
    """Which run."""

    run: Path
    """The run's output folder."""


class PushOptions(GivenRun):
    """Which run, and where it goes."""

    hub_model_id: str | None = None
    """Repository, USER/NAME. Default: the run's own, or the folder's name under your account."""
    private: bool = False
    """Make a new repository private."""


class SampleCommand(Grouped, command="sample"):
    """Draw samples from a model."""

    model_choice: GivenModel
    conditions: GivenConditions
    sampling: SamplingOptions


class JudgedTeacher(TeacherChoice, renamed={"factory": "teacher_factory"}):
    """The model that samples are compared with, and how it is read."""

    model: str = ""
    """As MODEL. Default: the teacher that a run names in its config.json."""
    guidance_scale: Scale | None = None
    """Scale that the teacher is guided by when it samples. Default: as in the run; without one, as
    --guidance-scale."""


class MeasuredSamples(DrawOptions):
    """What is drawn from the model, and how."""

    num_samples: Annotated[int, Range(2, 10**7)] = 5000
    """Number of samples. FID needs 2048 at least; published ones are of 50000."""
    guidance_scale: Scale | None = None
    """Scale of classifier-free guidance; 1 turns it off. Default: as a run measured itself; 1 for
    other models."""
    batch_size: Count = 256
    """Samples drawn at once. It does not change them."""


class MeasuredAgainst(Options, title="Measurement"):
    """What the samples are measured against."""

    reference: str | None = None
    """fashion-test, fashion-train, a folder of images, an .npz of images or statistics, another
    model, or teacher, whose samples are drawn. Default: recognized by the model's class names;
    without any, what needs no image is measured."""
    metrics: str | None = None
    """Names separated by commas, or all. Default: the usual ones of the reference, and the distance
    to the teacher if there is one."""


class MeasurementOptions(FeatureOptions, MeasuredAgainst):
    """What the samples are measured against, and by what."""

    feature_device: str | None = None
    """Device of the feature network, such as cpu or cuda:1. Default: the model's."""
    lpips_weights: str | None = None
    """For the metrics lpips and lpips_diversity: download, which fetches the published weights
    once, or the folder that holds them. Default: those that were given before."""
    lpips_backbone: Literal["alex", "vgg"] = "alex"
    """Network of LPIPS."""
    clip_model: str | None = None
    """For the metric clip, of text models: folder or hub id of a CLIP model as transformers saves
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metrics is not None and not self.metrics.strip(", "):
            raise UsageError(f"--metrics {shown(self.metrics)}: give all, or names such as fd,kid")


class EvaluationFiles(Options, title="Output"):
    """Where results lie."""

    output: Path | None = None
    """Folder of what is drawn, in shards of 1,000 samples, which other processes and the next start
    go on with. Default: a folder in the cache, $DKDM_CACHE or ~/.cache/dkdm."""
    json: Path | None = None
    """JSON file to write, with everything that a number depends on."""


class EvaluateCommand(Grouped, command="evaluate"):
    """Measure a model's samples against real images, another model, or its teacher."""

    model_choice: GivenModel
    teacher_choice: JudgedTeacher
    conditions: GivenConditions
    sampling: MeasuredSamples
    measurement: MeasurementOptions
    files: EvaluationFiles


class CompareCommand(Grouped, command="compare"):
    """Put runs, evaluations and models side by side: a table, or one page."""

    compared: ComparedOptions
    files: ComparisonFiles


class UiCommand(Grouped, command="ui"):
    """Draw with a student and its teacher side by side, in a browser on this machine."""

    model_choice: GivenModel
    teacher_choice: JudgedTeacher
    page: PageOptions


class SampleSet(Options):
    """What is written."""

    output: Path = Path("harvest")
    """Folder to write. The same command goes on with one that it left unfinished."""
    format: Literal["png", "webdataset", "safetensors"] = "png"
    """png: images in one folder for each class, prompts beside them. webdataset: tar files.
    safetensors: tensors as the network has them, latents for a latent model."""


class HarvestOptions(FeatureOptions, DrawOptions, SampleSet, title="Harvest"):
    """What to write, and how samples beyond those that a run kept are drawn."""

    num_samples: Annotated[int, Range(1, 10**8)] = 1000
    """Number of samples."""
    steps: Count = 50
    """Sampler steps of each sample that is drawn."""
    classes: tuple[ClassId, ...] | None = None
    """Class ids, repeated in turn. Default: those that the run's student learnt, or all."""
    guidance_interval: str | None = None
    """LOW:HIGH, the shares of noise (0 clean, 1 noise) between which guidance acts. Default: as in
    the run, or everywhere."""
    guidance_scale: Scale | None = None
    """Scale of classifier-free guidance. Default: the run's (the middle of its range), or 1."""
    batch_size: Count = 64
    """Samples drawn at once. It does not change them."""
    reference: str | None = None
    """Real images to measure the set against: fashion-test, fashion-train, a folder of images, or
    an .npz of images or statistics. Default: the set is not measured."""


class HarvestCommand(Grouped, command="harvest"):
    """Write finished samples of a run's teacher, or of a model, as a data set."""

    model_choice: ExportedModel
    conditions: GivenConditions
    harvest: HarvestOptions


class ExportCommand(Grouped, command="export"):
    """Write a model as one file, or in int8, and check what was written."""

    model_choice: ExportedModel
    conditions: GivenConditions
    export: ExportOptions


class InspectCommand(Grouped, command="inspect"):
    """Show what a model is, and check that it denoises."""

    model_choice: GivenModel
    conditions: GivenConditions
    check: InspectOptions
    printing: PrintOptions


class StudentsCommand(Grouped, command="students"):
    """List the presets that fit a teacher, with their sizes and speeds."""

    teacher_choice: TeacherChoice
    measuring: MeasureOptions
    printing: PrintOptions


class CheckStudentCommand(Grouped, command="check-student"):
    """Before the first training step, try everything that a student goes through."""

    teacher_choice: TeacherChoice
    student_choice: StudentChoice
    check: CheckOptions
    printing: PrintOptions


class PlanCommand(Grouped, command="plan"):
    """Say what a distillation takes: memory, whether it fits, what to change; time and traffic."""

    teacher_choice: PlannedTeacher
    student_choice: PlannedStudent
    training: TrainingOptions
    pool: PlannedPool
    optimizing: OptimizerChoice
    plan: PlanOptions
    printing: PrintOptions


class ExaminedRun(Options, title="Run", positional=("run",)):
    """What is checked."""

    run: Path | None = None
    """The output folder of a run: its files, every checkpoint, the finished model, the teacher.
    Default: the environment."""


class DoctorCommand(Grouped, command="doctor"):
    """Check the environment, or whether a run is whole."""

    examined: ExaminedRun
    printing: PrintOptions


class ReportCommand(Grouped, command="report"):
    """Write a run's report.html again."""

    given: GivenRun


class PushCommand(Grouped, command="push"):
    """Upload a finished run to the Hugging Face hub; log in with `hf auth login` or HF_TOKEN."""

    given: PushOptions
