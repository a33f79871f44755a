"""State dicts of lucidrains/denoising-diffusion-pytorch, tiny."""

import torch

from dkdm.core.diffusion.schedules import beta_schedule
from dkdm.networks.lucidrains import LucidrainsUNet
from formula_weights import state_of

PLAIN = {
    "first_channels": 8,
    "block_out_channels": (8, 16),
    "full_attention": (False, True),
    "heads": (2, 2),
    "head_channels": (4, 4),
    "time_channels": 8,
    "emb_channels": 32,
}


def checkpoint(objective="pred_v", **changes):
    """The state dict of a GaussianDiffusion with a cosine schedule of 100 levels."""
    betas = beta_schedule("squaredcos_cap_v2", 100)
    share = torch.cumprod(1 - betas, dim=0)
    snr = share / (1 - share)
    weights = {"pred_v": snr / (snr + 1), "pred_noise": snr / snr, "pred_x0": snr}
    tables = {"betas": betas, "alphas_cumprod": share, "loss_weight": weights[objective]}
    own = state_of(LucidrainsUNet(**PLAIN | changes).state_dict())
    unet = {f"model.{name}": value for name, value in own.items()}
    return {name: value.float() for name, value in (tables | unet).items()}
