"""What a file of an original repository leaves unsaid is what that repository's code has.

Network arguments, schedule, prediction, variance, clipping, times and factors of the latents, by
the constants of each repository, written out here; the numbers that come out of them are compared
with the repositories' own in the tests of each format.
"""

from dataclasses import dataclass

import pytest
import torch

from dkdm import load_teacher
from dkdm.core.diffusion.schedules import beta_schedule
from dkdm.models import FORMATS, LoadOptions
from dkdm.networks.adm import AdmUNet
from formula_weights import filled
from original_files import dit, edm, guided, lucidrains
from original_files import latent as ldm


@dataclass(frozen=True)
class Says:
    """The defaults of a repository.

    state: a state dict of its kind. arguments: some of the network's. sigma_over_alpha: noise to
    signal at some levels. time: what the network is fed there. flags: what its command is told.
    """

    state: object
    arguments: dict
    prediction: str
    variance: str
    clips: bool
    null_class: int | None
    sigma_over_alpha: dict
    time: dict
    flags: str = ""
    size: tuple | None = None


def ratio(betas):
    """Noise to signal of betas, at the first, a middle and the last level."""
    share = torch.cumprod(1 - betas.double(), dim=0)
    found = ((1 - share) / share).sqrt()
    return {t: float(found[t]) for t in (0, len(betas) // 2, len(betas) - 1)}


LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
KARRAS = {0: 0.002, 999: 80.0}  # rho 7 between them
FED = {0: 0.0, 500: 500.0, 999: 999.0}
DIT = {"num_attention_heads": 4, "num_layers": 2, "patch_size": 2, "norm_eps": 1e-6}
DIT |= {"activation_fn": "gelu-approximate", "num_embeds_ada_norm": 5, "in_channels": 4}
TABLE = {
    # create_diffusion(""): linear betas, learn_sigma; p_sample_loop(clip_denoised=False)
    "dit": Says(
        dit.checkpoint,
        DIT | {"out_channels": 8},
        "epsilon",
        "learned_range",
        False,
        5,
        ratio(LINEAR),
        FED,
        "--num-heads 4",
    ),
    # transport: Linear path, velocity; times run from noise at 0 to data at 1
    "sit": Says(
        dit.sit_checkpoint,
        DIT | {"out_channels": 8},
        "flow_prediction",
        "fixed_small",
        False,
        5,
        {499: 1.0},
        {499: 0.5, 999: 0.0},
        "--num-heads 4",
    ),
    # edm_sampler: sigma_min 0.002, sigma_max 80; EDMPrecond: sigma_data 0.5, c_noise ln(sigma) / 4
    "edm": Says(
        lambda: edm.checkpoint("ddpmpp"),
        edm.KINDS["ddpmpp"][1],
        "edm",
        "fixed_small",
        False,
        None,
        KARRAS,
        {0: -1.553652, 999: 1.095507},
    ),
    "edm2": Says(
        lambda: edm.checkpoint("edm2-pixels"),
        edm.KINDS["edm2-pixels"][1],
        "edm",
        "fixed_small",
        False,
        None,
        KARRAS,
        {0: -1.553652, 999: 1.095507},
    ),
    # GaussianDiffusion: p_sample(clip_denoised=True), posterior variance
    "lucidrains": Says(
        lucidrains.checkpoint,
        lucidrains.PLAIN,
        "v_prediction",
        "fixed_small",
        True,
        None,
        ratio(beta_schedule("squaredcos_cap_v2", 100)),
        {0: 0.0, 99: 99.0},
        size=(16, 16),
    ),
    # script_util: linear betas of 1000 steps, sigma_small False, predict_xstart False
    "guided-diffusion": Says(
        lambda: filled(AdmUNet(**guided.PERTURBED)).state_dict(),
        guided.PERTURBED,
        "epsilon",
        "fixed_large",
        True,
        None,
        ratio(LINEAR),
        FED,
        guided.SMALL + "--num_heads 2 --rescale_timesteps False",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_the_file_leaves_unsaid(tmp_path, name):
    says = TABLE[name]
    torch.save(says.state(), tmp_path / "model.pt")
    options = LoadOptions(flags=says.flags, sample_size=says.size)
    assert_says(load_teacher(str(tmp_path / "model.pt"), options=options), says)


def test_what_the_yaml_of_latent_diffusion_leaves_unsaid(tmp_path):
    """Its DDPM: betas linear in their roots, eps, the posterior's variance (v_posterior 0), no
    clipping in DDIMSampler, scale_factor 1."""
    roots = torch.linspace(0.0015**0.5, 0.0195**0.5, 20, dtype=torch.float64)
    arguments = {"in_channels": ldm.UNETS["vq"]["in_channels"]}
    says = Says(
        None, arguments, "epsilon", "fixed_small", False, None, ratio(roots**2), {0: 0.0, 19: 19.0}
    )
    teacher = ldm.load(tmp_path, "vq")
    assert_says(teacher, says)
    assert teacher.bundle.autoencoder.standard() == ([0.0], [1.0])


def assert_says(teacher, says):
    config = teacher.network.config
    assert {key: config[key] for key in says.arguments} == says.arguments
    found = teacher.parameterization
    assert (found.prediction, found.variance) == (says.prediction, says.variance)
    assert found.sigma_data == 0.5
    assert (teacher.process.clipping.range == 1) is says.clips
    assert getattr(teacher.conditioning, "null_class", None) == says.null_class
    for t, expected in says.sigma_over_alpha.items():
        process = teacher.process
        assert float(process.sigma[t] / process.alpha[t]) == pytest.approx(expected, rel=1e-5)
    for t, expected in says.time.items():
        assert float(teacher.network_time[t]) == pytest.approx(expected, abs=1e-5)


def test_every_format_is_in_the_table():
    assert {*TABLE, "latent-diffusion"} == set(FORMATS)
