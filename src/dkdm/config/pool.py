"""Where noisy samples come from: the pool, finished samples, real images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from dkdm.config.values import (
    ClassId,
    Count,
    CountOrNone,
    FillKind,
    Share,
    SourceKind,
    parse_stride,
)
from dkdm.errors import UsageError
from dkdm.reading.options import Options
from dkdm.reading.values import Range


class StorageOptions(Options, title="Pool"):
    """How large the pool is, where it lies, and what is kept of its batches."""

    pool_size: Count | None = None
    """Noisy samples in the pool, a batch or more. Default: follows from --rho and the length of the
    run; a batch for --source shuffled."""
    pool_dtype: Literal["float32", "float16"] = "float32"
    """Precision the pool is stored in."""
    pool_device: Literal["device", "cpu", "disk"] = "device"
    """Where the pool is stored: beside the models, in host memory, or in a file that is mapped into
    memory."""
    pool_dir: Path | None = None
    """Folder on whose disk --pool-device disk keeps the pool, in an unnamed file that is
    gone when the run ends; checkpoints hold the pool too. Default: --output-dir."""
    pool_pinned: bool = False
    """Let the states of a pool in host memory or on disk travel through pinned memory, while
    the device computes (not yet run on a device)."""
    replay: Annotated[int, Range(1, 1000)] = 1
    """How often the student learns from each teacher evaluation, on average. With 2, every second
    batch is drawn from the last 64 new ones, so that as many steps need half as many teacher
    evaluations."""

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
    rho: Annotated[float, Range(0, 1000, above=True)] | None = None
    """Size of the dynamic pool as a multiple of T * batch, for T noise levels; at least a batch, at
    most what the run can draw. --pool-size replaces it. Default: 0.4, as published, but no more
    than a fill with a fifth of the run's other teacher evaluations gives."""


class FillOptions(Options):
    """What the teacher is asked for before the first step."""

    fill: FillKind = "few-step"
    """How the pool is filled. few-step: finished samples, drawn in a few steps and noised afresh.
    ancestral: exact chains (slow). none: pure noise."""
    fill_steps: Count = 20
    """Teacher evaluations that the few-step fill spends on each sample it draws."""
    fill_entries: Annotated[int, Range(1, 1000)] | None = None
    """Noisy samples that the few-step fill makes of each sample it draws, at levels far apart: with
    8, the default, it costs an eighth of what it does with 1."""

    @property
    def entries_of_a_sample(self) -> int:
        """`fill_entries` in numbers."""
        return self.fill_entries or 8


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
    """What the student learns from a noised image. noise: the noise that was added. teacher: what
    the teacher makes of it, one evaluation each."""
    mixed_share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5
    """Share of each batch that is images, for --source mixed."""


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
