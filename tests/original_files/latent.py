"""Checkpoints of CompVis/latent-diffusion, tiny."""

from functools import cache

import torch
import yaml

from dkdm import load_teacher
from dkdm.models import LoadOptions
from dkdm.networks.adm import AdmUNet
from formula_weights import state_of

UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
}


UNETS = {
    "vq": UNET
    | {"in_channels": 3, "out_channels": 3, "attention_resolutions": [2], "num_head_channels": 32},
    "kl": UNET
    | {
        "attention_resolutions": [1, 2],
        "num_heads": 8,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "class": UNET
    | {
        "attention_resolutions": [2, 1],
        "num_head_channels": 16,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 24,
    },
}


CODER = {
    "double_z": False,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
}


CODERS = {
    "vq": CODER | {"z_channels": 3},
    "kl": CODER | {"double_z": True, "num_res_blocks": 2},
    "class": CODER | {"resolution": 32, "ch_mult": [1, 1, 2], "attn_resolutions": [8, 16]},
}


CODES, CLASSES = 32, 5


class Shapes(dict):
    """Names and shapes of a state dict."""

    def conv(self, name, given, taken, size=3):
        self[f"{name}.weight"], self[f"{name}.bias"] = (given, taken, size, size), (given,)

    def norm(self, name, channels):
        self[f"{name}.weight"] = self[f"{name}.bias"] = (channels,)

    def block(self, name, taken, given):
        self.norm(f"{name}.norm1", taken)
        self.conv(f"{name}.conv1", given, taken)
        self.norm(f"{name}.norm2", given)
        self.conv(f"{name}.conv2", given, given)
        if taken != given:
            self.conv(f"{name}.nin_shortcut", given, taken, 1)

    def attention(self, name, channels):
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", channels, channels, 1)

    def level(self, name, blocks, taken, given, attends):
        for i in range(blocks):
            self.block(f"{name}.block.{i}", given if i else taken, given)
            if attends:
                self.attention(f"{name}.attn.{i}", given)

    def middle(self, name, channels):
        self.block(f"{name}.mid.block_1", channels, channels)
        self.attention(f"{name}.mid.attn_1", channels)
        self.block(f"{name}.mid.block_2", channels, channels)


def coder_shapes(kind):
    """Names and shapes of the repository's autoencoder."""
    own, shapes = CODERS[kind], Shapes()
    widths, z = [own["ch"] * mult for mult in own["ch_mult"]], own["z_channels"]
    moments, blocks, last = 2 * z if kind == "kl" else z, own["num_res_blocks"], len(widths) - 1
    shapes.conv("encoder.conv_in", own["ch"], 3)
    shapes.conv("decoder.conv_in", widths[last], z)
    for i, width in enumerate(widths):
        attends = own["resolution"] // 2**i in own["attn_resolutions"]
        above, below = widths[max(i - 1, 0)], widths[min(i + 1, last)]
        shapes.level(f"encoder.down.{i}", blocks, above, width, attends)
        shapes.level(f"decoder.up.{i}", blocks + 1, below, width, attends)
        if i < last:
            shapes.conv(f"encoder.down.{i}.downsample.conv", width, width)
            shapes.conv(f"decoder.up.{i + 1}.upsample.conv", below, below)
    for half, width, given in (("encoder", widths[last], moments), ("decoder", widths[0], 3)):
        shapes.middle(half, widths[last])
        shapes.norm(f"{half}.norm_out", width)
        shapes.conv(f"{half}.conv_out", given, width)
    shapes.conv("quant_conv", moments, moments, 1)
    shapes.conv("post_quant_conv", z, z, 1)
    if kind != "kl":
        shapes["quantize.embedding.weight"] = (CODES, z)
    return {f"first_stage_model.{name}": torch.empty(shape) for name, shape in shapes.items()}


def unet_shapes(kind):
    """Names and shapes of its UNet, which are AdmUNet's."""
    params = {k: v for k, v in UNETS[kind].items() if not k.startswith(("image", "use_spatial"))}
    classes = CLASSES if kind == "class" else None
    params = {"use_scale_shift_norm": False, "num_class_embeds": classes, **params}
    shapes = AdmUNet(**params).state_dict()
    return {name: value for name, value in shapes.items() if name != "label_emb.weight"}


def checkpoint(kind):
    """A whole state dict, the averaged weights left aside."""
    return dict(weights(kind))


@cache
def weights(kind):
    unet = {f"model.diffusion_model.{k}": v for k, v in state_of(unet_shapes(kind)).items()}
    state = unet | state_of(coder_shapes(kind))
    if kind == "class":
        state |= state_of({"cond_stage_model.embedding.weight": torch.empty(CLASSES, 24)})
    return state | {"betas": torch.zeros(20), "first_stage_model.loss.logvar": torch.zeros(())}


def config(kind, **params):
    coder = "AutoencoderKL" if kind == "kl" else "VQModelInterface"
    first = {"embed_dim": CODERS[kind]["z_channels"], "n_embed": CODES, "ddconfig": CODERS[kind]}
    stage = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 24}}
    return {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 20,
        "channels": UNETS[kind]["in_channels"],
        "unet_config": {"target": "UNetModel", "params": UNETS[kind]},
        "first_stage_config": {"target": f"ldm.models.autoencoder.{coder}", "params": first},
        "cond_stage_config": stage if kind == "class" else "__is_unconditional__",
        **params,
    }


def load(tmp_path, kind, state=None, format=None, ema=True, **params):
    path, file = tmp_path / "model.ckpt", tmp_path / "config.yaml"
    torch.save({"state_dict": state or checkpoint(kind), "global_step": 7}, path)
    file.write_text(yaml.safe_dump({"model": {"params": config(kind, **params)}}))
    return load_teacher(str(path), format=format, options=LoadOptions(config=file, ema=ema))
