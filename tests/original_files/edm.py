"""State dicts of NVlabs/edm and NVlabs/edm2, tiny."""

from dkdm.networks.edm import DhariwalUNet, SongUNet
from dkdm.networks.edm2 import EDM2UNet
from formula_weights import state_of

KINDS = {
    "ddpmpp": (
        SongUNet,
        {
            "num_class_embeds": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "attention_resolutions": (8,),
            "model_channels": 8,
            "noise_channels": 8,
            "emb_channels": 32,
        },
    ),
    "ncsnpp": (
        SongUNet,
        {
            "block_out_channels": (16, 16, 16),
            "layers_per_block": 2,
            "attention_resolutions": (8,),
            "model_channels": 8,
            "noise_channels": 16,
            "emb_channels": 32,
            "fourier": True,
            "residual_input": True,
            "resample_filter": (1, 3, 3, 1),
        },
    ),
    "adm": (
        DhariwalUNet,
        {
            "num_class_embeds": 4,
            "block_out_channels": (32, 128),
            "layers_per_block": 1,
            "attention_resolutions": (8,),
            "model_channels": 32,
            "emb_channels": 128,
        },
    ),
    "edm2": (
        EDM2UNet,
        {
            "num_class_embeds": 4,
            "block_out_channels": (32, 128),
            "layers_per_block": 1,
            "attention_resolutions": (8,),
            "noise_channels": 32,
            "emb_channels": 128,
        },
    ),
    "edm2-pixels": (
        EDM2UNet,
        {
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (16, 32, 64),
            "layers_per_block": 2,
            "attention_resolutions": (4,),
            "noise_channels": 16,
            "emb_channels": 64,
        },
    ),
}


def checkpoint(kind):
    """The state dict of a preconditioned tiny UNet for 16x16 samples."""
    cls, config = KINDS[kind]
    prefix = "unet" if cls is EDM2UNet else "model"
    own = {f"{prefix}.{k}": v for k, v in cls(sample_size=16, **config).state_dict().items()}
    fixed = {name: value for name, value in own.items() if name.endswith("resample_filter")}
    return state_of(own) | fixed
