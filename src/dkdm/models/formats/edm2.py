"""Weights of NVlabs/edm2 (arXiv 2312.02696), saved as a state dict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.errors import UsageError
from dkdm.models.formats.edm import attention, edm_denoiser, levels
from dkdm.models.formats.first_stage import latent_bundle
from dkdm.models.formats.flags import read_flags
from dkdm.models.formats.state_dict import Weights, frozen
from dkdm.models.options import LoadOptions
from dkdm.networks.edm2 import EDM2UNet

FLAGS = {"vae": str}
LATENTS = (
    '"scaling_factor": 0.5, "latents_mean": [5.81, 3.25, 0.12, -2.15], '
    '"latents_std": [4.17, 4.62, 3.71, 3.28]'
)


def recognizes(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of its UNet."""
    return "emb_fourier.freqs" in tensors


def load(weights: Weights, options: LoadOptions) -> Denoiser:
    """The UNet under EDM's preconditioning, on 1000 levels of its noise.

    The head that estimates uncertainty is left out: only training uses it. Raises KeyError for
    weights that are missing, UsageError for an autoencoder whose config is not EDM2's.
    """
    flags = read_flags(options.flags, FLAGS)
    tensors = weights.tensors
    config = levels(tensors, "conv_res0")
    network = EDM2UNet(
        **config | {"in_channels": config["in_channels"] - 1},  # one is constant
        out_channels=len(tensors["out_conv.weight"]),
        attention_resolutions=attention(tensors, config, "attn_qkv"),
        noise_channels=len(tensors["emb_fourier.freqs"]),
        emb_channels=len(tensors["emb_noise.weight"]),
    )
    frozen(network, tensors, weights.path, options.dtype)
    bundle = latent_bundle(flags.get("vae"), config["in_channels"] - 1)
    if bundle.autoencoder and not bundle.autoencoder.config.get("latents_mean"):
        raise UsageError(
            f"--vae {flags['vae']}: EDM2 standardizes latents channel by channel: set "
            f"in its config.json {LATENTS}"
        )
    return edm_denoiser(network, options, bundle=bundle)
