"""Teachers and students of signals, images, videos and vectors, and runs of few steps."""

import json
import math

import torch

import dkdm
import pipelines
from dkdm import DistillConfig
from dkdm.core.denoisers.conditioning import Unconditional
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.models.schedulers import from_scheduler_config
from dkdm.networks import network_class
from dkdm.students import (
    student_of,
)
from factories import SCHEDULER

SHAPES = {"sound": (2, 64), "image": (4, 16, 8), "video": (4, 4, 8, 8), "vector": (6,)}


FAMILIES = ("UVit", "LinearTransformer", "MobileUNet")


def network_of(name, shape, out_channels=None, **conditions):
    """A small network with weights that matter: none of those that begin at zero are zero."""
    rank = len(shape) - 1
    sizes = {
        "UVit": {"patch_size": (2,) * rank, "width": 32, "depth": 3, "heads": 2},
        "LinearTransformer": {"patch_size": (2,) * rank, "width": 32, "depth": 1, "heads": 2},
        "MobileUNet": {"block_out_channels": (32, 32)},
        "ResidualMLP": {"width": 32, "depth": 2},
    }
    made = network_class(name)(
        sample_size=shape[1:],
        in_channels=shape[0],
        out_channels=out_channels or shape[0],
        **sizes[name],
        **conditions,
    )
    return pipelines.seeded(made)


def toy(shape, conditioning=None, variance="fixed_small", network=None):
    """A teacher of random weights."""
    conditioning = conditioning or Unconditional()
    classes = {} if isinstance(conditioning, Unconditional) else {"num_class_embeds": 4}
    channels = shape[0] * (2 if variance == "learned_range" else 1)
    kind = "LinearTransformer" if shape[1:] else "ResidualMLP"
    return Denoiser(
        network or network_of(kind, shape, channels, **classes),
        from_scheduler_config(SCHEDULER),
        Parameterization("v_prediction", variance),
        shape,
        conditioning,
    )


def distil(teacher, name, folder):
    """Three steps; the student, whose weights are those that were saved, and its folder."""
    student = student_of(name, teacher)
    config = DistillConfig(
        output_dir=folder,
        max_train_steps=3,
        train_batch_size=4,
        pool_size=8,
        fill="none",
        logging_steps=1,
        use_ema=False,
        evaluation_samples=0,
        validation_steps=0,
    )
    dkdm.distill(teacher, student, config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    assert math.isfinite(lines[-1]["loss"])
    return student


@torch.no_grad()
def assert_same(student, again):
    cond = student.conditioning.draw(3, torch.Generator().manual_seed(1))
    x, t = torch.randn(3, *student.sample_shape), torch.tensor([0, 20, 49])
    batch = Batch(x, t, cond, t)
    student.network.eval().requires_grad_(False)  # torch picks another kernel for those that do
    expected = student.predict(batch)
    assert expected.output.abs().max() > 0
    assert torch.equal(again.predict(batch).output, expected.output)
