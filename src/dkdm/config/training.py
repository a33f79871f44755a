"""How a student learns: steps, precision, optimizer, loss, the part of few steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from dkdm.config.values import (
    MOST_HEADS,
    Accelerate,
    Acceleration,
    Count,
    CountOrNone,
    LossWeighting,
    ObjectiveKind,
    Share,
    parse_steps,
)
from dkdm.errors import UsageError
from dkdm.reading.options import Options
from dkdm.reading.values import Range


class TrainingOptions(Options, title="Training"):
    """How long, how much at once, and in which precision."""

    max_train_steps: Count = 1000
    """Optimizer steps."""
    train_batch_size: Count | Literal["auto"] = 128
    """Samples in a batch, over all devices together. An optimizer step takes
    --gradient-accumulation-steps batches. auto: the largest power of two that fits in memory, at
    most 1,024 a process, found by trying steps before the run. A larger batch is another run: it
    has a larger pool, and may want another learning rate."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the arithmetic while a model learns, and of a distillation's teacher, unless its
    own precision is given. Weights, noise levels and what is measured stay float32."""
    allow_tf32: bool = False
    """On a CUDA device, let float32 matrix products round their factors to 10 bits (TF32), as
    convolutions do there in any case: faster, with other results. Not measured on a device yet."""
    gradient_accumulation_steps: Count = 1
    """Batches whose gradients are averaged into one optimizer step."""
    deterministic: bool = False
    """Use algorithms that give the same bits every time on a CUDA device too, at some cost in
    speed. A CPU always does, with the same number of threads."""
    fsdp: Literal["none", "student", "teacher", "both"] = "none"
    """What several processes shard (FSDP2), so that each has a part of every tensor. none: each has
    all of every model (DDP). student: of the model that learns, its weights, their average,
    gradients and the optimizer's state. teacher: its weights; all processes evaluate it
    together."""
    accelerate: Accelerate = "auto"
    """How kernels are started on a CUDA device; results are the same up to rounding. graph: all of
    a step at once, as a CUDA graph, which is checked against single calls before the first step;
    where a step cannot be captured, as networks, and a note says why. networks: all of a network's
    call at once. off: one by one. auto: graph, without a note for a kind of run that is never
    captured. compile: torch.compile makes both networks faster, on a CPU too; it takes minutes the
    first time, is kept in the cache folder, and pays for long runs."""
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
        """What `accelerate` comes to, if the step fits: networks are called as `graph` says."""
        chosen: Acceleration = "graph" if self.accelerate == "auto" else self.accelerate
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
    with a tenth of the learning rate. auto: muon for weights that start random, if no
    --learning-rate is given; else adamw."""
    learning_rate: Annotated[float, Range(0, 1000)] | None = None
    """Peak learning rate. Default: 1e-4 for adamw, 0.02 for muon."""


class OptimizerOptions(OptimizerChoice):
    """The optimizer, its learning rate, and the average of the weights."""

    lr_scheduler: Literal["auto", "constant", "constant_with_warmup", "linear", "cosine"] = "auto"
    """How the learning rate changes over the run. cosine and linear: it falls to 0. auto: cosine; a
    run that goes on keeps its own."""
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
        """The same with optimizer, rate and schedule. new: the weights that learn are random."""
        optimizer, rate, schedule = self.optimizer, self.learning_rate, self.lr_scheduler
        if optimizer == "auto":
            optimizer = "muon" if new and rate is None else "adamw"
        if rate is None:
            rate = 0.02 if optimizer == "muon" else 1e-4
        schedule = "cosine" if schedule == "auto" else schedule
        return replace(self, optimizer=optimizer, learning_rate=rate, lr_scheduler=schedule)


class WeightingOptions(Options, title="Loss"):
    """What is minimized."""

    loss_weighting: LossWeighting = "auto"
    """How noise levels are weighted. uniform, auto: equally, on the network's output. snr, min-snr:
    by the signal-to-noise ratio (capped at --snr-gamma), on the error of x_0. capped: by the same
    ratio plus 1, which is uniform for v_prediction but for the cap. student: by how densely the
    model's own process places its levels."""
    snr_gamma: Annotated[float, Range(0, above=True)] = 5.0
    """Largest signal-to-noise ratio that capped and min-snr use as a weight."""


class LossOptions(WeightingOptions):
    """What is minimized."""

    loss_weighting: LossWeighting = "auto"
    """How noise levels are weighted. uniform: equally, on the student's output. snr, min-snr: by
    the signal-to-noise ratio (capped at --snr-gamma), on the error of x_0. capped: by the same
    ratio plus 1, which is uniform for v_prediction but for the cap. student: by how densely the
    student's own process places its levels. auto: capped if --student-prediction is left open and
    becomes v_prediction, else uniform."""
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
    """States at which the student learns few steps, a batch or more."""
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
