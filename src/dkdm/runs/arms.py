"""What a student can learn from: every arm of `--source` is a row of `ARMS`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dkdm.config import DistillConfig, ImageOptions, PoolOptions, TrainingOptions
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.sources.ahead import Ahead
from dkdm.core.sources.budget import fill_cost, newly_drawn, pool_entries
from dkdm.core.sources.chains import Guidance
from dkdm.core.sources.finished import Finished, SampleShards
from dkdm.core.sources.finished_by_all import FinishedByAll
from dkdm.core.sources.images import Images
from dkdm.core.sources.ladder import Iterative, Shuffled
from dkdm.core.sources.mixed import Mixed, Taught, images_in_batch
from dkdm.core.sources.pool import Pool
from dkdm.core.sources.replay import Replayed
from dkdm.core.sources.source import Source
from dkdm.core.sources.synthetic import Drawing, Synthetic, draw_set, empty_set
from dkdm.data.teacher_images import images_of
from dkdm.errors import UsageError
from dkdm.runs.ahead import ahead_of, check_ahead, is_ahead, teacher_device
from dkdm.runs.source import (
    OF_A_FILL,
    OF_CHAINS,
    SourcePlan,
    fill,
    guidance_factor,
    guidance_of_set,
    make_pool,
)

FINISHED = "finished"
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Teaching:
    """What the teacher says of a source's batches.

    targets: it has evaluated them, at its own levels; otherwise their target is the noise that was
    added, at the student's levels. variance: of every sample too. features: it has seen the whole
    batch at once.
    """

    targets: bool = True
    variance: bool = True
    features: bool = True


@dataclass(frozen=True)
class Arm:
    """An arm whose source is a pool.

    kind: class of the pool. noise: whether it begins as pure noise, whatever --fill says.
    chains: whether chains end, whose samples can be kept. images: whether real images are read.
    ignores: options that change nothing.
    """

    kind: type[Pool] = Pool
    noise: bool = False
    chains: ClassVar[bool] = True
    images: ClassVar[bool] = False
    ignores: ClassVar[tuple[str, ...]] = ()

    def teaching(self, images: ImageOptions) -> Teaching:
        """What the teacher says of its batches."""
        del images
        return Teaching()

    def entries(self, pool: PoolOptions, training: TrainingOptions, num_levels: int) -> int:
        """How many noisy samples it keeps."""
        return pool_entries(pool, training, num_levels)

    def plan(self, teacher: Denoiser, config: DistillConfig) -> SourcePlan:
        """What the options come to."""
        pool, each = config.pool, guidance_factor(teacher, config.guidance)
        levels = teacher.process.num_levels
        size = self.entries(pool, config.training, levels)
        preparing = 0 if self.noise else round(fill_cost(pool, size, levels) * each)
        return SourcePlan(size, preparing, round(newly_drawn(config.pool, config.training) * each))

    def size(self, teacher: Denoiser, config: DistillConfig) -> str:
        """How large it is, in words."""
        count, pool = self.plan(teacher, config).entries, config.pool
        return f"{count:,} entries, {mebibytes(teacher, count, pool.pool_dtype)}"

    def make(
        self, teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
    ) -> Source:
        """The source, unfilled. Raises UsageError for options that it cannot have."""
        del student
        size = self.plan(teacher, config).entries
        asked = config.pool, config.guidance, config.conditions
        pool = make_pool(teacher, size, *asked, device, config.run, self.kind)
        pool.shards.check(config.training.batch_size)
        if config.pool.keep_finished:
            pool.finished = finished_of(pool, config)
        return pool

    def prepare(self, source: Any, teacher: Denoiser, config: DistillConfig) -> None:
        """Let the teacher prepare it."""
        del teacher
        if not self.noise:
            size, others = config.training.batch_size, bool(config.teachers.more_teachers)
            fill(source, config.pool, size, config.run.output_dir, others)

    def shorter(self, pool: PoolOptions) -> str:
        """Options that make preparing shorter."""
        if pool.fill == "ancestral":
            return "--fill few-step, or a smaller --pool-size or --rho, makes it shorter"
        return (
            "a larger --fill-entries, a smaller --fill-steps, --pool-size or --rho makes it shorter"
        )


class BatchArm(Arm):
    """An arm whose pool is as large as a batch."""

    ignores: ClassVar[tuple[str, ...]] = OF_A_FILL

    def entries(self, pool: PoolOptions, training: TrainingOptions, num_levels: int) -> int:
        """A batch."""
        del pool, num_levels
        return training.batch_size


class GroupsArm(BatchArm):
    """An arm whose pool is a batch, or the whole batches that --pool-size holds."""

    ignores: ClassVar[tuple[str, ...]] = ("rho",)

    def entries(self, pool: PoolOptions, training: TrainingOptions, num_levels: int) -> int:
        """As many as fit into --pool-size, which may be left out."""
        if pool.pool_size is None:
            return super().entries(pool, training, num_levels)
        batch_size = training.batch_size
        return pool_entries(pool, training, num_levels) // batch_size * batch_size

    def make(
        self, teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
    ) -> Source:
        """The pool; several groups lie in shards that divide a batch."""
        shards, batch_size = config.pool.shards, config.training.batch_size
        if self.plan(teacher, config).entries > batch_size:
            shards = next(n for n in range(shards, 0, -1) if batch_size % n == 0)
        pool = replace(config.pool, shards=shards)
        return super().make(teacher, student, replace(config, pool=pool), device)


class SyntheticArm(Arm):
    """A set of finished samples of the teacher, drawn first."""

    chains = False
    ignores: ClassVar[tuple[str, ...]] = OF_CHAINS

    def teaching(self, images: ImageOptions) -> Teaching:
        """Nothing."""
        del images
        return Teaching(targets=False, variance=False, features=False)

    def plan(self, teacher: Denoiser, config: DistillConfig) -> SourcePlan:
        """A set of no given size costs what the dynamic pool does."""
        each, batch_size = (
            guidance_factor(teacher, config.guidance),
            config.training.batch_size,
        )
        steps, size = config.synthetic.synthetic_steps, config.synthetic.synthetic_samples
        if size is None:
            _, *costs = Arm().plan(teacher, config)
            size = max(batch_size, int(sum(costs) // (steps * each)))
        if size < batch_size:
            raise UsageError(
                f"--synthetic-samples {size} is smaller than a batch of {batch_size}: give "
                f"{batch_size} or more"
            )
        return SourcePlan(size, round(size * steps * each), 0)

    def size(self, teacher: Denoiser, config: DistillConfig) -> str:
        """How large it is, in words."""
        count = self.plan(teacher, config).entries
        return f"{count:,} samples, {mebibytes(teacher, count, 'float32')}"

    def make(
        self, teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
    ) -> Synthetic:
        """The set, not drawn yet; its shards lie in the run's folder."""
        source = empty_set(
            teacher,
            student,
            self.plan(teacher, config).entries,
            seed=config.run.seed,
            condition_dropout=config.conditions.condition_dropout,
            device=device,
            shards=SampleShards(config.run.output_dir / SYNTHETIC),
        )
        scale, batch_size = guidance_of_set(config.guidance), config.training.batch_size
        source.drawing = Drawing(teacher, config.synthetic.synthetic_steps, scale, batch_size)
        if student.embeds_guidance:
            source.conditions["guidance"] = torch.full((len(source.images),), scale)
        return source

    def prepare(self, source: Any, teacher: Denoiser, config: DistillConfig) -> None:
        """Draw what is not in the shards yet."""
        scale, batch_size = guidance_of_set(config.guidance), config.training.batch_size
        draw_set(source, teacher, config.synthetic.synthetic_steps, scale, batch_size)

    def shorter(self, pool: PoolOptions) -> str:
        """Options that make preparing shorter."""
        del pool
        return "--synthetic-samples or --synthetic-steps makes it shorter"


class ImagesArm(Arm):
    """Real images: the target is the noise that was added, or the teacher's evaluation."""

    chains = False
    images = True
    ignores: ClassVar[tuple[str, ...]] = (*OF_CHAINS, *OF_A_FILL)

    def teaching(self, images: ImageOptions) -> Teaching:
        """All or nothing."""
        asked = images.images_target == "teacher"
        return Teaching(targets=asked, variance=asked, features=asked)

    def plan(self, teacher: Denoiser, config: DistillConfig) -> SourcePlan:
        """A teacher that is asked evaluates every sample."""
        if config.images_choice.images_target == "noise":
            return SourcePlan(0, 0, 0)
        each = guidance_factor(teacher, config.guidance)
        return SourcePlan(0, 0, round(newly_drawn(config.pool, config.training) * each))

    def size(self, teacher: Denoiser, config: DistillConfig) -> str:
        """Which images, in words."""
        del teacher
        return shown_images(config.images_choice)

    def make(
        self, teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
    ) -> Images | Taught:
        """The images."""
        batch_size = config.training.batch_size
        if config.images_choice.images_target == "teacher":
            return _images(teacher, teacher, config, device, batch_size)
        if not config.guidance.is_off:
            raise UsageError(
                "--guidance-scale: with --source images the teacher evaluates nothing: remove it, "
                "or give --images-target teacher"
            )
        return _images(teacher, student, config, device, batch_size)

    def prepare(self, source: Any, teacher: Denoiser, config: DistillConfig) -> None:
        """Nothing is to be prepared."""


class MixedArm(Arm):
    """The dynamic pool and real images, in every batch."""

    images = True

    def teaching(self, images: ImageOptions) -> Teaching:
        """At the teacher's levels; pool and images are evaluated one after the other."""
        return Teaching(variance=images.images_target == "teacher", features=False)

    def plan(self, teacher: Denoiser, config: DistillConfig) -> SourcePlan:
        """As the dynamic pool of smaller batches, and the images' evaluations."""
        if config.training.batch_size < 2:
            raise UsageError("--source mixed: give a --train-batch-size of 2 or more")
        size, preparing, training = Arm().plan(teacher, _without_images(config))
        if config.images_choice.images_target == "teacher":
            training = Arm().plan(teacher, config).training
        return SourcePlan(size, preparing, training)

    def size(self, teacher: Denoiser, config: DistillConfig) -> str:
        """How large the pool is, and which images, in words."""
        pool, options = super().size(teacher, config), config.images_choice
        return f"{pool}; {options.mixed_share:.0%} of a batch {shown_images(options)}"

    def make(
        self, teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
    ) -> Mixed:
        """Both parts."""
        batch_size, share = config.training.batch_size, config.images_choice.mixed_share
        pool = Arm().make(teacher, student, _without_images(config), device)
        assert isinstance(pool, Pool)
        count = images_in_batch(batch_size, share)
        return Mixed(pool, _images(teacher, teacher, config, device, count), share)

    def prepare(self, source: Any, teacher: Denoiser, config: DistillConfig) -> None:
        """Fill the pool."""
        super().prepare(source.pool, teacher, config)


ARMS: dict[str, Arm] = {
    "dynamic": Arm(),
    "shuffled": GroupsArm(Shuffled),
    "iterative": BatchArm(Iterative, noise=True),
    "synthetic": SyntheticArm(),
    "images": ImagesArm(),
    "mixed": MixedArm(),
}


def finished_of(pool: Pool, config: DistillConfig) -> Finished:
    """What keeps the samples whose chains end."""
    kept = SampleShards(config.run.output_dir / FINISHED), config.pool.keep_finished
    if pool.shards.world == 1:
        return Finished(*kept)
    batch_size = config.training.batch_size
    return FinishedByAll(*kept, pool=pool.shards, entries=pool.entries, batch_size=batch_size)


def make_source(
    teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
) -> Source:
    """The source that the options ask for, unprepared, with its replay."""
    arm, times = ARMS[config.pool.source], config.pool.replay
    source = arm.make(teacher, student, config, teacher_device(config, device))
    if is_ahead(config):
        return ahead_of(source, config, device)
    if times == 1:
        return source
    if not arm.teaching(config.images_choice).targets:
        raise UsageError(
            "--replay: with this --source the teacher evaluates no batches: remove --replay"
        )
    if config.loss.feature_weight:
        raise UsageError(
            "--replay: features of the teacher are not kept: remove --replay or --feature-weight"
        )
    return Replayed(source, teacher, times, config.run.seed)


def prepare_source(source: Source, teacher: Denoiser, config: DistillConfig) -> None:
    """Let the teacher prepare what `make_source` made."""
    source = source.source if isinstance(source, (Replayed, Ahead)) else source
    ARMS[config.pool.source].prepare(source, teacher, config)


def check_options(config: DistillConfig) -> None:
    """Raise UsageError for options that the source needs or cannot use; no model is needed."""
    check_ahead(config)
    source, arm, images = config.pool.source, ARMS[config.pool.source], config.images_choice.images
    if arm.images and images is None:
        raise UsageError(f"--source {source}: give --images, which is fashion-mnist or a folder")
    unused = {
        "--images": ("reads no images", images is not None and not arm.images),
        "--keep-finished": ("has no chains", config.pool.keep_finished > 0 and not arm.chains),
        "--synthetic-samples": (
            "draws no set first",
            config.synthetic.synthetic_samples is not None and source != "synthetic",
        ),
    }
    for option, (reason, is_unused) in unused.items():
        if is_unused:
            raise UsageError(
                f"{option}: --source {source} {reason}: remove {option}, or choose another --source"
            )


def shown_images(options: ImageOptions) -> str:
    """The images in words."""
    share = "" if options.images_share == 1 else f"{options.images_share:.4g} of "
    return f"{share}{options.images}"


def mebibytes(teacher: Denoiser, count: int, dtype: str) -> str:
    """The memory of so many samples, in words."""
    width = getattr(torch, dtype).itemsize
    return f"{count * torch.Size(teacher.sample_shape).numel() * width / 2**20:,.1f} MiB"


def _without_images(config: DistillConfig) -> DistillConfig:
    """The options with the batches that a mixed source's pool gives."""
    batch_size = config.training.batch_size
    count = batch_size - images_in_batch(batch_size, config.images_choice.mixed_share)
    return replace(config, training=replace(config.training, train_batch_size=count))


def _images(
    teacher: Denoiser,
    model: Denoiser,
    config: DistillConfig,
    device: torch.device,
    batch_size: int,
) -> Images | Taught:
    """Images on the levels of a model. Raises UsageError if they are fewer than a batch."""
    options, seed = config.images_choice, config.run.seed
    data = images_of(teacher, options, seed)
    if len(data.images) < batch_size:
        raise UsageError(
            f"--images: {len(data.images)} images are fewer than the {batch_size} of a batch: give "
            "a larger --images-share, more images, or a smaller --train-batch-size"
        )
    images = Images(
        data.images,
        data.conditions,
        model.process,
        model.parameterization,
        teacher.conditioning if model is teacher else model.conditioning,
        seed,
        config.conditions.condition_dropout,
        device,
    )
    asked = options.images_target == "teacher"
    return Taught(images, teacher, Guidance.of_options(config.guidance)) if asked else images
