"""What a student learns, and how its run goes: `Program`, which each `--objective` is one of.

A run has one part, or several that follow each other: each is a run by itself, in its own folder,
with its own source, objective, optimizer and checkpoints, and starts from the former's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from dkdm.config import DistillConfig, FewStepOptions
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.diffusion.prediction import Prediction
from dkdm.core.objectives.feature_loss import Features
from dkdm.core.sources.source import Source
from dkdm.data.reference import Reference
from dkdm.reading.options import hints
from dkdm.runs.arms import Teaching, check_options
from dkdm.runs.objective import objective_of
from dkdm.runs.outputs import compare_models, save_pool
from dkdm.runs.source import SourcePlan
from dkdm.runs.teachers import arm_of, make_source, prepare_source
from dkdm.shipping.card import Measured
from dkdm.students.lora import merge_lora

Loss = Callable[[Denoiser, Batch, Prediction], Tensor]


class Program:
    """`--objective dkdm`: a student learns to denoise as its teacher does, in a run of one part.

    Another objective overrides what differs. ignores: options that change nothing.
    """

    ignores: ClassVar[tuple[str, ...]] = tuple(
        name for name in hints(FewStepOptions) if name != "objective"
    )

    def before(self, config: DistillConfig) -> list[DistillConfig]:
        """The runs that come first, each in a folder of its own."""
        del config
        return []

    def last(self, config: DistillConfig) -> DistillConfig:
        """The options of the last part, whose folder is that of the run."""
        return config

    def check(self, config: DistillConfig) -> None:
        """Raise UsageError for options that do not fit together; no model is needed."""
        check_options(config)

    def teaching(self, teacher: Denoiser, config: DistillConfig) -> Teaching:
        """What the teacher says of a batch."""
        return arm_of(teacher, config).teaching(config.images_choice)

    def samples(self, config: DistillConfig) -> int:
        """Losses of a batch, over all processes."""
        return config.training.batch_size

    def plan(self, teacher: Denoiser, config: DistillConfig) -> SourcePlan:
        """The size of the source and what it costs."""
        return arm_of(teacher, config).plan(teacher, config)

    def describe(self, teacher: Denoiser, config: DistillConfig) -> str:
        """The source in words."""
        return f"{config.pool.source}: {arm_of(teacher, config).size(teacher, config)}"

    def student(self, student: Denoiser, teacher: Denoiser, config: DistillConfig) -> Denoiser:
        """The student as it learns and is shipped, of one that has its first weights."""
        del teacher, config
        return student

    def warning(self, student: Denoiser) -> str:
        """What a user should know of this student before the start; empty for nothing."""
        del student
        return ""

    def source(
        self, teacher: Denoiser, student: Denoiser, config: DistillConfig, device: torch.device
    ) -> Source:
        """Where batches come from, unprepared."""
        return make_source(teacher, student, config, device)

    def prepare(self, source: Source, teacher: Denoiser, config: DistillConfig) -> None:
        """Let the teacher prepare the source."""
        prepare_source(source, teacher, config)

    def loss(
        self,
        student: Denoiser,
        on_teacher_levels: Denoiser,
        teacher: Denoiser,
        config: DistillConfig,
        features: Features | None,
        source: Source,
    ) -> Loss:
        """What is minimized, a loss of each sample of a batch."""
        del source
        teaching = self.teaching(teacher, config)
        return objective_of(student, on_teacher_levels, teacher, config.loss, features, teaching)

    def finished(self, student: Denoiser, network: nn.Module) -> nn.Module:
        """The network as it is shipped and sampled, of a copy of that which learns."""
        del student
        return merge_lora(network)

    def measure(
        self,
        teacher: Denoiser,
        student: Denoiser,
        config: DistillConfig,
        reference: Reference | None,
        weights: str,
        source: Source,
    ) -> Measured:
        """Measure the finished student beside its teacher, and write what the page shows."""
        save_pool(source, config.run.output_dir)
        shown = config.run, config.evaluation, config.guidance, reference, weights
        return compare_models(teacher, student, *shown)
