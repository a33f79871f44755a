"""Small models and settings that several tests share; also named as module:factory."""

from dataclasses import replace

import torch
from diffusers import UNet2DModel
from torch import nn

from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.models.schedulers import from_scheduler_config

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 50,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "clip_sample": True,
}


def tiny_unet(classes=None, out_channels=1, dropout=0.0, layers_per_block=1, levels=1):
    """A UNet2DModel of a few thousand parameters for 1x8x8 samples.

    With two levels it has a middle with attention, and takes twice as long.
    """
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=out_channels,
        layers_per_block=layers_per_block,
        block_out_channels=(8, 16)[:levels],
        down_block_types=("DownBlock2D",) * levels,
        mid_block_type="UNetMidBlock2D" if levels > 1 else None,
        up_block_types=("UpBlock2D",) * levels,
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=classes,
        dropout=dropout,
    )


def denoiser(classes=3, scheduler=None, seed=0, **sizes):
    """A tiny class-conditional denoiser with random weights; classes=None is unconditional."""
    scheduler = SCHEDULER | (scheduler or {})
    torch.default_generator.manual_seed(seed)
    parameterization = Parameterization(
        scheduler["prediction_type"], scheduler.get("variance_type", "fixed_small")
    )
    network = tiny_unet(None if classes is None else classes + 1, **sizes)
    kwargs = {} if classes is None else {"conditioning": ClassLabels(classes, null_class=classes)}
    return Denoiser(
        network.eval(), from_scheduler_config(scheduler), parameterization, (1, 8, 8), **kwargs
    )


def counting(model):
    """The same model, and a list of how many samples each call of its network evaluates."""
    counts, call = [], model.call

    def counted(network, x, time, cond):
        counts.append(len(x))
        return call(network, x, time, cond)

    return replace(model, call=counted), counts


def some_batch(model, count=3):
    random = torch.Generator().manual_seed(3)
    cond = model.conditioning.draw(count, random)
    t = torch.randint(model.process.num_levels, (count,), generator=random)
    return Batch(torch.randn(count, *model.sample_shape, generator=random), t, cond, t)


def teacher():
    """The teacher of the command-line tests."""
    return denoiser()


def other_teacher():
    """The same network with other weights."""
    made = denoiser()
    with torch.no_grad():
        next(made.network.parameters()).mul_(0.5)
    return made


def student(sample_shape, out_channels, conditioning):
    """A student with dropout, so that the global random state matters."""
    del sample_shape, conditioning
    torch.manual_seed(1)
    return tiny_unet(4, out_channels, dropout=0.2)


def plain_student(sample_shape, out_channels, conditioning):
    """The same without dropout: what it learns is a function of what is drawn."""
    del sample_shape, conditioning
    torch.manual_seed(1)
    return tiny_unet(4, out_channels)


def student_of_five(sample_shape, out_channels, conditioning):
    """The same for five classes and "no class"."""
    del sample_shape, conditioning
    torch.manual_seed(1)
    return tiny_unet(6, out_channels, dropout=0.2)


class Blank(nn.Module):
    """Answers with zeros of the given number of channels."""

    def __init__(self, out_channels):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.out_channels = out_channels

    def forward(self, x, time, class_labels=None):
        del time, class_labels
        return self.scale * x.new_ones(len(x), self.out_channels, *x.shape[2:])


def wide_student(sample_shape, out_channels, conditioning):
    """Has two channels too many."""
    del sample_shape, conditioning
    return Blank(out_channels + 2)


def raising(*arguments):
    """Fails like a user's own code might."""
    raise RuntimeError(f"no luck with {len(arguments)} arguments")


def not_a_model(*arguments):
    """Returns something else."""
    return list(arguments)
